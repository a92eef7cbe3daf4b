"""vLLM on what the zoo writes: whether its greedy tokens are ours, for a base, adapters, a merge.

  python -m benchmarks.vllm_serves make FOLDER
  PYTHON-OF-VLLM benchmarks/vllm_serves.py serve FOLDER

The first writes, for a small Llama and a small Qwen 3 of large weights: the base, adapters of
one rank on all matrices, adapters of several ranks on some, the first adapters merged, and what we
continue some prompts with. The second asks vLLM for the same, and exits with 1 where a token
differs: then both programs' two likeliest are shown. All is float32.
"""

import json
import os
import pathlib
import sys

NEW, PROMPTS = 24, (5, 19, 40, 3)  # tokens that follow, and those of each prompt
COMMON = dict(
    vocab_size=503, hidden_size=256, intermediate_size=384, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=256,
    tie_word_embeddings=False,
)  # fmt: skip
FAMILIES = {
    "llama": COMMON | dict(
        model_type="llama", rms_norm_eps=1e-5,
        rope_parameters=dict(
            rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
            high_freq_factor=4.0, original_max_position_embeddings=64,
        ),
    ),
    "qwen3": COMMON | dict(
        model_type="qwen3", rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
    ),
}  # fmt: skip


def make(folder: pathlib.Path) -> None:
    """The folders, and `ours.json`: prompts, and by case what follows each of them."""
    import numpy as np

    from tests.conftest import large_weights
    from tests.zoo.test_peft import with_adapters
    import zoo
    from zoo.targets import Lora

    one = Lora(8, 16.0)
    several = Lora(
        8, 16.0, targets=("q_proj", "v_proj", "down_proj"), layers=(0, 2),
        rank_pattern={"down_proj": 4}, alpha_pattern={"v_proj": 24.0},
    )  # fmt: skip
    draw = np.random.default_rng(0)
    for family, config in FAMILIES.items():
        prompts = [draw.integers(3, config["vocab_size"], n).tolist() for n in PROMPTS]
        at = folder / family
        zoo.save(large_weights(zoo.fresh(config)), at / "base", dtype=np.float32)
        base = zoo.load(at / "base")
        adapted = {"adapter": with_adapters(base, one), "ranks": with_adapters(base, several)}
        for name, model in adapted.items():
            zoo.save_adapter(model, at / name)
        zoo.save(adapted["adapter"], at / "merged", dtype=np.float32)
        models = {
            "base": base,
            **{name: zoo.load(at / "base", adapter=at / name) for name in adapted},
            "merged": zoo.load(at / "merged"),
        }
        ours = {name: continued(model, prompts) for name, model in models.items()}
        for rows in zip(*(ours[name] for name in ("base", *adapted)), strict=True):
            # Or an adapter that is left out, or taken for another, would not be seen.
            assert len({tuple(row["tokens"]) for row in rows}) == 3
        (at / "ours.json").write_text(json.dumps({"prompts": prompts, "cases": ours}))


def continued(model, prompts: list[list[int]]) -> list[dict]:
    """What follows each prompt: the tokens, their logps, and the two likeliest at each place."""
    import jax
    import numpy as np

    from zoo.generate import generate

    rows = []
    for prompt, tokens in zip(prompts, generate(model, prompts, max_new_tokens=NEW), strict=True):
        logits = model(np.array([prompt + tokens]))[0, len(prompt) - 1 : -1]
        top, ids = jax.lax.top_k(logits, 2)
        logps = jax.nn.log_softmax(logits)[np.arange(NEW), np.array(tokens)]
        pairs = zip(ids.tolist(), top.tolist(), strict=True)
        two = [list(zip(*pair, strict=True)) for pair in pairs]
        rows.append({"tokens": tokens, "logps": logps.tolist(), "two": two})
    return rows


def serve(folder: pathlib.Path) -> bool:
    """A line for every case; whether all tokens are ours."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    plain = dict(dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=128)
    same = True
    for family in FAMILIES:
        at = folder / family
        told = json.loads((at / "ours.json").read_text())
        engine = LLM(str(at / "base"), enable_lora=True, max_lora_rank=8, **plain)
        same &= compare(f"{family} base", told, "base", engine)
        for i, name in enumerate(("adapter", "ranks"), start=1):
            lora = LoRARequest(name, i, str(at / name))
            same &= compare(f"{family} {name}", told, name, engine, lora)
        del engine
        same &= compare(f"{family} merged", told, "merged", LLM(str(at / "merged"), **plain))
    return same


def compare(called: str, told: dict, name: str, engine, lora=None) -> bool:
    """One case: the tokens that are the same, the logps that are least so, the nearest choice."""
    from vllm import SamplingParams

    asking = SamplingParams(
        temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=2
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in told["prompts"]]
    answers = engine.generate(prompts, asking, lora_request=lora, use_tqdm=False)
    same, off, flips = 0, 0.0, []
    for i, (ours, answer) in enumerate(zip(told["cases"][name], answers, strict=True)):
        theirs = answer.outputs[0]
        for j, token in enumerate(ours["tokens"]):
            if theirs.token_ids[j] != token:
                two = {key: value.logprob for key, value in theirs.logprobs[j].items()}
                flips.append(f"  prompt {i}, token {j}: our logits {ours['two'][j]}, gap "
                             f"{gap(ours['two'][j]):.2g}; vLLM's logps {two}")  # fmt: skip
                break
            same += 1
            off = max(off, abs(theirs.logprobs[j][token].logprob - ours["logps"][j]))
    of = NEW * len(prompts)
    nearest = min(gap(two) for ours in told["cases"][name] for two in ours["two"])
    print(f"{called:<15} {same} of {of} tokens are ours; logps within {off:.1e}; "
          f"the two likeliest are {nearest:.1e} apart, at least", *flips, sep="\n")  # fmt: skip
    return same == of


def gap(two: list) -> float:
    """Between the logits of the two likeliest tokens."""
    return two[0][1] - two[1][1]


if __name__ == "__main__":
    stage, where = sys.argv[1], pathlib.Path(sys.argv[2]).absolute()
    if stage == "make":
        make(where)
    elif not serve(where):
        sys.exit(1)

"""vLLM on what the zoo writes: whether its greedy tokens are ours, for a base, adapters, a merge.

  python -m benchmarks.vllm_serves make FOLDER
  PYTHON-OF-VLLM benchmarks/vllm_serves.py serve FOLDER

The first writes, for a small Llama and a small Qwen 3 of large weights: the base, adapters of
one rank on all matrices, adapters of several ranks on some, the first adapters merged, and what we
continue some prompts with; for other families the base. The second asks vLLM for the same, and
exits with 1 where a token differs: then both programs' two likeliest are shown; a family that vLLM
refuses is said with its reason. All is float32. Names of families after FOLDER are these alone.
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

EXPERTS = dict(num_experts_per_tok=2, n_routed_experts=6, n_shared_experts=1,
               moe_intermediate_size=128, first_k_dense_replace=1)  # fmt: skip
# Whose base alone is looked at, in widths that vLLM has kernels for on CPUs.
BASES = {
    "gemma3_text": COMMON | dict(
        model_type="gemma3_text", num_hidden_layers=6, query_pre_attn_scalar=64,
        sliding_window=32, sliding_window_pattern=3, tie_word_embeddings=True,
    ),
    "gemma4_text": COMMON | dict(
        model_type="gemma4_text", num_hidden_layers=6, global_head_dim=128, sliding_window=32,
        num_global_key_value_heads=1, attention_k_eq_v=True, hidden_size_per_layer_input=0,
        final_logit_softcapping=30.0, tie_word_embeddings=True,
    ),
    "qwen3_5_text": COMMON | dict(
        model_type="qwen3_5_text", num_hidden_layers=4, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64,
    ),
    "gpt_oss": COMMON | dict(
        model_type="gpt_oss", num_hidden_layers=4, num_local_experts=6, num_experts_per_tok=2,
        sliding_window=32, intermediate_size=128,
        rope_parameters=dict(
            rope_type="yarn", rope_theta=150000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0,
            truncate=False, original_max_position_embeddings=64,
        ),
    ),
    "glm4_moe": COMMON | EXPERTS | dict(model_type="glm4_moe", routed_scaling_factor=1.5),
    "deepseek_v3": COMMON | EXPERTS | dict(
        model_type="deepseek_v3", num_key_value_heads=4, q_lora_rank=96, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, n_group=1, topk_group=1,
        scoring_func="sigmoid", topk_method="noaux_tc",  # as its own config.json says
    ),
}  # fmt: skip


def make(folder: pathlib.Path, names: list[str]) -> None:
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
    for family, config in (FAMILIES | BASES).items():
        prompts = [draw.integers(3, COMMON["vocab_size"], n).tolist() for n in PROMPTS]
        at = folder / family
        if names and family not in names:
            continue
        if family in BASES:
            config = read_by_transformers(config)
        model = large_weights(zoo.fresh(config))
        if family.startswith("gemma"):  # whose tokens would be so large that each repeats itself
            model.embedding[...] = model.embedding[...] / 16
        zoo.save(model, at / "base", dtype=np.float32)
        base = zoo.load(at / "base")
        if family in BASES:
            told = {"prompts": prompts, "cases": {"base": continued(base, prompts)}}
            (at / "ours.json").write_text(json.dumps(told))
            continue
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


def read_by_transformers(config: dict) -> dict:
    """The same with its defaults for what is not named, which vLLM reads too."""
    import transformers

    said = transformers.AutoConfig.for_model(**config).to_json_string(use_diff=False)
    return json.loads(said)


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


def serve(folder: pathlib.Path, names: list[str]) -> bool:
    """A line for every case; whether all tokens are ours."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    plain = dict(dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=128)
    same = True
    for family in FAMILIES | BASES:
        at = folder / family
        if names and family not in names:
            continue
        told = json.loads((at / "ours.json").read_text())
        if family in BASES:
            try:
                engine = LLM(str(at / "base"), **plain)
            except Exception as error:  # vLLM raises another type for every cause
                print(f"{family} base: vLLM does not take it: {str(error).strip()[:300]}")
                continue
            same &= compare(f"{family} base", told, "base", engine)
            del engine
            continue
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
        make(where, sys.argv[3:])
    elif not serve(where, sys.argv[3:]):
        sys.exit(1)

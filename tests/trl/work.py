"""The work on which this project and TRL are compared: a small Llama and preference pairs.

Drawn with `RandomState`, whose stream is frozen, so that it is the same everywhere and needs no
torch. The shape is that of the field's usual CPU benchmark, shrunk.
"""

import json
import pathlib

import numpy as np
import safetensors.numpy

VOCABULARY, WIDTH, MLP, LAYERS, HEADS, KEY_HEADS, HEAD = 512, 64, 172, 2, 4, 2, 16
PAIRS, BATCH, STEPS = 160, 16, 50
BETA, LEARNING_RATE = 0.1, 3e-4
LOSS_STEPS = 20  # of each further loss: every pair twice
# With adapters; at this rate their first 30 steps move as far as the 50 of all weights.
RANK, ALPHA, LORA_STEPS, LORA_RATE = 8, 16, 30, 2e-3

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": MLP,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32",
}  # fmt: skip


def matrices() -> dict[str, tuple[int, int]]:
    """The matrices of the layers, (out, in) of each."""
    of_layer = {
        "self_attn.q_proj": (HEADS * HEAD, WIDTH),
        "self_attn.k_proj": (KEY_HEADS * HEAD, WIDTH),
        "self_attn.v_proj": (KEY_HEADS * HEAD, WIDTH),
        "self_attn.o_proj": (WIDTH, HEADS * HEAD),
        "mlp.gate_proj": (MLP, WIDTH),
        "mlp.up_proj": (MLP, WIDTH),
        "mlp.down_proj": (WIDTH, MLP),
    }
    return {
        f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in of_layer.items()
    }


def write_model(folder: pathlib.Path) -> None:
    """An HF folder with weights of std 0.5 sqrt(32 / fan_in), so that positions matter."""
    draw = np.random.RandomState(0)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (WIDTH,),
            layer + "post_attention_layernorm.weight": (WIDTH,),
        }
        shapes |= {f"{name}.weight": shape for name, shape in matrices().items() if layer in name}
    shapes["lm_head.weight"] = (VOCABULARY, WIDTH)
    weights = {
        name: (0.5 * np.sqrt(32 / shape[-1]) * draw.randn(*shape)).astype(np.float32)
        if len(shape) > 1
        else np.ones(shape, np.float32)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_adapter(folder: pathlib.Path, base: pathlib.Path) -> None:
    """A PEFT folder as PEFT would begin it: A drawn, B zero, on every matrix of the layers."""
    draw = np.random.RandomState(2)
    weights = {}
    for name, (out, into) in matrices().items():
        at = f"base_model.model.{name}"
        a = draw.uniform(-1, 1, (RANK, into)) / np.sqrt(into)
        weights[f"{at}.lora_A.weight"] = a.astype(np.float32)
        weights[f"{at}.lora_B.weight"] = np.zeros((out, RANK), np.float32)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
        "lora_dropout": 0.0, "target_modules": sorted({n.rsplit(".", 1)[1] for n in matrices()}),
        "bias": "none", "base_model_name_or_path": str(base),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    path = folder / "adapter_model.safetensors"
    safetensors.numpy.save_file(weights, path, metadata={"format": "pt"})


def pairs() -> list[dict[str, list[int]]]:
    """Token ids with Zipf's frequencies and log-normal lengths; every answer ends in 2."""
    draw = np.random.RandomState(1)
    shares = 1.0 / np.arange(1, VOCABULARY - 9)
    ids = lambda n: (draw.choice(VOCABULARY - 10, n, p=shares / shares.sum()) + 10).tolist()
    made = []
    for _ in range(PAIRS):
        prompt, chosen, rejected = (
            int(np.clip(draw.lognormal(np.log(mean), 0.6), 4, 100)) for mean in (20, 28, 28)
        )
        made.append(
            {
                "prompt_ids": ids(prompt),
                "chosen_ids": [*ids(chosen), 2],
                "rejected_ids": [*ids(rejected), 2],
            }
        )
    return made


def short_prompts(given: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """The same answers after the last token of their prompt alone.

    TRL's ORPO adds the likelihood of the prompt to that of the chosen answer; the first token of a
    text has none, so that here only the answer's is left.
    """
    return [pair | {"prompt_ids": pair["prompt_ids"][-1:]} for pair in given]


def rows() -> list[dict]:
    """One answer of every pair, with a label: is it wanted? Batches differ in how many are."""
    draw = np.random.RandomState(3)
    made = []
    for pair, wanted in zip(pairs(), draw.rand(PAIRS) < 0.4, strict=True):
        answer = pair["chosen_ids" if wanted else "rejected_ids"]
        made.append(
            {"prompt_ids": pair["prompt_ids"], "completion_ids": answer, "label": bool(wanted)}
        )
    return made

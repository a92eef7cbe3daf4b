"""The work of the comparisons, seeded: checkpoints by size, and preference pairs as token ids."""

import json
import pathlib

import numpy as np
import safetensors.numpy

VOCABULARY, HEADS, KEY_HEADS, END = 32000, 8, 4, 2
# Name -> width, MLP width, layers.
SIZES = {"A": (256, 688, 6), "B": (512, 1376, 8), "tiny": (64, 96, 2)}
# Pairs of an update, and the optimizer every program is given.
PAIRS, BETA, LEARNING_RATE, BETAS, EPSILON, LONGEST = 16, 0.1, 1e-4, (0.9, 0.999), 1e-8, 512
MEDIAN = 180  # tokens of a text


def write_model(folder: pathlib.Path, size: str, vocabulary: int = VOCABULARY) -> None:
    """A Llama as transformers would begin it: normal weights of std 0.02, norms of 1."""
    width, mlp, layers = SIZES[size]
    head = width // HEADS
    draw = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (width,),
            layer + "post_attention_layernorm.weight": (width,),
            layer + "self_attn.q_proj.weight": (HEADS * head, width),
            layer + "self_attn.k_proj.weight": (KEY_HEADS * head, width),
            layer + "self_attn.v_proj.weight": (KEY_HEADS * head, width),
            layer + "self_attn.o_proj.weight": (width, HEADS * head),
            layer + "mlp.gate_proj.weight": (mlp, width),
            layer + "mlp.up_proj.weight": (mlp, width),
            layer + "mlp.down_proj.weight": (width, mlp),
        }
    shapes["lm_head.weight"] = (vocabulary, width)
    weights = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else 0.02 * draw.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "head_dim": head,
        "num_key_value_heads": KEY_HEADS, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def matrices(folder: pathlib.Path) -> tuple[int, int]:
    """Parameters that are multiplied with every token: of a Llama's layers, and of its head."""
    config = json.loads((folder / "config.json").read_text())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    attention = 2 * width * head * (heads + config["num_key_value_heads"])
    mlp = 3 * width * config["intermediate_size"]
    return config["num_hidden_layers"] * (attention + mlp), config["vocab_size"] * width


def write_pairs(
    path: pathlib.Path,
    count: int,
    prompt_share: float = 0.4,
    vocabulary: int = VOCABULARY,
    median: int = MEDIAN,
) -> None:
    """Zipf's words in texts of log-normal lengths (by `median`, at most 512)."""
    draw = np.random.default_rng(0)
    shares = 1.0 / np.arange(1, vocabulary - 9)
    shares /= shares.sum()
    text = lambda n: (draw.choice(vocabulary - 10, n, p=shares) + 10).tolist()
    with path.open("w") as file:
        for _ in range(count):
            total, other = (
                int(np.clip(draw.lognormal(np.log(median), 0.6), 24, LONGEST)) for _ in range(2)
            )
            prompt = max(4, int(total * prompt_share))
            rejected = max(4, min(other - int(other * prompt_share), LONGEST - prompt))
            row = {
                "prompt_ids": text(prompt),
                "chosen_ids": [*text(total - prompt - 1), END],
                "rejected_ids": [*text(rejected - 1), END],
            }
            file.write(json.dumps(row) + "\n")


def read_pairs(path: pathlib.Path) -> list[dict[str, list[int]]]:
    """The rows of `write_pairs`."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def real_tokens(rows: list[dict[str, list[int]]]) -> int:
    """Of both answers, each with its prompt."""
    return sum(
        2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows
    )

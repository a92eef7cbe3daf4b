"""Writes what tests of nf4 are held against: numbers of bitsandbytes, a folder of transformers.

  python tests/checkpoints_io/make_kept.py

Needs torch 2.13, bitsandbytes 0.50.2, transformers 5.24 and accelerate, and no GPU.
"""

import pathlib
import tempfile

import bitsandbytes.functional
import make_cases
import numpy as np
import torch
import transformers

KEPT = pathlib.Path(__file__).parent / "kept"


def main() -> None:
    """Writes both."""
    kept = {}
    for name, (_, nested) in make_cases.CASES.items():
        matrix = torch.from_numpy(make_cases.numbers(name))
        codes, state = bitsandbytes.functional.quantize_4bit(
            matrix, blocksize=64, compress_statistics=nested, quant_type="nf4"
        )
        back = bitsandbytes.functional.dequantize_4bit(codes, state)
        kept |= {f"{name}.codes": codes.reshape(-1), f"{name}.scales": state.absmax}
        kept |= {f"{name}.back": back[:8]}
        if nested:
            kept |= {f"{name}.steps": state.state2.absmax, f"{name}.offset": state.offset}
            kept |= {"table": state.state2.code}
    np.savez_compressed(KEPT / "nf4.npz", **kept)

    torch.manual_seed(0)
    # Widths of 96 or 160 would not do: bitsandbytes' kernel for CPUs with AVX-512 takes another
    # block's scale there, by up to twice the largest number, and its portable code does not.
    sizes = dict(vocab_size=31, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    for weight in model.parameters():
        weight.data *= 4 if weight.ndim > 1 else 1
    asked = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=asked, dtype=torch.float32, device_map="cpu"
        )
    model.save_pretrained(KEPT / "nf4")
    wide = model.dequantize(dtype=torch.float32)
    tokens = torch.arange(24)[None] % 31
    np.save(KEPT / "nf4" / "logits.npy", wide(tokens).logits.detach().numpy()[0])


if __name__ == "__main__":
    main()

"""Checkpoints that see images: transformers' own, read here as text and written as text."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.long_forms import full_but
from tests.zoo import twins
import zoo
from zoo.parts import text_half

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

QWEN_VISION = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, patch_size=4)
MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])
THREE = QWEN_VISION | dict(out_hidden_size=32, deepstack_visual_indexes=[0])
PIXTRAL = dict(
    model_type="pixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, image_size=16, patch_size=8,
)  # fmt: skip
# Kind -> what its config says, beside SIZES for its text.
WHOLES = {
    "gemma3": (twins.GEMMA3, dict(
        model_type="siglip_vision_model", hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
    ), "gemma3_text"),
    "gemma4": (twins.GEMMA4, dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, patch_size=4,
    ), "gemma4_text"),
    "qwen2_vl": (dict(rope_parameters=MROPE), dict(
        depth=1, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4,
    ), "qwen2"),
    "qwen2_5_vl": (dict(rope_parameters=MROPE), QWEN_VISION | dict(out_hidden_size=32), "qwen2"),
    "qwen3_vl": (dict(head_dim=8, rope_parameters=MROPE), THREE, "qwen3"),
    "qwen3_vl_moe": (
        twins.MOE | dict(head_dim=8, rope_parameters=MROPE, norm_topk_prob=True), THREE, "qwen3_moe"
    ),
    "qwen3_5": (twins.QWEN35, QWEN_VISION | dict(out_hidden_size=32), "qwen3_5_text"),
    "qwen3_5_moe": (
        twins.QWEN35 | twins.EXPERTS35, QWEN_VISION | dict(out_hidden_size=32), "qwen3_5_moe_text"
    ),
    "mistral3": (dict(model_type="mistral", head_dim=8), PIXTRAL, "mistral"),
    "mistral3 of ministral3": (
        twins.MINISTRAL3 | dict(model_type="ministral3"), PIXTRAL, "ministral3"
    ),
}  # fmt: skip


def test_every_whole_is_here():
    assert {name.split()[0] for name in WHOLES} == text_half.KINDS.keys()


@pytest.mark.parametrize("name", full_but(WHOLES, "qwen3_vl_moe", "qwen3_5"))
def test_the_text_of_a_whole(tmp_path, name):
    text, vision, kind = WHOLES[name]
    config = transformers.CONFIG_MAPPING[name.split()[0]](
        text_config=twins.SIZES | text, vision_config=vision
    )
    torch.manual_seed(0)
    whole = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in whole.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=draw))
    whole.save_pretrained(tmp_path / "whole")
    tokens = twins.TOKENS[:, :24]
    expected = twins.logits(whole, tokens)
    model = zoo.load(tmp_path / "whole")
    np.testing.assert_allclose(model(tokens), expected, atol=1e-4)
    zoo.save(model, tmp_path / "text", dtype=jnp.float32)
    written = json.loads((tmp_path / "text/config.json").read_text())
    assert written["model_type"] == kind
    assert not written.keys() & {"vision_config", "text_config", "image_token_id"}
    assert "mrope" not in json.dumps(written)
    again, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "text", output_loading_info=True, attn_implementation="eager"
    )
    assert type(again).__name__ == written["architectures"][0]
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(twins.logits(again, tokens), expected, atol=1e-4)

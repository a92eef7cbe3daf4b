"""What a config.json may ask for, and how the rest is refused."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from tests.conftest import large_weights, small_config
import zoo
from zoo import llama, rope

BASE = dict(
    model_type="llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4,
)  # fmt: skip


def test_an_old_file_says_little_and_means_llama_2():
    config = llama.Config.from_hf(BASE)
    assert config.num_key_value_heads == 4
    assert config.head_dim == 8
    assert config.rope_parameters == rope.Rope(rope_theta=10_000.0)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (dict(attention_bias=True), "attention_bias"),
        (dict(hidden_act="gelu"), "gelu"),
        (dict(sliding_window=128), "sliding_window"),
        (dict(quantization_config=dict(quant_method="gptq")), "gptq"),
        (dict(rope_scaling=dict(rope_type="mrope", factor=4.0)), "mrope"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "original_max"),
        (dict(rope_scaling=dict(rope_type="linear", factor=4.0, beta_fast=1)), "beta_fast"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=4.0)), "low_freq_factor"),
        (dict(vocab_size=None), "vocab_size"),
        (dict(num_key_value_heads=3), "num_key_value_heads"),
        (dict(head_dim=7), "head_dim"),
        (dict(hidden_size="32"), "'32'"),
        (dict(hidden_size=-32), "-32"),
        (dict(num_hidden_layers=True), "num_hidden_layers"),
        (dict(num_attention_heads=0), "num_attention_heads"),
        (dict(rms_norm_eps="1e-5"), "rms_norm_eps"),
        (dict(tie_word_embeddings="true"), "tie_word_embeddings"),
        (dict(rope_theta="big"), "rope_theta"),
        (dict(rope_scaling=[1]), "rope should be an object"),
        (dict(rope_scaling=dict(type=[1])), "rope_type"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(other, told):
    with pytest.raises(ValueError, match=told):
        llama.Config.from_hf(BASE | other)


def test_an_unknown_architecture_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"'bert'; the zoo has llama"):
        zoo.abstract({"model_type": "bert"})


def test_a_config_written_is_the_config_read():
    for turning in (rope.Rope(1e4), rope.Rope(5e5, "linear", factor=2.0)):
        config = small_config(rope_parameters=turning)
        assert llama.Config.from_hf(config.to_hf()) == config


def test_no_field_is_dead():
    """Changing any field of the Config changes the logits, or the weights no longer fit."""
    tokens = jnp.arange(24).reshape(1, 24)
    stretched = rope.Rope(5e5, "llama3", 8.0, 1.0, 4.0, 16)
    model = large_weights(llama.Model(small_config(rope_parameters=stretched), nnx.Rngs(0)))
    params = nnx.state(model)
    before = model(tokens)
    others = {
        "rms_norm_eps": 0.1,
        "tie_word_embeddings": True,
        "rope_parameters": [
            dataclasses.replace(stretched, **{name: value})
            for name, value in dict(
                rope_theta=1e4, rope_type="linear", factor=2.0, low_freq_factor=2.0,
                high_freq_factor=8.0, original_max_position_embeddings=64,
            ).items()
        ],
    }  # fmt: skip
    for field in dataclasses.fields(llama.Config):
        value = getattr(model.config, field.name)
        new = others.get(field.name, value * 2 if isinstance(value, int) else None)
        for changed in new if isinstance(new, list) else [new]:
            config = dataclasses.replace(model.config, **{field.name: changed})
            other = nnx.eval_shape(lambda config=config: llama.Model(config, nnx.Rngs(0)))
            if field.name != "tie_word_embeddings" and jax.tree.map(
                jnp.shape, nnx.state(other)
            ) != jax.tree.map(jnp.shape, params):
                continue  # the weights would be refused as misshapen
            nnx.update(other, params)
            assert jnp.abs(other(tokens) - before).max() > 1e-3, (field.name, changed)


@pytest.mark.parametrize(
    ("name", "count"),
    [("llama2_7b", 6_738_415_616), ("llama3_1_8b", 8_030_261_248), ("llama3_2_1b", 1_235_814_400)],
)
def test_published_sizes(shared, name, count):
    import json

    hf = json.loads((shared / "data" / "configs" / "mlc" / f"{name}.json").read_text())
    keep = BASE.keys() | {
        "rope_theta", "rope_scaling", "num_key_value_heads", "tie_word_embeddings", "head_dim",
        "rms_norm_eps",
    }  # fmt: skip
    model = zoo.abstract({key: value for key, value in hf.items() if key in keep})
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == count

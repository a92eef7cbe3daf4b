"""Llama against its twin in transformers, with live torch."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from checkpoints_io import hf_weights
import zoo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
STRETCHED = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=16,
)  # fmt: skip
TWINS = {
    "plain": dict(tie_word_embeddings=False),
    "tied, odd head": dict(tie_word_embeddings=True, head_dim=10, vocab_size=101),
    "all key heads": dict(num_key_value_heads=4, hidden_size=48),
    "one key head": dict(num_key_value_heads=1, rms_norm_eps=1e-3),
    "llama3": dict(rope_parameters=STRETCHED),
    "linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 48))


@pytest.fixture(params=TWINS.values(), ids=TWINS.keys())
def twin(request, tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | request.param)))
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=0.5 * (32 / weight.shape[1]) ** 0.5)
    model.eval().save_pretrained(tmp_path)
    return model, tmp_path


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@jax.jit
def ours(model, tokens):
    with jax.numpy_dtype_promotion("strict"):
        return model(tokens)


def test_logits_are_those_of_transformers(twin):
    original, folder = twin
    expected = logits(original, TOKENS)
    bound = max(1e-4, 3 * np.abs(logits(original.double(), TOKENS) - expected).max())
    found = np.asarray(ours(zoo.load(folder), jnp.asarray(TOKENS)))
    assert np.abs(found - expected).max() <= bound


def test_gradient_is_that_of_transformers(twin):
    original, folder = twin
    tokens = torch.tensor(TOKENS)
    logps = original(tokens).logits[:, :-1].log_softmax(-1)
    logps.gather(-1, tokens[:, 1:, None]).sum().backward()

    def summed(model):
        logps = jax.nn.log_softmax(model(jnp.asarray(TOKENS))[:, :-1])
        return jnp.take_along_axis(logps, jnp.asarray(TOKENS)[:, 1:, None], -1).sum()

    model = zoo.load(folder)
    grads = nnx.merge(nnx.split(model)[0], jax.jit(nnx.grad(summed))(model))
    for name, expected, found in [
        ("embedding", original.model.embed_tokens.weight, grads.embedding[...]),
        ("down", original.model.layers[1].mlp.down_proj.weight, grads.blocks.mlp.down[1].T),
        ("norm", original.model.layers[0].input_layernorm.weight,
         grads.blocks.attention_norm.scale[0]),
    ]:  # fmt: skip
        expected = expected.grad.numpy()
        worst = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
        assert worst <= 1e-3, name


def test_round_trip_is_bit_for_bit(twin, tmp_path):
    _, folder = twin
    zoo.save(zoo.load(folder), tmp_path / "out", dtype=jnp.float32)
    before = safetensors.numpy.load_file(folder / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_export_loads_in_transformers_with_the_same_logits(twin, tmp_path, monkeypatch):
    original, folder = twin
    monkeypatch.setattr(hf_weights, "SHARD_BYTES", 20_000)  # several files and an index
    zoo.save(zoo.load(folder), tmp_path / "out", dtype=jnp.float32)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    again, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(logits(again.eval(), TOKENS), logits(original, TOKENS))
    again_ours = ours(zoo.load(tmp_path / "out"), jnp.asarray(TOKENS))
    np.testing.assert_array_equal(again_ours, ours(zoo.load(folder), jnp.asarray(TOKENS)))


def test_both_spellings_of_rope_are_read_alike(twin, tmp_path):
    _, folder = twin
    new = json.loads((folder / "config.json").read_text())
    old = dict(new)
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    config = zoo.llama.Config
    assert config.from_hf(old) == config.from_hf(new)

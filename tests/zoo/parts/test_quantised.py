"""Weights in few bits within a model: any architecture, one layer wide at a time."""

import dataclasses
import functools

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from checkpoints_io import quantised
from recipes.training import logps, plan, update
from tests.long_forms import full_but
from tests.zoo import twins
import zoo
from zoo import adapters, narrow, targets
from zoo.parts import adapted
from zoo.parts.quantised import is_quantised
from zoo.targets import Lora

TOKENS = jnp.arange(20) % 97


def flat(model):
    return traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model)), sep=".")


@pytest.mark.parametrize(
    ("family", "kind"),
    full_but(
        [
            ("llama", "nf4"),
            ("llama", "int8"),
            ("phi3", "int8"),
            ("gpt2", "nf4"),
            ("qwen3_moe", "nf4"),
        ],
        ("llama", "nf4"),
    ),
)
def test_a_model_of_few_bits_is_that_of_its_numbers(family, kind, tmp_path):
    """Separate, fused, turned and stacked matrices; what is exported is what was computed with."""
    zoo.save(twins.untrained(family, "plain"), tmp_path / "first", dtype=jnp.float32)
    model = zoo.load(tmp_path / "first", frozen=kind)
    few = {path: w for path, w in flat(model).items() if is_quantised(w)}
    assert few.keys() == {p for p in targets.linear(model) if not p.endswith("router")}
    zoo.check_finite(model)
    zoo.save(model, tmp_path / "out", dtype=jnp.float32)
    wide = zoo.load(tmp_path / "out")
    for path, value in flat(wide).items():
        if path in few:
            assert few[path].shape == value.shape
            np.testing.assert_array_equal(few[path].astype(jnp.float32), value)
            np.testing.assert_array_equal(few[path][1], value[1])
    ours, theirs = model(TOKENS), wide(TOKENS)
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(theirs).max()))
    # By the file's own tensor, in its own layout.
    if (family, kind) == ("llama", "nf4"):
        name = "model.layers.1.mlp.down_proj.weight"
        of = lambda folder: safetensors.numpy.load_file(tmp_path / folder / "model.safetensors")
        codes = quantised.quantised(of("first")[name], kind).codes
        np.testing.assert_array_equal(few["blocks.mlp.down"].narrow.codes[1], codes)


@pytest.mark.full
def test_adapters_are_merged_into_the_numbers_they_were_trained_on(tmp_path):
    zoo.save(twins.untrained("llama", "plain"), tmp_path / "first", dtype=jnp.float32)
    as_trained = dict(dtype=jnp.bfloat16, compute_dtype=jnp.float32)
    model = zoo.load(tmp_path / "first", frozen="nf4", **as_trained)
    graph, state = nnx.split(model)
    lora = Lora(rank=4, alpha=8.0)
    frozen = adapters.attached(nnx.to_pure_dict(state), targets.sites(model, lora))
    like = adapters.layout(model, targets.sites(model, lora))
    trained = adapters.fresh(frozen, like, zero="B", seed=0)
    trained = jax.tree.map(lambda x: x + 0.1, trained)
    both = nnx.merge(graph, nnx.State(adapted.joined(trained, frozen)))
    both.source = model.source
    zoo.save(both, tmp_path / "merged", dtype=jnp.float32)
    merged = zoo.load(tmp_path / "merged")
    ours, theirs = both(TOKENS), merged(TOKENS)
    assert jnp.abs(theirs - model(TOKENS)).max() > 0.1 * jnp.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(jnp.abs(theirs).max()))

    # The folder of the adapters brings the base that they were trained on.
    zoo.save_adapter(both, tmp_path / "adapter")
    again = zoo.load(tmp_path / "first", adapter=tmp_path / "adapter", **as_trained)
    np.testing.assert_array_equal(again(TOKENS), ours)
    wider = zoo.load(tmp_path / "first", adapter=tmp_path / "adapter")
    assert narrow.kind_of(wider) == "nf4"
    with pytest.raises(ValueError, match=r"kept in nf4, and those of .* kept in int8"):
        zoo.load(tmp_path / "first", adapter=tmp_path / "adapter", frozen="int8")
    other = zoo.load(tmp_path / "first")
    other.norm.scale.set_value(other.norm.scale[...] * 2)
    zoo.save(other, tmp_path / "other", dtype=jnp.float32)
    with pytest.raises(ValueError, match="were trained on other weights"):
        zoo.load(tmp_path / "other", adapter=tmp_path / "adapter")


SIZES = dict(
    model_type="llama", vocab_size=256, hidden_size=256, intermediate_size=512,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, hidden_act="silu",
    rms_norm_eps=1e-5, tie_word_embeddings=True,
    rope_parameters=dict(rope_type="default", rope_theta=1e4),
)  # fmt: skip


def of_a_step(layers, kind):
    """Temporary bytes of the program that adds a micro-batch, and those of frozen weights."""
    blank = zoo.abstract(SIZES | dict(num_hidden_layers=layers))
    blank = zoo.narrowed(blank, kind)
    found = targets.sites(blank, Lora(rank=4, alpha=8.0))
    trained = adapters.layout(blank, found)
    graph, state = nnx.split(blank)
    scale = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    frozen = adapters.attached(nnx.to_pure_dict(state), found, scale)
    whole = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    answers = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    batch = update.Packed(*[whole(1, 64)] * 8, counts=whole(1), scored=whole(2, 2))
    loss = lambda a: -jax.nn.log_sigmoid(a.policy[:, 0] - a.policy[:, 1])
    add = functools.partial(update.add_micro_batch, graph=graph, loss=loss)
    sums = update.Sums(trained, logps.Scores(answers, answers, answers), answers)
    fields = update.DataFields(whole(2, 2), answers)
    program = jax.jit(add, donate_argnums=0).lower(sums, trained, frozen, answers, fields, batch)
    held = plan.memory(blank, trained, {}, None, resident=False)["frozen"]
    return program.compile().memory_analysis().temp_size_in_bytes, held


def test_one_layer_is_wide_at_a_time():
    """However many there are: what grows are the tokens that enter each layer."""
    layer = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    entering = 4 * 64 * 256
    few, held = of_a_step(4, "nf4")
    many, held_of_many = of_a_step(32, "nf4")
    assert many - few < 28 * 3 * entering < layer * 28 / 10
    bits = 8 * (held_of_many - held) / (28 * layer / 4)
    assert 4.1 < bits < 4.3  # with norms, which are whole


def test_a_weight_says_what_it_is():
    model = zoo.narrowed(zoo.abstract(SIZES | dict(num_hidden_layers=3)), "nf4")
    down = model.blocks.mlp.down.get_value()
    assert (down.shape, down.ndim, down.size) == ((3, 512, 256), 3, 3 * 512 * 256)
    assert (down.kind, down.dtype, down[...] is down) == ("nf4", jnp.float32, True)
    assert dataclasses.replace(down, axes="F D") == down
    assert plan.numbers(model) == plan.numbers(zoo.abstract(SIZES | dict(num_hidden_layers=3)))

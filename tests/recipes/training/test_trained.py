"""Which weights are trained by name, and that a weight of some trained layers is the weight."""

import dataclasses

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recipes.configs import tiny
from recipes.data.packed import batches
from recipes.training import logps, optimizer, plan, trained
from tests.conftest import optimizer_settings_of, programs_of, small_config
from tests.long_forms import full_but
from tests.recipes.training.test_update import OBJECTIVE, THEIRS, apart, place_of, summed, work
from zoo import llama, mixtral, models
from zoo.parts import adapted, partly, rope, sharding

__all__ = ["work"]  # a fixture


@pytest.fixture(scope="module")
def blank():
    return models.abstract(small_config())


def test_names_are_matched_whole(blank):
    """Each weight holds its three layers; None stands for all of them."""
    found = trained.matching(blank, r".*(q|v)_proj\.weight|.*layers\.[02].*norm.*|lm_head\.weight")
    assert found == {
        "blocks.attention.q": None,
        "blocks.attention.v": None,
        "blocks.attention_norm.scale": (0, 2),
        "blocks.mlp_norm.scale": (0, 2),
        "head": None,
    }
    left = trained.others(blank, found)
    assert left["blocks.mlp_norm.scale"] == (1,) and left["embedding"] is None
    every = {models.name_of(path) for path, _ in nnx.to_flat_state(nnx.state(blank))}
    assert left.keys() | found.keys() == every
    assert left.keys() & found.keys() == {"blocks.attention_norm.scale", "blocks.mlp_norm.scale"}


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        (
            r"q_proj",
            r"matched as a whole, e.g. model.layers.0.self_attn.q_proj.weight.: did you mean ",
        ),
        (r".*qproj.weight", r"did you mean model.layers.0.self_attn.q_proj.weight"),
        (r".*layers\.3\..*", r"matches no weight of the model"),
        (r".*", r"matches every weight, which is the default: leave it out"),
        (r".*(q_proj", r"is not a valid regular expression: missing \)"),
    ],
)
def test_a_pattern_without_effect_is_refused(blank, pattern, told):
    with pytest.raises(ValueError, match=told):
        trained.matching(blank, pattern)


def test_a_tied_head_is_trained_with_its_embedding():
    tied = models.abstract(small_config(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"lm_head.weight of this model is tied to model.embed"):
        trained.matching(tied, r"lm_head\.weight|.*q_proj.*")
    assert trained.matching(tied, r"lm_head\.weight|.*embed_tokens.*") == {"embedding": None}


def test_the_experts_of_a_layer_are_trained_together():
    sizes = dataclasses.asdict(small_config()) | {"rope_parameters": rope.Rope(rope_theta=1e4)}
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    fields = {field.name for field in dataclasses.fields(mixtral.Config)}
    config = mixtral.Config(**{k: v for k, v in (sizes | more).items() if k in fields})
    blank = models.abstract(config)
    with pytest.raises(ValueError, match="train either all experts of a layer or none"):
        trained.matching(blank, r".*experts\.0\..*")
    found = trained.matching(blank, r".*layers\.1\..*experts.*")
    assert set(found.values()) == {(1,)}


CHOSEN = {"blocks.attention.q": (1,), "blocks.mlp.down": (0,), "blocks.mlp_norm.scale": (1,),
          "blocks.attention.v": None, "norm.scale": None}  # fmt: skip


def parted(params, chosen=CHOSEN):
    """What is trained, and what is not, of the weights of two layers."""
    flat = traverse_util.flatten_dict(params, sep=".")
    own, rest = {}, {}
    for path, value in flat.items():
        layers = chosen.get(path, ())
        if layers is None:
            own[path] = value
        elif not layers:
            rest[path] = value
        else:
            own[path] = value[np.array(layers)]
            rest[path] = value[np.array([1 - layers[0]])]
    unflat = lambda tree: traverse_util.unflatten_dict(tree, sep=".")
    return unflat(own), trained.with_room(unflat(rest), chosen)


def test_a_weight_with_some_trained_layers_is_the_weight(work):
    _, params, *_ = work
    own, rest = parted(params)
    whole = partly.whole(adapted.joined(own, rest))
    jax.tree.map(np.testing.assert_array_equal, whole, params)
    again = partly.like(params, rest)
    jax.tree.map(np.testing.assert_array_equal, again, adapted.joined(own, rest))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_policy_and_reference_give_the_same_bits(work, dtype):
    """The masters in float32 as they are computed with, beside frozen weights in that dtype."""
    graph, params, *_, pairs, mesh = work
    place = place_of(mesh, 2, 64)
    graph, _ = nnx.split(llama.Model(small_config(num_hidden_layers=2, hidden_size=16, head_dim=4),
                                     nnx.Rngs(0), dtype))  # fmt: skip
    own, rest = parted(params)
    rest = jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(dtype), rest)
    forward = logps.compiled(mesh)
    batch = batches.put(batches.pack(pairs, place.shape, [0]).micro_batches[0], place)
    policy = forward(graph, adapted.joined(logps.cast(own, dtype), rest), batch)
    narrow = logps.cast(params, dtype)
    reference = forward(graph, partly.like(narrow, rest), batch)
    np.testing.assert_array_equal(policy, reference)
    # And those of the weights as they are kept without it, but for rounding.
    whole = forward(graph, narrow, batch)
    np.testing.assert_allclose(policy, whole, rtol=1e-5 if dtype == jnp.float32 else 0.05)


@pytest.mark.parametrize("policy", full_but(["full", "products"], "products"))
def test_a_gradient_is_that_of_the_trained_layers(work, policy):
    """Over several micro-batches; every other layer's is not there."""
    graph, params, *_, pairs, mesh = work
    model = nnx.merge(graph, nnx.State(params))
    model.remat = policy
    graph, _ = nnx.split(model)
    own, rest = parted(params)
    descent = optax.sgd(0.25)
    place = place_of(mesh, 1, 40)
    state = optimizer.init(descent, own, mesh)
    programs = programs_of(own, state, graph, descent, OBJECTIVE, place.shape)
    packed = batches.pack(pairs, place.shape, [0])
    fields, sums = batches.data_fields(packed, place), programs.zero()
    for micro_batch in packed.micro_batches:
        batch = batches.put(micro_batch, place)
        sums = programs.add(sums, own, rest, jnp.asarray(THEIRS), fields, batch)
    whole, count = summed(work, 1, 40)
    assert count > 1
    expected, _ = parted(whole.gradient)
    assert jax.tree.structure(sums.gradient) == jax.tree.structure(expected)
    assert apart(sums.gradient, expected) < 1e-6
    np.testing.assert_array_equal(sums.policy.logps, whole.policy.logps)


def test_memory_is_counted_apart(blank):
    """Of three layers one is trained: 4 + 4 + 8 bytes a weight there, and 2 elsewhere."""
    mesh = sharding.mesh_of(1, 1, 1)
    model = models.abstract(small_config(), jnp.float32, jnp.bfloat16, mesh)
    chosen = trained.matching(model, r".*layers\.2\..*")
    learnt = trained.of(model, None, chosen)
    adamw = optimizer.optimizer_of(
        optimizer_settings_of(tiny.get_config()), lambda _: 1e-3, learnt.decayed
    )
    state = optimizer.layout(adamw, learnt.like, mesh)
    found = plan.memory(model, learnt.like, state, chosen, resident=True)
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    blocks = sum(x.size for x in jax.tree.leaves(nnx.state(model.blocks)))
    assert found["trained"] == found["gradient"] == 4 * blocks // 3
    assert found["optimizer"] == pytest.approx(8 * blocks // 3, abs=64)
    assert found["frozen"] == 2 * (count - blocks // 3)
    assert found["reference"] == 2 * count

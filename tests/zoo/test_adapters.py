"""Adapters: what they add, which weights get them, and that they are all that learns."""

import dataclasses
import functools

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recipes.data.packed import batches
from recipes.data.packed.packing import Shape
from recipes.training import logps
from tests import in_float64
from tests.conftest import large_weights, programs_of, sigmoid, small_config
from tests.recipes.data.packed.test_packing import random_pairs
from tests.zoo import twins
from zoo import adapters, gpt2, llama, phi3, qwen3_moe, targets
from zoo.parts import adapted, layers, sharding
from zoo.parts.adapted import Adapted, Adapter
from zoo.parts.rope import Rope
from zoo.targets import Lora

PAIRS = 4
GPT2 = dict(model_type="gpt2", vocab_size=97, n_positions=128, n_embd=32, n_layer=3, n_head=4,
            tie_word_embeddings=False)  # fmt: skip
COMMON = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=False,
              sliding_window=None, rope_parameters=Rope(rope_theta=1e4))  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)


@functools.cache
def small(family):
    config = {
        "llama": lambda: small_config(),
        "gpt2": lambda: gpt2.Config.from_hf(GPT2),
        "phi3": lambda: phi3.Config(**COMMON, intermediate_size=48),
        "qwen3_moe": lambda: qwen3_moe.Config(**COMMON, **MOE),
    }[family]()
    module = {"llama": llama, "gpt2": gpt2, "phi3": phi3, "qwen3_moe": qwen3_moe}[family]
    return large_weights(module.Model(config, nnx.Rngs(0)), scale=0.5)


def parted(model, lora, *, seed=0):
    """The trees of a model with new adapters: what is trained, and what is not."""
    params = nnx.to_pure_dict(nnx.state(model))
    found = targets.sites(model, lora)
    frozen = adapters.attached(params, found)
    like = adapters.layout(model, found, dora=lora.dora)
    return adapters.fresh(frozen, like, zero=lora.zero, seed=seed), frozen


def filled(trained, frozen, scale=0.1, seed=1):
    """Adapters with numbers in both factors, as far as each layer's rank goes."""
    draw = np.random.default_rng(seed)
    places = traverse_util.flatten_dict(frozen)
    flat = {}
    for path, one in traverse_util.flatten_dict(trained).items():
        noise = lambda x: jnp.asarray(draw.standard_normal(x.shape), jnp.float32) * scale
        a, b, m = noise(one.a), noise(one.b), one.magnitude
        lead = one.b.ndim - 1 - len(places[path].out.split())
        for i, rank in enumerate(places[path].ranks):
            a = a.at[i, ..., rank:].set(0)
            b = b.at[(i, *[slice(None)] * (lead - 1), slice(rank, None))].set(0)
        flat[path] = Adapter(a, b, None if m is None else m * (1 + noise(m)))
    return traverse_util.unflatten_dict(flat)


def merged(trained, frozen, *, length_held=False):
    """All weights; DoRA's length, if it is held, is a constant where it is differentiated."""

    def put(weight):
        if not adapted.is_adapted(weight):
            return weight
        wide = weight.astype(jnp.float32)
        if not length_held or weight.adapter.magnitude is None:
            return wide
        plain = dataclasses.replace(weight, adapter=weight.adapter._replace(magnitude=None))
        plain = plain.astype(jnp.float32)
        return plain * jax.lax.stop_gradient(wide / plain)

    return jax.tree.map(put, adapted.joined(trained, frozen), is_leaf=adapted.is_adapted)


def work_on(mesh):
    """One micro-batch of pairs."""
    shape = Shape(2, 128, PAIRS, 2, 2)
    place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    update = batches.pack(random_pairs(0, PAIRS), shape, [0])
    (packed,) = update.micro_batches
    return place, batches.data_fields(update, place), batches.put(packed, place)


@pytest.fixture(scope="module")
def work():
    mesh = sharding.mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        yield work_on(mesh)


def gradient(work, graph, trained, frozen):
    place, said, batch = work
    put = lambda tree: jax.device_put(tree, jax.NamedSharding(place.row_sharding.mesh, jax.P()))
    trained, frozen = put(trained), put(frozen)
    theirs = jnp.zeros((PAIRS, 2))
    sgd = optax.sgd(1.0)
    programs = programs_of(trained, sgd.init(trained), graph, sgd, sigmoid(0.1), place.shape)
    return programs.add(programs.zero(), trained, frozen, theirs, said, batch)


# By hand


def test_a_product_by_hand():
    """X W + s (x A) B with numbers that can be checked by eye."""
    w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    a, b = jnp.array([[1.0], [-1.0]]), jnp.array([[10.0, 20.0]])
    one = Adapted(w, jnp.float32(0.5), Adapter(a, b), (1,), "D F", "D", "F")
    x = jnp.array([[[2.0, 1.0]]])
    # x W = [5, 8]; x A = 1; s B = [5, 10]
    given = nnx.Param(one)
    np.testing.assert_array_equal(layers.einsum("BTD,DF->BTF", x, given), [[[10.0, 18.0]]])
    np.testing.assert_array_equal(one.astype(jnp.float32), [[6.0, 12.0], [-2.0, -6.0]])
    # DoRA: the columns (6, -2) and (12, -6) scaled to the lengths 1 and 2.
    long = np.hypot([6, 12], [-2, -6])
    dora = dataclasses.replace(one, adapter=Adapter(a, b, jnp.array([1.0, 2.0])))
    expected = np.array([10.0, 18.0]) * [1, 2] / long
    found = layers.einsum("BTD,DF->BTF", x, nnx.Param(dora))
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-6)
    columns = np.array([[6, 12], [-2, -6]]) * [1, 2] / long
    np.testing.assert_allclose(dora.astype(jnp.float32), columns, rtol=1e-6)


ATTENTION = {"k", "o", "q", "v"}
MLP = {"gate", "up", "down"}


@pytest.mark.parametrize(
    ("asked", "weights"),
    [
        (dict(), ATTENTION | MLP),
        (dict(targets=("q_proj", "v_proj")), {"q", "v"}),
        (dict(targets=("self_attn.o_proj",)), {"o"}),
        (dict(targets=(r".*\.(gate|up)_proj",)), {"gate", "up"}),
        (dict(targets=(r"model\.layers\.1\..*_proj",)), ATTENTION | MLP),
        (dict(exclude=("down_proj",)), ATTENTION | {"gate", "up"}),
        (dict(targets=("q_proj",), exclude=(r".*\.0\..*",)), {"q"}),
        (dict(targets=("q_proj", "self_attn.q_proj")), {"q"}),
        (dict(targets=("all-linear", "up_proj")), ATTENTION | MLP),
        (dict(layers=(0, 2)), ATTENTION | MLP),
    ],
)
def test_targets_as_peft_matches_them(asked, weights):
    found = targets.sites(small("llama"), Lora(4, 8.0, **asked))
    assert {site.path.rpartition(".")[2] for site in found} == weights


def test_layers_and_patterns():
    lora = Lora(4, 8.0, targets=("q_proj", "v_proj"), layers=(0, 2), rank_pattern={"v_proj": 2},
                alpha_pattern={r"layers\.2\..*": 1.0})  # fmt: skip
    q, v = targets.sites(small("llama"), lora)
    assert (q.path, q.ranks, q.scales) == ("blocks.attention.q", (4, 0, 4), (2.0, 0.0, 0.25))
    assert (v.path, v.ranks, v.scales) == ("blocks.attention.v", (2, 0, 2), (4.0, 0.0, 0.5))
    assert (q.into, q.out, v.out) == ("D", "N H", "K H")
    assert targets.rank_and_scale(Lora(16, 32.0, rslora=True), ("q_proj",), set()) == (16, 8.0)


def test_sides_of_fused_and_turned_weights():
    sides = lambda family: {
        site.path.rpartition(".")[2]: (site.into, site.out)
        for site in targets.sites(small(family), Lora(2, 2.0))
    }
    assert sides("gpt2") == {
        "qkv": ("D", "J N H"), "o": ("N H", "D"), "up": ("D", "F"), "down": ("F", "D"),
    }  # fmt: skip
    assert sides("phi3") == {
        "qkv": ("D", "Q H"), "o": ("N H", "D"), "gate_up": ("D", "J F"), "down": ("F", "D"),
    }  # fmt: skip
    experts = sides("qwen3_moe")
    assert experts["gate"] == ("D", "F")
    assert "router" not in experts


def test_a_router_takes_adapters_by_its_name():
    (site,) = targets.sites(small("qwen3_moe"), Lora(2, 2.0, targets=("mlp.gate",)))
    assert site.path == "blocks.mlp.router"
    for both in (("all-linear", "mlp.gate"), ("mlp.gate", "all-linear")):
        found = targets.sites(small("qwen3_moe"), Lora(2, 2.0, targets=both))
        assert "blocks.mlp.router" in {site.path for site in found}


def test_experts_in_one_tensor_take_none():
    """As with PEFT: of gpt-oss the attention alone; by their names they are refused."""
    model = twins.untrained("gpt_oss", twins.RICHEST["gpt_oss"])
    found = targets.sites(model, Lora(2, 2.0))
    assert {site.path for site in found} == {f"blocks.attention.{name}" for name in "qkvo"}
    with pytest.raises(ValueError, match="all experts of a layer in one tensor"):
        targets.sites(model, Lora(2, 2.0, targets=("gate_up_proj",)))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (dict(targets=("q_prj",)), r"'q_prj' .* matches no weight .* \(did you mean q_proj"),
        (dict(targets=("embed_tokens",)), "embeddings and heads take no adapters here"),
        (dict(targets=("lm_head",)), "embeddings and heads take no adapters here"),
        (dict(targets=()), "adapter.targets is empty"),
        (dict(targets=("q_proj", r".*\.v_proj")), "a regular expression stands alone"),
        (dict(targets=("(q_proj",)), "is not a regular expression"),
        (dict(exclude=("c_attn",)), "'c_attn' .* matches no weight"),
        (dict(targets=("q_proj",), exclude=("down_proj",)), "matches none of the weights in"),
        (dict(rank_pattern={"(q": 2}), r"rank_pattern='\(q' is not a regular expression"),
        (dict(rank_pattern={"c_attn": 2}), "'c_attn' .* matches no weight"),
        (dict(layers=(0, 3)), "names layer 3, and the model has 3"),
        (dict(targets=("q_proj",), exclude=("q_proj",)), "leave no weight"),
    ],
)
def test_what_matches_nothing_is_refused(asked, words):
    with pytest.raises(ValueError, match=words):
        targets.sites(small("llama"), Lora(4, 8.0, **asked))


def test_new_adapters_of_lower_rank_hold_zeros_beyond_it():
    lora = Lora(4, 8.0, zero="B", layers=(0, 2), rank_pattern={"v_proj": 2})
    trained, _ = parted(small("llama"), lora)
    v = trained["blocks"]["attention"]["v"]
    assert v.a.shape == (3, 32, 2)
    assert np.abs(v.a[0]).min() > 0
    assert not np.any(v.a[1])
    assert np.abs(v.a).max() <= 1 / np.sqrt(32)
    assert not np.any(v.b)


# Equalities


FULL = pytest.mark.full


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "dora"),
    [
        ("llama", False),
        pytest.param("llama", True, marks=FULL),
        pytest.param("qwen3_moe", False, marks=FULL),
        pytest.param("phi3", False, marks=FULL),
        pytest.param("gpt2", False, marks=FULL),
        pytest.param("phi3", True, marks=FULL),
        pytest.param("gpt2", True, marks=FULL),
    ],
)
def test_the_gradient_is_that_of_the_merged_weights(work, tmp_path, family, dora):
    """By the chain rule in float64, from the gradient of all weights of the merged model."""
    in_float64.ran("zoo.adapters_in_float64", tmp_path / "exact", family, dora)
    exact = np.load(tmp_path / "exact.npz")
    sums, (graph, trained, frozen) = sums_of(work, family, dora)
    full = gradient(work, graph, merged(trained, frozen), {})
    np.testing.assert_allclose(sums.policy.logps, full.policy.logps, rtol=1e-5, atol=2e-5)
    found = by_name(sums.gradient)
    assert found.keys() == set(exact)
    for name, ours in found.items():
        assert np.linalg.norm(ours - exact[name]) <= 1e-5 * np.linalg.norm(exact[name]), name


def sums_of(work, family, dora):
    """The sums of an update of adapters with numbers everywhere, and what they belong to."""
    model = small(family)
    graph = nnx.graphdef(model)
    trained, frozen = parted(model, Lora(4, 8.0, layers=(0, 2), dora=dora))
    trained = filled(trained, frozen)
    return gradient(work, graph, trained, frozen), (graph, trained, frozen)


def by_the_chain_rule(work, graph, trained, frozen):
    """The gradient of adapters, from that of all weights."""
    full = gradient(work, graph, merged(trained, frozen), {})

    def backwards(trained, **how):
        weights = merged(trained, frozen, **how)
        pulled = jax.tree.map(lambda w, g: jnp.vdot(w, g), weights, full.gradient)
        return sum(jax.tree.leaves(pulled))

    # PEFT and the paper take DoRA's length as a constant.
    free = traverse_util.flatten_dict(jax.grad(backwards)(trained))
    held = traverse_util.flatten_dict(jax.grad(backwards)(trained, length_held=True))
    wanted = {path: held[path]._replace(magnitude=free[path].magnitude) for path in held}
    return traverse_util.unflatten_dict(wanted)


def by_name(tree):
    """Every factor of every adapter."""
    flat = traverse_util.flatten_dict(tree, sep=".")
    factors = {
        f"{path}.{kind}": x for path, one in flat.items() for kind, x in one._asdict().items()
    }
    return {name: np.asarray(x) for name, x in factors.items() if x is not None}


@pytest.mark.parametrize(
    ("family", "zero", "dtype"),
    [
        ("llama", "A", "float32"),
        pytest.param("llama", "B", "bfloat16", marks=FULL),
        pytest.param("llama", "DoRA", "float32", marks=FULL),
        pytest.param("llama", "B", "float32", marks=FULL),
        pytest.param("llama", "A", "bfloat16", marks=FULL),
        pytest.param("phi3", "A", "bfloat16", marks=FULL),
        pytest.param("qwen3_moe", "B", "float32", marks=FULL),
        pytest.param("qwen3_moe", "A", "bfloat16", marks=FULL),
    ],
)
def test_new_adapters_and_adapters_that_are_off_change_no_bit(work, family, zero, dtype):
    model = nnx.clone(small(family))
    model.dtype = jnp.dtype(dtype)
    graph = nnx.graphdef(model)
    dora, zero = zero == "DoRA", zero.replace("DoRA", "B")
    trained, frozen = parted(model, Lora(4, 8.0, zero=zero, dora=dora))
    forward, batch = jax.jit(logps.of_params, static_argnums=0), work[2]
    base = forward(graph, nnx.to_pure_dict(nnx.state(model)), batch)
    # A new magnitude is the length of the weights: their quotient is 1 but for rounding.
    same = functools.partial(np.testing.assert_allclose, rtol=1e-6 * dora, atol=0)
    same(forward(graph, adapted.joined(trained, frozen), batch), base)
    moved = filled(trained, frozen)
    off = jax.tree.map(
        lambda w: dataclasses.replace(w, scale=w.scale * 0) if adapted.is_adapted(w) else w,
        adapted.joined(moved, frozen), is_leaf=adapted.is_adapted,
    )  # fmt: skip
    np.testing.assert_array_equal(forward(graph, off, batch), base)
    idle = adapters.nothing(moved, frozen)
    same(forward(graph, adapted.joined(idle, frozen), batch), base)
    assert not np.array_equal(forward(graph, adapted.joined(moved, frozen), batch), base)
    # The factor that is not 0 learns nothing yet, and the other does.
    sums = gradient(work, graph, trained, frozen)
    for one in traverse_util.flatten_dict(sums.gradient).values():
        still, learns = (one.b, one.a) if zero == "A" else (one.a, one.b)
        assert not np.any(still)
        assert np.any(learns)


@pytest.mark.full
def test_what_a_layer_lacks_in_rank_never_moves(work):
    model = small("llama")
    trained, frozen = parted(model, Lora(4, 8.0, layers=(0, 2), rank_pattern={"v_proj": 2}))
    trained = filled(trained, frozen)
    found = gradient(work, nnx.graphdef(model), trained, frozen).gradient["blocks"]["attention"]
    for one in (found["v"], found["q"]):
        assert not np.any(one.a[1])
        assert not np.any(one.b[1])
        assert np.any(one.a[0])


def test_a_model_is_known_by_what_it_computes():
    """Adapters that add nothing make no other model; those that add something do."""
    model = small("llama")
    params = nnx.to_pure_dict(nnx.state(model))
    trained, frozen = parted(model, Lora(4, 8.0))
    new, moved = (adapted.joined(t, frozen) for t in (trained, filled(trained, frozen)))
    assert jax.tree.structure(adapters.bare(new)) == jax.tree.structure(params)
    assert jax.tree.structure(adapters.bare(moved)) == jax.tree.structure(moved)
    assert jax.tree.structure(adapters.base_of(moved)) == jax.tree.structure(params)


def test_a_seed_gives_the_same_adapters():
    model = small("llama")
    one, other, third = (parted(model, Lora(4, 8.0), seed=seed)[0] for seed in (0, 0, 1))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(jax.tree.leaves(one)[1], jax.tree.leaves(third)[1])


def test_what_rounding_loses_of_a_small_adapter():
    """Beside weights of 0.02 an adapter after a step of Adam is rounded away."""
    draw = np.random.default_rng(0)
    model = nnx.clone(small("llama"))
    w = model.blocks.attention.q
    w.set_value(jnp.asarray(0.02 * draw.standard_normal(w.shape), jnp.bfloat16))
    found = targets.sites(model, Lora(4, 8.0, targets=("q_proj",)))
    params = nnx.to_pure_dict(nnx.state(model))
    frozen = adapters.attached(params, found)
    like = adapters.layout(model, found)
    trained = filled(adapters.fresh(frozen, like, zero="A", seed=0), frozen, scale=1.0)
    shares = {}
    for size in (1e-3, 1e-1):
        small_ones = jax.tree.map(functools.partial(jnp.multiply, size), trained)
        joined = nnx.merge(nnx.graphdef(model), nnx.State(adapted.joined(small_ones, frozen)))
        shares[size] = adapters.lost_in(joined, jnp.bfloat16)
        assert adapters.lost_in(joined, jnp.float32) < 1e-6
    assert shares[1e-3] > 0.5
    assert shares[1e-1] < 0.1

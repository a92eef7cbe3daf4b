"""Layers of several kinds in a pattern: a loop over layers, packed rows, generation, files."""

import functools
import json
import re

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from recipes.data.packed.packing import Shape
from tests.long_forms import full_but
from tests.recipes import test_families
from tests.zoo import alternating, twins
import zoo
from zoo import generate
from zoo.parts import keeping, mixing, pattern, remat, spans, stack

TOKENS = np.random.default_rng(0).integers(3, 96, (2, 12)).astype(np.int32)
ORDERS = ["dssfssfs", "fssfssd"]  # what leads, a pattern twice, what is left over


def test_a_pattern_is_found():
    told = lambda kinds: [("".join(p.kinds), p.times) for p in pattern.schedule(kinds)]
    assert told("daabaaba") == [("d", 1), ("aab", 2), ("a", 1)]
    assert told("aaaa") == [("a", 4)]
    assert told("dddmmmmm") == [("d", 3), ("m", 5)]
    assert told("sssssf" * 10) == [("sssssf", 10)]
    assert told("abc") == [("a", 1), ("b", 1), ("c", 1)]
    _, twice, rest = pattern.schedule("daabaaba")
    assert twice.layers(1) == [("a", 2), ("a", 3), ("b", 1)]
    assert rest.layers(0) == [("a", 4)]
    assert pattern.numbers("daabaaba") == {"d": [0], "a": [1, 2, 4, 5, 7], "b": [3, 6]}


@pytest.mark.parametrize("kinds", ["d", "aaab" * 3, "daabaaba", "abcabcab", "fsssfsssfsd"])
def test_every_layer_is_gone_through_once_and_in_order(kinds):
    found = [
        layer for p in pattern.schedule(kinds) for i in range(p.times) for layer in p.layers(i)
    ]
    assert "".join(kind for kind, _ in found) == kinds
    numbers = pattern.numbers(kinds)
    assert [numbers[kind][n] for kind, n in found] == list(range(len(kinds)))


def loop(model, x, where, *shared, each=None):
    """Layer by layer, as anybody would write it."""
    passed = dict.fromkeys(model.config.kinds, 0)
    for kind in model.config.kinds:
        n, block = passed[kind], model.blocks[kind]
        graph, state = nnx.split(block)
        one = nnx.merge(graph, jax.tree.map(lambda w, n=n: w[n], state))
        own = (each[kind][n],) if kind in each else ()
        x = one(x, mixing.Whole(where, model.attention), *shared, *own)
        passed[kind] += 1
    return x


@pytest.mark.full
def test_gradients_reach_what_layers_hand_on():
    """Keys of an earlier layer, and inputs of each: layer by layer as jax differentiates it all."""
    graph, state = nnx.split(twins.untrained("gemma4_text", "inputs of each layer, shared keys"))
    params = nnx.to_pure_dict(state)
    pull = np.random.default_rng(1).standard_normal((*TOKENS.shape, 32)).astype(np.float32)

    def gradient(remat):
        def summed(params):
            model = nnx.merge(graph, nnx.State(params))
            model.remat = remat
            return (model.hidden(jnp.asarray(TOKENS), spans.causal(*TOKENS.shape)) * pull).sum()

        return traverse_util.flatten_dict(jax.jit(jax.grad(summed))(params), sep=".")

    by_number, plain = gradient("full"), gradient("none")
    for path, found in by_number.items():
        scale = np.abs(plain[path]).max()
        assert scale > 0 or (path.endswith(".scale") and plain[path].ndim == 1), path
        np.testing.assert_allclose(found, plain[path], atol=1e-5 * max(scale, 1e-3), err_msg=path)


def summed(graph, params, run, pull):
    model = nnx.merge(graph, nnx.State(params))
    return (model.hidden(jnp.asarray(TOKENS), spans.causal(*TOKENS.shape), run) * pull).sum()


@functools.cache
def apart(kinds):
    graph, state = nnx.split(alternating.untrained(kinds))
    return graph, nnx.to_pure_dict(state)


def close(found, expected, rtol=1e-5):
    for path, theirs in jax.tree_util.tree_leaves_with_path(expected):
        ours = functools.reduce(lambda tree, key: tree[key.key], path, found)
        bound = rtol * np.abs(theirs).max(initial=0)  # of a kind that no layer is there is nothing
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=bound)


@functools.cache
def by_loop(kinds):
    pull = np.random.default_rng(1).standard_normal((*TOKENS.shape, 32)).astype(np.float32)
    graph, params = apart(kinds)
    return pull, *jax.jit(jax.value_and_grad(lambda p: summed(graph, p, loop, pull)))(params)


def with_remat(kinds, remat):
    model = nnx.merge(apart(kinds)[0], nnx.State(apart(kinds)[1]))
    model.remat = remat
    return nnx.split(model)[0]


@pytest.mark.parametrize(
    ("kinds", "remat"),
    full_but(
        [(ORDERS[1], "full"), *((ORDERS[0], name) for name in remat.POLICIES)],
        (ORDERS[0], "full"),
    ),
)
def test_a_stack_of_kinds_is_a_loop_over_layers(kinds, remat):
    pull, value, gradient = by_loop(kinds)
    graph, params = with_remat(kinds, remat), apart(kinds)[1]
    run = lambda p: summed(graph, p, stack.run, pull)
    found, ours = jax.jit(jax.value_and_grad(run))(params)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    close(ours, gradient)


@pytest.mark.parametrize(
    ("kinds", "remat"),
    full_but(
        [(ORDERS[0], "full"), (ORDERS[1], "full"), (ORDERS[0], "attention")], (ORDERS[0], "full")
    ),
)
def test_the_sum_of_gradients_of_every_kind(kinds, remat):
    pull, _, gradient = by_loop(kinds)
    graph, (others, stacks) = with_remat(kinds, remat), stack.split(apart(kinds)[1])
    draw = np.random.default_rng(2)
    so_far = jax.tree.map(lambda w: jnp.asarray(draw.standard_normal(w.shape), "f4"), stacks)

    def value(others, so_far):
        run = functools.partial(stack.run, so_far=so_far)
        return summed(graph, stack.join(others, stacks), run, pull)

    of_others, total = jax.jit(jax.grad(value, argnums=(0, 1)))(others, so_far)
    theirs, of_stacks = stack.split(gradient)
    close(of_others, theirs)
    close(total, jax.tree.map(jnp.add, so_far, of_stacks))


def test_nothing_compiles_longer_for_more_repetitions():
    def equations(times):
        config = alternating.config_of("d" + "ssf" * times + "s")
        graph, state = nnx.split(nnx.eval_shape(lambda: alternating.Model(config, nnx.Rngs(0))))
        params = nnx.to_pure_dict(state)

        def value(so_far, params):
            run = functools.partial(stack.run, so_far=so_far)
            return summed(graph, params, run, np.float32(1))

        made = jax.make_jaxpr(jax.grad(value))(stack.split(params)[1], params)
        return len(re.findall(r" = \w", str(made)))

    assert equations(2) == equations(8)


@pytest.mark.full
def test_no_weights_are_copied_for_a_kind_that_several_parts_have():
    """Reading them, and adding to their gradient in its place."""
    graph, params = apart("s" + "sf" * 12 + "d")
    others, stacks = stack.split(params)
    size = sum(w.nbytes for w in jax.tree.leaves(stacks))
    forward = lambda p: summed(graph, p, stack.run, np.float32(1))
    assert temporary(forward, params) < 0.5 * size
    add = lambda so_far, stacks: jax.grad(
        lambda so_far: summed(graph, stack.join(others, stacks),
                              functools.partial(stack.run, so_far=so_far), np.float32(1))
    )(so_far)  # fmt: skip
    kept = 26 * TOKENS.size * 32 * 4  # what enters each block
    assert temporary(add, stacks, stacks, donated=0) < 0.5 * size + 2 * kept


def temporary(f, *given, donated=()):
    program = jax.jit(f, donate_argnums=donated).lower(*given).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kinds", full_but(ORDERS, ORDERS[1]))
def test_packed_is_alone(kinds):
    model = alternating.untrained(kinds)
    test_families.compare(model, Shape(1, 256, 8, 2, 1), Shape(4, test_families.LONGEST, 8, 2, 4))


@pytest.mark.parametrize("kinds", full_but(ORDERS, ORDERS[1]))
def test_text_is_that_of_the_whole_read_again(kinds):
    """Two answers to each of two prompts, every step against the whole model, and by token."""
    model = alternating.untrained(kinds)
    prompts, lengths = TOKENS.copy(), np.array([7, 4], np.int32)
    answered, rows, begins = np.repeat(prompts, 2, axis=0), np.arange(4), np.repeat(lengths, 2)
    for row, begin in zip(answered[1::2], lengths, strict=True):
        row[begin:] = 99 - row[begin:]
    whole = jnp.broadcast_to(lengths[:, None], (2, 12))
    where = spans.causal(2, 12)._replace(lengths=whole)
    forward, unembed = jax.jit(keeping.forward), jax.jit(lambda model, x: model.unembed(x))
    _, read = forward(model, jnp.asarray(prompts), where, keeping.blank(model, 2, 16))
    kept = keeping.begun(model, read, 2, 8)
    behind = {kind: mixing.Prompts(some, jnp.asarray(lengths)) for kind, some in read.items()}
    expected = jax.jit(lambda model, x: model(x))(model, jnp.asarray(answered))
    for at in range(5):
        ends = begins + at
        new = jnp.asarray(answered[rows, ends][:, None])
        hidden, kept = forward(model, new, spans.last(jnp.asarray(ends)), kept, behind)
        np.testing.assert_allclose(
            unembed(model, hidden)[:, 0], expected[rows, ends], rtol=1e-4, atol=1e-4
        )
    given = [prompts[0, :7].tolist(), prompts[1, :4].tolist()] * 2
    texts = generate.generate(model, given, max_new_tokens=5)
    for prompt, text in zip(given, texts, strict=True):
        whole = np.zeros((1, 12), np.int32)
        whole[0, : len(prompt) + 5] = prompt + text
        likeliest = model(jnp.asarray(whole))[0].argmax(-1)
        assert likeliest[len(prompt) - 1 : len(prompt) + 4].tolist() == text


def test_what_is_kept_has_the_axes_that_are_declared():
    kept = keeping.blank(alternating.untrained(), 2, 64)
    shapes = {kind: {n: x.shape for n, x in some.items()} for kind, some in kept.items()}
    assert shapes == {
        "sliding_attention": dict.fromkeys(("keys", "values"), (5, 2, 64, 2, 8)),
        "full_attention": dict.fromkeys(("keys", "values"), (2, 2, 64, 1, 12)),
        "decay": {"state": (1, 2, 4, 8)},
    }


def test_what_runs_on_is_kept_in_float32():
    """A sum over a whole text would lose what it has in a narrow dtype; keys need no more."""
    axes = {"keys": "B S K H", "inputs": "B W D", "state": "B N H U"}
    sizes = dict(B=2, S=8, K=2, H=4, W=3, D=8, N=2, U=4)
    found = mixing.blank(axes, sizes, jnp.bfloat16)
    dtypes = {name: x.dtype for name, x in found.items()}
    assert dtypes == {"keys": jnp.bfloat16, "inputs": jnp.float32, "state": jnp.float32}
    assert all(x.shape == tuple(sizes[i] for i in axes[name].split()) for name, x in found.items())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.ARCHITECTURES, "alternating", alternating)
    zoo.save(alternating.untrained(), tmp_path / "model", dtype=jnp.float32)
    return tmp_path / "model"


def test_files_name_the_layers_by_their_place_in_the_model(folder, tmp_path):
    model, read = alternating.untrained(), zoo.load(folder)
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    number = lambda name: int(re.search(r"layers\.(\d+)\.", name)[1])
    decays = {number(name) for name in stored if ".decay." in name}
    wide = {number(n) for n, w in stored.items() if "q_proj" in n and w.shape[0] == 48}
    assert (decays, wide) == ({0}, {3, 6})
    q = model.blocks["full_attention"].attention.q[...]
    np.testing.assert_array_equal(
        stored["model.layers.6.self_attn.q_proj.weight"], q[1].transpose(1, 2, 0).reshape(48, 32)
    )
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, read)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    zoo.save(read, tmp_path / "again", dtype=jnp.float32)
    again = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    assert stored.keys() == again.keys()
    assert all(np.array_equal(stored[name], again[name]) for name in stored)
    zoo.check(folder)


def test_what_is_wrong_is_named_by_its_number(folder):
    path = folder / "model.safetensors"
    stored = safetensors.numpy.load_file(path)
    name = "model.layers.6.self_attn.k_proj.weight"
    spoilt = stored | {name: stored[name] * np.nan}
    safetensors.numpy.save_file(spoilt, path)
    with pytest.raises(ValueError, match=re.escape(name) + " holds numbers that are not finite"):
        zoo.check_finite(zoo.load(folder))
    safetensors.numpy.save_file({n: w for n, w in stored.items() if n != name}, path)
    with pytest.raises(ValueError, match="lack " + re.escape(name)):
        zoo.load(folder)


def test_a_kind_that_is_not_there_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"][3] = "mamba"
    with pytest.raises(ValueError, match=r"does not implement layer_types \{'mamba'\}"):
        zoo.abstract(config)

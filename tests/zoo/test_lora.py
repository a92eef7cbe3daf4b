"""Adapters in a notebook, as docs/adapters.md has them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from tests.conftest import TINY
from tests.long_forms import full_but
import zoo
from zoo import __main__ as looking
from zoo.parts import adapted

TOKENS = jnp.array([[5, 17, 300, 2, 9, 44, 81]])


def nats(model, tokens):
    logps = jax.nn.log_softmax(model(tokens)[:, :-1])
    return -jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1).mean()


def trained(model, steps=8):
    graph, own, frozen = zoo.lora.parted(model)
    adam = optax.adam(1e-2)

    @jax.jit
    def step(own, frozen, state):
        loss = lambda own: nats(zoo.lora.joined(graph, own, frozen), TOKENS)
        value, gradient = jax.value_and_grad(loss)(own)
        changes, state = adam.update(gradient, state)
        return optax.apply_updates(own, changes), state, value

    state, values = adam.init(own), []
    for _ in range(steps):
        own, state, value = step(own, frozen, state)
        values.append(float(value))
    return zoo.lora.joined(graph, own, frozen), values


@pytest.mark.parametrize(
    ("frozen", "dora"), full_but([(None, False), (None, True), ("nf4", False)], (None, False))
)
def test_new_adapters_are_trained_saved_and_read(frozen, dora, tmp_path):
    base = zoo.load(TINY / "model", frozen=frozen)
    model = zoo.lora.with_adapters(
        base, rank=4, alpha=8, targets=["q_proj", "down_proj"], dora=dora
    )
    np.testing.assert_allclose(model(TOKENS), base(TOKENS), atol=1e-5)
    learnt, values = trained(model)
    assert values[-1] < values[0] - 0.5
    kept = zoo.lora.parted(learnt)[2]
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(zoo.lora.parted(model)[2]), strict=True):
        np.testing.assert_array_equal(a, b)  # the frozen weights, and the scales
    zoo.save_adapter(learnt, tmp_path / "adapter")
    told = looking.told(str(tmp_path / "adapter"))
    kind = "DoRA" if dora else "LoRA"
    assert f"adapters, {kind} of rank 4 and alpha 8, alpha / rank\nmodules     " in told
    for words in ("q_proj", "down_proj", f"beside      {TINY}/model", "python -m zoo merge"):
        assert words in told
    again = zoo.load(TINY / "model", adapter=tmp_path / "adapter")
    np.testing.assert_allclose(again(TOKENS), learnt(TOKENS), atol=1e-5)
    more, values = trained(again, steps=2)  # and what is read is trained on
    assert values[0] == pytest.approx(float(nats(learnt, TOKENS)), abs=1e-5)
    assert adapted.is_adapted(more.blocks.down.get_value() if hasattr(more.blocks, "down")
                              else more.blocks.mlp.down.get_value())  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"layers": 1}, {"layers_to_transform": 1}),
        ({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},) * 2,
    ],
)
def test_peft_has_as_many_in_the_same_places(tmp_path, ours, theirs):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    own = transformers.AutoModelForCausalLM.from_pretrained(TINY / "model")
    targets = ["q_proj", "v_proj"]
    said = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **theirs)
    wanted = peft.get_peft_model_state_dict(peft.get_peft_model(own, said))
    model = zoo.lora.with_adapters(
        zoo.load(TINY / "model"), rank=4, alpha=8, targets=targets, **ours
    )
    zoo.save_adapter(model, tmp_path / "adapter")
    found = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name: x.shape for name, x in found.items()} == {
        name: tuple(x.shape) for name, x in wanted.items()
    }


def test_adapters_that_are_not_finite_are_not_written(tmp_path):
    model = zoo.lora.with_adapters(zoo.load(TINY / "model"), rank=2, targets=["q_proj"])
    graph, own, frozen = zoo.lora.parted(model)
    own = jax.tree.map(lambda x: x.at[0].set(jnp.nan), own)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.lora_A.weight holds"):
        zoo.save_adapter(zoo.lora.joined(graph, own, frozen), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_what_has_none_or_has_them_is_refused():
    model = zoo.load(TINY / "model")
    with pytest.raises(ValueError, match=r"no adapters: zoo.lora.with_adapters gives it new ones"):
        zoo.lora.parted(model)
    with pytest.raises(ValueError, match="q_prj"):
        zoo.lora.with_adapters(model, rank=4, targets=["q_prj"])
    with pytest.raises(ValueError, match="the model has adapters"):
        some = dict(rank=4, targets=["q_proj"])
        zoo.lora.with_adapters(zoo.lora.with_adapters(model, **some), **some)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (dict(rank=0), "rank=0: adapters have a whole number"),
        (dict(rank=-1), "rank=-1: "),
        (dict(rank=4, alpha=float("nan")), "alpha=nan: what adapters add"),
        (dict(rank=4, alpha=0), "alpha=0: "),
        (dict(rank=4, rank_pattern={"q_proj": 0}), "q_proj=0: adapters have a whole number"),
        (dict(rank=4, alpha_pattern={"q_proj": -1}), "q_proj=-1: what adapters add"),
        (dict(rank=4, rank_pattern={"q_prj": 2}), "q_prj"),
        (dict(rank=4, layers=[True]), r"layers=\[True\]: numbers of layers in a list"),
        (dict(rank=4, layers=[9]), "layers names layer 9, and the model has 4"),
    ],
)
def test_numbers_that_adapters_cannot_have_are_refused(how, told):
    with pytest.raises(ValueError, match=told):
        zoo.lora.with_adapters(zoo.load(TINY / "model"), **how)


def test_one_name_may_be_given_as_in_peft():
    count = lambda **how: len(jax.tree.leaves(zoo.lora.parted(
        zoo.lora.with_adapters(zoo.load(TINY / "model"), rank=2, **how))[1]))  # fmt: skip
    assert count(targets="all-linear") == count() == 14
    assert count(targets="q_proj") == count(targets=r".*\.q_proj") == 2
    assert count(exclude="q_proj") == 12


def test_adapters_of_every_dtype_are_read_beside_weights_that_hold_it(tmp_path):
    """float32 holds what was trained in 16 bits; these two kinds do not hold each other."""
    dtypes = ("float32", "bfloat16", "float16")
    base = zoo.load(TINY / "model")
    zoo.save(base, tmp_path / "base", dtype=jnp.float32)
    other = zoo.load(tmp_path / "base")
    other.norm.scale[...] += 0.5
    zoo.save(other, tmp_path / "other", dtype=jnp.float32)
    for dtype in dtypes:
        own = zoo.load(tmp_path / "base", dtype=dtype)
        model = zoo.lora.with_adapters(own, rank=2, targets="q_proj")
        zoo.save_adapter(model, tmp_path / dtype)
        for here in dtypes:
            zoo.load(tmp_path / "base", dtype=here, adapter=tmp_path / dtype)
        for here in {"float32", dtype}:
            with pytest.raises(ValueError, match="were trained on other weights"):
                zoo.load(tmp_path / "other", dtype=here, adapter=tmp_path / dtype)

"""Latent attention in generation: the latents themselves are asked, and gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.long_forms import full_but
from tests.zoo import twins
from tests.zoo.test_peft import with_adapters
import zoo
from zoo.parts import keeping, mixing, spans
from zoo.targets import Lora


@pytest.fixture(scope="module")
def plain():
    return twins.untrained("deepseek_v2", next(iter(twins.TWINS["deepseek_v2"])))


def of_few_bits(model, folder):
    zoo.save(model, folder, dtype=jnp.float32)
    return zoo.load(folder, frozen="int8")


KINDS = {
    "plain": lambda model, _: model,
    "lora": lambda model, _: with_adapters(model, Lora(4, 8.0, targets=("kv_b_proj", "o_proj"))),
    "dora": lambda model, _: with_adapters(model, Lora(4, 8.0, targets=("kv_b_proj",), dora=True)),
    "int8": of_few_bits,
}


@pytest.mark.parametrize("kind", full_but(KINDS, "plain"))
def test_a_further_token_has_the_logits_of_the_whole_text(plain, kind, tmp_path):
    model = KINDS[kind](plain, tmp_path)
    ids = jnp.asarray(np.random.default_rng(0).integers(3, 90, (2, 9)))
    expected = model(ids)
    lengths = jnp.array([5, 5])
    forward = jax.jit(keeping.forward)
    _, read = forward(model, ids[:, :5], spans.causal(2, 5, lengths), keeping.blank(model, 2, 8))
    kept = keeping.begun(model, read, 1, 4)
    prompts = {kind: mixing.Prompts(some, lengths) for kind, some in read.items()}
    for at in range(5, 9):
        where = spans.last(jnp.array([at, at]))
        hidden, kept = forward(model, ids[:, at : at + 1], where, kept, prompts)
        off = jnp.abs(model.unembed(hidden)[:, 0] - expected[:, at]).max()
        assert off <= 1e-5 * jnp.abs(expected).max()


def test_a_further_token_makes_no_keys_of_the_others(plain):
    """What a longer prompt adds to its work is less than they would take."""

    def work(S):
        lengths, forward = jnp.array([S]), jax.jit(keeping.forward)
        read = keeping.blank(plain, 1, S)
        prompts = {kind: mixing.Prompts(some, lengths) for kind, some in read.items()}
        kept = keeping.begun(plain, read, 1, 8)
        given = jnp.zeros((1, 1), jnp.int32), spans.last(lengths), kept, prompts
        return forward.lower(plain, *given).compile().cost_analysis()["flops"]

    sizes = plain.config.sizes_of("dense")
    keys = 2 * plain.config.kv_lora_rank * sizes["N"] * sizes["Q"]  # of one token, in one layer
    assert work(1024) - work(64) < 960 * keys * len(plain.config.kinds) / 4

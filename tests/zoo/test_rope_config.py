"""A config.json that speaks of ropes in two places: as in transformers, or refused."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest

from tests.long_forms import full_but
from tests.zoo import twins
import zoo
from zoo import gemma3_text, llama, olmo3
from zoo.parts import hf_keys, rope, spans

BASE = dict(
    model_type="llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4,
)  # fmt: skip
PLAIN = dict(rope_type="default", rope_theta=10_000.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)


def test_rope_scaling_added_beside_rope_parameters_is_what_counts():
    """Model cards say: for long texts add this to config.json."""
    read = llama.Config.from_hf(BASE | dict(rope_parameters=PLAIN, rope_scaling=YARN))
    assert read.rope_parameters == rope.Rope(
        1e4, "yarn", factor=4.0, original_max_position_embeddings=16
    )
    read = llama.Config.from_hf(BASE | dict(rope_parameters=PLAIN, rope_scaling={}))
    assert read.rope_parameters == rope.Rope(1e4)


def test_a_base_that_rope_scaling_would_take_away_is_refused():
    asked = BASE | dict(rope_parameters=PLAIN | dict(rope_theta=5e5), rope_scaling=YARN)
    with pytest.raises(ValueError, match=r"rope_theta would be 10000.0, and not the 500000.0 of"):
        llama.Config.from_hf(asked)
    assert llama.Config.from_hf(asked | dict(rope_theta=5e5)).rope_parameters.rope_theta == 5e5


def test_an_original_length_beside_the_rope_counts_for_more_than_one_inside():
    asked = BASE | dict(rope_scaling=YARN, original_max_position_embeddings=32)
    assert llama.Config.from_hf(asked).rope_parameters.original_max_position_embeddings == 32


def test_what_no_rope_depends_on_is_named_and_ignored(caplog):
    """The YaRN models of its authors say `finetuned`, vLLM's examples `extrapolation_factor`."""
    hf_keys.say_ignored.cache_clear()
    plain = llama.Config.from_hf(BASE | dict(rope_scaling=YARN))
    beside = dict(finetuned=True, extrapolation_factor=1.0)
    assert llama.Config.from_hf(BASE | dict(rope_scaling=YARN | beside)) == plain
    assert "no known implementation reads 'extrapolation_factor', 'finetuned'" in caplog.text
    with pytest.raises(ValueError, match=r"'yarn' has \['short_mscale'\], which it does not take"):
        llama.Config.from_hf(BASE | dict(rope_scaling=YARN | dict(short_mscale=1.2)))
    with pytest.raises(ValueError, match=r"'linear' lacks \['factor'\]"):
        llama.Config.from_hf(BASE | dict(rope_scaling=dict(type="linear")))


def test_of_two_ropes_rope_scaling_changes_the_full_layers():
    two = BASE | dict(layer_types=["sliding_attention", "full_attention"])
    linear = dict(rope_type="linear", factor=8.0)
    read = gemma3_text.Config.from_hf(
        two | dict(rope_scaling=linear, rope_parameters=dict(full_attention=dict(rope_theta=3e5)))
    )
    assert read.rope_parameters == rope.TwoRopes(
        rope.Rope(3e5, "linear", factor=8.0), rope.Rope(1e4)
    )
    with pytest.raises(ValueError, match=r"'default' has \['factor'\]"):  # of which it says nothing
        gemma3_text.Config.from_hf(two | dict(rope_scaling=dict(type="linear", factor=8.0)))
    with pytest.raises(ValueError, match=r"disagree about what rope_theta 50000.0 means"):
        olmo3.Config.from_hf(two | dict(rope_theta=5e4))
    with pytest.raises(ValueError, match="rope_local_base_freq"):
        olmo3.Config.from_hf(two | dict(rope_local_base_freq=5e4))


# Of which the slowest pair that turns as before lies beyond the last pair that there is.
STEEP = YARN | dict(
    rope_theta=10.0, beta_fast=2000.0, beta_slow=1.0, original_max_position_embeddings=4096
)


def test_yarn_has_no_pair_beyond_the_last():
    """Head of 8: pairs 0 to 3 of a ramp from 0 to 7, not to 12; each 1 - 3/4 ramp of 10^(-i/4)."""
    steep = llama.Config.from_hf(BASE | dict(rope_scaling=STEEP)).rope_parameters
    cos, sin = rope.turn(steep, 8, spans.causal(1, 2))
    angles = np.arctan2(sin, cos)[0, 1, 0]
    np.testing.assert_allclose(angles, [1.0, 0.50209, 0.24847, 0.12067], atol=1e-5)


# What stands in the three places, and what may stand there.
LINEAR = dict(rope_type="linear", factor=2.0)
INSIDE = {
    "rope_parameters": [
        None, {}, PLAIN, dict(rope_theta=7e4), YARN | dict(rope_theta=1e4), LINEAR,
        {"type": "linear", "factor": 2.0}, PLAIN | dict(partial_rotary_factor=0.5),
        dict(full_attention=dict(rope_theta=3e5), sliding_attention=dict(rope_theta=2e4)),
        dict(full_attention=YARN | dict(rope_theta=3e5)), dict(sliding_attention=PLAIN),
    ],
    "rope_scaling": [
        None, {}, YARN, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"type": "yarn", **LINEAR}, LINEAR | dict(rope_theta=9e4), dict(rope_type="default"),
        dict(rope_type="yarn", factor=4.0), twins.LLAMA3["rope_parameters"], STEEP,
    ],
    "beside": [
        {}, dict(rope_theta=5e4), dict(rope_theta=5e4, rope_local_base_freq=777.0),
        dict(original_max_position_embeddings=32), dict(partial_rotary_factor=1.0),
    ],
}  # fmt: skip


OF_TWO = ("gemma3_text", "olmo3", "gemma4_text", "gemma4_unified_text")  # kinds of layers
OWN = ("llama", "gemma3_text", "olmo3", "phi3", "gpt_oss")  # the others read as llama does
# Two have no ropes. Mistral 4's own module turns as much of a head as the file happens to say, and
# its model fails unless that is the part which it turns: its twins have all of its real ropes.
FAMILIES = [one for one in twins.TWINS if one not in ("gpt2", "nemotron_h", "mistral4")]
MARKED = full_but(FAMILIES, *OWN)


@pytest.mark.parametrize("family", MARKED)
def test_every_combination_turns_as_in_transformers_or_is_refused(family):
    """The angles of transformers' own module, which is all that its model knows of them."""
    pytest.importorskip("torch")
    first = {k: v for k, v in next(iter(twins.TWINS[family].values())).items() if "rope" not in k}
    base = twins.SIZES | {"head_dim": 8} | first
    if any(field.name == "qk_rope_head_dim" for field in dataclasses.fields(config_of(family))):
        base["qk_rope_head_dim"] = 8
    if family in OF_TWO:
        kinds = ["sliding_attention", "full_attention"]
        base |= {"layer_types": kinds, "num_hidden_layers": 2}
    equal = 0
    for new, old, beside in itertools.product(*INSIDE.values()):
        said = base | {"rope_parameters": new, "rope_scaling": old} | beside
        said = {key: value for key, value in said.items() if value is not None}
        try:
            config = zoo.ARCHITECTURES[family].Config.from_hf(said)
        except ValueError:
            continue
        ropes = config.rope_parameters
        ours = [ropes] if isinstance(ropes, rope.Rope) else [*vars(ropes).values()]
        if old == {} and isinstance(ropes, rope.TwoRopes):
            continue  # of which transformers makes a KeyError where there is nothing to change
        try:
            original = turns_of_transformers(family, said)
        except KeyError:  # it looks for a kind of layer that the file does not name
            assert family in ("gemma4_text", "gemma4_unified_text")
            continue
        widths = turned(config)
        for one, width, theirs in zip(ours, widths[: len(ours)], original, strict=True):
            for found, expected in zip(
                rope.turn(one, width, spans.causal(1, 70)), theirs, strict=True
            ):
                np.testing.assert_allclose(found[0, :, 0], expected, atol=2e-5, err_msg=str(said))
        equal += 1
    least = 7 if family.startswith("gemma4") else 15 if family in (*OF_TWO, "phi3") else 80
    assert equal > least


def config_of(family):
    return zoo.ARCHITECTURES[family].Config


def turned(config):
    """How wide the part of a head is that is turned; in full layers, and in the others."""
    width = getattr(config, "qk_rope_head_dim", None) or config.head_dim
    return getattr(config, "global_head_dim", None) or width, width


def turns_of_transformers(family, said):
    """Cosine and sine of 70 positions, one half of each; of the full layers, then the others."""
    import importlib

    import torch
    import transformers

    package = family.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    every = {name for name in dir(module) if name.endswith("RotaryEmbedding")}
    (kind,) = {name for name in every if "Text" in name} or every  # the others are of images
    config = transformers.CONFIG_MAPPING[family](**copy.deepcopy(said))
    turning, x, at = getattr(module, kind)(config), torch.zeros(1, 70, 4), torch.arange(70)[None]
    of = ["full_attention", "sliding_attention"] if family in OF_TWO else []
    with torch.no_grad():
        turns = [turning(x, at, one) for one in of] or [turning(x, at)]
    if torch.is_tensor(turns[0]):  # as complex numbers
        return [[turn.real[0].numpy(), turn.imag[0].numpy()] for turn in turns]
    step = 2 if family == "cohere2" else 1  # whose halves are one in the other
    some = lambda part: part.shape[-1] if family == "gpt_oss" else part.shape[-1] // 2
    return [[part[0, :, ::step][:, : some(part)].numpy() for part in turn] for turn in turns]

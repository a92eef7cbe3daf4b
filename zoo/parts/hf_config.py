"""Reads a `config.json` into the Config of an architecture; no key is dropped silently.

A key is a field of the Config, or fixed (the file implements one value of it), or ignored (it does
not change the logits). Any other is refused, by name and value, if some implementation reads it,
and otherwise reported once and ignored.
"""

from collections.abc import Mapping
import dataclasses
import types
import typing
from typing import Any, ClassVar, TypeVar

from jaxtyping import Int
import numpy as np

from checkpoints_io.errors import BadInput
from checkpoints_io.quantised import is_read
from zoo.parts import hf_keys, rope, rope_config

# The values of `layer_types` in most families.
SLIDING, FULL = "sliding_attention", "full_attention"
QUANTISED = "quantization_config"
MOST_COUNTED = 10_000  # layers or experts, before the weights have been checked
ALL = 2**30  # as a window: wider than any text

Own = TypeVar("Own", bound="Config")  # the Config of one architecture


@dataclasses.dataclass(frozen=True)
class Config:
    """The base class of every architecture's Config; its fields are keys of a `config.json`."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]  # what transformers calls the model
    fixed: ClassVar[Mapping[str, object]] = {}  # keys of which the file implements one value
    ignored: ClassVar[frozenset[str]] = frozenset()  # keys that change no logit
    # The defaults of transformers for keys that a file omits.
    assumed: ClassVar[Mapping[str, object]] = {}
    turns_a_part: ClassVar[bool] = False  # whether rope covers only part of each head by default
    layers_may_be: ClassVar[frozenset[str]] = frozenset({SLIDING, FULL})  # in `layer_types`

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        return sizes(self)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of block of every layer; empty if all layers are alike."""
        return ()

    @property
    def longest_text(self) -> int | None:
        """The longest text in tokens that is computed as in the original model; None: any."""
        return self.sizes.get("M")

    @property
    def experts_of_a_token(self) -> int:
        """How many experts each token is routed to; 1 if a layer has a single MLP."""
        return getattr(self, "num_experts_per_tok", 1)

    def sizes_of(self, kind: str) -> dict[str, int]:
        """The axis sizes in layers of one kind: L counts only these, and head widths may differ."""
        return self.sizes | ({"L": self.kinds.count(kind)} if self.kinds else {})

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Translates a `config.json` to the names of the fields, with `rope_parameters` a Rope."""
        return rope_config.read(hf)

    @classmethod
    def from_hf(cls: type[Own], hf: dict[str, object]) -> Own:
        """Reads a `config.json`.

        Raises:
          ValueError: it lacks a key, or asks for something the architecture does not implement.
        """
        return read(cls, cls.respelled(hf))

    def to_hf(self) -> dict[str, object]:
        """The `config.json` of this Config, for a model that was not loaded from a folder."""
        return written(self)


def read(cls: type[Own], hf: Mapping[str, object]) -> Own:
    """The Config `cls` of a `config.json`, in the spelling of transformers 4 or 5.

    Raises:
      ValueError: it lacks a key, or asks for something the file does not implement.
    """
    kind, fixed, ignored = cls.model_type, cls.fixed, cls.ignored
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    hf = {key: value for key, value in hf.items() if key not in hf_keys.IGNORED | ignored}
    _refuse_quantised(hf, kind)
    hf.pop(QUANTISED, None)
    own = fields.keys() | fixed.keys()
    own |= hf_keys.without_effect(hf)
    others = {k: v for k, v in hf.items() if k not in own and v is not None}
    others = {k: v for k, v in others.items() if v != hf_keys.NEUTRAL.get(k, ...)}
    refused = {key: hf[key] for key, ours in fixed.items() if hf.get(key) not in (None, ours)}
    refused |= {key: value for key, value in others.items() if key in hf_keys.READ}
    if refused:
        raise BadInput(f"zoo/{kind}.py does not implement {refused} of config.json")
    if nobodys := sorted(others):
        hf_keys.say_ignored(kind, tuple(nobodys))
    given = {key: value for key, value in hf.items() if key in fields and value is not None}
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    if odd := {k: v for k, v in given.items() if not _is(fields[k], v)}:
        raise BadInput(f"config.json: {odd} are not values a {kind} can have")
    given = {key: v for key, v in cls.assumed.items() if key not in hf} | given
    heads, width = given.get("num_attention_heads"), given.get("hidden_size")
    if "num_key_value_heads" in fields and heads:
        given.setdefault("num_key_value_heads", heads)
    if "head_dim" in fields and isinstance(heads, int) and isinstance(width, int):
        given.setdefault("head_dim", width // heads)
    missing = sorted(k for k in fields if given.get(k) is None and not _may_be_none(fields[k]))
    if missing:
        raise BadInput(f"config.json lacks {missing}, which a {kind} needs")
    config = cls(**{name: _made(kind, given.get(name)) for name, kind in fields.items()})
    _check_sizes(config)
    return config


def written(config: Config) -> dict[str, object]:
    """A `config.json` for a model that was not read from one, in the spelling of transformers 5."""
    said: dict[str, object] = {
        "architectures": [config.architecture],
        "model_type": config.model_type,
    }
    # Without a source these ids are unknown, and the defaults of transformers would be wrong.
    said |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, rope.Rope | rope.TwoRopes):
            said |= rope_config.written(value, part=config.turns_a_part)
        else:
            said[field.name] = list(value) if isinstance(value, tuple) else value
    return said | dict(config.fixed)


def sizes(config: Any) -> dict[str, int]:
    """The size of every axis, by its letter, for a config with the keys of a Llama."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": getattr(config, "intermediate_size", 0),  # 0: experts have widths of their own
        "L": config.num_hidden_layers,
        "N": config.num_attention_heads,
        "K": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "H": getattr(config, "head_dim", 0),  # 0: parts of a head have widths of their own
    }


def filling(config: Any) -> int:
    """The width of a head if all heads together are as wide as the model.

    Raises:
      ValueError: the width does not divide.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        raise BadInput(
            f"config.json: hidden_size {width} must be a multiple of num_attention_heads {heads}"
        )
    return width // heads


def count_of(hf: Mapping[str, object], key: str = "num_hidden_layers") -> int | None:
    """Reads a key that sets the length of a list or loop; None if it is missing.

    Raises:
      ValueError: the number is too large for any model.
    """
    count = hf.get(key)
    if isinstance(count, int | float) and count > MOST_COUNTED:
        raise BadInput(f"config.json: {key} is {count}, and may be {MOST_COUNTED} at most")
    return count if isinstance(count, int) and not isinstance(count, bool) else None


def every(hf: dict[str, object], period: object, others: str = SLIDING) -> dict[str, object]:
    """Adds `layer_types` if a file lacks it: every `period`th layer has full attention."""
    count = count_of(hf)
    if hf.get("layer_types") or count is None or not isinstance(period, int):
        return hf
    return hf | {"layer_types": [others if i % period else FULL for i in range(1, count + 1)]}


def qwen_windows(hf: dict[str, object]) -> dict[str, object]:
    """Adds `layer_types` if a Qwen file only counts the layers without a sliding window."""
    hf, slides = switched(hf, "use_sliding_window")
    first = hf.pop("max_window_layers", 28)
    hf["sliding_window"] = hf.get("sliding_window", 4096) if slides else None
    count = count_of(hf)
    if not hf.get("layer_types") and count is not None and isinstance(first, int):
        slides = hf["sliding_window"] is not None
        hf["layer_types"] = [SLIDING if slides and i >= first else FULL for i in range(count)]
    return hf


def switched(hf: Mapping[str, object], key: str) -> tuple[dict[str, object], bool]:
    """Removes a boolean switch from a config.json and returns its value, False if missing.

    Raises:
      ValueError: it is neither true nor false.
    """
    rest = dict(hf)
    value = rest.pop(key, None) or False
    if not isinstance(value, bool):
        raise BadInput(f"config.json: {key} should be true or false, not {value!r}")
    return rest, value


def windows(config: Any) -> Int[np.ndarray, " L"] | None:
    """The window of each layer, the token itself included; None if all have full attention."""
    if SLIDING not in config.layer_types:
        return None
    width = config.sliding_window
    return np.array([width if kind == SLIDING else ALL for kind in config.layer_types], np.int32)


def sliding(config: Any) -> Int[np.ndarray, " L"]:
    """An array with 1 for each sliding-window layer and 0 for the others."""
    return np.array([kind == SLIDING for kind in config.layer_types], np.int32)


def _refuse_quantised(hf: Mapping[str, object], kind: str) -> None:
    """Refuses quantised weights, known by the config keys of several tools or by another file."""
    files = [key for key in hf if key.endswith(".json")]  # which `hf_folder.read_config` found
    for key in (QUANTISED, "compression_config", "quantization", *files):
        if told := hf.get(key):
            if isinstance(told, dict):
                # bitsandbytes stores GPT-2's matrices transposed relative to GPT-2's files.
                if key == QUANTISED and kind != "gpt2" and is_read(told):
                    continue
                told = told.get("quant_method") or told.get("quant_algo") or told
            raise BadInput(
                f"the weights are quantised ({key}: {told!r}), and the zoo reads none of that for "
                f"{kind}: take the checkpoint they were made from"
            )


def _check_sizes(config: Config) -> None:
    """Checks that sizes divide each other and that lists name every layer."""
    count = config.sizes
    if count["N"] % count["K"]:
        raise BadInput(
            f"config.json: num_attention_heads {count['N']} must be a multiple of "
            f"num_key_value_heads {count['K']}"
        )
    for kind, own in ((kind, config.sizes_of(kind)) for kind in sorted(set(config.kinds))):
        if own["N"] % own["K"]:
            raise BadInput(
                f"config.json: {own['N']} heads of a {kind} layer must be a multiple of its "
                f"{own['K']} key heads"
            )
    if isinstance(ropes := getattr(config, "rope_parameters", None), rope.Rope):
        rope.check_head(count["H"], ropes)
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        listed = getattr(config, name, None)
        if listed is not None and len(listed) != count["L"]:
            raise BadInput(
                f"config.json: {name} names {len(listed)} layers, and the model has {count['L']}"
            )
    odd = set(getattr(config, "layer_types", None) or ()) - config.layers_may_be
    if odd:
        raise BadInput(f"zoo/{config.model_type}.py does not implement layer_types {odd}")
    if SLIDING in (getattr(config, "layer_types", None) or ()) and not getattr(
        config, "sliding_window", None
    ):
        raise BadInput("config.json: some layer_types slide, and there is no sliding_window")


def _made(kind: object, value: object) -> object:
    """Converts a JSON value to its field's type: JSON may say 1 for 1.0."""
    wants_float = kind is float or float in typing.get_args(kind)
    return float(value) if wants_float and isinstance(value, int) else value


def _may_be_none(kind: object) -> bool:
    return types.NoneType in typing.get_args(kind)


def _is(kind: Any, value: object) -> bool:
    """Whether a value has this type and, if a number, is above 0 and of plausible size."""
    if isinstance(kind, types.UnionType):
        return any(_is(one, value) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        (one, _) = typing.get_args(kind)
        return isinstance(value, tuple) and all(_is(one, v) for v in value)
    if kind in (int, float):
        right = isinstance(value, int if kind is int else int | float)
        return right and not isinstance(value, bool) and 0 < value <= rope_config.MOST[kind]
    return isinstance(value, kind)

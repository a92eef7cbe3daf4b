"""Reads and writes the rope keys of a config.json, in the spelling of transformers 4 or 5."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from checkpoints_io.errors import BadInput
from zoo.parts import hf_keys, rope

# Kind of rope -> the keys it needs, and those it may have.
KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "proportional": (set(), {"factor", "partial_rotary_factor"}),
    "dynamic": ({"factor", "max_position_embeddings"}, set()),
    "llama3": (
        {
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        },
        set(),
    ),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
    "longrope": (
        {"short_factor", "long_factor", "factor", "original_max_position_embeddings"},
        {"attention_factor"},
    ),
}
# Some rope depends on each of these; no implementation reads any other.
KNOWN = {
    "rope_theta", "partial_rotary_factor", "alpha", "mrope_section", "short_mscale", "long_mscale",
    "llama_4_scaling_beta", "full_attention", "sliding_attention",
}.union(*(needed | possible for needed, possible in KEYS.values()))  # fmt: skip
WHOLE = {"original_max_position_embeddings", "max_position_embeddings"}
LISTS = {"short_factor", "long_factor"}
TWO = {"full_attention", "sliding_attention"}
ABOVE_ONE = {"rope_theta", "original_max_position_embeddings"}  # their logarithms are divisors
# No model has numbers above these, which would make some arithmetic fail.
MOST = {int: 2**31 - 1, float: 1e30}


def read(
    hf: Mapping[str, object], theta: float = 10_000.0, *, partial: bool = False
) -> dict[str, object]:
    """Replaces all rope keys of a config.json by one Rope.

    `theta` is the base where the file gives none; `partial` architectures may rotate a part of
    each head. Where `rope_parameters` and `rope_scaling` are both there, the latter
    alone counts, as in transformers.

    Raises:
      ValueError: it asks for a kind that is not implemented, or lacks what the kind needs.
    """
    rest = dict(hf)
    new, old = rest.pop("rope_parameters", None), rest.pop("rope_scaling", None)
    keys = ["rope_theta", "original_max_position_embeddings", "partial_rotary_factor"]
    beside = {key: rest.pop(key, None) for key in keys}
    beside["max_position_embeddings"] = hf.get("max_position_embeddings")
    one = _one(old or new or {}, beside, theta, partial)
    if old and isinstance(new, dict):
        _refuse_lost(new, one)
    return rest | {"rope_parameters": one}


def of_text(hf: Mapping[str, object]) -> dict[str, object]:
    """Drops the image keys of ropes from a config.json: in text all three positions are equal."""
    found = dict(hf)
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(ropes := hf.get(key), dict):
            own = {
                k: v for k, v in ropes.items() if k not in ("mrope_section", "mrope_interleaved")
            }
            found[key] = {k: "default" if v == "mrope" else v for k, v in own.items()}
    return found


def _refuse_lost(new: Mapping[str, object], one: rope.Rope) -> None:
    """Refuses a `rope_scaling`, added as model cards advise, that would discard the rope's base."""
    for key in ("rope_theta", "partial_rotary_factor"):
        value, used = new.get(key), getattr(one, key)
        if value is not None and value != used:
            raise BadInput(
                f"config.json has both rope_parameters and rope_scaling, and transformers reads "
                f"the latter alone: {key} would be {used}, and not the {value!r} of "
                f"rope_parameters. Write {key} into rope_scaling, or give rope_parameters alone"
            )


def read_two(
    hf: Mapping[str, object], theta: float, sliding_theta: float | None = None
) -> dict[str, object]:
    """Like `read`, for an architecture whose sliding layers have a rope of their own.

    Old files scale the full layers only: what `rope_scaling` says joins what `rope_parameters` says
    of them. With a `sliding_theta` the sliding base may be named `rope_local_base_freq`; without
    one, `rope_theta` beside them means the full layers to transformers 5 and all of them to 4.

    Raises:
      ValueError: as in `read`; or a rope depends on the length of the text.
    """
    rest = dict(hf)
    new, old = rest.pop("rope_parameters", None), rest.pop("rope_scaling", None)
    base = rest.pop("rope_theta", None)
    local = rest.pop("rope_local_base_freq", None) if sliding_theta else None
    if new is None:
        new = {kind: {"rope_type": "default"} for kind in TWO}
    if isinstance(new, dict):  # transformers 5.3 wrote two keys too many
        new = {k: v for k, v in new.items() if v is not None and (k, v) != ("rope_type", "default")}
    if not isinstance(new, dict) or new.keys() - TWO:
        raise BadInput(f"config.json: rope_parameters should name two kinds of layer, not {new}")
    full, sliding = (new.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    if old:
        if not isinstance(old, dict) or not isinstance(full, dict) or not full:
            raise BadInput(
                f"config.json: rope_scaling should be an object beside rope_parameters of "
                f"full_attention, which it changes, not {old!r} beside {new!r}"
            )
        full = full | old
    beside = {"max_position_embeddings": hf.get("max_position_embeddings")}
    full = _one(full, beside | {"rope_theta": base}, theta)
    sliding = _one(sliding, beside | {"rope_theta": local}, sliding_theta or theta)
    if not sliding_theta and base is not None and sliding.rope_theta != full.rope_theta == base:
        raise BadInput(
            f"config.json: versions of transformers disagree about what rope_theta {base!r} means "
            "to the sliding layers: give rope_parameters with a rope_theta for full_attention "
            "and one for sliding_attention"
        )
    for one in (full, sliding):
        if one.rope_type in rope.BY_LENGTH:
            raise BadInput(
                f"the zoo does not implement rope_type {one.rope_type!r} for layers of two kinds"
            )
        if one.truncate is False:  # transformers looks for it elsewhere, and does not find it
            raise BadInput("the zoo does not implement truncate=False for layers of two kinds")
    return rest | {"rope_parameters": rope.TwoRopes(full, sliding)}


def _one(
    given: object, beside: Mapping[str, object], theta: float, partial: bool = False
) -> rope.Rope:
    if not isinstance(given, dict):
        raise BadInput(f"config.json: rope should be an object, not {given!r}")
    given = {key: value for key, value in given.items() if value is not None}
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)  # transformers 4.43 to 4.45 wrote both
    for key in ("mscale", "mscale_all_dim"):  # 0 means the same as no key
        if given.get(key) == 0:
            del given[key]
    if "mscale_all_dim" not in given:  # the other is relative to it
        given.pop("mscale", None)
    given.pop("attn_factor", None)  # another library's; transformers does not read it
    if not isinstance(kind, str) or kind not in KEYS:
        raise BadInput(f"the zoo does not implement rope_type {kind!r}, only {', '.join(KEYS)}")
    needed, possible = KEYS[kind]
    base = beside.get("rope_theta")
    given.setdefault("rope_theta", theta if base is None else base)
    for key in ("partial_rotary_factor", *WHOLE & needed):
        if beside.get(key) is not None:
            given.setdefault(key, beside[key])
    outside, longest = (beside.get(f"{of}max_position_embeddings") for of in ("original_", ""))
    if "original_max_position_embeddings" in needed and longest is not None:
        given.setdefault("original_max_position_embeddings", longest)
    if "original_max_position_embeddings" in needed and outside is not None:
        given["original_max_position_embeddings"] = outside  # overrides what is inside
    old: Any = given.get("original_max_position_embeddings")
    if kind == "longrope" and _is_right("", longest) and _is_right("", old):
        given.setdefault("factor", longest / old)
    if not partial and given.get("partial_rotary_factor") == 1:
        del given["partial_rotary_factor"]
    everywhere = {"rope_theta", "partial_rotary_factor"} if partial else {"rope_theta"}
    if nobodys := given.keys() - KNOWN:
        hf_keys.say_ignored("rope", tuple(sorted(nobodys)))
        given = {key: value for key, value in given.items() if key in KNOWN}
    if lacking := needed - given.keys():
        raise BadInput(f"config.json: rope of type {kind!r} lacks {sorted(lacking)}")
    if others := given.keys() - needed - possible - everywhere:
        raise BadInput(
            f"config.json: rope of type {kind!r} has {sorted(others)}, which it does not take; it "
            f"takes {sorted(needed | possible)}"
        )
    if odd := {key: value for key, value in given.items() if not _is_right(key, value)}:
        least = 1 if ABOVE_ONE & odd.keys() else 0
        raise BadInput(
            f"config.json: rope has {odd}: numbers must be above {least} and at most "
            f"{MOST[float]:g} ({MOST[int]} where they are whole)"
        )
    return rope.Rope(rope_type=kind, **{key: _made(key, value) for key, value in given.items()})


def _is_right(key: str, value: object) -> bool:
    if key == "truncate":
        return isinstance(value, bool)
    if key in LISTS:
        return isinstance(value, list) and all(_is_right("", v) for v in value)
    least, most = key in ABOVE_ONE, MOST[int if key in WHOLE else float]
    return isinstance(value, int | float) and not isinstance(value, bool) and least < value <= most


def _made(key: str, value: Any) -> Any:
    if key in LISTS:
        return tuple(map(float, value))
    return value if key == "truncate" else int(value) if key in WHOLE else float(value)


def written(ropes: rope.Rope | rope.TwoRopes, *, part: bool = False) -> dict[str, object]:
    """The rope keys of a config.json, in the spelling of transformers 5.

    With `part` they state a full rotation explicitly, since files that omit it mean a partial one.
    """
    if isinstance(ropes, rope.TwoRopes):
        full, sliding = _said(ropes.full_attention), _said(ropes.sliding_attention)
        return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
    said = _said(ropes, part)
    beside = {k: said.pop(k) for k in ("max_position_embeddings",) if k in said}
    return {"rope_parameters": said} | beside


def _said(one: rope.Rope, part: bool = False) -> dict[str, object]:
    items = {key: value for key, value in dataclasses.asdict(one).items() if value is not None}
    if one.partial_rotary_factor == 1 and not part:
        items.pop("partial_rotary_factor")
    return {key: list(v) if isinstance(v, tuple) else v for key, v in items.items()}

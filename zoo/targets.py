"""Selects the weights that get adapters by their HF names, as PEFT does."""

from collections.abc import Callable, Iterator, Mapping
import difflib
import functools
import math
import re
from typing import Any, NamedTuple

from flax import nnx

from checkpoints_io import hf_names
from checkpoints_io.errors import BadInput
from zoo.models import Model, hf_table, name_of, said_of
from zoo.parts import layers, text_half
from zoo.parts.adapted import lead_of

ALL_LINEAR = "all-linear"


class Lora(NamedTuple):
    """The adapters to add; names and meanings are those of PEFT's `LoraConfig`."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = (ALL_LINEAR,)  # suffixes of module names, or one regular expression
    exclude: tuple[str, ...] = ()  # likewise
    layers: tuple[int, ...] | None = None  # None: all of them
    rslora: bool = False  # scale by alpha / sqrt(rank), not alpha / rank
    dora: bool = False
    zero: str = "A"  # the factor that is initialised to 0
    rank_pattern: Mapping[str, int] = {}
    alpha_pattern: Mapping[str, float] = {}


class Site(NamedTuple):
    """A weight with adapters, and the rank and scale of each layer's adapter."""

    path: str  # ours
    axes: str  # of the weight: "L D N H"
    into: str  # axes that the product sums over, in the order of the file
    out: str  # axes of its output
    ranks: tuple[int, ...]  # of each layer; 0: it has none
    scales: tuple[float, ...]

    @property
    def lead(self) -> str:
        """The leading axes: L, and E if each expert has its own adapter."""
        return lead_of(self.axes, self.into, self.out)


def module_names(entry: hf_names.Entry, shape: tuple[int, ...]) -> Iterator[tuple]:
    """The HF names of a weight's modules, and the index of each in the weight."""
    for index, name in hf_names.of(entry, shape):
        yield index, name.removesuffix(".weight")


def sides(axes: str, entry: hf_names.Entry) -> tuple[str, str]:
    """The input and output axes of a weight's product, in the order of its file.

    Our weights have the same order, except that an axis of fused matrices (J) is an output.
    """
    first, second = hf_names.groups(entry.axes)[-2:]
    where = lambda group: min(axes.index(letter) for letter in group.split())
    if "J" in first or ("J" not in second and where(first) > where(second)):
        return second, first
    return first, second


Matrices = Mapping[str, tuple[nnx.Variable, hf_names.Entry]]  # by our paths


def linear(model: Model) -> Matrices:
    """The matrices of the blocks, by our paths, to which adapters can be attached."""
    table = hf_table(model)
    every = {name_of(path): param for path, param in nnx.to_flat_state(nnx.state(model))}
    return {
        path: (param, table[path])
        for path, param in every.items()
        if path.startswith("blocks.") and layers.is_matrix(param.axes)
    }


def sites(model: Model, lora: Lora) -> list[Site]:
    """The weights that `lora` selects, by the names in the Hugging Face files.

    Raises:
      ValueError: a target, an excluded name or a pattern matches nothing or is not a valid regular
        expression, or a layer does not exist.
    """
    choose, leave = _matcher(lora.targets, "targets"), _matcher(lora.exclude, "exclude")
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, setting):
            _compiled(pattern, setting)
    if not lora.targets:
        raise BadInput("adapter.targets is empty: name what gets adapters, or all-linear")
    count = model.config.sizes["L"]
    if odd := [i for i in lora.layers or () if not 0 <= i < count]:
        raise BadInput(f"adapter.layers names layer {odd[0]}, and the model has {count}")
    hf = said_of(model)
    met: set[str] = set()  # targets, excluded names and patterns that matched something
    names: set[str] = set()
    found = []
    for path, (param, entry) in linear(model).items():
        own = site(path, param.axes, entry, {}, param.shape[0])
        each: dict[int, tuple[int, float]] = {}
        in_one_tensor = "E" in own.lead and "{E}" not in entry.name
        # These need to be named: PEFT's all-linear has routers but no fused experts, and PEFT
        # refuses the output projection of a state space (X), as kernels bypass adapters there.
        is_apart = path.endswith("router") or in_one_tensor or "X" in own.into
        for (i, *_), name in module_names(entry, param.shape):
            names.add(name)
            called = text_half.spellings(hf, name)
            by, without = (set().union(*map(one, called)) for one in (choose, leave))
            if not by or (is_apart and by == {ALL_LINEAR}):
                continue
            met |= by | without
            if in_one_tensor and not without:
                raise BadInput(
                    f"{name} holds all experts of a layer in one tensor, and such take no adapters "
                    f"here: take {name.rpartition('.')[2]} out of adapter.targets, or into exclude"
                )
            number = entry.layers[i] if entry.layers is not None else i
            if not without and (lora.layers is None or number in lora.layers):
                each[i] = rank_and_scale(lora, called, met)
        if each:
            found.append(site(path, param.axes, entry, each, param.shape[0]))
    asked = [*lora.targets, *lora.rank_pattern, *lora.alpha_pattern]
    if not text_half.is_whole(hf):  # otherwise the exclusion may be of its tower
        asked += lora.exclude
    if idle := [name for name in asked if name not in met]:
        raise BadInput(_matches_nothing(idle[0], names, idle[0] in lora.targets))
    if not found:
        raise BadInput("adapter.exclude and adapter.layers leave no weight of adapter.targets")
    if lora.dora:
        refuse_experts(found, "adapter.dora: take them out by adapter.exclude")
    return found


def site(
    path: str,
    axes: str,
    entry: hf_names.Entry,
    each: Mapping[int, tuple[int, float]],
    count: int,
) -> Site:
    """The site of a weight of `count` layers, with rank and scale of `each` that has an adapter."""
    ranks, scales = zip(*(each.get(i, (0, 0.0)) for i in range(count)), strict=True)
    return Site(path, axes, *sides(axes, entry), ranks, scales)


def taken_for_experts(model: Model, found: list[Site]) -> str | None:
    """A module with adapters whose name PEFT would mistake for an expert's, if there is one.

    It is of a shared expert, or of a layer without experts: in many families PEFT 0.21 takes such
    names for those of experts, and loses the adapters.
    """
    names = lambda path: next(module_names(matrices[path][1], matrices[path][0].shape))[1]
    matrices = linear(model)
    is_of_experts = lambda path: "E" in matrices[path][0].axes.split()
    of_experts = {names(path).rpartition(".")[2] for path in matrices if is_of_experts(path)}
    beside = (names(site.path) for site in found if not is_of_experts(site.path))
    return next((name for name in beside if name.rpartition(".")[2] in of_experts), None)


def refuse_experts(found: list[Site], remedy: str) -> None:
    """Refuses DoRA magnitudes on experts.

    Raises:
      ValueError: some of these sites are experts.
    """
    if of_experts := [one.path for one in found if one.lead != "L"]:
        raise BadInput(f"experts ({of_experts[0]}) take no magnitudes, here or in PEFT: {remedy}")


def rank_and_scale(lora: Lora, called: tuple[str, ...], met: set[str]) -> tuple[int, float]:
    """The rank and the scale of a module, which may have several names (`called`).

    Patterns that match are added to `met`.

    Source of rsLoRA: https://arxiv.org/abs/2312.03732.
    """
    rank = _by_pattern(lora.rank_pattern, called, lora.rank, met)
    alpha = _by_pattern(lora.alpha_pattern, called, lora.alpha, met)
    return rank, float(alpha) / (math.sqrt(rank) if lora.rslora else rank)


def _by_pattern(
    patterns: Mapping[str, object], called: tuple[str, ...], otherwise: object, met: set[str]
) -> Any:
    """The value of the first pattern that matches a module's name, by PEFT's rules."""
    for pattern, value in patterns.items():
        if any(map(_ending(pattern).fullmatch, called)):
            met.add(pattern)
            return value
    return otherwise


@functools.cache  # a folder may name thousands of modules, and each is compared with all
def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})")


def _matcher(asked: tuple[str, ...], setting: str) -> Callable[[str], set[str]]:
    """A function from a module's name to the requested names (suffixes or a regex) it matches."""
    plain = [one for one in asked if one == ALL_LINEAR or re.fullmatch(r"[\w.]+", one)]
    if len(asked) > 1 and len(plain) < len(asked):
        odd = next(one for one in asked if one not in plain)
        raise BadInput(
            f"adapter.{setting} has {odd!r} among other names: a regular expression stands alone, "
            "and matches whole names, like .*\\.(q|v)_proj"
        )
    if asked and not plain:
        whole = _compiled(asked[0], setting)
        return lambda name: {asked[0]} if whole.fullmatch(name) else set()
    fits = lambda one, name: one == ALL_LINEAR or f".{name}".endswith(f".{one}")
    return lambda name: {one for one in asked if fits(one, name)}


def _compiled(pattern: str, setting: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise BadInput(
            f"adapter.{setting}={pattern!r} is not a regular expression: {error}"
        ) from error


def _matches_nothing(asked: str, names: set[str], is_target: bool) -> str:
    if not is_target and any(re.fullmatch(rf"(.*\.)?({asked})", name) for name in names):
        return f"{asked!r} of the adapter's settings matches none of the weights in adapter.targets"
    ends = sorted({name.rpartition(".")[2] for name in names})
    near = difflib.get_close_matches(asked, ends, 3, 0.5)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    if re.search(r"embed|lm_head|wte|wpe", asked):
        hint = ": embeddings and heads take no adapters here"
    return (
        f"{asked!r} of the adapter's settings matches no weight of the model{hint}; there are "
        f"{', '.join(ends)}, like {min(names)}"
    )

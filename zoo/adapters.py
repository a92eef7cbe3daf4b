"""Which weights of a model get adapters, and their first values.

Weights are chosen by the names that people know, those of the Hugging Face files, as PEFT chooses
them. A model with adapters is two trees: `trained`, the adapters, and `frozen`, all the rest;
`joined` makes the weights of the model of them.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import difflib
import functools
import math
import re
from typing import Any, NamedTuple

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
import numpy as np

from checkpoints_io import hf_weights
from checkpoints_io.errors import BadInput
from zoo.models import Model, hf_table, name_of
from zoo.parts import adapted, layers, sharding
from zoo.parts.adapted import Adapted, Adapter, lettered

ALL_LINEAR = "all-linear"


class Lora(NamedTuple):
    """Which adapters; names and meanings are those of PEFT's `LoraConfig`."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = (ALL_LINEAR,)  # ends of module names, or one regular expression
    exclude: tuple[str, ...] = ()  # likewise
    layers: tuple[int, ...] | None = None  # None: all of them
    rslora: bool = False  # the product is scaled by alpha / sqrt(rank), not alpha / rank
    dora: bool = False
    zero: str = "A"  # the factor that begins as 0
    rank_pattern: Mapping[str, int] = {}
    alpha_pattern: Mapping[str, float] = {}


class Site(NamedTuple):
    """A weight with adapters, and what the adapter of each of its layers is."""

    path: str  # ours
    axes: str  # of the weight: "L D N H"
    into: str  # what a product sums over, in the order of the file
    out: str  # what it makes
    ranks: tuple[int, ...]  # of each layer; 0: it has none
    scales: tuple[float, ...]


def module_names(entry: hf_weights.Entry, shape: tuple[int, ...]) -> Iterator[tuple]:
    """The modules of a weight by their HF names, and where in the weight each stands."""
    for index, name in hf_weights.hf_names(entry, shape):
        yield index, name.removesuffix(".weight")


def sides(axes: str, entry: hf_weights.Entry) -> tuple[str, str]:
    """The letters a weight sums over, and those it makes, in the order of its file.

    Ours stand in this order; but what is several things side by side (J) is what is made.
    """
    first, second = hf_weights.groups(entry.axes)[-2:]
    where = lambda group: min(axes.index(letter) for letter in group.split())
    if "J" in first or ("J" not in second and where(first) > where(second)):
        return second, first
    return first, second


def linear(model: Model) -> dict[str, tuple[nnx.Variable, hf_weights.Entry]]:
    """The matrices of the blocks by our paths: what may have adapters."""
    table = hf_table(model)
    every = {name_of(path): param for path, param in nnx.to_flat_state(nnx.state(model))}
    return {
        path: (param, table[path])
        for path, param in every.items()
        if path.startswith("blocks.") and layers.is_matrix(param.axes)
    }


def sites(model: Model, lora: Lora) -> list[Site]:
    """The weights that `lora` chooses, by the names of the Hugging Face files.

    Raises:
      ValueError: a target, an excluded name or a pattern matches nothing, or a layer is not there.
    """
    choose, leave = _matcher(lora.targets, "targets"), _matcher(lora.exclude, "exclude")
    if not lora.targets:
        raise BadInput("adapter.targets is empty: name what gets adapters, or all-linear")
    count = model.config.sizes["L"]
    if odd := [i for i in lora.layers or () if not 0 <= i < count]:
        raise BadInput(f"adapter.layers names layer {odd[0]}, and the model has {count}")
    met: set[str] = set()  # targets, excluded names and patterns that matched something
    names: set[str] = set()
    found = []
    for path, (param, entry) in linear(model).items():
        into, out = sides(param.axes, entry)
        layers: dict[int, tuple[int, float]] = {}
        for (i, *_), name in module_names(entry, param.shape):
            names.add(name)
            is_router = path.endswith("router")  # only by its name: PEFT's all-linear has it too
            if not (by := choose(name)) or (is_router and by == ALL_LINEAR):
                continue
            met.add(by)
            number = entry.layers[i] if entry.layers is not None else i
            if without := leave(name):
                met.add(without)
            elif lora.layers is None or number in lora.layers:
                layers[i] = _rank_and_scale(lora, name, met)
        if layers:
            each = [layers.get(i, (0, 0.0)) for i in range(param.shape[0])]
            found.append(Site(path, param.axes, into, out, *map(tuple, zip(*each, strict=True))))
    asked = [*lora.targets, *lora.exclude, *lora.rank_pattern, *lora.alpha_pattern]
    if idle := [name for name in asked if name not in met]:
        raise BadInput(_matches_nothing(idle[0], names))
    if lora.dora and (of_experts := [site.path for site in found if _lead(site) != "L"]):
        raise BadInput(
            f"adapter.dora: experts ({of_experts[0]}) take no magnitudes, here or in PEFT; add "
            "them to adapter.exclude"
        )
    if not found:
        raise BadInput("adapter.exclude and adapter.layers leave no weight of adapter.targets")
    return found


def _rank_and_scale(lora: Lora, name: str, met: set[str]) -> tuple[int, float]:
    rank = by_pattern(lora.rank_pattern, name, lora.rank, met)
    alpha = by_pattern(lora.alpha_pattern, name, lora.alpha, met)
    return rank, scale_of(rank, float(alpha), rslora=lora.rslora)


def scale_of(rank: int, alpha: float, *, rslora: bool) -> float:
    """What an adapter's product is multiplied by. Source of rsLoRA: arXiv 2312.03732."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def by_pattern(
    patterns: Mapping[str, Any], name: str, otherwise: Any, met: set[str] | None = None
) -> Any:
    """The value of the first pattern that matches a module's name, as PEFT matches them.

    The pattern joins `met`.
    """
    met = set() if met is None else met
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            met.add(pattern)
            return value
    return otherwise


def _matcher(asked: tuple[str, ...], setting: str) -> Callable[[str], str | None]:
    """Which of the names asked for a module has: ends of it, or one regular expression."""
    plain = [one for one in asked if one == ALL_LINEAR or re.fullmatch(r"[\w.]+", one)]
    if len(asked) > 1 and len(plain) < len(asked):
        odd = next(one for one in asked if one not in plain)
        raise BadInput(
            f"adapter.{setting} has {odd!r} among other names: a regular expression stands alone, "
            "and matches whole names, like .*\\.(q|v)_proj"
        )
    try:
        whole = re.compile(asked[0]) if asked and not plain else None
    except re.error as error:
        raise BadInput(
            f"adapter.{setting}={asked[0]!r} is not a regular expression: {error}"
        ) from error

    def match(name: str) -> str | None:
        if whole:
            return asked[0] if whole.fullmatch(name) else None
        fits = lambda one: one == ALL_LINEAR or f".{name}".endswith(f".{one}")
        return next((one for one in asked if fits(one)), None)

    return match


def _matches_nothing(asked: str, names: set[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in names})
    near = difflib.get_close_matches(asked, ends, 3, 0.5)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    if re.search(r"embed|lm_head|wte|wpe", asked):
        hint = ": embeddings and heads take no adapters here"
    return (
        f"{asked!r} of the adapter's settings matches no weight of the model{hint}; there are "
        f"{', '.join(ends)}, like {min(names)}"
    )


def attached(
    params: PyTree, found: list[Site], put: Callable[[np.ndarray], Any] = jnp.asarray
) -> PyTree:
    """A tree of weights with room for adapters at these sites; `put` places their scales."""
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep=".")
    for site in found:
        own = site.axes.removeprefix("L ")
        scale = put(np.array(site.scales, np.float32))
        flat[site.path] = Adapted(
            flat[site.path], scale, None, site.ranks, own, site.into, site.out
        )
    return traverse_util.unflatten_dict(flat, sep=".")


def layout(model: Model, found: list[Site], *, dora: bool = False) -> dict:
    """Shapes and shardings of the adapters at these sites, in float32: what is trained."""
    weights, flat = linear(model), {}
    for site in found:
        param, _ = weights[site.path]
        sizes = dict(zip(site.axes.split(), param.shape, strict=True)) | {"R": max(site.ranks)}
        placed = functools.partial(_placed, sizes=sizes, like=param.get_value().sharding)
        lead, made = _lead(site), site.out if dora else None
        flat[site.path] = Adapter(
            placed(f"{lead} {site.into} R"),
            placed(f"{lead} R {site.out}"),
            placed(f"{lead} {made}") if made else None,
        )
    return traverse_util.unflatten_dict(flat, sep=".")


def _lead(site: Site) -> str:
    """L, and E where each expert has an adapter of its own."""
    return " ".join(c for c in site.axes.split() if c not in site.into + site.out)


def _placed(
    axes: str, sizes: Mapping[str, int], like: jax.sharding.Sharding
) -> jax.ShapeDtypeStruct:
    shape = tuple(sizes[letter] for letter in axes.split())
    if isinstance(like, jax.NamedSharding) and isinstance(like.mesh, jax.sharding.Mesh):
        like = sharding.sharding(axes, shape, like.mesh)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=like)


def fresh(frozen: PyTree, like: PyTree, *, zero: str, seed: int) -> dict:
    """New adapters with the shapes and places of `like`: the model is what it was.

    The factor that is not 0 is uniform within 1 / sqrt(what it sums over), as PEFT's A is; a
    magnitude is the length of its weights. A seed gives the same values on any devices.
    """

    def drawn(frozen: PyTree) -> dict:
        weights: dict[tuple, Any] = traverse_util.flatten_dict(frozen)
        shapes: dict[tuple, Any] = traverse_util.flatten_dict(like)
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        flat = {}
        for (path, (a, b, magnitude)), key in zip(shapes.items(), keys, strict=True):
            weight = weights[path]
            ranks, most = np.array(weight.ranks), max(weight.ranks)
            lead = b.ndim - 1 - len(weight.out.split())  # axes before R: L, and E of experts
            # Where a layer's rank is smaller, the rest of both factors is 0 and stays it.
            here = (np.arange(most) < ranks[:, None]).astype(np.float32)  # [L, R]
            of_a = here.reshape(len(ranks), *[1] * (a.ndim - 2), most)
            of_b = here.reshape(len(ranks), *[1] * (lead - 1), most, *[1] * (b.ndim - 1 - lead))
            noise = lambda like, key=key: jax.random.uniform(key, like.shape, minval=-1, maxval=1)
            summed = math.prod(a.shape[lead:-1])
            share = 1 / np.sqrt(np.maximum(ranks, 1)).reshape(-1, *[1] * (b.ndim - 1))
            flat[path] = Adapter(
                jnp.zeros(a.shape) if zero == "A" else noise(a) * of_a / math.sqrt(summed),
                jnp.zeros(b.shape) if zero == "B" else noise(b) * of_b * share,
                None if magnitude is None else lengths(weight),
            )
        return traverse_util.unflatten_dict(flat)

    places = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(drawn, out_shardings=places)(frozen)


def alike(params: PyTree, frozen: PyTree) -> PyTree:
    """Other weights of the same model, with room for adapters where `frozen` has it."""
    put = lambda there, mine: (
        dataclasses.replace(there, base=mine) if adapted.is_adapted(there) else mine
    )
    return jax.tree.map(put, frozen, params, is_leaf=adapted.is_adapted)


def nothing(begun: PyTree, frozen: PyTree) -> PyTree:
    """Adapters like `begun` that leave the frozen weights what they are."""
    flat, idle = traverse_util.flatten_dict(frozen), {}
    new: dict[tuple, Any] = traverse_util.flatten_dict(begun)
    for path, one in new.items():
        magnitude = None if one.magnitude is None else lengths(flat[path])
        idle[path] = Adapter(jnp.zeros_like(one.a), jnp.zeros_like(one.b), magnitude)
    return traverse_util.unflatten_dict(idle)


def lost_in(model: Model, dtype: jax.typing.DTypeLike) -> float:
    """The share of what adapters add that rounding the merged weights to `dtype` is off by.

    Over all of them: the length of (rounded - merged) by the length of (merged - base).
    """
    narrow = jnp.finfo(dtype)

    @jax.jit
    def lengths_of(weight: Adapted) -> tuple[Array, Array]:
        merged, base = weight.astype(jnp.float32), weight.base.astype(jnp.float32)
        # A cast there and back would be taken out by XLA, which may compute more precisely.
        off = jax.lax.reduce_precision(merged, narrow.nexp, narrow.nmant) - merged
        return jnp.sum(off**2), jnp.sum((merged - base) ** 2)

    off = added = 0.0
    for param, _ in linear(model).values():
        weight = param.get_value()
        for layer in range(len(weight.ranks)) if adapted.is_adapted(weight) else ():
            found = lengths_of(jax.tree.map(lambda x, i=layer: x[i], weight))
            off, added = off + float(found[0]), added + float(found[1])
    return math.sqrt(off / added) if added else 0.0


def lost_told(share: float, dtype: jax.typing.DTypeLike) -> str:
    """A sentence about `lost_in`."""
    name = np.dtype(dtype).name
    if share < 1e-4:
        return f"{name} holds all of what the adapters add"
    remedy = "" if share < 0.1 else ": serve the adapters beside their base, or write float32"
    return f"rounding to {name} is off by {share:.1%} of what the adapters add{remedy}"


def base_of(params: PyTree) -> PyTree:
    """The frozen weights alone."""
    return jax.tree.map(lambda w: w.base if adapted.is_adapted(w) else w, params,
                        is_leaf=adapted.is_adapted)  # fmt: skip


def bare(params: PyTree) -> PyTree:
    """Without adapters that add nothing: what makes the same model is the same then."""

    def one(weight: Any) -> Any:
        if not adapted.is_adapted(weight):
            return weight
        a, b, magnitude = weight.adapter
        if bool(jnp.any(a)) and bool(jnp.any(b)):
            return weight
        return weight.base if magnitude is None else (weight.base, magnitude)

    return jax.tree.map(one, params, is_leaf=adapted.is_adapted)


@jax.jit
def lengths(weight: Adapted) -> Float[Array, "..."]:
    """The length of what makes each output, of every layer: DoRA's first magnitude."""
    lead = "".join(c for c in lettered(weight.axes) if c not in weight.into + weight.out)
    axes, kept = "L" + lettered(weight.axes), "L" + lead + lettered(weight.out)
    wide = weight.base.astype(jnp.float32)
    return jnp.sqrt(jnp.einsum(f"{axes},{axes}->{kept}", wide, wide, precision="highest"))

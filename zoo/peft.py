"""The adapters of a model as a PEFT folder, and back, by the model's table of HF names.

A folder holds one A and one B for each layer of a weight, and for each expert. Ours stand stacked,
with the largest rank of all layers: what a smaller one lacks is 0.
"""

import collections
from collections.abc import Mapping
import os
import pathlib
from typing import Any, NamedTuple

import einops
from flax import nnx, traverse_util
import jax
import numpy as np

from checkpoints_io import hf_weights, peft_folder, places, processes
from checkpoints_io.bits import fingerprint
from checkpoints_io.errors import BadInput
from zoo import adapters, narrow, peft_experts, targets
from zoo.models import ARCHITECTURES, Model, name_of
from zoo.parts.adapted import Adapted, Adapter, is_adapted
from zoo.parts.quantised import is_quantised
from zoo.targets import Site

PARTS = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "magnitude"}
# Layer (and expert) -> a, b, magnitude, and what the module is called.
Found = dict[tuple[int, ...], dict[str, Any]]


class Read(NamedTuple):
    """What a PEFT folder holds for a model."""

    sites: list[Site]
    adapters: dict  # what is trained, laid out as `adapters.layout` says
    said: peft_folder.Said
    base: dict[str, str]  # "fingerprint" and "dtype" of the frozen weights, where it says them


def sites_of(model: Model, folder: pathlib.Path) -> tuple[list[Site], peft_folder.Said]:
    """Which weights a folder has adapters for, by the headers of its files.

    Raises:
      FileNotFoundError, ValueError: as `read`.
    """
    said = peft_folder.read_config(folder)
    with peft_folder.tensors(folder) as (tensors, _):
        places = _places(model, tensors, folder)
        return [_site(model, path, found, said, folder) for path, found in places.items()], said


def read(model: Model, folder: pathlib.Path) -> Read:
    """The adapters of a folder for `model`, which may have no weights.

    Raises:
      FileNotFoundError: it is no such folder.
      ValueError: what it holds has no place in the model, or another shape or rank.
    """
    weights = targets.linear(model)
    sites, said = sites_of(model, folder)
    with peft_folder.tensors(folder) as (tensors, facts):
        places = _places(model, tensors, folder)
        like = adapters.layout(model, sites, dora=said.use_dora)
        flat: dict[str, Any] = traverse_util.flatten_dict(like, sep=".")
        for site in sites:
            sizes = dict(zip(site.axes.split(), weights[site.path][0].shape, strict=True))
            flat[site.path] = _stacked(site, sizes, places[site.path], flat[site.path], folder)
    return Read(sites, traverse_util.unflatten_dict(flat, sep="."), said, facts)


def _places(model: Model, tensors: Mapping, folder: pathlib.Path) -> dict[str, Found]:
    """Each tensor at its place in the model, in the order of the model's weights."""
    short = getattr(ARCHITECTURES[model.config.model_type], "HF_NAMES", ())
    homes = {
        name: (path, index)
        for path, (param, entry) in targets.linear(model).items()
        for index, name in targets.module_names(entry, param.shape)
    }
    places: dict[str, Found] = {path: {} for path, _ in homes.values()}
    tensors, called = peft_experts.apart(model, tensors, folder)
    for name, tensor in tensors.items():
        module, _, what = name.removesuffix(".weight").rpartition(".")
        known = hf_weights.known_as(f"{module}.weight", short) or ""
        home = homes.get(known.removesuffix(".weight"))
        if what not in PARTS or home is None:
            raise BadInput(
                f"{folder} holds {name}, which has no place in "
                f"{model.source or f'a {model.config.model_type} model'}: is it the adapter of "
                "another model?"
            )
        path, index = home
        own = places[path].setdefault(index, {"called": called.get(module, module)})
        own[PARTS[what]] = tensor
    if not any(places.values()):
        raise BadInput(f"{folder} holds no adapters")
    return {path: found for path, found in places.items() if found}


def _site(
    model: Model, path: str, found: Found, said: peft_folder.Said, folder: pathlib.Path
) -> Site:
    param, entry = targets.linear(model)[path]
    into, out = targets.sides(param.axes, entry)
    each: dict[int, tuple[int, float]] = {}
    for index, name in targets.module_names(entry, param.shape):
        if index not in found:
            continue
        if lacks := {"a", "b"} - found[index].keys():
            raise BadInput(f"{folder} lacks lora_{min(lacks).upper()} of {name}")
        rank = found[index]["a"].get_shape()[0]
        name = found[index]["called"]
        asked = targets.by_pattern(said.rank_pattern, name, said.r)
        if rank != asked:
            raise BadInput(
                f"{folder}: {name} has an adapter of rank {rank}, and {peft_folder.CONFIG} says "
                f"{asked}"
            )
        alpha = targets.by_pattern(said.alpha_pattern, name, said.lora_alpha)
        own = rank, targets.scale_of(rank, float(alpha), rslora=said.use_rslora)
        if each.setdefault(index[0], own) != own:
            raise BadInput(f"{folder}: the experts of a layer have adapters of different rank")
    layers = [each.get(i, (0, 0.0)) for i in range(param.shape[0])]
    ranks, scales = zip(*layers, strict=True)
    return Site(path, param.axes, into, out, ranks, scales)


def _stacked(
    site: Site, sizes: Mapping[str, int], found: Found, like: Adapter, folder: pathlib.Path
) -> Adapter:
    """The tensors of all layers of a weight, each a part of one array on the devices."""
    forms = {
        "a": (f"R ({site.into}) -> {site.into} R", like.a),
        "b": (f"({site.out}) R -> R {site.out}", like.b),
        "magnitude": (f"({site.out}) -> {site.out}", like.magnitude),
    }
    arrays = {}
    for part, (turned, shape) in forms.items():
        if shape is None:
            continue
        whole = np.zeros(shape.shape, np.float32)
        for index, tensors in found.items():
            given = np.asarray(tensors[part][...], np.float32)
            try:
                own = einops.rearrange(given, turned, **_known(turned, sizes))
            except einops.EinopsError as error:
                raise BadInput(
                    f"{folder}: the {part} of {site.path} in layer {index[0]} has shape "
                    f"{given.shape}, which does not fit the model: is it the adapter of another?"
                ) from error
            if not np.isfinite(own).all():
                raise BadInput(f"{folder}: the {part} of {site.path} is not finite")
            where = tuple(slice(size) for size in own.shape)  # a smaller rank leaves zeros
            whole[index][where] = own
        part_of = lambda at, whole=whole: whole[at]
        arrays[part] = jax.make_array_from_callback(whole.shape, shape.sharding, part_of)
    return Adapter(arrays["a"], arrays["b"], arrays.get("magnitude"))


def _known(pattern: str, sizes: Mapping[str, int]) -> dict[str, int]:
    return {letter: size for letter, size in sizes.items() if letter in pattern}


def save_adapter(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    revision: str | None = None,
) -> None:
    """Writes the adapters of a model as a folder that PEFT and vLLM read, in float32.

    `base` is what the folder says that they are for: the model's own folder unless given. The
    fingerprint of the frozen weights is kept with them. Every process must call it.

    Raises:
      ValueError: the model has no adapters.
      FileExistsError: `folder` holds something that is not a model.
    """
    params = {name_of(path): p for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    weights = {path: p.get_value() for path, p in params.items() if is_adapted(p.get_value())}
    if not weights:
        raise BadInput("the model has no adapters: zoo.save writes the whole of it")
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, tuple[int, float]] = {}  # of each module
    for path, weight in weights.items():
        _, entry = targets.linear(model)[path]
        held = jax.tree.map(_on_host, (weight.adapter, weight.scale))
        for index, name in targets.module_names(entry, weight.shape):
            if rank := weight.ranks[index[0]]:
                (a, b, magnitude), scale = held[0], float(held[1][index[0]])
                ranks[name] = rank, scale * rank
                a, b = a[index][..., :rank], b[index][:rank]
                into, out = weight.into, weight.out
                tensors[f"{name}.lora_A.weight"] = einops.rearrange(a, f"{into} R -> R ({into})")
                tensors[f"{name}.lora_B.weight"] = einops.rearrange(b, f"R {out} -> ({out}) R")
                if magnitude is not None:
                    tensors[f"{name}.lora_magnitude_vector"] = magnitude[index].reshape(-1)
    config = _config(model, ranks, weights) | {
        "base_model_name_or_path": base or str(model.source or ""),
        "revision": revision,
    }
    dtype = np.dtype(model.embedding.get_value().dtype).name
    facts = {"base_fingerprint": _of_base(model, dtype), "base_dtype": dtype}
    if kind := narrow.kind_of(model):
        facts["base_frozen"] = kind
    with places.at(os.fspath(folder)).whole_folder() as begun:
        if begun:
            peft_folder.write(begun, config, tensors, facts)


def refuse_other_base(model: Model, found: Read, folder: pathlib.Path) -> None:
    """Compares the weights of a model with those that the adapters were trained on.

    Folders of other programs do not say which they were.

    Raises:
      ValueError: they are others.
    """
    known, kind = found.base.get("base_fingerprint"), found.base.get("base_frozen")
    if not known:
        return
    if kind != (here := narrow.kind_of(model)):
        kept = lambda kind: f"in {kind}" if kind else "whole"
        raise BadInput(
            f"the adapters in {folder} were trained on weights kept {kept(kind)}, and those of "
            f"{model.source} are kept {kept(here)}: load it with frozen={kind!r}, or in a recipe "
            f"--config.frozen={kind}"
        )
    if _of_base(model, found.base.get("base_dtype")) != known:
        named = found.said.base_model_name_or_path
        raise BadInput(
            f"the adapters in {folder} were trained on other weights than those of {model.source}: "
            f"{named or 'their base'} as it was then"
        )


def _of_base(model: Model, dtype: str | None) -> str:
    """The fingerprint of the frozen weights in `dtype`; what is in few bits stays so."""
    frozen = adapters.base_of(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    part = lambda few: jax.tree.map(
        lambda w: w if is_quantised(w) == few else None, frozen, is_leaf=is_quantised
    )
    known = fingerprint(part(False), dtype)
    return known if narrow.kind_of(model) is None else known + fingerprint(part(True))


def frozen_as(folder: pathlib.Path) -> str | None:
    """How the weights were kept that the adapters of a folder were trained on, as `zoo.load` says.

    Raises:
      FileNotFoundError, ValueError: as `read`.
    """
    peft_folder.read_config(folder)  # that it is such a folder is said first
    with peft_folder.tensors(folder) as (_, facts):
        return facts.get("base_frozen")


def _on_host(array: jax.Array) -> np.ndarray:
    return np.asarray(array if array.is_fully_addressable else processes.gathered(array))


def _config(
    model: Model, ranks: Mapping[str, tuple[int, float]], weights: Mapping[str, Adapted]
) -> dict[str, object]:
    """adapter_config.json: the rank that most modules have, and the others' by their names."""
    usual, alpha = collections.Counter(ranks.values()).most_common(1)[0][0]
    table = targets.linear(model)
    every = [name for param, entry in table.values()
             for _, name in targets.module_names(entry, param.shape)]  # fmt: skip
    of_end = collections.Counter(name.rpartition(".")[2] for name in every)
    chosen = collections.Counter(name.rpartition(".")[2] for name in ranks)
    whole = {end for end, count in chosen.items() if count == of_end[end]}
    some = {name for name in ranks if name.rpartition(".")[2] not in whole}
    first = next(iter(weights))
    entry = table[first][1]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": usual,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,  # lora_alpha is what gives the scale without it
        "use_dora": weights[first].adapter.magnitude is not None,
        "target_modules": sorted(whole | some),
        "rank_pattern": {name: r for name, (r, _) in ranks.items() if r != usual},
        "alpha_pattern": {name: a for name, (_, a) in ranks.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": hf_weights.groups(entry.axes)[0] == weights[first].into,
        "modules_to_save": None,
        "inference_mode": True,
        "init_lora_weights": True,  # whatever it was: vLLM refuses others by this key
    }

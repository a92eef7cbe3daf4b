"""Reads a PEFT folder as the adapters of a model, by the model's table of HF names.

A folder holds one A and one B for each layer of a weight, and for each expert. Ours are stacked,
with the largest rank of all layers: smaller ranks are padded with 0.
"""

from collections.abc import Mapping
import logging
import math
import pathlib
import re
from typing import NamedTuple

import einops
from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from checkpoints_io import hf_names, peft_folder
from checkpoints_io.bits import fingerprint
from checkpoints_io.errors import BadInput
from zoo import adapters, narrow, peft_experts, targets
from zoo.models import ARCHITECTURES, Model, hf_table
from zoo.parts import text_half
from zoo.parts.adapted import RANK, Adapter
from zoo.parts.quantised import is_quantised
from zoo.targets import Site

PARTS = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "magnitude"}
NAMES = {part: name for name, part in PARTS.items()}
# Layer (and expert) -> a, b, magnitude, and the name of the module.
Found = dict[tuple[int, ...], dict[str, PyTree]]


class Read(NamedTuple):
    """The contents of a PEFT folder, laid out for a model."""

    sites: list[Site]
    adapters: dict  # the trained weights, laid out as by `adapters.layout`


def sites_of(model: Model, folder: pathlib.Path) -> tuple[list[Site], peft_folder.Said]:
    """The weights that a folder has adapters for, by the headers of its files.

    Raises:
      FileNotFoundError, ValueError: as in `read`.
    """
    with peft_folder.opened(folder) as opened:
        refuse_other_kind(model, opened.trained_on, folder)
        weights = targets.linear(model)
        return _sites(weights, _places(model, weights, opened), opened), opened.said


def read(model: Model, folder: pathlib.Path) -> Read:
    """Reads the adapters of a folder, and checks that the model has the weights they belong to.

    The check needs a fingerprint, which folders of other programs lack.

    Raises:
      FileNotFoundError: the folder is not a PEFT folder.
      ValueError: its tensors have no place in the model, or another shape or rank; or they were
        trained on other weights.
    """
    with peft_folder.opened(folder) as opened:
        refuse_other_kind(model, opened.trained_on, folder)
        weights = targets.linear(model)
        places = _places(model, weights, opened)
        found = _sites(weights, places, opened)
        _refuse_other_base(model, opened)
        like = adapters.layout(model, found, dora=opened.said.use_dora)
        flat: dict[str, PyTree] = traverse_util.flatten_dict(like, sep=".")
        for site in found:
            flat[site.path] = _stacked(weights, site, places[site.path], flat[site.path], folder)
    return Read(found, traverse_util.unflatten_dict(flat, sep="."))


def _places(
    model: Model, weights: targets.Matrices, opened: peft_folder.Opened
) -> dict[str, Found]:
    """Maps each tensor to its place in the model, in the order of the model's weights."""
    own = getattr(ARCHITECTURES[model.config.model_type], "HF_NAMES", ())
    short = (*own, *text_half.NAMES)
    homes = {
        name: (path, index)
        for path, (param, entry) in weights.items()
        for index, name in targets.module_names(entry, param.shape)
    }
    places: dict[str, Found] = {path: {} for path, _ in homes.values()}
    tensors, called = peft_experts.apart(weights, opened)
    for name, tensor in tensors.items():
        module, _, what = name.removesuffix(".weight").rpartition(".")
        known = hf_names.known_as(f"{module}.weight", short) or ""
        home = homes.get(known.removesuffix(".weight"))
        if what not in PARTS or home is None:
            raise BadInput(f"{opened.folder} holds {name}, {_why_not(model, name, known)}")
        path, index = home
        own = places[path].setdefault(index, {"called": called.get(module, module)})
        own[PARTS[what]] = tensor
    if not any(places.values()):
        raise BadInput(f"{opened.folder} holds no adapters")
    return {path: found for path, found in places.items() if found}


def _why_not(model: Model, name: str, known: str) -> str:
    """The reason why no matrix of the model takes a tensor of adapters, for the error."""
    model_here = str(model.source or f"a {model.config.model_type} model")
    matrices, of = targets.linear(model), known.removesuffix(".weight")
    others = [entry.name for path, entry in hf_table(model).items() if path not in matrices]
    own = {re.sub(r"\{\w\}", "#", other).removesuffix(".weight") for other in others}
    if re.search(text_half.OTHERS[0], name):
        return "of what sees or hears: of such models the text alone takes adapters here"
    if peft_experts.WRAPPED.fullmatch(name):
        return f"of all experts of a layer: those of {model_here} take none here"
    if re.sub(r"(?<=\.)\d+(?=\.)", "#", of) in own:
        return f"and {of.rpartition('.')[2]} takes no adapters here, nor another value beside them"
    return f"which has no place in {model_here}: is it the adapter of another model?"


def _sites(
    weights: targets.Matrices, places: Mapping[str, Found], opened: peft_folder.Opened
) -> list[Site]:
    """The adapter site of each weight, after checking the shapes of all tensors."""
    folder, said = opened.folder, opened.said
    lora = targets.Lora(
        said.r, float(said.lora_alpha), rslora=said.use_rslora,
        rank_pattern=said.rank_pattern, alpha_pattern=said.alpha_pattern,
    )  # fmt: skip
    sites = []
    for path, found in places.items():
        param, entry = weights[path]
        into, out = _widths(weights, targets.site(path, param.axes, entry, {}, param.shape[0]))
        each: dict[int, tuple[int, float]] = {}
        for index, own in found.items():
            name = own["called"]
            rank, scale = targets.rank_and_scale(lora, (name,), set())
            wanted = {"a": [rank, into], "b": [out, rank]}
            wanted |= {"magnitude": [out]} if said.use_dora else {}
            for part in PARTS.values():
                shape = [*own[part].get_shape()] if part in own else None
                if shape != wanted.get(part):
                    raise BadInput(
                        f"{folder}: of {name} the {NAMES[part]} is {shape or 'missing'}, where the "
                        f"model and {peft_folder.CONFIG} (rank {rank}) have "
                        f"{wanted.get(part, 'none')}: is it the adapter of another?"
                    )
            if each.setdefault(index[0], (rank, scale)) != (rank, scale):
                raise BadInput(f"{folder}: the experts of a layer have adapters of different rank")
        sites.append(targets.site(path, param.axes, entry, each, param.shape[0]))
    if said.use_dora:
        targets.refuse_experts(sites, f"{folder} has such")
    return sites


def _widths(weights: targets.Matrices, site: Site) -> tuple[int, int]:
    """The input and output widths of a matrix."""
    sizes = dict(zip(site.axes.split(), weights[site.path][0].shape, strict=True))
    product = lambda letters: math.prod(sizes[letter] for letter in letters.split())
    return product(site.into), product(site.out)


def _stacked(
    weights: targets.Matrices, site: Site, found: Found, like: Adapter, folder: pathlib.Path
) -> Adapter:
    """Stacks the tensors of all layers of a weight into one array on the devices."""
    sizes = dict(zip(site.axes.split(), weights[site.path][0].shape, strict=True))
    forms = {
        "a": f"{RANK} ({site.into}) -> {site.into} {RANK}",
        "b": f"({site.out}) {RANK} -> {RANK} {site.out}",
        "magnitude": f"({site.out}) -> {site.out}",
    }
    arrays = {}
    for part, shape in like._asdict().items():
        if shape is None:
            continue
        whole, form = np.zeros(shape.shape, np.float32), forms[part]
        known = {letter: size for letter, size in sizes.items() if letter in form}
        for index, tensors in found.items():
            own = einops.rearrange(np.asarray(tensors[part][...], np.float32), form, **known)
            if not np.isfinite(own).all():
                raise BadInput(
                    f"{folder}: the {NAMES[part]} of {tensors['called']} is not finite (NaN or "
                    "infinity): its training diverged, or the file is damaged"
                )
            where = tuple(slice(size) for size in own.shape)  # a smaller rank leaves zeros
            whole[index][where] = own
        part_of = lambda at, whole=whole: whole[at]
        arrays[part] = jax.make_array_from_callback(whole.shape, shape.sharding, part_of)
    return Adapter(arrays["a"], arrays["b"], arrays.get("magnitude"))


def refuse_other_kind(
    model: Model, trained_on: peft_folder.TrainedOn, folder: pathlib.Path
) -> None:
    """Refuses a model quantised differently from the weights that the adapters were trained on.

    The model may be abstract.

    Raises:
      ValueError: the quantisation differs.
    """
    kind, here = trained_on.frozen, narrow.kind_of(model)
    if trained_on.fingerprints and kind != here:
        kept = lambda kind: f"in {kind}" if kind else "whole"
        flag = f"set --config.frozen={kind}" if kind else "leave --config.frozen out"
        raise BadInput(
            f"the adapters in {folder} were trained on weights kept {kept(kind)}, and those of "
            f"{model.source} are kept {kept(here)}: load it with frozen={kind!r}; in a recipe "
            f"{flag}"
        )


def _refuse_other_base(model: Model, opened: peft_folder.Opened) -> None:
    known, named = opened.trained_on.fingerprints, opened.said.base_model_name_or_path
    if not known and named and _name(named) != _name(str(model.source or named)):
        logging.getLogger(__name__).warning(
            "the adapters in %s name %s as what they were trained on, and are put on %s: whether "
            "the weights are the same is not known", opened.folder, named, model.source,
        )  # fmt: skip
    # A fingerprint in a dtype that the model's dtype cannot hold cannot be checked.
    own = np.dtype(model.embedding.get_value().dtype)
    width = lambda dtype: np.dtype(dtype).itemsize
    dtypes = sorted((x for x in known if jnp.promote_types(x, own) == own), key=width)
    if dtypes and of_base(model, dtypes[-1]) != known[dtypes[-1]]:
        raise BadInput(
            f"the adapters in {opened.folder} were trained on other weights than those of "
            f"{model.source}: {named or 'their base'} as it was then"
        )


def _name(path_or_id: str) -> str:
    """The name of weights without owner, folder or revision: `Llama-3.1-8B`."""
    return path_or_id.rstrip("/").rpartition("/")[2].partition("@")[0].lower()


def of_base(model: Model, dtype: str) -> str:
    """The fingerprint of the frozen weights in `dtype`; quantised ones are taken as they are."""
    frozen = adapters.base_of(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    part = lambda few: jax.tree.map(
        lambda w: w if is_quantised(w) == few else None, frozen, is_leaf=is_quantised
    )
    known = fingerprint(part(False), dtype)
    return known if narrow.kind_of(model) is None else known + fingerprint(part(True))

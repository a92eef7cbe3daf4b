"""Writes the adapters of a model as a PEFT folder, by the model's table of HF names."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import os
import pathlib

import einops
from flax import nnx
import jax
import numpy as np

from checkpoints_io import hf_export, hf_folder, hf_names, peft_folder, places, processes
from checkpoints_io.errors import BadInput
from zoo import narrow, peft, targets
from zoo.models import ARCHITECTURES, Model, name_of
from zoo.parts import text_half
from zoo.parts.adapted import RANK, Adapted, is_adapted


def save_adapter(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    revision: str | None = None,
    card: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    chat_template: str | None = None,
) -> None:
    """Writes the adapters of a model as a folder that PEFT and vLLM read, in float32.

    `base` is the base model that the folder names, by default the folder the model came from. The
    fingerprint of the frozen weights is saved with them; `card` is the text of README.md. The files
    of `tokenizer` (a folder) and the text `chat_template` are written if they differ from the base.
    Every process must call this.

    Raises:
      ValueError: the model has no adapters, or they are not finite.
      FileExistsError: `folder` holds something that is not a model.
    """
    params = {name_of(path): p for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    weights = {path: p.get_value() for path, p in params.items() if is_adapted(p.get_value())}
    if not weights:
        raise BadInput("the model has no adapters: zoo.save writes the whole model")
    matrices, modules = targets.linear(model), _modules_of(model)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, tuple[int, float]] = {}  # of each module, and its alpha
    for path, weight in weights.items():
        (a, b, magnitude), scale = jax.tree.map(_on_host, (weight.adapter, weight.scale))
        into, out = weight.into, weight.out
        forms = f"{into} {RANK} -> {RANK} ({into})", f"{RANK} {out} -> ({out}) {RANK}"
        for index, name in modules(matrices[path][1], weight.shape):
            if rank := weight.ranks[index[0]]:
                # In float32, like the scale, which gives back exactly the original alpha.
                ranks[name] = rank, float(scale[index[0]] * np.float32(rank))
                own = a[index][..., :rank], b[index][:rank]
                for part, array, form in zip("AB", own, forms, strict=True):
                    tensors[f"{name}.lora_{part}.weight"] = einops.rearrange(array, form)
                if magnitude is not None:
                    tensors[f"{name}.lora_magnitude_vector"] = magnitude[index].reshape(-1)
    hf_export.refuse_not_finite(tensors)
    every = [name for param, entry in matrices.values()
             for _, name in modules(entry, param.shape)]  # fmt: skip
    config = _config(matrices, every, ranks, weights) | {
        "base_model_name_or_path": base or str(model.source or ""),
        "revision": revision,
    }
    if _whole_of(model):
        config["exclude_modules"] = text_half.OTHER_MODULES
    own = np.dtype(model.embedding.get_value().dtype).name
    # Rounding to bfloat16 by way of float16 could give other values.
    dtypes = [own] if own == "float16" else sorted({own, "bfloat16"})
    known = {dtype: peft.of_base(model, dtype) for dtype in dtypes}
    trained_on = peft_folder.TrainedOn(known, narrow.kind_of(model))
    with places.at(os.fspath(folder)).whole_folder(peft_folder.CONFIG) as begun:
        if begun:
            words = pathlib.Path(tokenizer) if tokenizer is not None else None
            hf_folder.write_tokenizer(begun, words, chat_template)
            peft_folder.write(begun, config, tensors, trained_on, card)


def _on_host(array: jax.Array) -> np.ndarray:
    return np.asarray(array if array.is_fully_addressable else processes.gathered(array))


def _whole_of(model: Model) -> dict[str, object] | None:
    """The config.json of the multimodal model that this one is the text part of."""
    source = hf_folder.look_up(model.source) if model.source else None
    return source.config if source and text_half.is_whole(source.config) else None


def _modules_of(model: Model) -> Callable[..., Iterator[tuple]]:
    """Like `targets.module_names`, but by transformers 5's module names where files differ.

    In a multimodal model they are prefixed by the module of the text part.
    """
    own = getattr(ARCHITECTURES[model.config.model_type], "HF_MODULES", ())
    whole = _whole_of(model)
    names = (*own, text_half.module_in(whole)) if whole else own

    def modules(entry: hf_names.Entry, shape: tuple[int, ...]) -> Iterator[tuple]:
        for index, name in targets.module_names(entry, shape):
            yield index, hf_names.known_as(name, names)

    return modules


def _config(
    table: targets.Matrices,
    every: Sequence[str],
    ranks: Mapping[str, tuple[int, float]],
    weights: Mapping[str, Adapted],
) -> dict[str, object]:
    """The adapter_config.json: the most common rank, and the other ranks by module name."""
    usual, alpha = collections.Counter(ranks.values()).most_common(1)[0][0]
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
        "use_rslora": False,  # lora_alpha is chosen to give the right scale without it
        "use_dora": weights[first].adapter.magnitude is not None,
        "target_modules": sorted(whole | some),
        "rank_pattern": _pattern({name: r for name, (r, _) in ranks.items()}, usual),
        "alpha_pattern": _pattern({name: a for name, (_, a) in ranks.items()}, alpha),
        "bias": "none",
        "fan_in_fan_out": hf_names.groups(entry.axes)[0] == weights[first].into,
        "modules_to_save": None,
        "inference_mode": True,
        "init_lora_weights": True,  # whatever it was: vLLM refuses other values
    }


def _pattern(values: Mapping[str, int | float], usual: int | float) -> dict[str, int | float]:
    """Unusual values by module name, or by name suffix if all modules with it agree.

    A reader compares each module with each entry, so thousands of experts need short patterns.
    """
    by_end = collections.defaultdict(set)
    for name, value in values.items():
        by_end[name.rpartition(".")[2]].add(value)
    found = {}
    for name, value in values.items():
        end = name.rpartition(".")[2]
        if value != usual:
            found[end if len(by_end[end]) == 1 else name] = value
    return found

"""The config.json beside weights that are written: the source's own, or what has become of it."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
import jax
import numpy as np

from checkpoints_io.errors import BadInput
from zoo.models import Model, config_of, name_of, said_of
from zoo.parts import hf_keys, text_half

DTYPES = "dtype", "torch_dtype"  # what transformers 5 calls the weights', and 4 did


def of(model: Model, dtype: jax.typing.DTypeLike, *, text_only: bool) -> dict[str, object]:
    """The `config.json` of a model whose weights are written in `dtype`.

    Byte for byte that of its source, unless its Config was changed since it was read.

    Raises:
      ValueError: the weights have other shapes than the Config says, or its parts compute with
        something else; or it was changed into one that no file can say.
    """
    made = nnx.eval_shape(lambda: type(model)(model.config, nnx.Rngs(0), model.dtype))
    _refuse_other_shapes(model, made)
    _refuse_other_parts(model, made)
    config = _changed(model, said_of(model), text_only)
    of_dtype = lambda keys: dict.fromkeys(keys, np.dtype(dtype).name)
    half = config.get("text_config")
    if isinstance(half, dict):  # some programs go by what it says of itself
        config["text_config"] = half | of_dtype(key for key in DTYPES if key in half)
    return config | of_dtype([key for key in DTYPES if key in config] or DTYPES[:1])


def _changed(model: Model, said: Mapping[str, object], text_only: bool) -> dict[str, object]:
    """What a file said, with what the model's Config says now."""
    own = model.config.to_hf()
    if model.is_new and text_half.scores(said):
        said = {**said, "architectures": [model.config.architecture]}
    # Weights are written as they are, and no code beside them.
    config = {k: v for k, v in said.items() if k not in ("quantization_config", "auto_map")}
    if not text_half.is_whole(config):  # a kind that this code alone knew is another by name
        config |= {"model_type": model.config.model_type}
    if text_only and text_half.is_whole(said):  # its text becomes a model of its own
        config = text_half.written(config, own)
    if _says(config, model):
        return config
    if text_half.is_whole(config):
        raise BadInput(
            "the Config of this model was changed since it was read, and it came with parts that "
            "see: save its text alone, with text_only=True"
        )
    # What other keys say of the numbers is no longer true; names and ids stay what they were.
    kept = {k: v for k, v in config.items() if k not in hf_keys.READ}
    changed = kept | {k: v for k, v in own.items() if v is not None or k not in kept}
    if text_half.scores(config):  # it still is what it was; its own head is beside its weights
        changed |= {k: config[k] for k in ("architectures", "tie_word_embeddings") if k in config}
    if not _says(changed, model):
        raise BadInput(
            "the Config of this model was changed into one that no config.json says: zoo.abstract "
            "tells what is wrong with it"
        )
    return changed


def _says(config: Mapping[str, object], model: Model) -> bool:
    """Is this the config.json of a model with this Config?"""
    scores = {"tie_word_embeddings": True} if text_half.scores(config) else {}
    return config_of({**config, **scores}) == model.config


def _refuse_other_shapes(model: Model, made: Model) -> None:
    shapes = lambda of: {
        name_of(path): tuple(param.get_value().shape)
        for path, param in nnx.to_flat_state(nnx.state(of, nnx.Param))
    }
    wanted, found = shapes(made), shapes(model)
    if others := sorted(found.keys() - wanted.keys()):
        raise BadInput(
            f"{others[0]} is no weight of a {model.config.model_type}, whose files have no name "
            "for it: write it apart, and take it off the model"
        )
    for name, shape in wanted.items():
        if found.get(name) != shape:
            raise BadInput(
                f"{name} is {list(found[name]) if name in found else 'not there'}, and by "
                f"model.config it is {list(shape)}: change model.config with it, by "
                "dataclasses.replace"
            )


def _refuse_other_parts(model: Model, made: Model) -> None:
    """Refuses what a part took from the Config when it was made, and the Config no longer says."""
    now = _taken(model)
    for name, value in _taken(made).items():
        if name in now and now[name] != value:
            raise BadInput(
                f"model.{name} is {now[name]!r}, as the model was made, and by model.config it is "
                f"{value!r}: set it with the Config, or the file would say another model"
            )


def _taken(model: Model) -> dict[str, Any]:
    """What the parts of a model hold besides weights and parts, by their paths."""
    return {
        ".".join([*map(str, path), name]): value
        for path, node in nnx.iter_graph(model)
        if path and isinstance(node, nnx.Module)
        for name, value in vars(node).items()
        if not name.startswith("_") and not isinstance(value, nnx.Variable | nnx.Module)
    }

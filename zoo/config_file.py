"""Builds the config.json of an export: the source's own, updated if the Config was changed."""

from collections.abc import Mapping

from flax import nnx
import jax
import numpy as np

from checkpoints_io.errors import BadInput
from zoo.models import Model, config_of, name_of, said_of
from zoo.parts import hf_keys, text_half

DTYPES = "dtype", "torch_dtype"  # the key for the weights' dtype in transformers 5, and in 4


def of(model: Model, dtype: jax.typing.DTypeLike, *, text_only: bool) -> dict[str, object]:
    """The `config.json` of a model whose weights are written in `dtype`.

    It equals that of the source byte for byte, unless the Config was changed after loading.

    Raises:
      ValueError: the shapes of weights, or settings of modules, disagree with the Config; or no
        config.json can express the changed Config.
    """
    made = nnx.eval_shape(lambda: type(model)(model.config, nnx.Rngs(0), model.dtype))
    _refuse_other_shapes(model, made)
    _refuse_other_parts(model, made)
    config = _changed(model, said_of(model), text_only)
    of_dtype = lambda keys: dict.fromkeys(keys, np.dtype(dtype).name)
    half = config.get("text_config")
    if isinstance(half, dict):  # some programs read the dtype there
        config["text_config"] = half | of_dtype(key for key in DTYPES if key in half)
    return config | of_dtype([key for key in DTYPES if key in config] or DTYPES[:1])


def _changed(model: Model, said: Mapping[str, object], text_only: bool) -> dict[str, object]:
    """Updates the source's config.json with what the model's Config says now."""
    own = model.config.to_hf()
    if model.is_new and text_half.scores(said):
        said = {**said, "architectures": [model.config.architecture]}
    # Weights are written unquantised, and without remote code.
    config = {k: v for k, v in said.items() if k not in ("quantization_config", "auto_map")}
    if not text_half.is_whole(config):  # a kind that only that remote code knew is renamed
        config |= {"model_type": model.config.model_type}
    if text_only and text_half.is_whole(said):  # the text part becomes a standalone model
        config = text_half.written(config, own)
    if _says(config, model):
        return config
    if text_half.is_whole(config):
        raise BadInput(
            "the Config of this model was changed since it was loaded, and the model came with a "
            "vision tower: save only its text part, with text_only=True"
        )
    # Other keys about the numbers are no longer true and go; names and ids stay.
    kept = {k: v for k, v in config.items() if k not in hf_keys.READ}
    changed = kept | {k: v for k, v in own.items() if v is not None or k not in kept}
    if text_half.scores(config):  # it is still a reward model, with a head of its own
        changed |= {k: config[k] for k in ("architectures", "tie_word_embeddings") if k in config}
    if not _says(changed, model):
        raise BadInput(
            "the Config of this model was changed into one that no config.json can express: "
            "zoo.abstract says what is wrong with it"
        )
    return changed


def _says(config: Mapping[str, object], model: Model) -> bool:
    """Whether this config.json describes a model with this Config."""
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
            f"{others[0]} is not a weight of a {model.config.model_type}, whose files have no name "
            "for it: save it separately and remove it from the model"
        )
    for name, shape in wanted.items():
        if found.get(name) != shape:
            raise BadInput(
                f"{name} is {list(found[name]) if name in found else 'not there'}, and by "
                f"model.config it is {list(shape)}: change model.config with it, by "
                "dataclasses.replace"
            )


def _refuse_other_parts(model: Model, made: Model) -> None:
    """Refuses settings that a module took from the Config and that the Config has since changed."""
    now = _taken(model)
    for name, value in _taken(made).items():
        if name in now and now[name] != value:
            raise BadInput(
                f"model.{name} is {now[name]!r}, as the model was built, but by model.config it is "
                f"{value!r}: set both, or the file would describe another model"
            )


def _taken(model: Model) -> dict[str, object]:
    """The attributes of a model's modules other than weights and modules, by their paths."""
    return {
        ".".join([*map(str, path), name]): value
        for path, node in nnx.iter_graph(model)
        if path and isinstance(node, nnx.Module)
        for name, value in vars(node).items()
        if not name.startswith("_") and not isinstance(value, nnx.Variable | nnx.Module)
    }

"""Flax NNX models, one file per architecture, read from and written to Hugging Face folders."""

import pathlib
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from zoo import llama, sharding

# `model_type` in an HF config.json -> the module with its `Config`, `Model` and `HF_WEIGHTS`.
ARCHITECTURES: dict[str, types.ModuleType] = {"llama": llama}
Model = llama.Model  # any of their models: `llama.Model | …`


def load(
    path_or_id: str | pathlib.Path,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    compute_dtype: jax.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    revision: str | None = None,
) -> Model:
    """The model of a Hugging Face folder or hub id, its weights on the devices of `mesh`.

    `dtype` is that of the weights; `compute_dtype` that of the activations, the same unless given.
    Without a mesh everything is on the first device.

    Example:
      model = zoo.load("meta-llama/Llama-3.2-1B")
      logits = model(tokens)  # [B, T] -> [B, T, V]

    Raises:
      FileNotFoundError: there is no such folder, repository or file.
      ValueError: config.json or the weights do not fit any architecture here.
    """
    from checkpoints_io import hf_folder, hf_weights  # the one door from here to the disk

    folder = hf_folder.find(str(path_or_id), revision)
    model = abstract(hf_folder.read_config(folder), dtype, compute_dtype, mesh)
    graph, state = nnx.split(model)
    table, wanted, unused = _wanted(model)
    arrays = hf_weights.read(folder, table, wanted, unused)
    flat = nnx.to_flat_state(state)
    filled = [(path, param.replace(arrays[_name(path)])) for path, param in flat]
    model = nnx.merge(graph, nnx.from_flat_state(filled))
    model.source = folder
    return model


def check(path_or_id: str | pathlib.Path) -> None:
    """Refuses what `load` would refuse, by the headers of the files alone.

    Raises:
      FileNotFoundError, ValueError: as `load`.
    """
    from checkpoints_io import hf_folder, hf_weights

    folder = hf_folder.find(str(path_or_id))
    hf_weights.check(folder, *_wanted(abstract(hf_folder.read_config(folder))))


def save(
    model: Model,
    folder: str | pathlib.Path,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    tokenizer: pathlib.Path | None = None,
    stop_ids: tuple[int, ...] = (),
    chat_template: str | None = None,
) -> None:
    """Writes a Hugging Face folder that transformers and vLLM load: weights, config, tokenizer.

    The folder appears when it is whole. Tokenizer and chat template are those the model came with,
    or those of the folder `tokenizer` and the text `chat_template`; `stop_ids` are added to the ids
    that end generation. Every process must call it.

    Raises:
      FileExistsError: `folder` holds something that is not a model.
    """
    from checkpoints_io import hf_folder, hf_weights

    arch = ARCHITECTURES[model.config.model_type]
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    weights = {_name(path): (param.axes, param.get_value()) for path, param in params}
    with hf_folder.written_whole(pathlib.Path(folder)) as fresh:
        hf_weights.write(fresh, arch.HF_WEIGHTS, weights, np.dtype(dtype))
        config = hf_folder.read_config(model.source) if model.source else model.config.to_hf()
        if fresh:
            hf_folder.write_companions(
                fresh, config, model.source, tokenizer or model.source, stop_ids, chat_template
            )


def abstract(
    hf_config: dict,
    dtype: jax.typing.DTypeLike = jnp.float32,
    compute_dtype: jax.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """The model of a `config.json`: in place of weights their shapes, dtypes and shardings.

    Raises:
      ValueError: no architecture here has its `model_type`, or the one that has refuses it.
    """
    kind = hf_config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"config.json has model_type {kind!r}; the zoo has {', '.join(sorted(ARCHITECTURES))}"
        )
    arch = ARCHITECTURES[kind]
    config = arch.Config.from_hf(hf_config)
    model = nnx.eval_shape(lambda: arch.Model(config, nnx.Rngs(0), compute_dtype or dtype))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def placed(param: nnx.Param) -> nnx.Variable:
        where = sharding.sharding(param.axes, param.shape, mesh) if mesh else here
        return param.replace(jax.ShapeDtypeStruct(param.shape, dtype, sharding=where))

    is_param = lambda x: isinstance(x, nnx.Variable)
    nnx.update(model, jax.tree.map(placed, nnx.state(model), is_leaf=is_param))
    return model


def _wanted(model: Model) -> tuple[dict, dict, frozenset[str]]:
    """What the weight reader asks: the table, the weights, and the tensors that may lie about."""
    from checkpoints_io import hf_weights

    table = ARCHITECTURES[model.config.model_type].HF_WEIGHTS
    wanted = {
        _name(path): hf_weights.Wanted(
            param.axes, param.shape, np.dtype(param.dtype), param.get_value().sharding
        )
        for path, param in nnx.to_flat_state(nnx.state(model))
    }
    return table, wanted, frozenset(n for path, (n, _) in table.items() if path not in wanted)


def _name(path: tuple) -> str:
    return ".".join(map(str, path))

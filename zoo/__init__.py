"""Flax NNX models, one file per architecture, read from and written to Hugging Face folders."""

import pathlib
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_io.errors import BadInput
from zoo import (
    causal_lm,
    cohere2,
    gemma,
    gemma2,
    gemma3_text,
    generate,  # noqa: F401 (zoo.generate)
    gpt2,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    pattern,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    rope,
    sharding,
    smollm3,
    stack,
)

# `model_type` in an HF config.json -> the module with its `Config`, `Model` and `HF_WEIGHTS`.
ARCHITECTURES: dict[str, types.ModuleType] = {
    "cohere2": cohere2,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3_text,
    "gemma3_text": gemma3_text,
    "gpt2": gpt2,
    "gpt_oss": gpt_oss,
    "granite": granite,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "smollm3": smollm3,
}
# What is listed or looped over, before the weights have been looked at.
COUNTED = ("num_hidden_layers", "n_layer", "num_experts", "num_local_experts")
MOST_COUNTED = 10_000
Model = causal_lm.CausalLM  # any of their models


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

    # What the zoo cannot read is refused before its weights are fetched.
    looked_at = hf_folder.find(str(path_or_id), revision, hf_folder.CONFIG_FILES)
    model = abstract(hf_folder.read_config(looked_at), dtype, compute_dtype, mesh)
    folder = hf_folder.find(str(path_or_id), revision)
    graph, state = nnx.split(model)
    arrays = hf_weights.read(folder, _plan(model))
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

    looked_at = hf_folder.find(str(path_or_id), files=hf_folder.CONFIG_FILES)
    model = abstract(hf_folder.read_config(looked_at))
    hf_weights.check(hf_folder.find(str(path_or_id)), _plan(model))


def check_finite(model: Model) -> None:
    """Refuses weights that hold a NaN or an infinity, by their names in the folder they came from.

    Looked at where they are, each once. Every process must call it.

    Raises:
      ValueError: there are such weights.
    """
    from checkpoints_io import bits, hf_weights

    table = _table(model)
    params = {_name(path): p.get_value() for path, p in nnx.to_flat_state(nnx.state(model))}
    # All are begun before one is waited for.
    finite = {name: bits.finite(x, table[name].name.count("{")) for name, x in params.items()}
    bad = [
        hf_name
        for name, parts in finite.items()
        if not (here := np.asarray(parts)).all()
        for index, hf_name in hf_weights.hf_names(table[name], params[name].shape)
        if not here[index]
    ]
    if bad:
        raise BadInput(
            f"{model.source or 'the model'}: {bad[0]} holds numbers that are not finite (NaN or "
            f"infinity; tensors with such numbers: {len(bad)}): the files are damaged, or their "
            "training diverged; take another checkpoint"
        )


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
    from checkpoints_io import hf_export, hf_folder, whole

    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    weights = {_name(path): (param.axes, param.get_value()) for path, param in params}
    with whole.folder(pathlib.Path(folder)) as fresh:
        hf_export.write(fresh, _table(model), weights, np.dtype(dtype))
        config = _hf_config_of(model)
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
    config = _config(hf_config)
    arch = ARCHITECTURES[config.model_type]
    model = nnx.eval_shape(lambda: arch.Model(config, nnx.Rngs(0), compute_dtype or dtype))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def placed(param: nnx.Param) -> nnx.Variable:
        where = sharding.sharding(param.axes, param.shape, mesh) if mesh else here
        return param.replace(jax.ShapeDtypeStruct(param.shape, dtype, sharding=where))

    is_param = lambda x: isinstance(x, nnx.Variable)
    nnx.update(model, jax.tree.map(placed, nnx.state(model), is_leaf=is_param))
    return model


def _hf_config_of(model: Model) -> dict:
    """The source's config.json, or as much of it as describes what is written."""
    from checkpoints_io import hf_folder

    own = model.config.to_hf()
    if not model.source:
        return own
    config = hf_folder.read_config(model.source)
    if "text_config" in config:  # the text half becomes a model of its own
        ids = {key: value for key, value in config.items() if key.endswith("os_token_id")}
        kind = {key: own[key] for key in ("model_type", "architectures")}
        config = config["text_config"] | ids | kind
    # Weights are written as they are, and no code beside them.
    return {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}


def longest_text(hf_config: dict) -> int | None:
    """How many tokens the model of a `config.json` was made for, if it says so."""
    own = hf_config.get("text_config", hf_config)
    longest = own.get("max_position_embeddings") or own.get("n_positions")
    return longest if isinstance(longest, int) else None


def turns_alike_to(hf_config: dict) -> int | None:
    """The longest text whose rotary positions are those of all shorter ones; None: any."""
    return rope.limit(getattr(_config(hf_config), "rope_parameters", None))


def _config(hf_config: dict):
    """The Config of its architecture."""
    kind = hf_config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise BadInput(
            f"config.json has model_type {kind!r}; the zoo has {', '.join(sorted(ARCHITECTURES))}"
        )
    for part in (hf_config, hf_config.get("text_config")):
        counts = {key: part.get(key) for key in COUNTED} if isinstance(part, dict) else {}
        for key, count in counts.items():
            if isinstance(count, int | float) and count > MOST_COUNTED:
                raise BadInput(f"config.json: no model has {key} of {count}")
    return ARCHITECTURES[kind].Config.from_hf(hf_config)


def _plan(model: Model):
    """What the weight reader asks: the table, the weights, and the tensors that repeat others."""
    from checkpoints_io import hf_weights

    arch = ARCHITECTURES[model.config.model_type]
    table = _table(model)
    wanted = {
        _name(path): hf_weights.Wanted(
            param.axes, param.shape, np.dtype(param.dtype), param.get_value().sharding
        )
        for path, param in nnx.to_flat_state(nnx.state(model))
    }
    tied = {} if "head" in wanted else {table["head"].name: table["embedding"].name}
    return hf_weights.Plan(table, wanted, tied, getattr(arch, "HF_NAMES", ()))


def _table(model: Model):
    """Where each of our weights stands in the files; of a kind of layers, by their numbers."""
    from checkpoints_io import hf_weights

    numbers = {f"{stack.STACKS}.{kind}": found
               for kind, found in pattern.numbers(model.config.kinds).items()}  # fmt: skip
    kind_of = lambda path: ".".join(path.split(".")[:2])
    return {
        path: hf_weights.Entry(name, axes, numbers.get(kind_of(path)))
        for path, (name, axes) in ARCHITECTURES[model.config.model_type].HF_WEIGHTS.items()
    }


def _name(path: tuple) -> str:
    return ".".join(map(str, path))

"""Loads and saves Hugging Face folders: the only place where the zoo touches the disk."""

from collections.abc import Mapping, Sequence
import contextlib
import json
import os
import pathlib

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from checkpoints_io import bits, hf_export, hf_folder, hf_names, hf_weights, peft_folder, places
from checkpoints_io.errors import BadInput, NotFound
from zoo import adapters, config_file, peft, reading
from zoo.models import (
    Model,
    abstract,
    dtype_of,
    hf_table,
    name_of,
    never_narrowed,
    refuse_dtype,
    refuse_other,
    refuse_seed,
    said_by,
)
from zoo.narrow import narrowed
from zoo.parts import adapted, hf_config, text_half, token_rows
from zoo.text import template


def load(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    compute_dtype: jax.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    revision: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    frozen: str | None = None,
) -> Model:
    """Loads the model of a Hugging Face folder, `gs://…` or hub id onto the devices of `mesh`.

    `dtype` is the dtype of the weights; `compute_dtype`, by default the same, of the activations.
    Without a mesh (`zoo.sharding.mesh_of`) everything is on the first device. `adapter` is a PEFT
    folder or hub id, whose adapters are attached to the weights, in float32: `save` merges them,
    `save_adapter` does not.
    `frozen` ("nf4" or "int8") quantises the matrices of the blocks, and only adapters can then be
    trained. It defaults to the quantisation that `adapter` was trained on.

    Example:
      model = zoo.load("meta-llama/Llama-3.2-1B")
      logits = model(tokens)  # [B, T] -> [B, T, V]

    Raises:
      FileNotFoundError: there is no such folder, repository or file.
      ValueError: config.json or the weights do not fit any architecture here, or the adapters
        do not fit the model.
    """
    # A model that the zoo cannot read is refused before its weights are downloaded.
    folder, beside = hf_folder.look_up(path_or_id, revision), None
    _refuse_reward_model(folder)
    if adapter is not None:
        beside = hf_folder.find(os.fspath(adapter), files=peft_folder.FILES)
        frozen = frozen or peft_folder.read_trained_on(beside).frozen
    model = abstract(folder.config, dtype, compute_dtype, mesh)
    model = narrowed(model, frozen) if frozen else model
    model.source = folder
    if beside:
        peft.sites_of(model, beside)
    model = reading.filled(model, hf_folder.fetched(folder), reading.plan_of(model))
    return _with_adapters(model, beside) if beside else model


def read(
    model: Model, some: Mapping[str, Sequence[int] | None], dtype: jax.typing.DTypeLike
) -> dict:
    """Reads some weights from the folder of an abstract model, as nested dicts.

    `some` maps the path of each weight to the layers that are wanted, or to None for all of them.

    Raises:
      FileNotFoundError, ValueError: as in `load` and `check_finite`.
    """
    plan, exact, parts = reading.plan_of(model), never_narrowed(model), {}
    for path, layers in some.items():
        entry, want = plan.table[path], plan.wanted[path]
        if layers is not None:
            numbers = layers if entry.layers is None else [entry.layers[i] for i in layers]
            entry = entry._replace(layers=numbers)
            want = want._replace(shape=(len(layers), *want.shape[1:]))
        if path not in exact:
            want = want._replace(dtype=np.dtype(dtype))
        parts[path] = entry, want
    assert model.source is not None
    arrays: dict[str, PyTree] = hf_weights.read(hf_folder.look_up(model.source).path, plan, parts)
    _refuse_not_finite(model, arrays, {path: entry for path, (entry, _) in parts.items()})
    return traverse_util.unflatten_dict(arrays, sep=".")


def _with_adapters(model: Model, folder: pathlib.Path) -> Model:
    found = peft.read(model, folder)
    graph, state = nnx.split(model)
    params = adapters.attached(nnx.to_pure_dict(state), found.sites)
    return nnx.merge(graph, nnx.State(adapted.joined(found.adapters, params)))


def fresh(
    config: object,
    *,
    seed: int = 0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    compute_dtype: jax.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """A model with new random weights, initialised directly on the devices of `mesh`.

    `config` is a Config, the contents of a `config.json`, a config of transformers, or a folder or
    hub id, of which the weights are not read but `save` copies the tokenizer. A seed gives the same
    weights on any devices.

    Example:
      model = zoo.fresh("recipes/tiny/model", seed=1)

    Raises:
      FileNotFoundError, ValueError: as in `load`.
    """
    refuse_seed(seed)
    source = None
    if isinstance(config, str | os.PathLike):
        source = hf_folder.fetched(hf_folder.look_up(config), hf_folder.TOKENIZER_FILES)
        config = source.config
    elif not isinstance(config, hf_config.Config):
        config = said_by(config)
    model = abstract(config, dtype, compute_dtype, mesh)
    graph, like = nnx.split(model)
    placed = jax.tree.map(lambda param: param.sharding, nnx.to_pure_dict(like))

    def drawn() -> dict:
        made = type(model)(model.config, nnx.Rngs(seed), model.dtype)
        weights = nnx.to_pure_dict(nnx.state(made))
        return jax.tree.map(lambda x, as_: x.astype(as_.dtype), weights, nnx.to_pure_dict(like))

    params = jax.jit(drawn, out_shardings=placed)()
    nnx.replace_by_pure_dict(like, params)
    model = nnx.merge(graph, like)
    model.source, model.is_new = source, True
    if source is None and isinstance(config, Mapping):
        own = config.get("architectures") or [model.config.architecture]
        model.described = json.dumps({**config, "architectures": own}, default=str)
    return model


def check(path_or_id: str | os.PathLike[str]) -> None:
    """Refuses what `load` would refuse, reading only the headers of the weight files.

    Raises:
      FileNotFoundError, ValueError: as in `load`.
    """
    folder = hf_folder.look_up(path_or_id)
    _refuse_reward_model(folder)
    model = abstract(folder.config)
    model.source = folder
    hf_weights.check(hf_folder.fetched(folder).path, reading.plan_of(model))


def _refuse_reward_model(folder: hf_folder.Folder) -> None:
    if text_half.scores(folder.config):
        raise BadInput(
            f"{folder} is a reward model, with a number for a text in place of logits: "
            "zoo.reward.load reads it, and recipes/sample_pairs.py takes it as --reward_model"
        )


def check_finite(model: Model) -> None:
    """Refuses weights that hold a NaN or an infinity, and names the tensor as the files do.

    Each weight is checked once, on its own devices. Every process must call this.

    Raises:
      ValueError: some weight holds a NaN or an infinity.
    """
    weights = adapters.base_of(nnx.to_pure_dict(nnx.state(model)))
    params: dict[str, PyTree] = traverse_util.flatten_dict(weights, sep=".")
    _refuse_not_finite(model, params, hf_table(model))


def _refuse_not_finite(
    model: Model, params: Mapping[str, PyTree], table: Mapping[str, hf_names.Entry]
) -> None:
    # Dispatch every check before waiting for the first result.
    finite = {name: bits.finite(x, table[name].name.count("{")) for name, x in params.items()}
    bad = [
        hf_name
        for name, parts in finite.items()
        if not (here := np.asarray(parts)).all()
        for index, hf_name in hf_names.of(table[name], params[name].shape)
        if not here[index]
    ]
    if bad:
        raise BadInput(
            f"{model.source or 'the model'}: {bad[0]} holds numbers that are not finite (NaN or "
            f"infinity; tensors with such numbers: {len(bad)}): the files are damaged, or their "
            "training diverged; use another checkpoint"
        )


def save(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    tokenizer: str | os.PathLike[str] | None = None,
    stop_ids: Sequence[int] | np.ndarray = (),
    chat_template: str | None = None,
    text_only: bool = False,
    card: str | None = None,
) -> None:
    """Writes a Hugging Face folder that transformers and vLLM load: weights, config, tokenizer.

    The folder appears only once it is complete. The tokenizer and chat template are those that the
    model came with, unless `tokenizer` (a folder) or `chat_template` (a text) replaces them;
    `stop_ids` are added to the ids that end generation. Other weights of the source folder are
    copied bit for bit: an indexer and, unless `text_only`, a vision tower or multi-token prediction
    heads. `card` is the text of README.md. Every process must call this.

    Raises:
      FileExistsError: `folder` holds something that is not a model.
      FileNotFoundError: there is no folder `tokenizer`, or the model's source folder is gone.
      ValueError: `dtype` is not one that weights may have; the weights do not fit the model's
        Config or are not finite; a stop id is beyond the vocabulary; or the template is invalid.
    """
    refuse_other(model, "zoo.save(model, folder)")
    refuse_dtype("dtype", dtype)
    stop_ids = token_rows.stop_ids(stop_ids)
    if odd := [i for i in stop_ids if i >= model.config.vocab_size]:
        raise BadInput(f"stop_ids: {odd[0]} is beyond the model's {model.config.vocab_size} ids")
    if chat_template is not None:
        template.compiled(chat_template, None)
    source = hf_folder.look_up(model.source) if model.source else None
    if source and not source.path.is_dir():
        raise NotFound(
            f"{source} is gone, and with it the tokenizer and what else the model came with: with "
            "model.source = None only weights and config.json are written"
        )
    held = source if source and not model.is_new and hf_weights.are_in(source.path) else None
    whole = None if text_only else held
    config = config_file.of(model, dtype, text_only=whole is None)
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    weights = {
        name_of(path): hf_export.Weight(
            param.axes, param.get_value(), np.dtype(dtype_of(param, dtype))
        )
        for path, param in params
    }
    words = source.path if source else None
    if tokenizer is not None:
        words = hf_folder.find(os.fspath(tokenizer), files=hf_folder.TOKENIZER_FILES)
    with contextlib.ExitStack() as stack:
        begun = stack.enter_context(places.at(os.fspath(folder)).whole_folder())
        table, others, joined = hf_table(model), {}, []
        if held:
            plan = reading.spelling(model, text_only)
            others = stack.enter_context(hf_weights.carried(held.path, plan))
            if whole and text_half.is_whole(whole.config):
                table, joined = hf_weights.as_in(whole.path, plan)
        hf_export.write(begun, table, weights, others, joined)
        if begun:
            hf_folder.write_companions(begun, config, source, words, stop_ids, chat_template, card)
            if whole:
                hf_folder.copy(hf_folder.PROCESSORS, whole.path, begun)

"""All that can fail, before any long work: settings, data, models, room. Says the plan."""

import pathlib
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import ml_collections
import tqdm

from checkpoints_io import hf_folder
from recipes import plan, reference, settings
from recipes.data import batches, chat
from recipes.data import pairs as pairs_io
from recipes.data.packing import Shape
from recipes.data.tokens import PairIds
from recipes.evaluation import HeldOut
import zoo
from zoo import sharding


class Run(NamedTuple):
    """A run that is ready to start."""

    directory: pathlib.Path
    mesh: Mesh
    rows: NamedSharding  # how the rows of a micro-batch are split
    tokenizer: chat.Tokenizer
    policy: zoo.Model
    reference: zoo.Model
    pairs: list[PairIds]
    held_out: list[HeldOut]
    first: batches.Update  # what the gate looks at
    shape: Shape
    total_steps: int
    facts: dict[str, Any]  # what a checkpoint of this run must agree with
    counts: dict[str, int]


def say(text: str) -> None:
    """Tells the person at the terminal, once however many processes there are."""
    if jax.process_index() == 0:
        tqdm.tqdm.write(text)


def prepare(config: ml_collections.ConfigDict) -> Run:
    """Reads and checks all that a run needs, and says what it will do.

    Raises:
      ValueError, OSError: a sentence about what is wrong and how to mend it.
    """
    settings.check(config)
    precision = settings.precision(config.mp)
    mesh = sharding.mesh_of(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    directory = pathlib.Path(config.directory).expanduser().absolute()
    directory.mkdir(parents=True, exist_ok=True)

    folder = hf_folder.find(config.initialize_from_hf)
    hf_config = hf_folder.read_config(folder)
    abstract = zoo.abstract(hf_config)
    longest = hf_config.get("max_position_embeddings")
    if longest and config.train_seq_len > longest:
        raise ValueError(
            f"--config.train_seq_len={config.train_seq_len} is more than the {longest} positions "
            f"that {config.initialize_from_hf} was made for (max_position_embeddings)"
        )
    tokenizer_folder = hf_folder.find(config.tokenizer) if config.tokenizer else folder
    tokenizer = chat.load_tokenizer(tokenizer_folder, config.chat_template)
    if config.data.layout != "plain_text":
        chat.check_template(tokenizer)
    train, held_out, counts = _pairs(config, tokenizer)
    _refuse_unknown_ids(train + [p for h in held_out for p in h.pairs], abstract, tokenizer)

    shape = batches.shape_of(
        train,
        rows=config.per_device_parallelism * sharding.data_shards(mesh),
        row_length=config.row_length,
        per_update=config.train_batch_size,
    )
    train, unfit = plan.that_fit(train, shape)
    held_out = [h._replace(pairs=plan.that_fit(h.pairs, shape)[0]) for h in held_out]
    steps = config.num_train_steps or max(
        1, round(config.num_epochs * len(train) / config.train_batch_size)
    )
    counts["data/dropped"] += unfit
    _say_plan(config, mesh, shape, train, held_out, abstract, tokenizer, steps, unfit, directory)

    say(f"reading the weights in {folder}")
    policy = zoo.load(folder, dtype=precision.params, compute_dtype=precision.compute, mesh=mesh)
    frozen = reference.load(
        config.reference_model_path,
        is_hf=config.reference_is_hf,
        policy=policy,
        dtype=precision.compute,
        mesh=mesh,
    )
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    first = next(batches.in_order(train, shape, batches.rows_here(shape.rows, rows)))
    facts = {
        "settings": settings.that_shape_the_run(config),
        "data": pairs_io.fingerprint(train),
        "reference": reference.fingerprint(nnx.to_pure_dict(nnx.state(frozen))),
    }
    return Run(
        directory, mesh, rows, tokenizer, policy, frozen, train, held_out, first, shape, steps,
        facts, counts,
    )  # fmt: skip


def refuse_other_run(saved: dict[str, Any], run: Run) -> None:
    """Checks the facts of a checkpoint against those of this run.

    Raises:
      ValueError: it is another run's.
    """
    settings.refuse_other_run(saved["settings"], run.facts["settings"], str(run.directory))
    for name, what in (("data", "training pairs"), ("reference", "reference weights")):
        if saved[name] != run.facts[name]:
            raise ValueError(
                f"the {what} have changed since the checkpoint in {run.directory} was written "
                f"(fingerprint {saved[name]} then, {run.facts[name]} now): give the old ones back, "
                "or choose another --config.directory"
            )


def _pairs(
    config: ml_collections.ConfigDict, tokenizer: chat.Tokenizer
) -> tuple[list[PairIds], list[HeldOut], dict[str, int]]:
    """Training pairs, held-out sets, and how many rows were lost on the way."""
    read = lambda source: pairs_io.read(source, config.data, tokenizer, config.train_seq_len)
    source = read(config.train_data)
    say("\n  ".join([f"training data {config.train_data}:", *source.counts.lines()]))
    train = source.ids
    held_out: list[HeldOut] = []
    if config.validation_split_fraction is not None:
        train, held = pairs_io.split(source, config.validation_split_fraction)
        held_out.append(HeldOut("validation", held, []))
    for name, path in config.validation.items():
        extra = read(path)
        say("\n  ".join([f"held-out data {name} ({path}):", *extra.counts.lines()]))
        held_out.append(HeldOut(name, extra.ids, []))
    most = config.max_eval_pairs
    held_out = [h._replace(pairs=h.pairs[:most]) for h in held_out]
    counts = {
        "data/dropped": source.counts.rows - source.counts.used,
        "data/truncated": source.counts.truncated,
    }
    return train, held_out, counts


def _refuse_unknown_ids(pairs: list[PairIds], model: zoo.Model, tokenizer: chat.Tokenizer) -> None:
    top = max(
        int(max(ids.max(initial=0) for ids in (p.prompt, p.chosen, p.rejected))) for p in pairs
    )
    if top >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer gives id {top} ({tokenizer.convert_ids_to_tokens(top)!r}), and the "
            f"model's embedding has {model.config.vocab_size} rows: it is another model's tokenizer"
        )


def _say_plan(
    config, mesh, shape: Shape, train, held_out, model, tokenizer, steps: int, unfit: int, directory
) -> None:
    share, count = plan.fill(train, shape)
    plan.refuse_empty_rows(share, config)
    bytes_each = plan.memory(model, settings.precision(config.mp).compute, mesh.devices.size)
    saved = plan.checkpoint_bytes(model)
    exported = sum(x.size for x in jax.tree.leaves(nnx.state(model))) * 2
    free = plan.refuse_small_disk(directory, (config.keep_checkpoints + 1) * saved + exported)
    device = mesh.devices.flat[0]
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    held = ", ".join(f"{len(h.pairs)} in {h.name}" for h in held_out) or "none"
    parts = ", ".join(f"{name} {plan.size(count)}" for name, count in bytes_each.items())
    say(
        f"devices      {mesh.devices.size} {device.device_kind} ({device.platform}); mesh {axes}\n"
        f"pairs        {len(train)} to train on, held out: {held}"
        + (f"; {unfit} too long for the rows" if unfit else "")
        + f"\nupdates      {steps} of {shape.pairs} pairs = {steps * shape.pairs / len(train):.2f} "
        f"epochs; about {count:.1f} micro-batches each\n"
        f"rows         {shape.rows} of {shape.row_length} positions a micro-batch, "
        f"{share:.0%} filled\n"
        f"memory       {plan.size(sum(bytes_each.values()))} per device ({parts}) and activations\n"
        f"disk         {plan.size(saved)} per checkpoint, {config.keep_checkpoints} kept; "
        f"{plan.size(free)} free in {directory}\n"
        f"first pair, scored tokens in ⟦ ⟧:\n{plan.example(train[0], tokenizer)}"
    )

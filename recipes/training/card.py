"""The card of an exported model: README.md, with the metadata that a hub reads at its top.

It is made of what the directory of the run says: settings, held-out figures, and what became of
the rows of the data.
"""

from collections.abc import Iterable, Sequence
import json
import re
import shlex
import sys

from checkpoints_io import hf_hub, places
from checkpoints_io.unseen import visible
from recipes.data.rows import source, sources
from recipes.training import by_name, listing, records
from recipes.training.run import Exporting, Run, adapters_alone
from recipes.training.settings import LOGGING_AND_SAVING, recipe_of, table_of, trains_on_pairs

Figures = Sequence[tuple[str, str, str]]  # held-out set, name, value
RECIPES = r"recipes/(dpo|sft)\.py$"
# Of this machine or this run alone, and nothing about the model.
OF_HERE = ("name", "tags", "directory", "token_cache", "compile_cache", "reference_cache")
FIGURES = {
    "dpo_accuracy": "accuracy",
    "dpo_reward_margin": "reward margin",
    "dpo_loss": "loss",
    "loss": "loss (nats per token)",
    "bits_per_byte": "bits per byte",
}


def text(run: Run | Exporting, step: int) -> str:
    """The card of the model of this step. Every process must ask for it."""
    held_out = records.of_held_out(run.directory, step)
    sets = dict.fromkeys(name.removeprefix("eval/").rpartition("/")[0] for name in held_out)
    rows = [
        (one, figure, f"{held_out[name]:.4g}")
        for one in sets
        for figure in FIGURES
        if (name := f"eval/{one}/{figure}") in held_out
    ]
    parts = [
        f"---\n{_metadata(run, rows)}\n---",
        f"# {_plain(run.records.name)}",
        _what(run, step),
        _section("Held-out figures", ("set", "figure", f"after step {step}"), _told(rows)),
        _section("Data", ("source", "for", "rows", "used", "lost, and why"), _data(run.directory)),
        _section("Settings", ("setting", "value"), _settings(run)),
        _command(),
        "The licence and limitations of the base model also apply to this model.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(run: Run | Exporting, figures: Figures) -> str:
    import huggingface_hub  # half a second, late

    is_pairs, base = trains_on_pairs(_flat(run)), run.base.partition("@")[0]
    tags = ["nnx-zoo", "dpo" if is_pairs else "sft", *(["lora"] if run.adapting else [])]
    results = [
        huggingface_hub.EvalResult(
            task_type="text-generation", dataset_type=one, dataset_name=one,
            metric_type=what, metric_value=float(value),
        )
        for one, what, value in figures
    ]  # fmt: skip
    return huggingface_hub.ModelCardData(
        base_model=base if _is_of_hub(run) else None,
        library_name="peft" if adapters_alone(run) else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*tags, *run.records.tags])),
        datasets=_datasets(run) or None,
        model_name=run.records.name,
        eval_results=results or None,
    ).to_yaml()


def _told(figures: Figures) -> list[list[str]]:
    return [[_plain(one), FIGURES[figure], value] for one, figure, value in figures]


def _is_of_hub(run: Run | Exporting) -> bool:
    return bool(run.folder.revision) and bool(re.fullmatch(hf_hub.ID, run.base.partition("@")[0]))


def _datasets(run: Run | Exporting) -> list[str]:
    """The hub ids among the sources of the training data."""
    plain = source.Common(None, {}, single=False)
    every = source.training(run.records.settings["train_data"], plain).values()
    ids = (sources.hub_id(one.source.path) for one in every)
    return [one for one in dict.fromkeys(ids) if one]


def _what(run: Run | Exporting, step: int) -> str:
    given = _flat(run)
    base = _code(run.base.partition("@")[0] if _is_of_hub(run) else run.base)
    if run.folder.revision:
        base += f" (revision {_code(run.folder.revision)})"
    how, each = "supervised fine-tuning", "answers"
    if trains_on_pairs(given):
        each = "pairs"
        how = f"preference optimization (loss {_code(given['loss'])}, beta {given['beta']:g})"
    made = f"Trained by {how}: {step} updates of {given['train_batch_size']} {each}"
    if adapters_alone(run):
        return f"LoRA adapters for {base}. {made}."
    merged = ", with merged LoRA adapters" if run.adapting else ""
    return f"{base}, trained further{merged}. {made}."


def _data(directory: places.Place) -> list[list[str]]:
    """What became of the rows, by source."""
    try:
        told = json.loads(directory.read(records.DATA) or b"[]")
    except ValueError:
        return []
    return [
        [
            _code(one["source"]),
            _plain(one["name"]),
            f"{one['rows']:,}",
            f"{one['used']:,}",
            ", ".join(f"{count:,} {_plain(why)}" for why, count in one["lost"].items() if count)
            or "none",
        ]
        for one in told
    ]


def _settings(run: Run | Exporting) -> list[list[str]]:
    """The settings that are not the defaults."""
    given = _flat(run)
    table = table_of(recipe_of(given))
    return [
        [_code(name), _code(listing.spelt(value))]
        for name, value in given.items()
        if name not in OF_HERE
        and name not in LOGGING_AND_SAVING
        and not name.startswith("distributed.")
        and (name not in table or value != table[name].default)
        and value is not None
    ]


def _flat(run: Run | Exporting) -> dict[str, object]:
    return dict(by_name.flat(run.records.settings))


def _command() -> str:
    """How this program was started, if it is a recipe; where its files lie is left out."""
    found = re.search(RECIPES, sys.argv[0])
    if not found:
        return ""
    words = [word for word in sys.argv[1:] if not word.startswith("--config.directory=")]
    line = visible(shlex.join(["python", found[0], *words])).replace("\n", "␊")
    return f"## Command\n\n    {line}"


def _section(title: str, names: Iterable[str], rows: Sequence[Iterable[str]]) -> str:
    if not rows:
        return ""
    lines = [list(names), ["---"] * len(list(names)), *map(list, rows)]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(said: object) -> str:
    """Text of others as text of Markdown, on one line."""
    one = visible(str(said)).replace("\n", " ")
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", one)


def _code(said: object) -> str:
    one = visible(str(said)).replace("\n", " ").replace("`", "'").replace("|", "\\|")
    return f"`{one}`" if one else ""

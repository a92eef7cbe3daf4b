"""The end of a run: what was learned, where the model is, and how to use it."""

from collections.abc import Collection, Mapping, Sequence
import json
import shlex
from typing import cast

from checkpoints_io import quantised
from recipes.data import shown
from recipes.data.ids.examples import is_ranked
from recipes.data.run_data import HeldOut
from recipes.training import command, listing, optimizer, plain_texts, policy, samples, tasks
from recipes.training.run import Run, adapters_alone, say
from recipes.training.samples import Answers
from recipes.training.settings import ADAPTER, OF_FOLDER
import zoo
from zoo import targets
from zoo.parts import text_half

# The values that vLLM's --max-lora-rank may have; its default is 16 (vllm/config/lora.py, 0.33).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Said of a folder in a bucket.
COPIED = "transformers, PEFT and vLLM only read local folders: copy it to their machine"


def show(
    run: Run,
    trained: zoo.Model,
    reference: zoo.Model | None,
    held_out: Mapping[str, float],
    step: int,
) -> None:
    """Prints sample answers, held-out figures, the folder, and lines to paste.

    "Before" is the reference, if the recipe has one. `held_out` are the figures of the step that
    is shown, if there are any.
    """
    answers = samples.answered(run, trained, reference)
    if answers:
        say(samples.side_by_side(run.tokenizer, answers))
    # A reference that has followed the policy is no longer the model from before.
    follows = optimizer.reference_of(run.opt_state) is not None
    has_reference = run.reference is not None and not follows
    told = figures(run.held_out, held_out, has_reference=has_reference)
    told += plain_texts.lines(run, held_out) + tasks.lines(run, held_out)
    if told := [*told, *manner(answers, run.stop_ids, has_reference=has_reference)]:
        compared = "before (the reference) -> " if has_reference else ""
        say(f"\nheld-out figures, {compared}after {step} steps")
        say("\n".join(f"  {line}" for line in told))
    folder = policy.export_folder(step, run).address
    if not policy.exported(step, run):
        say(how_to_export(folder))
    elif adapters_alone(run):
        say(how_to_use_adapters(folder, run))
    else:
        say(how_to_go_on(folder, run))


def figures(
    sets: Sequence[HeldOut], held_out: Mapping[str, float], *, has_reference: bool = True
) -> list[str]:
    """Held-out accuracy and reward margin, before and after; for single answers, the loss."""
    told = []
    for one in sets:
        name, pairs = one.name, one.examples
        noun = shown.noun(pairs)
        if (loss := held_out.get(f"eval/{name}/loss")) is not None:
            told.append(f"{name} loss: {loss:.3f} nats per token ({len(pairs)} {noun})")
        for what, before in (("accuracy", "no preference"), ("reward margin", "0")):
            after = held_out.get(f"eval/{name}/dpo_{what.replace(' ', '_')}")
            if after is not None:
                compared = f"{before} -> " if has_reference else ""
                told.append(f"{name} {what}: {compared}{after:.3f} ({len(pairs)} {noun})")
    return told


def manner(
    answers: Answers | None, stop_ids: Collection[int], *, has_reference: bool = True
) -> list[str]:
    """The share of answers closer to the chosen one (`samples.is_wanted`), and how many are cut."""
    if not answers or not is_ranked(answers.examples[0]):
        return []
    before, after = (samples.wanted_share(answers, name) for name in ("before", "after"))
    compared = "" if before is None else f"{before:.0%} -> "
    if before is None and has_reference:
        compared = "not generated -> "
    return [
        f"answers closer to the chosen one: {compared}{after:.0%} ({len(answers.examples)} greedy "
        "answers; the share that is more similar to the chosen answer than to the rejected one)",
        *_unended(answers, stop_ids),
    ]


def _unended(answers: Answers, stop_ids: Collection[int]) -> list[str]:
    """A line on answers that were cut off, if there are more of them than before."""
    count = {name: sum(text[-1] not in stop_ids for text in texts if text)
             for name, texts in answers.texts.items()}  # fmt: skip
    if count["after"] <= count.get("before", 0):
        return []
    compared = f"{count['before']} -> " if "before" in count else ""
    return [f"answers cut off at {answers.most} tokens: {compared}{count['after']}"]


def how_to_export(folder: str) -> str:
    """How to write the model folder of a finished run."""
    return (
        "\nno Hugging Face folder was written (--config.steps_per_hf_export=-1): the same "
        f"command with --config.steps_per_hf_export=None writes {folder}"
    )


def how_to_use_adapters(folder: str, run: Run) -> str:
    """Where the adapters are, and lines to paste."""
    quoted, on = (json.dumps(one, ensure_ascii=False) for one in (folder, run.base))
    shell = shlex.quote
    frozen = run.records.settings["frozen"]
    elsewhere = _elsewhere(folder, run)
    if "://" in folder:
        elsewhere = f"\n{COPIED}\n"
    if frozen in quantised.KINDS:
        elsewhere = f"""
these adapters were trained on {frozen} weights; PEFT and vLLM would apply them to unquantised
ones, so merge first
"""
    return f"""
the adapters are in {folder}

chat with it:
  {command.python()} -m zoo chat {shell(folder)}

load it:
  import zoo
  model = zoo.load({on}, adapter={quoted})
{elsewhere}
merge weights and adapters into one model, for any program:
  {command.python()} -m zoo merge {shell(run.base)} {shell(folder)} FOLDER

continue from these adapters, with other pairs or settings:
  {command.again(_begun_from(folder, run) | {"directory": _another(run)})}"""


def _elsewhere(folder: str, run: Run) -> str:
    """Commands for programs that load adapters onto weights of their own."""
    assert run.adapting is not None
    rank, revision, base = run.adapting.rank, run.folder.revision, policy.base_of(run)
    quoted, on = (json.dumps(one, ensure_ascii=False) for one in (folder, base))
    serve = (
        f"(vLLM takes ranks up to {VLLM_RANKS[-1]}, but these adapters have rank {rank}: "
        "merge them)"
    )
    if served := next((size for size in VLLM_RANKS if size >= rank), None):
        pinned = f" --revision {revision}" if revision else ""
        serve = (
            f"vllm serve {shlex.quote(base)}{pinned} --enable-lora --max-lora-rank {served} "
            f"--lora-modules mine={shlex.quote(folder)}"
        )
    pinned = f", revision={json.dumps(revision)}" if revision else ""
    # PEFT finds a text model's modules by their names in the whole multimodal model.
    sees = text_half.is_whole(run.folder.config)
    kind = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    of_tokenizer = on + pinned
    if other := run.records.settings["tokenizer"]:
        of_tokenizer = json.dumps(other, ensure_ascii=False)
    if mistaken := targets.taken_for_experts(run.blank, run.adapting.sites):
        return f"""
  {serve}

PEFT 0.21 may mistake adapters like {mistaken} for those of experts, and
lose them: merge first for PEFT
"""
    return f"""
  import peft, transformers  # pip install peft transformers torch
  model = transformers.{kind}.from_pretrained({on}{pinned})
  model = peft.PeftModel.from_pretrained(model, {quoted})
  tokenizer = transformers.AutoTokenizer.from_pretrained({of_tokenizer})

  {serve}
"""


def _begun_from(folder: str, run: Run) -> dict[str, str]:
    """Settings of a run that starts from these adapters, without those that they determine."""
    own = cast(Mapping[str, object], run.records.settings["adapter"])
    begun = {"adapter.path": folder, "adapter.rank": "None"}
    for name, setting in ADAPTER.items():
        short = name.removeprefix("adapter.")
        if short in own and name not in OF_FOLDER and own[short] != setting.default:
            begun[name] = listing.spelt(setting.default)
    return begun


def _another(run: Run) -> str:
    """A directory for the run after this one: runs/tiny-2 after runs/tiny."""
    before = run.directory.address
    name, dash, number = before.rpartition("-")
    return f"{name}-{int(number) + 1}" if dash and number.isdecimal() else f"{before}-2"


def how_to_go_on(folder: str, run: Run) -> str:
    """Where the model is, and lines to paste."""
    quoted = json.dumps(folder, ensure_ascii=False)
    asked = '[{"role": "user", "content": "Hello"}]' if run.tokenizer.chat_template else '"Once"'
    program = (
        f'import transformers; ask = transformers.pipeline("text-generation", {quoted}); '
        f"print(ask({asked}, max_new_tokens=64))"
    )
    begun = {"initialize_from_hf": folder, "directory": _another(run)}
    elsewhere = f"""load it (in Python here: zoo.load({quoted})) in transformers or vLLM:
  {command.python()} -c {shlex.quote(program)}
  vllm serve {shlex.quote(folder)}"""
    if "://" in folder:
        elsewhere = f"load it:\n  import zoo\n  model = zoo.load({quoted})\n\n{COPIED}"
    return f"""
the model is in {folder}

chat with it:
  {command.python()} -m zoo chat {shlex.quote(folder)}

{elsewhere}

continue from it, with other pairs or settings:
  {command.again(begun)}"""

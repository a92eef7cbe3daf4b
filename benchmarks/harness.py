"""Tasks of lm-evaluation-harness over the zoo and over the harness's own `hf`, side by side.

  python benchmarks/harness.py --model=FOLDER

Five kinds of task over the embedded pairs: multiple choice, cloze, generation, perplexity, and
generation by the chat template. Each is a process of its own, ours and theirs in turn, so that
imports, the harness's index of tasks and compiling are in both. Needs the extra `evaluation`, and
torch.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import flags
import harness_tasks

from checkpoints_io.errors import BadInput, RunFailed
from recipes import measure
from recipes.training import command

MODEL = flags.DEFINE_string("model", None, "A folder.", required=True)
PAIRS = flags.DEFINE_string("pairs", "recipes/tiny/train.jsonl", "What is asked.")
QUESTIONS = flags.DEFINE_integer("questions", 160, "Of each task.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 1, "How often.", lower_bound=1)
ONLY = flags.DEFINE_list("only", None, "Some of the tasks.")
SIDE = flags.DEFINE_enum("side", None, ["ours", "hf"], "One of them, in this process.")
FOLDER = flags.DEFINE_string("folder", None, "Where its task is.")

# The embedded pairs' tasks, and generation once more, asked by the chat template.
TASKS = [*(name.removeprefix("mine_") for name in harness_tasks.KINDS), "chat"]


def main() -> None:
    """Measures one side of one task, or, without --side, all of them in turn."""
    if SIDE.value and not (ONLY.value and FOLDER.value):
        raise BadInput(f"--side={SIDE.value} is of one task: give --only=NAME and --folder")
    if SIDE.value:
        print(json.dumps(measured(ONLY.value[0])))
        return
    lines = pathlib.Path(PAIRS.value).read_text().splitlines()[: QUESTIONS.value]
    with tempfile.TemporaryDirectory() as folder:
        harness_tasks.write(pathlib.Path(folder), [json.loads(line) for line in lines])
        for name in ONLY.value or TASKS:
            for side in ("ours", "hf") * ROUNDS.value:
                found = {"task": name, "side": side} | in_a_process(name, side, folder)
                print(json.dumps(found), flush=True)


def in_a_process(name: str, side: str, folder: str) -> dict:
    """What a process of its own printed last."""
    words = [sys.executable, __file__, f"--model={MODEL.value}", f"--folder={folder}"]
    words += [f"--side={side}", f"--only={name}"]
    ran = subprocess.run(words, capture_output=True, text=True)
    if ran.returncode:
        raise RunFailed(ran.stderr[-2000:])
    return json.loads(ran.stdout.splitlines()[-1])


def measured(name: str) -> dict:
    """CPU seconds, and the task's figure."""
    chat = name == "chat"
    task = "mine_text" if chat else f"mine_{name}"
    if SIDE.value == "ours":
        found = measure.measure(
            MODEL.value, [task], tasks_folder=FOLDER.value, num_fewshot=0, chat_template=chat
        )
    else:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=FOLDER.value)
        model = HFLM(pretrained=MODEL.value, dtype="float32", device="cpu", batch_size=16)
        found = lm_eval.simple_evaluate(
            model, tasks=[task], task_manager=manager, num_fewshot=0,
            apply_chat_template=chat, fewshot_as_multiturn=chat, bootstrap_iters=1000,
        )  # fmt: skip
    figures = {k: v for k, v in found["results"][task].items() if "," in k and "stderr" not in k}
    return {"CPU s": round(time.process_time(), 1)} | figures


if __name__ == "__main__":
    command.main_without_config(main)

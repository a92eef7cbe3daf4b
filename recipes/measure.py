"""Benchmarks of a model, by lm-evaluation-harness: its tasks, its numbers, our forward pass.

  pip install -e '.[evaluation]'
  python recipes/measure.py --model=runs/tiny/hf/step-60 --tasks=arc_easy,gsm8k
  python recipes/measure.py --model=FOLDER --tasks=mine --tasks_folder=tasks --chat

A model is a folder, a folder of adapters, or a hub id of either. Tasks are the harness's own, or
those of the YAML files in --tasks_folder.
"""

from collections.abc import Mapping
import json

from absl import flags
import jax

from checkpoints_io import compiled, places
from recipes.training import command
from recipes.training import tasks as of_harness
from recipes.training.run import say
from zoo import chat
from zoo.parts import sharding


def measure(
    model: str,
    tasks: list[str],
    *,
    tasks_folder: str | None = None,
    base: str | None = None,
    dtype: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    tensor: int = 1,
) -> dict:
    """The harness's results of a model, as it gives them.

    All devices work on it; so many share the weights (`tensor`).

    Raises:
      FileNotFoundError, ValueError: there is no such model or task, or the harness is not there.
    """
    asked = of_harness.found(tasks, tasks_folder, limit)
    mesh = sharding.mesh_of(-1, 1, tensor)
    own, tokenizer = chat.loaded(model, base, dtype, mesh, talks=chat_template)
    with jax.set_mesh(mesh):
        return of_harness.results(
            asked, own, tokenizer, num_fewshot=num_fewshot, chat_template=chat_template
        )


def _kept(found: Mapping[str, object]) -> dict[str, object]:
    """The content of a file of results: the figures, and by which versions of which tasks."""
    return {name: found[name] for name in ("results", "versions", "n-shot", "n-samples")}


def main() -> None:
    """Measures what the flags name, and prints the harness's table."""
    given = flags.FLAGS
    compiled.keep_here()
    found = measure(
        given.model, given.tasks, tasks_folder=given.tasks_folder, base=given.base,
        dtype=given.dtype, num_fewshot=given.num_fewshot, limit=given.limit,
        chat_template=given.chat, tensor=given.tensor,
    )  # fmt: skip
    from lm_eval.utils import make_table

    if given.output:
        folder, _, name = given.output.rpartition("/")
        figures = json.dumps({"model": given.model, **_kept(found)}, indent=2, default=str)
        places.at(folder or ".", "--output").write_whole(name, figures.encode())
    say(f"{given.model} on {jax.default_backend()}\n{make_table(found)}")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A folder or hub id.", required=True)
    flags.DEFINE_list("tasks", None, "Names of tasks.", required=True)
    flags.DEFINE_string("tasks_folder", None, "A folder with YAML files of further tasks.")
    flags.DEFINE_string(
        "base", None, "The base model of adapters, if it is not where their config says."
    )
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the weights.")
    flags.DEFINE_integer(
        "num_fewshot", None, "Number of few-shot examples before each question.", lower_bound=0
    )
    flags.DEFINE_integer("limit", None, "Maximum number of questions per task.", lower_bound=1)
    flags.DEFINE_integer("tensor", 1, "Number of devices to split the weights over.", lower_bound=1)
    flags.DEFINE_string("output", None, "A JSON file to write the figures to.")
    flags.DEFINE_boolean("chat", False, "Ask with the chat template.")
    command.main_without_config(main)

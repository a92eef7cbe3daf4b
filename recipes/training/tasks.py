"""Tasks of lm-evaluation-harness: of any model, and at the evaluations of a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import os
import pathlib
from typing import Any

from checkpoints_io.errors import BadInput, NotFound
from recipes.training import harness
from recipes.training.preemption import StopRequested
from recipes.training.run import Run, Tasks
import zoo
from zoo.text.chat_tokenizer import ChatTokenizer

RESAMPLES = 1000  # for standard errors that no formula gives


def found(names: Sequence[str], folder: str | None, most: int | None, flag: str = "--") -> Tasks:
    """The tasks of these names, of the harness or of YAML files in a folder.

    Raises:
      FileNotFoundError, ValueError: the harness is not installed, or has no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise NotFound(
            "lm-evaluation-harness is not installed: pip install -e '.[evaluation]'"
        ) from error
    manager = TaskManager(include_path=folder, include_defaults=not folder)
    if folder and not set(names) <= set(manager.all_subtasks):
        # Its own thousands take seconds to index. A group of the folder may have some of them.
        manager = TaskManager(include_path=folder)
    if missing := [name for name in names if name not in manager.all_tasks]:
        raise BadInput(
            f"there is no task {missing[0]!r}: `lm-eval ls tasks` lists those of the harness, and "
            f"{flag}tasks_folder adds those of a folder of yours"
        )
    return Tasks(tuple(names), manager, most)


def results(
    tasks: Tasks,
    model: zoo.Model,
    tokenizer: ChatTokenizer,
    *,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The harness's results for a model; `between` is called before each batch."""
    import lm_eval

    # Resamples are drawn here: a fork of a process that has jax may hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    given = lm_eval.simple_evaluate(
        harness.model_of(model, tokenizer, between), tasks=list(tasks.names),
        task_manager=tasks.manager, num_fewshot=num_fewshot, limit=tasks.most,
        bootstrap_iters=RESAMPLES, apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,
    )  # fmt: skip
    assert given is not None
    return given


def evaluate(
    run: Run, model: Callable[[], zoo.Model], stop: Callable[[], bool]
) -> Iterator[dict[str, float]]:
    """The figures of each task, and of each group of them: `eval/arc_easy/acc`.

    Raises:
      StopRequested: the run is to stop.
    """
    if run.tasks is None:
        return

    def between() -> None:
        if stop():
            raise StopRequested

    tokenizer = _tokenizer(run.tokenizer_folder)
    given = results(run.tasks, model(), tokenizer, between=between)
    for name, said in given["results"].items():
        if figures := _means(said):  # a group may have none of its own
            yield {f"eval/{name}/{figure}": value for figure, value in figures.items()}


@functools.cache
def _tokenizer(folder: pathlib.Path) -> ChatTokenizer:
    return zoo.load_tokenizer(folder)


def lines(run: Run, held_out: Mapping[str, float]) -> list[str]:
    """The lines about tasks at the end of a run."""
    told = []
    for name in run.tasks.names if run.tasks else ():
        own = f"eval/{name}/"
        figures = {key.removeprefix(own): v for key, v in held_out.items() if key.startswith(own)}
        if figures:
            told.append(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
    return told


def _means(figures: Mapping[str, object]) -> dict[str, float]:
    """A task's figures without their standard errors, by the harness's names: `metric,filter`."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in figures.items()
        if isinstance(value, int | float) and "," in name and "_stderr," not in name
    }

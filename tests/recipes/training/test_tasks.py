"""Tasks of lm-evaluation-harness at the evaluations of a run."""

import sys

import pytest

from checkpoints_io.errors import BadInput, NotFound
from recipes import dpo, measure
from recipes.pages import run_page
from recipes.training import checks, settings, tasks
from recipes.training.preemption import StopRequested
from recipes.training.run import Tasks
from tests.conftest import TINY, exported, records, run_with
from tests.recipes.test_measure import write_tasks
import zoo

NEVER = lambda: False


@pytest.fixture
def with_tasks(tiny_config, tmp_path, monkeypatch):
    """A run of two steps that asks local tasks after each of them."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    write_tasks(tmp_path, 6)
    config = tiny_config
    config.tasks = ("mine_choice", "mine_text")
    config.tasks_folder = str(tmp_path)
    config.num_train_steps, config.steps_per_eval = 2, 1
    config.max_eval_pairs = 4
    return config


def test_tasks_of_a_folder_alone_need_no_index_of_the_others(tmp_path):
    pytest.importorskip("lm_eval")
    write_tasks(tmp_path, 2)
    (tmp_path / "both.yaml").write_text("group: both\ntask: [mine_choice, arc_easy]\n")
    manager = lambda *names: tasks.found(names, str(tmp_path), None).manager
    alone = {"mine_choice", "mine_cloze", "mine_text", "mine_rolling", "both"}
    assert {*manager("mine_choice", "mine_text").all_tasks} == alone
    for names in (("both",), ("mine_choice", "arc_easy")):
        assert len(manager(*names).all_tasks) > 1000
    with pytest.raises(BadInput, match="no task 'mine_choise'"):
        manager("mine_choise")


def test_a_means_figures_have_the_names_of_their_filters(monkeypatch):
    given = {
        "arc": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.1, "sample_len": 4},
        "gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A",
                  "exact_match,flexible-extract": 1},
        "group": {"alias": "group", " ": " "},
    }  # fmt: skip
    monkeypatch.setattr(tasks, "results", lambda *_, **__: {"results": given})
    run = run_with(tasks=Tasks(("arc", "gsm8k"), None, None), tokenizer_folder=TINY / "model")
    arc, gsm8k = tasks.evaluate(run, lambda: None, NEVER)  # and nothing of the group
    found = arc | gsm8k
    assert found == {
        "eval/arc/acc": 0.25, "eval/gsm8k/exact_match,strict-match": 0.5,
        "eval/gsm8k/exact_match,flexible-extract": 1.0,
    }  # fmt: skip
    assert tasks.lines(run, found) == [
        "arc: acc 0.25", "gsm8k: exact_match,strict-match 0.5, exact_match,flexible-extract 1",
    ]  # fmt: skip
    assert tasks.lines(run_with(), {}) == [*tasks.evaluate(run_with(), lambda: None, NEVER)] == []


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"tasks_folder": "mine"}, "tasks_folder=mine has no effect without --config.tasks"),
        ({"tasks": ("heldout",)}, "tasks=heldout has the same name as a held-out set"),
    ],
)
def test_what_could_have_no_effect_is_refused(tiny_config, said, told):
    tiny_config.update(said)
    with pytest.raises(BadInput, match=told):
        checks.checked(tiny_config, settings.table_of(settings.DPO))


def test_without_the_harness_a_run_names_the_extra_before_it_reads_anything(
    tiny_config, monkeypatch
):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    tiny_config.tasks = ("arc_easy",)
    tiny_config.initialize_from_hf = "/nowhere"
    with pytest.raises(NotFound, match=r"pip install -e '\.\[evaluation\]'"):
        dpo.train(tiny_config)


@pytest.mark.full
def test_figures_of_a_run_are_those_of_its_export(with_tasks, tmp_path, capfd):
    pytest.importorskip("lm_eval")
    with_tasks.steps_per_hf_export, with_tasks.hf_save_dtype = None, "float32"
    dpo.train(with_tasks)
    evaluated = [line for line in records(with_tasks) if "eval/mine_choice/acc" in line]
    assert [line["step"] for line in evaluated] == [1, 2]
    folder = f"{with_tasks.directory}/hf/step-2"
    alone = measure.measure(
        folder, list(with_tasks.tasks), tasks_folder=str(tmp_path), limit=4, dtype="float32"
    )["results"]
    last = evaluated[-1]
    assert last["eval/mine_choice/acc"] == alone["mine_choice"]["acc,none"]
    assert last["eval/mine_choice/acc_norm"] == alone["mine_choice"]["acc_norm,none"]
    assert last["eval/mine_text/exact_match"] == alone["mine_text"]["exact_match,none"]
    said = capfd.readouterr().out
    assert "mine_choice: acc" in said and "could not be written" not in said, said
    assert "Right answers" in (tmp_path / "run" / run_page.FILE).read_text()
    # The harness seeds what others draw from; nothing of the run moves.
    without = with_tasks.copy_and_resolve_references()
    without.directory, without.tasks, without.tasks_folder = f"{tmp_path}/other", (), None
    dpo.train(without)
    kept = lambda line: {k: v for k, v in line.items() if not k.startswith("eval/mine")}
    assert [kept(line) for line in records(with_tasks)] == records(without)
    ours, theirs = exported(with_tasks, 2), exported(without, 2)
    assert all((ours[name] == array).all() for name, array in theirs.items())


@pytest.mark.full
def test_they_are_given_up_when_the_run_is_asked_to_stop(with_tasks, tmp_path):
    pytest.importorskip("lm_eval")
    asked = tasks.found(("mine_choice",), str(tmp_path), 4)
    run = run_with(tasks=asked, tokenizer_folder=TINY / "model")
    with pytest.raises(StopRequested):
        [*tasks.evaluate(run, lambda: zoo.load(TINY / "model"), lambda: True)]


@pytest.mark.full
def test_a_task_that_is_not_there_is_named(tmp_path):
    pytest.importorskip("lm_eval")
    with pytest.raises(BadInput, match=r"no task 'mine_nothing'.*--config\.tasks_folder"):
        tasks.found(["mine_nothing"], str(tmp_path), None, "--config.")

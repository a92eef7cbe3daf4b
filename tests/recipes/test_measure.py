"""lm-evaluation-harness over the zoo: the numbers of its own `hf` model, on the same weights."""

import json
import sys

import numpy as np
import pytest

from benchmarks import harness_tasks
from checkpoints_io.errors import BadInput, NotFound
from recipes import measure
from recipes.training import harness
from tests.conftest import TINY
import zoo


def write_tasks(folder, rows):
    """Task files over some of the tiny run's held-out pairs."""
    lines = (TINY / "heldout.jsonl").read_text().splitlines()[:rows]
    harness_tasks.write(folder, [json.loads(line) for line in lines])


def answers(found):
    """What the harness was told of each request, by task and document."""
    return {
        (name, sample["doc_id"]): sample["filtered_resps"]
        for name, samples in found["samples"].items()
        for sample in samples
    }


@pytest.mark.full
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_its_numbers_are_those_of_transformers(tmp_path, monkeypatch, chat):
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    write_tasks(tmp_path, 12)
    model, tasks = (
        str(TINY / "model"),
        [name for name in harness_tasks.KINDS if not chat or "rolling" not in name],
    )
    monkeypatch.setattr(harness, "LONGEST", 64)
    monkeypatch.setattr(zoo, "longest_text", lambda _: 64)
    ours = measure.measure(
        model, tasks, tasks_folder=str(tmp_path), chat_template=chat, num_fewshot=0
    )
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=4, max_length=64),
        tasks=tasks, task_manager=TaskManager(include_path=str(tmp_path)), num_fewshot=0,
        apply_chat_template=chat, fewshot_as_multiturn=chat,
    )  # fmt: skip
    ours_, theirs_ = answers(ours), answers(theirs)
    assert ours_.keys() == theirs_.keys() and len(ours_) == 12 * len(tasks)
    for key, mine in ours_.items():
        if key[0] == "mine_text":
            assert mine == theirs_[key], key
            continue
        numbers = lambda some: np.array(some, float).ravel()
        np.testing.assert_allclose(numbers(mine), numbers(theirs_[key]), atol=2e-4, err_msg=key)
    for name in tasks:
        for figure, value in ours["results"][name].items():
            if isinstance(value, float) and "stderr" not in figure:
                assert value == pytest.approx(theirs["results"][name][figure], rel=1e-5), figure


def test_texts_are_as_long_as_the_model_was_made_for():
    pytest.importorskip("lm_eval")
    model, words = zoo.load(TINY / "model"), zoo.load_tokenizer(TINY / "model")
    assert harness.model_of(model, words).max_length == 256


def test_continuations_of_one_context_are_scored_as_if_alone():
    model, words = zoo.load(TINY / "model"), zoo.load_tokenizer(TINY / "model")
    context = words.encode("What is the capital of Peru?")
    several = [words.own.encode(text)[0] for text in (" Lima", " The capital is Lima.", " No")]
    asked = [(context, one) for one in several] + [(context[:3], several[0]), (context, several[1])]
    found = harness.scored(model, asked, 256)
    for (before, after), (logp, is_greedy) in zip(asked, found, strict=True):
        logits = np.asarray(model(np.array([[*before, *after]])), np.float64)[
            0, len(before) - 1 : -1
        ]
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = logps[np.arange(len(after)), after].sum()
        assert logp == pytest.approx(expected, abs=1e-4)
        assert is_greedy == (logits.argmax(-1) == after).all()
    # A context that does not fit loses its beginning, as in the harness: input is all but the last.
    (short,) = harness.scored(model, [(context, several[1])], len(several[1]) + 2)
    (same,) = harness.scored(model, [(context[-3:], several[1])], 256)
    assert short[0] == pytest.approx(same[0], abs=1e-5) and short[0] != found[1][0]
    with pytest.raises(BadInput, match="but the model is limited to 1"):
        harness.scored(model, [(context, several[1])], 1)


def test_many_texts_behind_the_same_token_fill_their_rows(monkeypatch):
    """As in perplexities: each begins with one token, and there is no context to share."""
    model, words = zoo.load(TINY / "model"), zoo.load_tokenizer(TINY / "model")
    draw, positions = np.random.default_rng(0), []
    asked = [([words.eos_id], draw.integers(5, 90, n).tolist()) for n in draw.integers(20, 90, 60)]
    scores = harness._scores
    counted = lambda graph, params, batch: (
        positions.append(batch.tokens.size), scores(graph, params, batch)
    )[1]  # fmt: skip
    monkeypatch.setattr(harness, "_scores", counted)
    found = harness.scored(model, asked, 256)
    assert sum(positions) <= 1.25 * sum(len(ids) for _, ids in asked)
    for i in (0, 7, 59):
        assert found[i][0] == pytest.approx(harness.scored(model, [asked[i]], 256)[0][0], abs=1e-3)


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(NotFound, match=r"pip install -e '\.\[evaluation\]'"):
        measure.measure(str(TINY / "model"), ["a"])

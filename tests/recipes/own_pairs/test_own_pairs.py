"""Pairs of one's own: prompts of any layout, answers that a kill does not change, judges, pairs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from checkpoints_io import places
from recipes import sample_pairs
from recipes.data.chats import columns, layouts
from recipes.own_pairs import answers, judges, kept, pairs, prompts
from recipes.own_pairs.answers import Drawing
from recipes.tiny import judge
from tests.conftest import ROOT, TINY
import zoo
from zoo.sampling import Sampling

user = lambda text: {"role": "user", "content": text}
said = lambda text: {"role": "assistant", "content": text}
HOW = Drawing(answers=3, most=4, sampling=Sampling(1.0), seed=1)


TALK = [user("A"), said("B"), user("C")]
OTHERS = [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}]
HH = "\n\nHuman: A\n\nAssistant: "
SCORED = [{"response": "B", "overall_score": 2.0}, {"response": "C", "overall_score": 1.0}]


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "A"}, [user("A")]),
        ({"prompt": [user("A"), said("B")]}, [user("A")]),
        ({"messages": [*TALK, said("D")]}, TALK),
        ({"question": "A"}, [user("A")]),
        ({"prompt": "A", "answer": "B"}, [user("A")]),
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, [user("Add.\n1 and 2")]),
        ({"conversations": OTHERS}, [user("A")]),
        ({"prompt": "A", "chosen": "B", "rejected": "C"}, [user("A")]),
        ({"chosen": [*TALK, said("D")], "rejected": [*TALK, said("E")]}, TALK),
        ({"chosen": f"{HH}B", "rejected": f"{HH}C"}, [user("A")]),
        ({"instruction": "A", "completions": SCORED}, [user("A")]),
        ({"prompt": "A", "chosen": "B", "rejected": "B"}, [user("A")]),
        ({"prompt": "A", "prompt_id": "7", "messages": [user("A"), said("B")]}, [user("A")]),
    ],
)
def test_a_prompt_is_what_is_asked(row, asked):
    assert prompts.asked(row) == (asked, None, {})


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "Why?"}, "no prompt in any of its columns: text"),
        ({"messages": [said("So.")]}, "it asks nothing"),
        ({"prompt": [{"role": "system", "content": "Be kind."}]}, "it asks nothing"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "Sum it up.", "input": "It rains."}, "`input` looks like part of the prompt"),
        ({"context": "It rains.", "question": "Does it?"}, "`context` looks like part"),
        (
            {"prompt": "A", "functions": [{"name": "f"}]},
            "`functions` looks like part of the prompt",
        ),
        ({"prompt": "A", "query": "Q", "chosen": "B", "rejected": "C"}, "`query` looks like"),
    ],
)
def test_a_row_that_asks_nothing_says_so(row, told):
    with pytest.raises(ValueError, match=told):
        prompts.asked(row)


def test_settings_of_the_template_stay_with_a_row(tmp_path):
    """Also of a pair; the model is asked as the row asks, and so is the judge."""
    row = {"prompt": "A", "chat_template_kwargs": {"enable_thinking": False}}
    assert prompts.asked(row)[2] == {"enable_thinking": False}
    assert prompts.asked(row | {"chosen": "B", "rejected": "C"})[2] == {"enable_thinking": False}
    line = a_line(0, ["b", "c"]) | {"chat_template_kwargs": {"enable_thinking": False}}
    pair = pairs.pair_of(line, [1.0, 0.0])
    assert pair["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs" not in pairs.pair_of(a_line(0, ["b", "c"]), [1.0, 0.0])
    words = zoo.load_tokenizer(TINY / "model")
    answer = answers._line(prompts.Prompt(0, [user("A")], None, {"x": 1}, (1,)), [], words)
    assert kept.given(answer) == {"x": 1}


def test_prompts_are_asked_once_and_every_row_is_accounted_for(tmp_path):
    words, file = zoo.load_tokenizer(TINY / "model"), tmp_path / "prompts.jsonl"
    long = " ".join(["river"] * 200)
    rows = [{"prompt": "A"}, {"prompt": "B"}, {"messages": [user("A")]}, {"prompt": long}, {"x": 1}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not JSON\n")
    found = prompts.read(str(file), words, 100)
    assert [prompt.row for prompt in found.prompts] == [0, 1]
    assert found.prompts[1].ids == tuple(words.chat([user("B")]))
    assert found.left_out[2] == "the same prompt as row 0"
    assert "no room for an answer, which needs at most 100" in found.left_out[3]
    assert [*found.left_out] == [2, 3, 4, 5]
    file.write_text('{"x": 1}\n')
    with pytest.raises(ValueError, match="holds no prompt to answer: row 0: no prompt"):
        prompts.read(str(file), words, None)


def some_prompts(words, count=5):
    texts = ["Name a river.", "B", "C " * 60, "What is a mill?", "E"][:count]
    ids = [tuple(words.chat([user(text)])) for text in texts]
    return [
        prompts.Prompt(i, [user(text)], None, {}, one)
        for i, (text, one) in enumerate(zip(texts, ids, strict=True))
    ]


def test_answers_after_a_kill_are_those_that_would_have_been(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "ROWS", 6)
    model, words = zoo.load(TINY / "model"), zoo.load_tokenizer(TINY / "model")
    every = answers.batches(some_prompts(words), HOW)
    assert [[prompt.row for prompt in batch] for batch in every] == [[0, 1], [3, 4], [2]]
    one, two = (places.at(str(tmp_path / name)) for name in ("one", "two"))
    generate, seeds = zoo.generate.generate, []
    drawn = lambda *a, seed, **how: seeds.append(seed) or generate(*a, seed=seed, **how)
    monkeypatch.setattr(zoo.generate, "generate", drawn)
    for place in (one, two):
        place.make()
        answers.draw(model, words, place, every, HOW)
    assert len({*seeds}) == 3 and seeds[:3] == seeds[3:]  # or rows of batches would be drawn alike
    whole = one.read(answers.FILE)
    assert whole == two.read(answers.FILE)
    lines = kept.lines(one, answers.FILE)
    assert [line["row"] for line in lines] == [0, 1, 3, 4, 2]
    assert all(len(ids) <= 4 for line in lines for ids in line["tokens"])
    for cut in (0, 10, len(whole) // 2, len(whole) - 1, len(whole)):
        two.write_whole(answers.FILE, whole[:cut])
        answers.draw(model, words, two, every, HOW)
        assert two.read(answers.FILE) == whole
    answers.draw(model, words, two, every, HOW._replace(seed=2))
    assert two.read(answers.FILE) == whole  # nothing was left to draw
    two.remove(answers.FILE)
    answers.draw(model, words, two, every, HOW._replace(seed=2))
    assert two.read(answers.FILE) != whole


def a_line(row, texts, finished=None, tools=None):
    return {
        "row": row, "prompt": [user(f"Q{row}")], "tools": tools, "answers": texts,
        "tokens": [[7]] * len(texts), "finished": finished or [True] * len(texts),
    }  # fmt: skip


LINES = [
    a_line(0, ["good", "bad", "good", "", "cut"], [True] * 4 + [False]),
    a_line(3, ["a", "bb", "ccc"], tools=[{"name": "f"}]),
    a_line(1, ["same", "same"]),
    a_line(2, ["aa", "bb"]),
]


def with_answers(folder, lines=LINES):
    directory = places.at(str(folder))
    directory.make()
    directory.write_whole(answers.FILE, kept.written(lines))
    return directory


def by_length(lines):
    return ([len(text) for text in line["answers"]] for line in lines)


def test_the_best_and_the_worst_are_a_pair_that_the_recipe_reads(tmp_path):
    directory = with_answers(tmp_path)
    judges.judge(directory, "mine", lambda: by_length)
    scores = [line["scores"] for line in kept.lines(directory, judges.FILE)]
    assert scores == [[4.0, 3.0, None, None, None], [1.0, 2.0, 3.0], [4.0, None], [2.0, 2.0]]
    told = pairs.write(directory, {4: "a prompt of 12 tokens", 7: "a prompt of 99 tokens"})
    rows = kept.lines(directory, pairs.FILE)
    assert rows[0] == {
        "prompt": [user("Q0")], "chosen": [said("good")], "rejected": [said("bad")],
        "score_chosen": 4.0, "score_rejected": 3.0, "row": 0,
    }  # fmt: skip
    assert (rows[1]["chosen"], rows[1]["rejected"]) == ([said("ccc")], [said("a")])
    assert rows[1]["tools"] == [{"name": "f"}]
    assert kept.lines(directory, pairs.LEFT_OUT) == [
        {"row": 1, "reason": pairs.TOO_FEW}, {"row": 2, "reason": pairs.ALIKE},
        {"row": 4, "reason": "a prompt of 12 tokens"},
        {"row": 7, "reason": "a prompt of 99 tokens"},
    ]  # fmt: skip
    assert told.splitlines()[0].startswith("2 pairs, one per line, in ")
    assert "       2  a prompt of … tokens" in told.splitlines()
    read = layouts.read(columns.recognised(rows[0]), rows[0])
    assert read.prompt == [user("Q0")]
    assert (read.chosen, read.rejected) == ([said("good")], [said("bad")])


def test_what_a_judge_has_said_is_kept(tmp_path):
    directory, asked = with_answers(tmp_path), []

    def dying(lines):
        yield [2, 1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judges.judge(directory, "mine", lambda: dying)
    (kept_line,) = kept.lines(directory, judges.FILE)
    assert kept_line["scores"] == [2, 1, None, None, None]
    judges.judge(directory, "mine", lambda: lambda lines: asked.extend(lines) or by_length(lines))
    assert [line["row"] for line in asked] == [3, 1, 2]
    with pytest.raises(ValueError, match="has the scores of mine, but this command asks for other"):
        judges.judge(directory, "other", lambda: by_length)
    nobody = lambda: pytest.fail("nothing is left to judge")
    judges.judge(directory, "mine", nobody)


@pytest.mark.parametrize(
    "said_", [[1.0], [1.0, 2.0, 3.0], None, "good", [1.0, "x"], {"scores": [1, 2]}]
)
def test_what_are_no_scores_is_said(tmp_path, said_):
    directory = with_answers(tmp_path)
    with pytest.raises(RuntimeError, match="for the 2 answers to row 0: it must return a list"):
        judges.judge(directory, "mine", lambda: lambda lines: iter([said_]))


def test_an_answer_that_a_judge_does_not_judge_is_in_no_pair():
    line = a_line(0, ["a", "b", "c"])
    assert pairs.pair_of(line, [1.0, None, 3.0])["rejected"] == [said("a")]
    assert pairs.pair_of(line, [1.0, None, None]) == pairs.TOO_FEW_JUDGED
    assert pairs.pair_of(line, [2.0, 2.0, 2.0]) == pairs.ALIKE
    assert judges._checked([float("nan"), 1], [0, 2], "mine", 0) == {2: 1.0}


def test_a_judge_is_a_function_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_judge.py").write_text(
        "def short(prompt, answers):\n    assert prompt[0]['role'] == 'user'\n"
        "    return [-len(answer) for answer in answers]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert [*judges.of_user("my_judge:short")(LINES[1:2])] == [[-1, -2, -3]]
    for named in ("my_judge:long", "no_such_file:short"):
        with pytest.raises(FileNotFoundError, match=f"--judge={named} cannot be found"):
            judges.of_user(named)


def test_a_judge_is_a_command(tmp_path):
    judge_ = tmp_path / "judge.py"
    judge_.write_text(
        "import json, sys\nfor line in sys.stdin:\n    asked = json.loads(line)\n"
        "    assert sorted(asked) == ['answers', 'prompt', 'row']\n"
        "    print([len(answer) for answer in asked['answers']], flush=True)\n"
    )
    many = LINES[:2] * 2000  # more than a pipe holds
    found = [*judges.of_user(f"{sys.executable} {judge_}")(many)]
    assert found == [*by_length(many)]
    with pytest.raises(RuntimeError, match="ended with status 3"):
        [*judges.of_user("exit 3")(many)]
    with pytest.raises(RuntimeError, match=r"prints 'hello.*not JSON"):
        [*judges.of_user("echo hello")(many)]


def test_the_implicit_reward_is_a_difference_of_log_probabilities(tmp_path):
    model, words = zoo.load(TINY / "model"), zoo.load_tokenizer(TINY / "model")
    other = zoo.fresh(TINY / "model", seed=1)
    prompt = [user("Name a river.")]
    ids = [words.encode("Rhine"), [5], words.encode("Nile\n- Thames")]
    line = a_line(0, ["Rhine", "cut", "Nile"], [True, False, True])
    directory = with_answers(tmp_path, [line | {"prompt": prompt, "tokens": ids}])
    judges.judge(directory, "theirs", lambda: judges.of_implicit(model, other, words))
    (found,) = kept.lines(directory, judges.FILE)

    def logp(of, after):
        text = [*words.chat(prompt), *after]
        logits = np.asarray(of(np.array(text)), np.float64)[: len(text) - 1]
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return sum(logps[i - 1, text[i]] for i in range(len(text) - len(after), len(text)))

    expected = [logp(model, ids[i]) - logp(other, ids[i]) for i in (0, 2)]
    assert found["scores"][1] is None
    np.testing.assert_allclose([found["scores"][i] for i in (0, 2)], expected, atol=1e-4)
    same = judges.of_implicit(model, model, words)([line | {"prompt": prompt, "tokens": ids}])
    assert [*same] == [[0.0, 0.0, 0.0]]


def test_the_judge_of_the_embedded_pairs_prefers_the_chosen_answers():
    lines = (TINY / "heldout.jsonl").read_text().splitlines()
    right = []
    for row in map(json.loads, lines):
        both = [row[name][-1]["content"] for name in ("chosen", "rejected")]
        good, bad = judge.manner(row["chosen"][:-1], both)
        right.append(good > bad)
    assert all(right)
    assert len(right) == 67


def command(folder, environment=None, **flags):
    given = {
        "model": TINY / "model", "prompts": folder / "prompts.jsonl", "directory": folder / "out",
        "judge": "recipes.tiny.judge:manner", "answers": 4, "max_new_tokens": 40, **flags,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    program = [sys.executable, "recipes/sample_pairs.py", *words]
    environment = os.environ | (environment or {})
    return subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.full
def test_the_program_says_what_it_made_and_refuses_another_run(tmp_path):
    rows = (TINY / "train.jsonl").read_text().splitlines()[:12]
    (tmp_path / "prompts.jsonl").write_text("\n".join([*rows, rows[0], "{}"]) + "\n")
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    directory = places.at(str(tmp_path / "out"))
    made, without = (kept.lines(directory, name) for name in (pairs.FILE, pairs.LEFT_OUT))
    assert sorted([one["row"] for one in made + without]) == [*range(14)]
    assert f"{len(made)} pairs, one per line" in done.stdout
    before = directory.read(pairs.FILE)
    assert command(tmp_path).returncode == 0
    assert directory.read(pairs.FILE) == before
    for flags, told in (
        ({"answers": 5}, "made with another --answers (4 before, 5 now)"),
        ({"seed": 5}, "made with another --seed (0 before, 5 now)"),
        ({"max_new_tokens": 5}, "made with another --max_new_tokens (40 before, 5 now)"),
        ({"judge": "true"}, "remove that file to judge the answers again"),
        ({"judge": None}, "give exactly one judge"),
        ({"reference": TINY / "model"}, "--reference; 2 given"),
        ({"directory": tmp_path}, "contains out but no answers of this program"),
    ):
        refused = command(tmp_path, **flags)
        assert (refused.returncode, told in refused.stderr) == (1, True), refused.stderr


@pytest.mark.full
def test_on_eight_devices_the_answers_are_the_same(tmp_path):
    """Drawn by rows on four times two devices, and judged there by log-probabilities."""
    rows = (TINY / "train.jsonl").read_text().splitlines()[:12]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    other = tmp_path / "other"
    zoo.save(zoo.fresh(TINY / "model", seed=1), other)
    judged = {"judge": None, "reference": other}
    assert command(tmp_path, directory=tmp_path / "one", **judged).returncode == 0
    many = "--xla_force_host_platform_device_count=8"
    done = command(tmp_path, {"XLA_FLAGS": many}, directory=tmp_path / "many", tensor=2, **judged)
    assert done.returncode == 0, done.stderr
    one, eight = (places.at(str(tmp_path / name)) for name in ("one", "many"))
    assert one.read(answers.FILE) == eight.read(answers.FILE)
    for a, b in zip(*(kept.lines(place, judges.FILE) for place in (one, eight)), strict=True):
        np.testing.assert_allclose(*(np.array(x["scores"], float) for x in (a, b)), atol=1e-3)


def test_answers_of_other_settings_are_not_mixed(tmp_path):
    directory = places.at(str(tmp_path))
    made_with = {"prompts": {"files": {"a.jsonl": "12"}}, "answers": 4}
    kept.check(directory, made_with)
    kept.check(directory, made_with)
    for other, told in (
        ({"answers": 5}, r"another --answers \(4 before, 5 now\): give another directory"),
        ({"prompts": {"files": {"a.jsonl": "13"}}}, r"another --prompts \(other contents\)"),
    ):
        with pytest.raises(ValueError, match=told):
            kept.check(directory, made_with | other)
    directory.remove(kept.MADE_WITH)
    directory.write_whole("notes.txt", b"mine")
    with pytest.raises(FileExistsError, match=r"contains notes.txt but no answers of this program"):
        kept.check(directory, made_with)


def test_nobody_or_two_judge():
    asked = sample_pairs.Options("m", "p", "d", HOW)
    for others in ({}, {"judge": "a:b", "reference": "c"}):
        with pytest.raises(ValueError, match="give exactly one judge"):
            sample_pairs.sample(asked._replace(**others))

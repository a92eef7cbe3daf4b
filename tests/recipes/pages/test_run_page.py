"""The page of a run: what its files say, whoever wrote them, and nothing that could do harm."""

import json
import math

import pytest

from checkpoints_io import places
from recipes import report
from recipes.pages import charts, run_files, run_page
from tests.recipes.pages.test_data_page import Page

SCRIPT = "<script>window.pwned = 1</script>"
ATTACKS = [SCRIPT, "\"'><img src=x onerror=alert(1)>", "</title></style></svg><iframe src=//x>"]


def sample(step, *, row=0, temperature=0, text="yes", ratio=0.5, **other):
    return {
        "step": step, "set": "heldout", "row": row, "prompt": f"Why {row}?", "policy": text,
        "temperature": temperature, "reference": "no", "policy_tokens": 3 + step,
        "log_ratios": {"policy": [[text, ratio], ["", -2.0]], "reference": [["no", -ratio]]},
    } | other  # fmt: skip


def write(folder, *, settings=None, records=(), samples=(), data=()):
    folder.mkdir()
    lines = lambda some: "".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in some)
    (folder / "settings.json").write_text(json.dumps(settings or {}))
    (folder / "metrics.jsonl").write_text(lines(records))
    (folder / "samples.jsonl").write_text(lines(samples))
    (folder / "data.json").write_text(json.dumps([*data]))
    return run_files.read(places.Disk(folder), folder.name)


RECORDS = [
    {"step": 1, "train/dpo_reward_margin": 0.0, "time/first_step": 90.0, "time/input": 10.0},
    {"step": 2, "eval/heldout/dpo_reward_margin": 0.5, "time/evaluation": 25.0},
    {"step": 2, "train/dpo_reward_margin": 0.25, "time/steps": 75.0, "train/gradient_norm": 3},
    {"step": 4, "eval/heldout/dpo_reward_margin": 0.25},
]
PART = {"name": "train", "source": "a.jsonl", "rows": 4, "used": 3, "lost": {"no text": 1}}


def test_a_page_says_what_the_files_say(tmp_path):
    settings = {"num_train_steps": 4, "beta": 0.1, "data": {"layout": None}, "tags": ["a", "b"]}
    some = [sample(0, ratio=0.0), sample(4), sample(4, temperature=0.7, text="perhaps")]
    part = PART | {"notes": {"with an empty turn": 2}}
    run = write(
        tmp_path / "one", settings=settings, records=RECORDS, samples=some, data=[part]
    )  # fmt: skip
    html = run_page.page([run])
    page = Page(html)
    assert "steps 4 of 4; heldout, reward margin 0.25 (best 0.5 at step 2)" in page.words
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in page.cells if row}
    assert cells["first steps, with compilation"] == ["1 min 30 s", "45.0%"]
    assert cells["waiting for data"] == ["10 s", "5.0%"]
    assert cells["used"][:2] == ["3", "75.0%"] and cells["lost: no text"][:2] == ["1", "25.0%"]
    assert cells["used: with an empty turn"][0] == "2"
    assert cells["data.layout"] == ["None"] and cells["tags"] == ["a, b"]
    assert page.words.count("Why 0?") == 2 and "heldout, row 0, drawn at 0.7" in page.words
    tokens = [attrs for tag, attrs in page.tags if tag == "b" and "title" in attrs]
    assert {"class": "up2", "title": "+0.50 nats"} in tokens
    assert {"class": "down2", "title": "-0.50 nats"} in tokens
    assert {"title": "+0.00 nats"} in tokens
    titles = [strong for strong in html.split("<strong>")[1:]]
    assert [title.partition("<")[0] for title in titles] == [
        "Reward margin", "Gradient norm", "Length of samples",
    ]  # fmt: skip


def test_several_runs_lie_over_each_other(tmp_path):
    runs = [
        write(tmp_path / name, settings={"beta": beta, "seed": 0}, records=RECORDS,
              samples=[sample(0), sample(4)])
        for name, beta in (("one", 0.1), ("two", 0.3))
    ]  # fmt: skip
    html = run_page.page(runs)
    page = Page(html)
    assert run_page.differing(runs) == [("beta", ["0.1", "0.3"])]
    assert run_page.differing(runs[:1]) == [("beta", ["0.1"]), ("seed", ["0"])]
    classes = [attrs.get("class") for tag, attrs in page.tags if tag == "path"]
    assert {"train r0", "train r1", "held r0", "held r1"} <= {
        " ".join((c or "").split()) for c in classes
    }
    (prompt,) = run_page.prompts(runs)
    assert [row[:2] for row in prompt.rows] == [
        ("step 0", 0), ("step 0", 1), ("step 4", 0), ("step 4", 1),
    ]  # fmt: skip
    assert "Settings that differ" in page.words


def test_of_many_steps_some_are_shown_the_first_and_the_last_among_them(tmp_path):
    run = write(tmp_path / "one", samples=[sample(step) for step in range(0, 101, 5)])
    (prompt,) = run_page.prompts([run])
    assert [row[0] for row in prompt.rows] == [
        "step 0", "step 20", "step 40", "step 60", "step 80", "step 100",
    ]  # fmt: skip
    assert prompt.left_out == 15


def test_a_page_runs_nothing_whatever_its_files_say(tmp_path):
    evil = {attack: attack for attack in ATTACKS}
    run = write(
        tmp_path / "one",
        settings=evil | {"initialize_from_hf": SCRIPT, "num_train_steps": SCRIPT},
        records=[{"step": 1, f"eval/{SCRIPT}/dpo_accuracy": 0.5, SCRIPT: 1.0, "train/dpo_loss": 1}],
        samples=[
            sample(1, text=attack, prompt=attack, set=attack, row=attack, wanted=attack,
                   log_ratios={attack: [], "policy": [[attack, 1.0]]})
            for attack in ATTACKS
        ],
        data=[PART | {"name": SCRIPT, "source": SCRIPT, "lost": {SCRIPT: 1}, "notes": {SCRIPT: 1}}],
    )._replace(name=SCRIPT)  # fmt: skip
    for html in (run_page.page([run]), run_page.page([run, run._replace(name="\x1b[2J")])):
        page = Page(html)
        assert {"script", "img", "link", "iframe", "a"}.isdisjoint(tag for tag, _ in page.tags)
        names = {name for _, attrs in page.tags for name in attrs}
        assert not any(n.startswith("on") or n in ("src", "href", "style") for n in names)
        assert "url(" not in html and "@import" not in html and "://" not in html
        assert "\x1b" not in html
        policy = {"http-equiv": "Content-Security-Policy"}
        policy["content"] = "default-src 'none'; style-src 'unsafe-inline'"
        assert ("meta", policy) in page.tags
        assert page.words.count(SCRIPT) > 8
        assert all(attack in page.words for attack in ATTACKS)


def test_what_no_run_writes_is_passed_over(tmp_path):
    run = write(
        tmp_path / "one",
        records=["not json\n", "[1]\n", {"step": "1"}, {"step": True}, {"step": -1},
                 {"step": 3, "a": 1.5, "b": "c", "d": math.nan, "e": True, "f": 10**400},
                 '{"step": 5, "a'],
        samples=[sample(1), sample(1, log_ratios={"policy": [["a", "b"]]}), sample(1, prompt=3),
                 sample(1, log_ratios=None), sample(1, reference=[]), sample(1, temperature=None)],
        data=[PART | {"notes": {}}, PART, "a", PART | {"notes": {}, "rows": -1}],
    )  # fmt: skip
    assert run.records == [(3, {"a": 1.5})]
    assert (len(run.samples), len(run.data)) == (1, 1)
    Page(run_page.page([run]))
    (tmp_path / "one" / "settings.json").write_text("[" * 10**5)
    again = run_files.read(places.Disk(tmp_path / "one"), "one")
    assert again.settings == {}
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        run_files.read(places.Disk(tmp_path), "tmp")


def test_a_run_of_before_has_a_page_too(tmp_path):
    """Without samples, times and reasons."""
    (tmp_path / "old").mkdir()
    records = [
        {"step": 1, "train/dpo_loss": 0.7, "train/data/dropped": 3, "train/data/truncated": 0}
    ]
    (tmp_path / "old" / "metrics.jsonl").write_text(json.dumps(records[0]) + "\n")
    told = report.report([str(tmp_path / "old")], None)
    assert told == f"{tmp_path}/old/report.html"
    page = Page((tmp_path / "old" / "report.html").read_text())
    cells = {row[0]: row[1] for row in page.cells if len(row) > 1}
    assert (cells["dropped"], cells["truncated"]) == ("3", "0")
    assert "What was said" not in page.words and "Where the time went" not in page.words


def test_runs_are_told_apart_by_their_paths(tmp_path):
    for room in ("a", "b"):
        (tmp_path / room).mkdir()
        write(tmp_path / room / "tiny", records=RECORDS)
    both = [str(tmp_path / room / "tiny") for room in ("a", "b")]
    page = f"{tmp_path}/both.html"
    assert report.report(both, page) == page
    assert "a/tiny, b/tiny" in Page((tmp_path / "both.html").read_text()).words
    with pytest.raises(ValueError, match="give the directory of a run"):
        report.report([], None)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Not a page."}')
    with pytest.raises(ValueError, match=r"rows.jsonl is not a page of this program"):
        report.report(both, f"{tmp_path}/rows.jsonl")
    assert report.report(both, page) == page  # over its own


@pytest.mark.parametrize(
    ("low", "high", "about", "expected"),
    [
        (0, 60, 5, [0, 20, 40, 60]),
        (-0.1, 1.06, 4, [0, 0.5, 1]),
        (0, 7e-7, 4, [0, 2e-7, 4e-7, 6e-7]),
    ],
)
def test_ticks_are_round_numbers(low, high, about, expected):
    assert charts.ticks(low, high, about) == pytest.approx(expected)


def test_numbers_are_short():
    found = [charts.short(x) for x in (0, 0.25, 12345, 20000, 5e-7, -3, 2e6, 1000, 1234)]
    assert found == ["0", "0.25", "12.35k", "20k", "5e-7", "-3", "2M", "1k", "1234"]


def test_long_curves_are_thinned_to_means_and_keep_their_ends():
    points = [(i, 2 * i) for i in range(10_001)]
    found = charts.thinned(points, 101)
    assert len(found) == 101 and found[-1] == (10_000, 20_000)
    assert found[0] == (49.5, 99.0)
    assert charts.thinned(points[:5], 101) == points[:5]


def test_a_chart_holds_its_curves():
    line = charts.Line("held", 0, "one", [(0, 0.0), (10, 1.0)])
    chart = charts.chart("a", "b", [line, charts.Line("train", 0, "two", [])])
    (drawn,) = chart.lines
    assert drawn.path == "M44.0 130.0 L336.0 16.8"
    assert drawn.dots[1] == ("336.0", "16.8", "one, step 10: 1")
    assert charts.chart("a", "b", []) is None
    flat = charts.chart("a", "b", [line._replace(points=[(3, 2.0)])])
    assert flat.lines[0].dots == [("336.0", "70.0", "one, step 3: 2")]
    nothing = charts.chart("a", "b", [line._replace(points=[(0, 0.0), (10, 0.0)])])
    assert nothing.lines[0].path == "M44.0 130.0 L336.0 130.0"

"""Held-out files are read as the training data where they have its form, and by themselves else."""

import json

import pytest

from recipes.configs import tiny
from recipes.data import run_data
from recipes.data.rows import sources
from recipes.training import checks, settings, written
from tests.conftest import TINY

# The same three pairs under several names and in several forms.
PAIRS = [("Say a.", "a.", "No."), ("Say b.", "b.", "Never."), ("Say c.", "c.", "Not now.")]
OURS = [dict(prompt=p, chosen=c, rejected=r) for p, c, r in PAIRS]
THEIRS = [dict(q=p, better=c, worse=r) for p, c, r in PAIRS]
MIXED = [dict(prompt=p, better=c, worse=r) for p, c, r in PAIRS]
# The file's own `chosen` is something else, as in the training data.
BOTH = [dict(q=p, better=c, worse=r, chosen="id 7", rejected="id 8") for p, c, r in PAIRS]
SYSTEM = [row | {"persona": "Be kind."} for row in THEIRS]
CHAT = [
    {
        side: [{"role": "user", "content": p}, {"role": "assistant", "content": said}]
        for side, said in (("chosen", c), ("rejected", r))
    }
    for p, c, r in PAIRS
]
HH = [
    {
        side: f"\n\nHuman: {p}\n\nAssistant: {said}"
        for side, said in (("chosen", c), ("rejected", r))
    }
    for p, c, r in PAIRS
]
NAMES = dict(prompt="q", chosen="better", rejected="worse")


@pytest.fixture
def read(tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return str(tmp_path / name)

    def read(train, held_out, names, forced=None, /, **said):
        config = tiny.get_config()
        config.token_cache = None
        config.train_data = write("train.jsonl", train)
        path = write("heldout.jsonl", held_out)
        config.validation = dict(heldout=dict(path=path, **said) if said else path)
        config.data.columns, config.data.layout = names, forced
        given = checks.checked(config, settings.table_of(settings.DPO))
        found = run_data.read(run_data.data_settings(given, TINY / "model", written.rows_of(given)))
        return found.train[0].examples, found.held_out[0].examples, found.sources[-1].layout

    return read


def same(some, others):
    """The same ids, each scored the same."""
    return all(
        a.tolist() == b.tolist()
        for pair, other in zip(some, others, strict=True)
        for a, b in zip(pair[1:6], other[1:6], strict=True)
    )


@pytest.mark.parametrize(
    "held_out", [OURS, THEIRS, MIXED, CHAT, BOTH], ids=lambda rows: str([*rows[0]])
)
@pytest.mark.parametrize("train", [THEIRS, BOTH], ids=lambda rows: str([*rows[0]]))
def test_names_of_columns_are_those_of_files_that_have_them(read, train, held_out):
    trained, found, _ = read(train, held_out, NAMES)
    assert same(trained, found)


def test_a_column_that_only_the_training_data_has(read):
    """Of a held-out file like it in all else: the others' names are still theirs."""
    names = NAMES | {"system_prompt": "persona"}
    trained, found, _ = read(SYSTEM, THEIRS, names)
    assert len(found) == 3
    assert [len(pair.prompt) for pair in found] < [len(pair.prompt) for pair in trained]
    _, alike, _ = read(SYSTEM, SYSTEM, names)
    assert same(trained, alike)


def test_columns_of_its_own_win(read):
    rows = [dict(q="no", better="x", worse="y", a=p, b=c, c=r) for p, c, r in PAIRS]
    trained, found, _ = read(
        THEIRS, rows, NAMES, columns=dict(prompt="a", chosen="b", rejected="c")
    )
    assert same(trained, found)
    rows = [row | dict(q="no", better="x", worse="y") for row in OURS]
    trained, found, _ = read(THEIRS, rows, NAMES, columns={})
    assert same(trained, found)


def test_the_layout_is_that_of_files_that_look_alike(read):
    plain, found, layout = read(OURS, OURS, {}, "plain_text")
    assert layout == "plain_text"
    assert same(plain, found)


@pytest.mark.parametrize(
    ("train", "layout", "held_out", "expected"),
    [
        (HH, "hh", CHAT, "preference_chat"),
        (HH, "hh", OURS, "prompt_chosen_rejected"),
        (HH, "hh", HH, "hh"),
        (CHAT, "preference_chat", HH, "hh"),
        (CHAT, "preference_chat", CHAT, "preference_chat"),
        (OURS, "prompt_chosen_rejected", CHAT, "preference_chat"),
        (OURS, "plain_text", OURS, "plain_text"),
    ],
)
def test_a_layout_that_is_said_for_the_training_data(read, train, layout, held_out, expected):
    assert read(train, held_out, {}, layout)[2] == expected


def test_its_own_layout_wins(read):
    assert read(OURS, OURS, {}, "plain_text", layout="plain_text")[2] == "plain_text"
    assert read(HH, OURS, {}, "hh", layout="prompt_chosen_rejected")[2] == "prompt_chosen_rejected"


def test_a_name_that_no_column_has(read):
    told = "train.jsonl has no column 'bettr'.* for `chosen`: it has better, q, worse"
    with pytest.raises(ValueError, match=told):
        read(THEIRS, THEIRS, NAMES | {"chosen": "bettr"})
    with pytest.raises(ValueError, match=r"heldout.jsonl has no column 'x'"):
        read(THEIRS, OURS, NAMES, columns=dict(chosen="x"))


def test_a_column_that_only_the_last_row_has(read):
    rows = [*THEIRS * 400, SYSTEM[0]]
    trained, _, _ = read(rows, THEIRS, NAMES | {"system_prompt": "persona"})
    assert len(trained) == 1201
    assert len(trained[-1].prompt) > len(trained[0].prompt)


def test_names_of_columns_that_are_no_names(read):
    with pytest.raises(ValueError, match=r"validation.heldout.columns has no column 'chosn'"):
        read(OURS, OURS, {}, columns=dict(chosn="x"))
    with pytest.raises(ValueError, match=r"data.columns.chosen=3 is not a column name"):
        read(OURS, OURS, {"chosen": 3})


def test_a_start_loads_a_hub_dataset_once(tmp_path, monkeypatch, request):
    """Though its columns are looked at, its layout recognised, its rows read and its identity."""
    import datasets

    asked = []

    def load(name, **_):
        asked.append(name)
        return datasets.Dataset.from_list(THEIRS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    request.addfinalizer(sources._hub.cache_clear)
    config = tiny.get_config()
    config.train_data, config.data.columns = "owner/train", NAMES
    config.validation = dict(heldout="owner/heldout")
    for cache in (None, str(tmp_path)):
        config.token_cache = cache
        given = checks.checked(config, settings.table_of(settings.DPO))
        found = run_data.read(run_data.data_settings(given, TINY / "model", written.rows_of(given)))
        assert len(found.train[0].examples) == len(found.held_out[0].examples) == 3
    assert sorted(asked) == ["owner/heldout", "owner/train"]

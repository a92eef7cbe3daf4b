"""From files to pairs: every row is used or counted, and a prompt is on one side only."""

import gzip
import json

import ml_collections
import pyarrow
import pyarrow.parquet
import pytest

from recipes.data import chat, layouts, pairs, sources
from tests.conftest import TINY

SETTINGS = ml_collections.ConfigDict(
    dict(
        layout="preference_chat", mask_user_turns=True, over_length="drop",
        max_malformed_fraction=0.5,
    )
)  # fmt: skip
USER = {"role": "user", "content": "a"}


def turn(text):
    return {"role": "assistant", "content": text}


GOOD = {"chosen": [USER, turn("b")], "rejected": [USER, turn("c")]}


@pytest.fixture(scope="module")
def tokenizer():
    return chat.load_tokenizer(TINY / "model", None)


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "ä", "chosen": "😀"}]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.json"):
        assert [row.fields for row in sources.read(str(tmp_path / name))] == rows
    parquet = [row.fields for row in sources.read(str(tmp_path / "a.parquet"))]
    assert parquet == [rows[0], rows[1] | {"rejected": None}]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"", "none of .jsonl"),
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b"{}", "JSON list"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.parquet", b"no", "not a readable Parquet"),
        ("a.jsonl.gz", b"no", "gzip"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told):
        list(sources.read(str(tmp_path / name)))


def test_a_file_that_is_not_there():
    for name in ("nowhere.jsonl", "../a/b/c", "nothing"):
        with pytest.raises(FileNotFoundError, match="no data file"):
            sources.read(name)


def test_layouts():
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    asked = layouts.prompt_chosen_rejected(row)
    assert asked == layouts.Pair([USER], [turn("b")], [turn("c")])
    in_turns = {"prompt": [USER], "chosen": [turn("b")], "rejected": [turn("c")]}
    assert layouts.prompt_chosen_rejected(in_turns) == asked
    assert layouts.preference_chat(GOOD) == asked
    assert layouts.plain_text(row) == layouts.Pair("a", "b", "c")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({}, "no list of messages in `chosen`"),
        ({"chosen": []}, "no list"),
        ({"chosen": ["a"]}, "not {role, content}"),
        ({"chosen": [{"role": "user", "content": None}]}, "not {role, content}"),
        (GOOD | {"rejected": 3}, "`rejected`"),
        (GOOD | {"rejected": GOOD["chosen"]}, "chosen equals rejected"),
        (GOOD | {"rejected": [USER]}, "beginning of the other"),
    ],
)
def test_malformed_rows_say_why(row, told):
    with pytest.raises(ValueError, match=told):
        layouts.preference_chat(row)


def test_every_lost_row_is_counted_with_its_reason(tmp_path, tokenizer):
    long = GOOD | {"chosen": [USER, turn("very long " * 50)]}
    equal = GOOD | {"rejected": GOOD["chosen"]}
    rows = [json.dumps(row) for row in (GOOD, {}, long, equal, GOOD)] + ["{not json"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    found = pairs.read(str(path), SETTINGS, tokenizer, 64)
    assert found.counts.used == len(found.ids) == 2
    assert [pair.row for pair in found.ids] == [0, 4]
    assert found.counts.malformed == {
        "no list of messages in `chosen`": 1,
        "not a JSON object": 1,
    }
    assert found.counts.dropped == {"longer than train_seq_len": 1, "chosen equals rejected": 1}
    told = "\n".join(found.counts.lines())
    assert "2 of 6 rows used" in told
    assert f"{path}:2" in told
    strict = ml_collections.ConfigDict(SETTINGS.to_dict() | {"max_malformed_fraction": 0.1})
    with pytest.raises(ValueError, match=r"2 of 6 rows .*:2: no list of messages"):
        pairs.read(str(path), strict, tokenizer, 64)


def test_files_without_a_usable_row(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        pairs.read(str(tmp_path / "a.jsonl"), SETTINGS, tokenizer, 64)
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match=r"no row of .* can be used"):
        pairs.read(str(tmp_path / "a.jsonl"), SETTINGS, tokenizer, 2)


def test_a_prompt_is_on_one_side_only(tmp_path, tokenizer):
    rows = []
    for i in range(200):
        asked = {"role": "user", "content": f"question {i % 100}"}
        rows.append({"chosen": [asked, turn(f"yes {i}")], "rejected": [asked, turn("no")]})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = pairs.read(str(tmp_path / "a.jsonl"), SETTINGS, tokenizer, 128)
    train, held_out = pairs.split(found, 0.2)
    assert len(train) + len(held_out) == 200
    assert 20 <= len(held_out) <= 60
    sides = [{pair.row % 100 for pair in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    again, _ = pairs.split(found, 0.2)
    assert [p.row for p in again] == [p.row for p in train]
    with pytest.raises(ValueError, match="validation_split_fraction"):
        pairs.split(found._replace(ids=found.ids[:1], prompts=found.prompts[:1]), 0.2)


def test_the_fingerprint_sees_every_token(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    ids = pairs.read(str(tmp_path / "a.jsonl"), SETTINGS, tokenizer, 64).ids
    before = pairs.fingerprint(ids)
    changed = ids[0].rejected.copy()
    changed[0] += 1
    assert pairs.fingerprint([ids[0]._replace(rejected=changed)]) != before
    assert pairs.fingerprint([ids[0]._replace(rejected_scored=~ids[0].rejected_scored)]) != before
    assert pairs.fingerprint(ids) == before


def test_the_embedded_files_share_no_prompt(tokenizer):
    read = lambda name: pairs.read(str(TINY / name), SETTINGS, tokenizer, 256)
    train, held_out = read("train.jsonl"), read("heldout.jsonl")
    assert train.counts.used == train.counts.rows >= 300
    assert held_out.counts.used == held_out.counts.rows >= 50
    sides = [{json.dumps(prompt) for prompt in side.prompts} for side in (train, held_out)]
    assert not sides[0] & sides[1]

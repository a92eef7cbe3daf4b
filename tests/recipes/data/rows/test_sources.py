"""Every kind of file gives the same rows, and what cannot be read is a row with a reason."""

import gzip
import json
import os
import re
import subprocess
import sys

from array_record.python import array_record_module
import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from recipes.data.rows import json_files, records, sources
from tests.conftest import ROOT

ROWS = [{"prompt": "a", "chosen": "b"}, {"prompt": "ä", "chosen": "😀"}, {"prompt": "c"}]
LINES = "\n".join(json.dumps(row) for row in ROWS).encode() + b"\n\n"


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def arrow(kind):
    table = pyarrow.Table.from_pylist(ROWS)
    sink = pyarrow.BufferOutputStream()
    with kind(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def array_records(path):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for row in ROWS:
        writer.write(json.dumps(row).encode())
    writer.close()
    return path.read_bytes()


def cells(delimiter, end="\r\n"):
    rows = [[row.get(name, "") for name in ("prompt", "chosen")] for row in ROWS]
    return end.join(map(delimiter.join, [["prompt", "chosen"], *rows])).encode()


def dictionaries():
    """Of every text, those within a list too: as polars writes its categories."""
    table = pyarrow.Table.from_pylist(ROWS)
    kind = pyarrow.dictionary(pyarrow.int8(), pyarrow.string())
    sink = pyarrow.BufferOutputStream()
    schema = pyarrow.schema([(name, kind) for name in table.column_names])
    with pyarrow.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table.cast(schema))
    return sink.getvalue().to_pybytes()


CONTENT = {
    "a.jsonl": LINES,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "no_end.jsonl": LINES.strip(),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstd(LINES),
    "a.json": json.dumps(ROWS, indent=2).encode(),
    "lines.json": b"\n" + LINES,
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv": cells(","),
    "quoted.csv": b"\xef\xbb\xbf" + cells(",", "\n").replace(b"b", b'"b"') + b"\n\n",
    "semicolons.csv": cells(";"),
    "a.csv.zst": zstd(cells(",")),
    "old.tsv": cells("\t", "\r"),
    "a.TSV.gz": gzip.compress(cells("\t")),
    "utf16.csv": cells("\t").decode().encode("utf-16"),
    "a.parquet": parquet(),
    "dictionary.arrow": dictionaries(),
    "stream.arrow": arrow(pyarrow.ipc.new_stream),
    "file.arrow": arrow(pyarrow.ipc.new_file),
}


def read(path):
    """The rows, without the columns that are there to say nothing."""
    rows = list(sources.read(str(path)))
    assert not any(row.reason for row in rows), rows
    return [{k: v for k, v in row.fields.items() if v is not None} for row in rows]


@pytest.mark.parametrize("name", CONTENT)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(CONTENT[name])
    assert read(tmp_path / name) == ROWS
    far = fsspec.filesystem("memory")
    far.pipe(f"/far/{name}", CONTENT[name])
    assert read(f"memory://far/{name}") == ROWS


def test_array_records_here_and_far_away(tmp_path):
    content = array_records(tmp_path / "a.array_record")
    assert read(tmp_path / "a.array_record") == ROWS
    fsspec.filesystem("memory").pipe("/far/b.array_record", content)
    assert read("memory://far/b.array_record") == ROWS


def test_several_files_follow_each_other_in_the_order_of_their_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text(json.dumps({"from": name}))
    found = list(sources.read(f"{tmp_path}/*.jsonl"))
    assert [row.fields["from"] for row in found] == ["a.jsonl", "b.jsonl"]
    assert found[1].where == f"{tmp_path}/b.jsonl:1"
    with pytest.raises(FileNotFoundError, match="no data file"):
        sources.read(f"{tmp_path}/*.parquet")


@pytest.mark.parametrize(
    ("content", "reason", "where"),
    [
        (b'{"a": 1}\n{"a": \n{"a": 3}\n', "not valid JSON", ":2"),
        (b'{"a": 1}\n[1]\n{"a": 3}\n', "not a JSON object", ":2"),
        (b'{"a": 1}\n{"a": "\xff"}\n{"a": 3}\n', "not valid UTF-8", ":2"),
        (b'{"a": 1}\n{"a": ' + b"[" * 9**5 + b'\n{"a": 3}\n', "not valid JSON", ":2"),
        (
            b'{"a": 1}\n{"a": ' + b"[" * 99 + b"]" * 99 + b'}\n{"a": 3}',
            "nested deeper than 64 lists",
            ":2",
        ),
        (b'{"a": 1}\n{"a": ' + b"1" * 9999 + b'}\n{"a": 3}\n', "not valid JSON", ":2"),
    ],
)
def test_a_line_that_cannot_be_read_is_counted_with_its_place(tmp_path, content, reason, where):
    (tmp_path / "a.jsonl").write_bytes(content)
    good, bad, also_good = sources.read(str(tmp_path / "a.jsonl"))
    assert (good.fields, also_good.fields) == ({"a": 1}, {"a": 3})
    assert bad == records.Row(f"{tmp_path}/a.jsonl{where}", None, reason)


@pytest.mark.parametrize(
    ("content", "reason", "where"),
    [
        (b'1,b\n2,"b" c\n3,d', "not valid CSV: ',' expected after '\"'", ":3"),
        (b'1,b\n2,"b\n"x\n3,d', "not valid CSV: ',' expected after '\"'", ":3-4"),
        (b'1,b\n2\n3,d', "more or fewer cells than the header", ":3"),
        (b'1,b\n2,b,c\n3,d', "more or fewer cells than the header", ":3"),
        (b'1,b\n2,b\xff\n3,d', "not valid UTF-8", ":3"),
        (b'1,"b\nb"\n2,b\xff\n3,d', "not valid UTF-8", ":4"),
        (b'1,b\n2,' + b"x" * 3 * 2**20 + b"\n3,d", "longer than 1 MiB", ":3"),
    ],
)  # fmt: skip
def test_a_record_of_csv_that_cannot_be_read_is_counted(
    tmp_path, monkeypatch, content, reason, where
):
    monkeypatch.setattr(records, "LONGEST", 2**20)
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,chosen\n" + content)
    good, bad, *_, also_good = sources.read(str(path))
    assert (good.fields["prompt"], also_good.fields) == ("1", {"prompt": "3", "chosen": "d"})
    assert bad == records.Row(f"{path}{where}", None, reason)


def test_a_quote_that_swallows_too_much_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST", 2**10)
    (tmp_path / "a.csv").write_bytes(b'a,b\n1,"2\n' + b"3,4\n" * 300 + b"5,6\n")
    bad, *others = sources.read(str(tmp_path / "a.csv"))
    assert (bad.reason, bad.where[-6:]) == ("longer than 0 MiB", ":2-257")
    assert [row.fields for row in others] == [{"a": "3", "b": "4"}] * 45 + [{"a": "5", "b": "6"}]


def test_a_quote_without_end_and_columns_of_one_name(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'a,b\n1,2\n"3,4\n5,6\n')
    good, bad = sources.read(str(tmp_path / "a.csv"))
    assert (good.fields, bad.where[-4:]) == ({"a": "1", "b": "2"}, ":3-4")
    (tmp_path / "a.csv").write_bytes(b"a,a\n1,2\n")
    (row,) = sources.read(str(tmp_path / "a.csv"))
    assert "several columns are named 'a'" in row.reason
    (tmp_path / "a.csv").write_bytes(b',a\n1,"long, with\n""lines"" "\n')  # the index of pandas
    assert read(tmp_path / "a.csv") == [{"column 1": "1", "a": 'long, with\n"lines" '}]


def test_utf16_is_read_as_csv_and_told_of_elsewhere(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"a": 1}\n'.encode("utf-16"))
    first, *_ = sources.read(str(tmp_path / "a.jsonl"))
    assert first.reason == "UTF-16: save it as UTF-8"


@pytest.mark.parametrize("key", [b'"a": 1, "a": 2', b'"a": {"b": 1, "c": 2, "b": 1}'])
def test_a_key_that_stands_twice_is_not_chosen_between(tmp_path, key):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{' + key + b"}\n")
    good, bad = sources.read(str(tmp_path / "a.jsonl"))
    assert (good.fields, bad.reason) == ({"a": 1}, "a key that occurs twice in one object")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'[{"a": 1}, {"a": }, 3,\n\n {"a": "x"x}, {"a": 4}]',
         [1, "not valid JSON [1], line 1", "not a JSON object [2], line 1",
          "not valid JSON [3], line 3", 4]),
        (b'\n[\n]\n', []),
        (b'[{"a": 1},]', [1]),
        (b'[{"a": 1},,{"a": 2}]', [1, "not valid JSON [1], line 1", 2]),
        (b'[{"a": "[1, {\\"]}"}]', ['[1, {"]}']),
        (b'[{"a": 1}, {"a": [2]', [1, "the list does not end [1]"]),
        (b'[{"a": 1}, {"a": "x]', [1, "the list does not end [1]"]),
        (b'[{"a": 1}] [2]', [1, "more than one JSON list [1]"]),
        (b'[{"a": 1},\n{"a": "' + b"x" * 2**18 + b'"},\n{"a": 2}]',
         [1, "longer than 0 MiB [1], line 2", 2]),
        (b'[{"a": 1},\n[' + b"2,\n" * 2**17 + b'2],\n{"a": 2}, 3]',
         [1, "longer than 0 MiB [1], line 2", 2, f"not a JSON object [3], line {2**17 + 3}"]),
    ],
)  # fmt: skip
def test_a_list_is_read_a_value_at_a_time(tmp_path, monkeypatch, content, told):
    monkeypatch.setattr(records, "LONGEST", 2**17)
    for at_once in (1, 7, 2**20) if len(content) < 99 else (2**10, 2**20):
        monkeypatch.setattr(json_files, "AT_ONCE", at_once)
        (tmp_path / "a.json").write_bytes(content)
        found = sources.read(str(tmp_path / "a.json"))
        short = lambda row: f"{row.reason.split(': ')[-1]} {row.where.split('a.json')[-1]}"
        assert [row.fields["a"] if row.fields else short(row) for row in found] == told


def test_a_long_first_line_of_a_json_file_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "AT_ONCE", 2**10)
    content = b'{"a": "' + b"x" * 2**12 + b'"}\n{"a": 2}\n'
    (tmp_path / "a.json").write_bytes(content)
    (tmp_path / "a.jsonl").write_bytes(content)
    ours, theirs = (
        [row.fields for row in sources.read(str(tmp_path / name))] for name in ("a.json", "a.jsonl")
    )
    assert ours == theirs == [{"a": "x" * 2**12}, {"a": 2}]


def test_a_gigantic_line_is_counted_and_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST", 2**20)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "' + b"x" * 3 * 2**20 + b'"}\n{"a": 2}\n')
    bad, good = sources.read(str(tmp_path / "a.jsonl"))
    assert (bad.reason, bad.where[-2:], good.fields) == ("longer than 1 MiB", ":1", {"a": 2})
    assert good.where.endswith(":2")


TELL = [name for name in CONTENT if not name.endswith(("csv", "tsv"))]  # that they break off


@pytest.mark.parametrize("name", [*TELL, "utf16.csv", "a.array_record"])
def test_a_file_that_breaks_off_says_so(tmp_path, name):
    content = CONTENT.get(name) or array_records(tmp_path / "whole.array_record")
    plain = name.endswith(".jsonl")
    (tmp_path / name).write_bytes(content[: len(content) // 2 + 3 * plain])
    rows = list(sources.read(str(tmp_path / name)))
    assert rows[-1].fields is None
    assert rows[-1].reason
    assert all(row.fields in ROWS for row in rows[:-1] if name.endswith((".jsonl", ".json")))


@pytest.mark.parametrize("name", CONTENT)
def test_a_file_without_rows(tmp_path, name):
    """Empty, or nothing but a header: no rows of a text; a table lacks what says so."""
    (tmp_path / name).write_bytes(b"")
    text = not name.endswith((".arrow", ".parquet"))
    assert [bool(row.reason) for row in sources.read(str(tmp_path / name))] == [True] * (not text)
    if name.endswith(("csv", "tsv")):
        for header in (b"prompt,chosen", b"\xef\xbb\xbfprompt,chosen\r\n\r\n"):
            (tmp_path / name).write_bytes(header)
            assert not list(sources.read(str(tmp_path / name)))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
@pytest.mark.parametrize("content", [b"no", b"[" * 10**5, b'{"a": 1}]', b"[{}] []"])
def test_files_that_are_something_else(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(sources.read(str(tmp_path / name)))[-1].reason


def test_a_broken_text_in_a_table_costs_its_row_alone(tmp_path):
    texts = pyarrow.array([b"good", b"\xff\xfe", b"also good"]).view(pyarrow.utf8())
    pyarrow.parquet.write_table(pyarrow.table({"a": texts}), tmp_path / "a.parquet")
    good, bad, also_good = sources.read(str(tmp_path / "a.parquet"))
    assert (good.fields, also_good.fields) == ({"a": "good"}, {"a": "also good"})
    assert bad.reason
    assert bad.where.endswith("[1]")


def test_a_hub_dataset_is_read_as_its_table(monkeypatch, request):
    """The name, subset, split and revision as `datasets` is asked for them."""
    import datasets

    asked = []

    def load(*given, **named):
        asked.append((given, named))
        return datasets.Dataset.from_list(ROWS * 400).select(range(1, 1200))

    monkeypatch.setattr(datasets, "load_dataset", load)
    request.addfinalizer(sources._hub.cache_clear)
    rows = list(sources.read("owner/name:subset:split@3f2a", frozenset(["chosen"])))
    assert asked == [(("owner/name", "subset"), {"split": "split", "revision": "3f2a"})]
    assert len(rows) == 1199
    assert rows[0].fields == {"chosen": "😀"}
    assert (rows[-1].where, rows[-1].unread) == (
        "owner/name:subset:split@3f2a[1198]", ("prompt",)
    )  # fmt: skip
    list(sources.read("owner/name"))
    assert asked[-1] == (("owner/name",), {"split": "train", "revision": None})
    list(sources.read("owner/name:subset:train[10%:20%]"))  # a slice has a colon of its own
    assert asked[-1] == (("owner/name", "subset"), {"split": "train[10%:20%]", "revision": None})
    assert sources.hub_id("owner/name:subset:train[:1000]@main") == "owner/name"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("nowhere.jsonl", "no data file"),
        ("../a/b/c", "no data file"),
        ("nothing", "no data file"),
        ("nosuch://a/b.jsonl", "cannot be reached"),
        ("memory://far/nothing.jsonl", "no data file"),
        ("owner/name:split", "no dataset of that name"),
        ("owner/name:subset:split@main", "no dataset of that name"),
    ],
)
def test_sources_that_are_not_there(source, told, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # which else is retried
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=told):
        list(sources.read(source))


def unfolding(kind, text, rows):
    """A table of a few bytes whose texts are long once they are unfolded."""
    indices = pyarrow.array([0] * rows, pyarrow.int32())
    texts = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([text]))
    table = pyarrow.table({"chosen": texts, "other": texts})
    sink = pyarrow.BufferOutputStream()
    if kind == "a.parquet":
        pyarrow.parquet.write_table(table, sink, compression="zstd")
    else:
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("kind", ["a.parquet", "a.arrow"])
def test_tables_that_unfold_to_gigabytes_are_read_a_little_at_a_time(tmp_path, kind):
    (tmp_path / kind).write_bytes(unfolding(kind, "x" * 2**23, 600))
    assert (tmp_path / kind).stat().st_size < 2**25
    # Not ru_maxrss: a process inherits that of the worker that started it.
    program = f"""
from benchmarks import measure
from recipes.data.rows import sources
rows = sources.read({str(tmp_path / kind)!r}, frozenset(["chosen"]))
assert sum(len(row.fields["chosen"]) == 2**23 and row.unread == ("other",) for row in rows) == 600
assert measure.peak_mib() < 2048
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=100)


@pytest.mark.parametrize("kind", ["a.parquet", "a.arrow"])
def test_a_value_that_unfolds_too_far_is_a_row_too_long(tmp_path, kind):
    (tmp_path / kind).write_bytes(unfolding(kind, "x" * 2**25, 3))
    rows = list(sources.read(str(tmp_path / kind), frozenset(["chosen"])))
    assert [row.reason for row in rows] == ["longer than 16 MiB"] * 3


def test_columns_that_nobody_wants_are_named_and_not_read(tmp_path):
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
        first = next(sources.read(str(tmp_path / name), frozenset(["chosen"])))
        assert (first.fields, first.unread) == ({"chosen": "b"}, ("prompt",))


def test_a_list_without_end_is_refused(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[" + b" " * 2**25))
    (row,) = sources.read(str(tmp_path / "a.json.gz"))
    assert row.reason == "the file cannot be read from here on: the list does not end"
    (tmp_path / "b.jsonl").write_bytes(b'{"a": ' + b"[" * 10**6 + b"}")
    (row,) = sources.read(str(tmp_path / "b.jsonl"))
    assert row.reason == "more than 100000 lists"


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table([["a"], ["b"]], names=["chosen", "chosen"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (row,) = sources.read(str(tmp_path / "a.parquet"))
    assert "several columns are named 'chosen'" in row.reason


def test_links_that_lead_nowhere_and_pipes_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="is a broken link"):
        sources.read(f"{tmp_path}/*.jsonl")
    os.mkfifo(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="is not a regular file"):
        sources.read(str(tmp_path / "c.jsonl"))


@pytest.mark.parametrize(
    "name",
    ["a[1].jsonl", "a::b.jsonl", "zip::x.jsonl", "a?b#c d.jsonl", "*.jsonl", "ä 日本.JSONL",
     "in [1]/a::b.jsonl", "~a.jsonl", "100%.jsonl", "a=b,c.jsonl", "file:a.jsonl"],
)  # fmt: skip
def test_what_is_there_by_its_own_name_is_meant_by_it(tmp_path, monkeypatch, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"a": 1}')
    (tmp_path / "a1.jsonl").write_text('{"a": 2}')
    assert read(tmp_path / name) == [{"a": 1}]
    monkeypatch.chdir(tmp_path)
    assert read(name) == [{"a": 1}]
    assert len(sources.identity(name)["files"]) == 1


def test_patterns_in_folders_whose_names_look_like_patterns(tmp_path):
    (tmp_path / "run[1]::x").mkdir()
    for name in ("b[2].jsonl", "a[2].jsonl", ".hidden.jsonl"):
        (tmp_path / "run[1]::x" / name).write_text(json.dumps({"from": name}))
    for pattern in ("run[1]::x/*.jsonl", "run[1]::x/*[2].jsonl", "run*/*.jsonl"):
        assert [row["from"] for row in read(tmp_path / pattern)] == ["a[2].jsonl", "b[2].jsonl"]


def filled(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"from": name}))
    return folder


def test_a_folder_is_its_data_files(tmp_path):
    names = ["a.jsonl", "b/a.jsonl", "b/c.jsonl"]
    beside = ["README.md", ".git/a.jsonl", "_old/a.jsonl", "dataset_info.json", "._a.jsonl"]
    filled(tmp_path, *names, *beside)
    assert [row["from"] for row in read(tmp_path)] == names
    assert read(f"{tmp_path}/") == read(tmp_path)
    assert [row["from"] for row in read(tmp_path / "b")] == names[1:]
    assert len(sources.identity(str(tmp_path))["files"]) == 3
    far = fsspec.filesystem("memory")
    far.pipe("/folder/in/a.jsonl", LINES)
    assert read("memory://folder") == ROWS


def test_a_folder_that_datasets_saved(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "cache-123.arrow").write_bytes(b"")
    assert read(tmp_path / "saved") == ROWS


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a.jsonl", "b.jsonl", "c.csv"], r"several kinds (1 .csv, 2 .jsonl)*as in F/*.jsonl"),
        (["a.parquet", "b.parquet", "sub/c.csv"], r"(1 .csv, 2 .parquet)*as in F/*.parquet"),
        (["a.jsonl", "b.csv"], r"as in F/*.jsonl"),
        (["train.jsonl", "test.jsonl"], r"several splits (1 test, 1 train)*as in F/train.jsonl"),
        (["data/train-0.csv", "data/train-1.csv", "data/test-0.csv"], r"as in F/data/train-*.csv"),
        (["train/0.csv", "train/1.csv", "test/0.csv"], r"as in F/train"),
        (["a/train.csv", "b/train.csv", "a/test.csv"], r"as in F/*/train.csv"),
        (
            ["train_prefs-0.csv", "test_prefs-0.csv", "train_sft-0.csv", "train_gen-0.csv"],
            r"several splits (1 test_prefs, 1 train_gen, 1 train_prefs, 1 train_sft)"
            r"*as in F/train_prefs-0.csv",
        ),
        (["a.jsonl", "b.jsonl", "heldout.jsonl"], r"(1 heldout, 2 no split)*as in F/a.jsonl"),
    ],
)
def test_a_folder_of_several_things_is_not_guessed_at(tmp_path, names, told):
    filled(tmp_path, *names)
    with pytest.raises(ValueError, match="several") as error:
        sources.read(str(tmp_path))
    told = re.escape(told.replace("F/", f"{tmp_path}/")).replace(r"\)\*", r"\).*")
    assert re.search(f"{told}$", str(error.value))
    found = sources.identity(str(error.value).split("as in ")[1])["files"]
    assert found.keys() < {str(tmp_path / name) for name in names}


def test_folders_without_data_and_unknown_kinds_are_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"is a folder without data: \.jsonl"):
        sources.read(str(tmp_path))
    with pytest.raises(ValueError, match=r"not end in one of \.jsonl"):
        sources.read(str(tmp_path / "a.txt"))
    filled(tmp_path, "b/a.jsonl", "c/a.jsonl")
    with pytest.raises(ValueError, match="b is a folder, one of several"):
        sources.read(f"{tmp_path}/[!a]*")


def test_an_identity_changes_with_the_bytes_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    before = sources.identity(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert sources.identity(str(tmp_path / "a.jsonl")) == before
    (tmp_path / "a.jsonl").write_bytes(LINES.replace(b"a", b"b"))
    assert sources.identity(str(tmp_path / "a.jsonl")) != before

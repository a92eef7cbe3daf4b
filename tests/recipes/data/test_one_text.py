"""The same 200 rows in every kind of file: the same ids, whatever a format adds or leaves out."""

import csv
import datetime
import decimal
import gzip
import io
import json
import re

from hypothesis import given, settings, strategies
import pyarrow
import pyarrow.parquet
import pytest

from recipes.data import source_pairs
from recipes.data.chats import columns, layouts
from recipes.data.ids.encode_rows import How, Source
from recipes.data.rows import records, sources, tables
from tests.conftest import TINY
from tests.recipes.data.test_source_pairs import equal

TEMPLATE = """{% if tools %}{{ tools | tojson }}{% endif %}
{%- if mood %}{{ mood | tojson }}{% endif %}
{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}
{%- if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
ODD = 'a "quoted", text; with\ttabs\nlines\r\nand “signs” 😀 日本 é null NaN'


def tool(i):
    """Every fourth describes other parameters: a table gives each of them those of all."""
    parameters = [
        {"type": "object", "properties": {"what": {"type": "string", "default": None}}},
        {
            "type": "object",
            "properties": {"n": {"type": "integer", "enum": [1, 2]}, "unit": {"type": "string"}},
        },
        {"type": "object", "properties": {}},
        None,
    ][i % 4]
    return {"type": "function", "function": {"name": f"f{i}", "parameters": parameters}}


def call(i):
    arguments = [{"what": ODD}, {"n": i, "unit": None}, {}, {"deep": {"list": [None, i]}}][i % 4]
    calls = [{"type": "function", "function": {"name": f"f{i}", "arguments": arguments}}]
    return {"role": "assistant", "content": [None, ""][i % 2], "tool_calls": calls}


def answer(text):
    return {"role": "assistant", "content": text}


def with_tools(i):
    asked = [{"role": "user", "content": f"{i} {ODD}"}]
    return {
        "prompt": asked,
        "chosen": [call(i)],
        "rejected": [call(i + 1)] if i % 3 else [answer("No.")],
        "tools": [tool(i), tool(i + 1)] if i % 5 else None,
        "chat_template_kwargs": {"mood": {"good": i, "bad": None} if i % 2 else {"none": None}},
    }


def conversations(i):
    asked = [{"role": "user", "content": f"{i} {ODD}"}, answer("What?")]
    asked.append({"role": "user", "content": "That."})
    row = {"chosen": [*asked, answer(f"Yes {i}.")], "rejected": [*asked, answer(ODD)]}
    scores = [(4.5, 2), (None, None), (3, None)][i % 3]
    return row | {
        "chosen_score": scores[0], "rejected_score": scores[1], "prompt_id": str(i),
        "system": "Be brief." if i % 4 == 0 else None,
        "system_prompt": "Be kind." if i % 4 == 1 else None,
    }  # fmt: skip


def flat(i):
    return {
        "prompt": f"{i} {ODD}",
        "chosen": f" Yes {i}.\n",
        "rejected": [ODD, "No", "'", "0012"][i % 4] + str(i),
        "system_prompt": "Be brief." if i % 2 else None,
        "chosen_score": 4.5 if i % 3 else None,
        "rejected_score": 2.25 if i % 3 == 1 else None,
        "tools": json.dumps([tool(i)]) if i % 5 else None,
    }


ROWS = {kind.__name__: [kind(i) for i in range(200)] for kind in (with_tools, conversations, flat)}


def lines(rows, keep=lambda i, value: True):
    """Every other null as a key that is not there."""
    rows = [{k: v for k, v in row.items() if keep(i, v)} for i, row in enumerate(rows)]
    return "\n".join(
        json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)
    ).encode()


def cells(rows, delimiter, encoding="utf-8", end="\r\n"):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode(encoding)


def ipc(table, kind=pyarrow.ipc.new_stream, **options):
    sink = pyarrow.BufferOutputStream()
    with kind(sink, table.schema) as writer:
        writer.write_table(table, **options)
    return sink.getvalue().to_pybytes()


def parquet(table, **options):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def retyped(kind, text):
    """The type with another for its texts, and lists of the large kind."""
    again = lambda inner: retyped(inner, text)
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([field.with_type(again(field.type)) for field in kind])
    if pyarrow.types.is_list(kind):
        return pyarrow.large_list(again(kind.value_type))
    return text if pyarrow.types.is_string(kind) else kind


def cast(table, text):
    return table.cast(
        pyarrow.schema([field.with_type(retyped(field.type, text)) for field in table.schema])
    )


def contents(rows):
    table = pyarrow.Table.from_pylist(rows)
    encoded = cast(table, pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    found = {
        "a.jsonl": lines(rows),
        "sparse.jsonl": lines(rows, lambda i, value: i % 2 or value is not None),
        "a.jsonl.gz": gzip.compress(lines(rows)),
        "a.json": json.dumps(rows, indent=1).encode(),
        "a.parquet": parquet(table, row_group_size=70),
        "plain.parquet": parquet(table, use_dictionary=False),
        "stream.arrow": ipc(table),
        "file.arrow": ipc(table, pyarrow.ipc.new_file, max_chunksize=70),
        "dictionary.arrow": ipc(encoded),
        "dictionary.parquet": parquet(encoded),
        "large.parquet": parquet(cast(table, pyarrow.large_string())),
        "views.arrow": ipc(cast(table, pyarrow.string_view()), pyarrow.ipc.new_file),
        "binary.arrow": ipc(cast(table, pyarrow.binary())),
    }
    if isinstance(rows[0]["chosen"], str):
        found |= {
            "a.csv": cells(rows, ","),
            "unix.csv": cells(rows, ",", "utf-8-sig", "\n"),
            "europe.csv": cells(rows, ";"),
            "excel.csv": cells(rows, "\t", "utf-16"),
            "a.tsv": cells(rows, "\t"),
            "a.csv.gz": gzip.compress(cells(rows, ",")),
        }
    return found


def written(folder, kind):
    for name, content in contents(ROWS[kind]).items():
        (folder / name).write_bytes(content)
        yield folder / name


@pytest.mark.parametrize("kind", ROWS)
def test_equal_pairs_from_every_kind_of_file(tmp_path, kind):
    first = None
    for path in written(tmp_path, kind):
        source, _ = source_pairs.recognised(Source(str(path)))
        rows = [columns.renamed(row.fields, {}) for row in sources.read(str(path))]
        found = [layouts.LAYOUTS[source.layout].read(row) for row in rows]
        first = first or found
        assert len(found) == 200
        assert found == first, path.name


def test_a_list_of_rejected_answers_is_written_out_in_cells_alone(tmp_path):
    """A text of a file that has lists is an answer, whatever it looks like."""
    how = How(str(TINY / "model"), None, "assistant", None, 256, "drop", 0.0, answers=3)
    row = {"prompt": "Two colours, please", "chosen": "Blue", "rejected": ["red", "green"]}
    text = row | {"rejected": json.dumps(row["rejected"])}
    (tmp_path / "lists.jsonl").write_bytes(lines([row]))
    (tmp_path / "cells.csv").write_bytes(cells([text], ","))
    (tmp_path / "texts.jsonl").write_bytes(lines([text]))
    (tmp_path / "texts.parquet").write_bytes(parquet(pyarrow.Table.from_pylist([text])))
    found = {}
    for path in tmp_path.iterdir():
        source, _ = source_pairs.recognised(Source(str(path)))
        found[path.name] = source_pairs.read(source, how).ids[0].answers
    counted = {name: len(answers) for name, answers in found.items()}
    assert counted == {"lists.jsonl": 3, "cells.csv": 3, "texts.jsonl": 2, "texts.parquet": 2}


@pytest.mark.full
@pytest.mark.parametrize("kind", ROWS)
def test_equal_ids_from_every_kind_of_file(tmp_path, kind):
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    template = str(tmp_path / "template.jinja")
    how = How(str(TINY / "model"), template, "assistant", None, 4096, "drop", 0.0)
    first = None
    for path in written(tmp_path, kind):
        source, _ = source_pairs.recognised(Source(str(path)))
        found = source_pairs.read(source, how)
        first = first or found
        assert found.counts.used == 200
        assert equal(found, first), path.name


def objects(depth):
    """Objects whose keys say what they hold, as a table needs it, some null and some not there.

    A table has one order of keys for all rows: that is not compared.
    """
    kinds = {
        "text": strategies.text('a\n"é😀', max_size=3),
        "number": strategies.integers(-9, 9),
        "list": strategies.lists(strategies.none() | strategies.text("xy", max_size=2), max_size=2),
    }
    if depth:
        kinds |= {"object": objects(depth - 1), "objects": strategies.lists(objects(0), max_size=2)}
    kinds = {name: strategies.none() | kind for name, kind in kinds.items()}
    return strategies.fixed_dictionaries({}, optional=kinds).map(
        lambda found: {name: found[name] for name in kinds if name in found}
    )


@given(strategies.lists(objects(2), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None, database=None)
def test_an_object_is_the_same_from_a_table_and_from_json(tmp_path_factory, found):
    rows = [{"chosen": value} for value in found]
    folder = tmp_path_factory.mktemp("objects")
    (folder / "a.jsonl").write_bytes(lines(rows))
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "a.arrow").write_bytes(ipc(pyarrow.Table.from_pylist(rows)))
    expected = [row.fields for row in sources.read(str(folder / "a.jsonl"))]
    assert "None" not in str(expected).replace("[None", "[").replace(", None", "")
    for name in ("a.json", "a.arrow"):
        got = [row.fields for row in sources.read(str(folder / name))]
        assert got == expected, name


def test_what_arrow_knows_and_json_does_not(tmp_path):
    """Maps are objects, JSON in a column is what it says, times are written, decimals numbers."""
    entries = pyarrow.map_(pyarrow.string(), pyarrow.struct([("n", pyarrow.int64())]))
    day = datetime.datetime(2026, 1, 31, 12, 30)
    columns = {
        "map": pyarrow.array([[("b", {"n": 1}), ("a", None)], []], entries),
        "json": pyarrow.array(['{"b": {"x": null, "a": [1, 1.5]}}', None], pyarrow.json_()),
        "list": pyarrow.ListArray.from_arrays(
            pyarrow.array([0, 2, 2], pyarrow.int32()),
            pyarrow.array(['{"b": 1}', '"x"'], pyarrow.json_()),
        ),
        "time": pyarrow.array([{"at": day}, None]),
        "day": pyarrow.array([day.date(), None]),
        "decimal": pyarrow.array([decimal.Decimal("4.50"), None]),
        "whole": pyarrow.array([decimal.Decimal("4"), None]),
        "bytes": pyarrow.array(["é".encode(), None]),
        "half": pyarrow.array([1.5, None], pyarrow.float16()),
        "numbers": pyarrow.array([7, None]).dictionary_encode(),
    }
    (tmp_path / "a.arrow").write_bytes(ipc(pyarrow.table(columns).slice(0, 2)))
    first, second = sources.read(str(tmp_path / "a.arrow"))
    assert first.fields == {
        "map": {"b": {"n": 1}},
        "json": {"b": {"a": [1, 1.5]}},
        "list": [{"b": 1}, "x"],
        "time": {"at": "2026-01-31T12:30:00"},
        "day": "2026-01-31",
        "decimal": 4.5,
        "whole": 4,
        "bytes": "é",
        "half": 1.5,
        "numbers": 7,
    }
    assert second.fields == {"map": {}, "list": []}


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([[1], [2]], pyarrow.list_view(pyarrow.int64())),
        pyarrow.RunEndEncodedArray.from_arrays([2], ["a"]),
        pyarrow.array([datetime.timedelta(1), None]),
    ],
)
def test_what_json_has_nothing_like_is_refused_by_column(tmp_path, column):
    table = pyarrow.table({"chosen": ["a", "b"], "odd": column})
    (tmp_path / "a.arrow").write_bytes(ipc(table))
    (row,) = sources.read(str(tmp_path / "a.arrow"))
    assert re.search("the column 'odd' holds .* which is not read", row.reason)
    rows = sources.read(str(tmp_path / "a.arrow"), frozenset(["chosen"]))
    assert [row.fields for row in rows] == [{"chosen": "a"}, {"chosen": "b"}]


def test_what_a_column_cannot_say_costs_its_row_alone(tmp_path):
    table = pyarrow.table(
        {"json": pyarrow.array(["1", '{"a": 1, "a": 2}', "{", "2"], pyarrow.json_())}
    )
    (tmp_path / "a.arrow").write_bytes(ipc(table))
    assert [row.fields for row in sources.read(str(tmp_path / "a.arrow"))] == [
        {"json": 1}, None, None, {"json": 2}
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["list", "struct", "map"])
def test_dictionaries_within_unfold_a_little_at_a_time(tmp_path, monkeypatch, kind):
    """Fifty texts of 200 kB that stand in one."""
    monkeypatch.setattr(records, "LONGEST", 2**20)
    indices = pyarrow.array([0] * 50, pyarrow.int8())
    texts = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["x" * 200_000]))
    offsets = pyarrow.array(range(51), pyarrow.int32())
    column = {
        "list": lambda: pyarrow.ListArray.from_arrays(offsets, texts),
        "struct": lambda: pyarrow.StructArray.from_arrays([texts], ["a"]),
        "map": lambda: pyarrow.MapArray.from_arrays(offsets, pyarrow.array(["a"] * 50), texts),
    }[kind]()
    (tmp_path / "a.arrow").write_bytes(ipc(pyarrow.table({"chosen": column})))
    assert 50 * 200_000 < tables._unfolded(column) < 50 * 200_100
    rows = list(sources.read(str(tmp_path / "a.arrow")))
    assert [len(str(row.fields)) > 200_000 for row in rows] == [True] * 50
    monkeypatch.setattr(records, "LONGEST", 2**17)
    rows = list(sources.read(str(tmp_path / "a.arrow")))
    assert [row.reason for row in rows] == ["longer than 0 MiB"] * 50


def test_dictionaries_of_parquet_are_not_copied_for_every_few_rows(tmp_path, monkeypatch):
    """Each batch brings all of its group's dictionary along: so many batches would be quadratic."""
    texts = pyarrow.array([f"text {i}" for i in range(3000)])
    (tmp_path / "a.parquet").write_bytes(
        parquet(pyarrow.table({"chosen": texts.dictionary_encode()}))
    )
    monkeypatch.setattr(tables, "AT_ONCE", 10)
    sizes, batches = [], pyarrow.parquet.ParquetFile.iter_batches

    def counted(self, size, **options):
        sizes.append(size)
        return batches(self, size, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    found = [row.fields["chosen"] for row in sources.read(str(tmp_path / "a.parquet"))]
    assert found == texts.to_pylist()
    assert sizes == [3000 // 16]

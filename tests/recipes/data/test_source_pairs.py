"""From files to pairs: every row is used or counted, and a prompt is on one side only."""

import concurrent.futures
import contextlib
import json
import pathlib
import re
import shutil
import time

from hypothesis import given, settings, strategies
import numpy as np
import pytest

from checkpoints_io import places, whole
from checkpoints_io.errors import BadInput
from recipes.data import source_pairs
from recipes.data.chats import layouts
from recipes.data.ids import counts, encode_rows, parallel, shards
from recipes.data.ids.encode_rows import How, Source
from recipes.data.ids.examples import AnswerIds, PairIds
from recipes.data.ids.shards import Shard
from recipes.data.rows import sources
from tests.conftest import TINY
from tests.zoo.text.test_confined import catastrophic, gone
from zoo.text import confined
from zoo.text.confined import Limits

MODEL = str(TINY / "model")
HOW = How(MODEL, None, "assistant", None, 64, "drop", max_malformed_fraction=0.5)
CREW = parallel.Crew(HOW)  # for all tests: to start one takes longer than most of them
USER = {"role": "user", "content": "a"}


def turn(text):
    return {"role": "assistant", "content": text}


GOOD = {"chosen": [USER, turn("b")], "rejected": [USER, turn("c")]}


def read(path, cache=None, **other):
    place = None if cache is None else places.Disk(cache)
    return source_pairs.read(
        Source(str(path), "preference_chat"), HOW._replace(**other), place, CREW
    )


def written(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def equal(one, other):
    same = all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
        for x, y in zip(one.ids, other.ids, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    return same and one.counts == other.counts and np.array_equal(one.keys, other.keys)


def test_every_lost_row_is_counted_with_its_reason(tmp_path):
    long = GOOD | {"chosen": [USER, turn("very long " * 50)]}
    equal = GOOD | {"rejected": GOOD["chosen"]}
    path = written(tmp_path / "a.jsonl", [GOOD, {}, long, equal, GOOD, "{not json"])
    found = read(path)
    assert found.counts.used == len(found.ids) == 2
    assert [pair.row for pair in found.ids] == [0, 4]
    assert found.counts.malformed == {
        "`chosen` is missing, or null": 1,
        "not valid JSON": 1,
    }
    too_long = "longer than train_seq_len (64 tokens)"
    assert found.counts.dropped == {too_long: 1, "chosen equals rejected": 1}
    assert found.counts.repeated == 1
    told = "\n".join(found.counts.lines())
    assert "2 of 6 rows used" in told
    assert f"{path}:2" in told
    each = r"2 of 6 rows .*: 1 like .*:2: `chosen` is missing, or null; 1 like .*:6: not valid JSON"
    with pytest.raises(ValueError, match=each):
        read(path, max_malformed_fraction=0.1)


def test_pairs_that_contradict_each_other_are_counted(tmp_path):
    turned = {"chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}
    other = GOOD | {"rejected": [USER, turn("d")]}
    found = read(written(tmp_path / "a.jsonl", [GOOD, other, turned, other]))
    assert (found.counts.contradicted, found.counts.repeated) == (2, 1)
    assert (
        "2 contradicted by another row that prefers the other answer (kept)" in found.counts.lines()
    )
    assert read(written(tmp_path / "b.jsonl", [GOOD, other])).counts.contradicted == 0


def test_a_chosen_answer_of_nothing_is_counted(tmp_path):
    nothing = [GOOD, GOOD | {"chosen": [USER, turn(" ")]}, GOOD | {"rejected": [USER, turn("")]}]
    notes = read(written(tmp_path / "a.jsonl", nothing)).counts.notes
    assert (notes["wants_nothing"], notes["empty_turn"]) == (1, 2)


def test_files_without_a_usable_row(tmp_path):
    with pytest.raises(ValueError, match="holds no rows"):
        read(written(tmp_path / "a.jsonl", []))
    with pytest.raises(ValueError, match=r"no row of .* can be used: .*train_seq_len=2\)"):
        read(written(tmp_path / "a.jsonl", [GOOD]), max_length=2)
    with pytest.raises(ValueError, match="holds no rows"):
        source_pairs.recognised(Source(str(written(tmp_path / "a.jsonl", []))))
    with pytest.raises(
        ValueError, match=r"a.jsonl:1: among its columns \(better\) there are no `chosen`"
    ):
        source_pairs.recognised(Source(str(written(tmp_path / "a.jsonl", [{"better": "a"}]))))


def test_the_layout_is_recognised_and_what_is_not_read_is_told(tmp_path):
    row = {"q": "a", "chosen": "b", "rejected": "c", "prompt_id": 3}
    path = written(tmp_path / "a.jsonl", ["torn {", row])
    source, line = source_pairs.recognised(Source(str(path), columns=(("prompt", "q"),)))
    assert source.layout == "prompt_chosen_rejected"
    assert line == (
        "layout prompt_chosen_rejected, recognised from the columns; not read: prompt_id"
    )
    found = source_pairs.read(source, HOW)
    assert (found.counts.used, found.counts.rows) == (1, 2)
    _, line = source_pairs.recognised(source._replace(layout="plain_text"))
    assert line == "layout plain_text; not read: prompt_id"


def test_scores_of_the_data_stay_with_the_pair(tmp_path):
    scored = GOOD | {"score_chosen": 8.5, "score_rejected": 2}
    path = written(tmp_path / "a.jsonl", [scored, GOOD])
    assert [pair.ratings for pair in read(path).ids] == [(8.5, 2.0), None]
    assert [pair.ratings for pair in read(path, tmp_path / "cache").ids] == [(8.5, 2.0), None]


def test_scores_that_are_not_two_numbers_cost_no_pair(tmp_path):
    given = [(4.5, 2), (4.5, None), (None, None), ("NaN", 2), (4.5, float("nan")), (True, 10**400)]
    rows = [GOOD | {"chosen_score": one, "rejected_score": other} for one, other in given]
    for cache in (None, tmp_path / "cache"):
        found = read(written(tmp_path / "a.jsonl", [*rows, GOOD]), cache)
        assert [pair.ratings for pair in found.ids] == [(4.5, 2.0), *[None] * 6]
        assert found.counts.notes["unscored"] == 4
    told = "4 whose chosen_score and rejected_score are not two numbers (both are ignored)"
    assert told in found.counts.lines()


def test_a_prompt_is_on_one_side_only(tmp_path):
    rows = []
    for i in range(200):
        asked = {"role": "user", "content": f"question {i % 100}"}
        rows.append({"chosen": [asked, turn(f"yes {i}")], "rejected": [asked, turn("no")]})
    found = read(written(tmp_path / "a.jsonl", rows), max_length=128)
    train, held_out = source_pairs.split(found, 0.2)
    assert len(train) + len(held_out) == 200
    assert 20 <= len(held_out) <= 60
    sides = [{pair.row % 100 for pair in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    again, _ = source_pairs.split(found, 0.2)
    assert [p.row for p in again] == [p.row for p in train]
    some = lambda count: found._replace(ids=found.ids[:count], keys=found.keys[:count])
    for count in range(2, 12):  # of few prompts one is on either side
        for fraction in (0.001, 0.1, 0.999):
            sides = source_pairs.split(some(count), fraction)
            assert all(sides) and sum(map(len, sides)) == count
    told = r"have the same prompt: set --config\.validation_split_fraction=None"
    with pytest.raises(ValueError, match=told):
        source_pairs.split(some(1), 0.2)


def test_the_fingerprint_sees_every_token(tmp_path):
    ids = read(written(tmp_path / "a.jsonl", [GOOD])).ids
    before = source_pairs.fingerprint(ids)
    changed = ids[0].rejected.copy()
    changed[0] += 1
    assert source_pairs.fingerprint([ids[0]._replace(rejected=changed)]) != before
    assert (
        source_pairs.fingerprint([ids[0]._replace(rejected_scored=~ids[0].rejected_scored)])
        != before
    )
    assert source_pairs.fingerprint(ids) == before


def test_the_embedded_files_share_no_prompt():
    train, held_out = (read(TINY / n, max_length=256) for n in ("train.jsonl", "heldout.jsonl"))
    assert train.counts.used == train.counts.rows >= 300
    assert held_out.counts.used == held_out.counts.rows >= 50
    assert not {*train.keys.tolist()} & {*held_out.keys.tolist()}


def many(path, number):
    rows = [
        GOOD | {"chosen": [{"role": "user", "content": f"question {i}"}, turn(f"b{i}")]}
        if i % 7
        else "{torn"
        for i in range(number)
    ]
    for row in rows:
        if isinstance(row, dict):
            row["rejected"] = [row["chosen"][0], turn("c")]
    return written(path, rows)


def test_tokens_are_kept_and_mapped_again(tmp_path, monkeypatch):
    """By several processes, from files of a few rows each; the second time nothing is encoded."""
    monkeypatch.setattr(parallel, "SHARD", 16)
    path, cache = many(tmp_path / "a.jsonl", 100), tmp_path / "cache"
    alone = read(path)
    kept = read(path, cache)
    assert equal(kept, alone)
    assert kept.counts.malformed == {"not valid JSON": 15}
    assert len(list(cache.glob("*/*.safetensors"))) == 7
    assert not list(cache.glob("*/*.part"))
    monkeypatch.setattr(parallel, "_tokenised", None)
    assert equal(read(path, cache), alone)


ONE, TWO, THREE = (np.arange(n, dtype=np.int32) for n in (1, 2, 3))
ANY, LAST = np.array([True, True]), np.array([False, False, True])


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [
            PairIds(7, ONE, TWO, THREE, ANY, LAST, ("special", "left_out/a\nb"), (0.1, -2.0)),
            PairIds(9, THREE, THREE, TWO, LAST, ANY),
        ],
        [AnswerIds(7, ONE, TWO, ANY), AnswerIds(9, TWO, THREE, LAST, ("moved",))],
    ],
    ids=["none", "pairs", "answers"],
)
def test_a_shard_as_bytes(ids):
    told = counts.none()._replace(rows=9, first={"a": "b"}, repeated=1)
    told.notes["special"] += 1
    shard = Shard(ids, np.array([2**64 - 1 - i for i in range(len(ids))], np.uint64), told)
    found = shards.from_bytes(shards.to_bytes(shard))
    assert equal(found, shard)
    assert list(map(type, found.ids)) == list(map(type, ids))
    arrays = [found.keys, *(x for one in found.ids for x in one if isinstance(x, np.ndarray))]
    own = [shard.keys, *(x for one in ids for x in one if isinstance(x, np.ndarray))]
    assert [x.dtype for x in arrays] == [x.dtype for x in own]


@pytest.mark.parametrize(
    "harm", ["cut", "emptied", "removed", "flipped", "a bit", "no end", "torn end"]
)
def test_a_harmed_cache_is_mended(tmp_path, monkeypatch, harm):
    monkeypatch.setattr(parallel, "SHARD", 50)
    path, cache = many(tmp_path / "a.jsonl", 100), tmp_path / "cache"
    before = read(path, cache)
    one = sorted(cache.glob("*/*.safetensors"))[0]
    content = one.read_bytes()
    # A reader that maps the old file keeps it: what is written anew has another inode.
    one.rename(tmp_path / "old")
    done = one.with_name("done.json")
    if harm == "cut":
        one.write_bytes(content[: len(content) // 2])
    elif harm == "emptied":
        one.write_bytes(b"")
    elif harm == "flipped":
        one.write_bytes(content[:20] + bytes(reversed(content[20:-20])) + content[-20:])
    elif harm == "a bit":  # of a token, where nothing but its digest tells
        at = content.index(before.ids[0].prompt.tobytes())
        one.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif harm != "removed":
        one.write_bytes(content)
        done.write_bytes(b"{" if harm == "torn end" else b"")
    again = read(path, cache)
    assert equal(again, before)
    assert one.read_bytes() == content


def test_a_cache_that_was_not_finished_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "SHARD", 10)
    path, cache = many(tmp_path / "a.jsonl", 40), tmp_path / "cache"
    encoded, firsts = parallel._tokenised, []

    def until(first, *rest):
        if len(firsts) == 2:
            raise KeyboardInterrupt
        firsts.append(first)
        return encoded(first, *rest)

    monkeypatch.setattr(parallel, "_tokenised", until)
    with pytest.raises(KeyboardInterrupt):
        read(path, cache)
    monkeypatch.setattr(parallel, "_tokenised", lambda *a: firsts.append(a[0]) or encoded(*a))
    again = read(path, cache)
    assert sorted(firsts) == [0, 10, 20, 30]
    assert equal(again, read(path))


def test_of_two_at_once_one_tokenises_and_the_other_waits(tmp_path, monkeypatch):
    path, cache = many(tmp_path / "a.jsonl", 40), tmp_path / "cache"
    encoded, calls = parallel._tokenised, []

    def slowly(*given):
        calls.append(given[0])
        time.sleep(0.5)
        return encoded(*given)

    monkeypatch.setattr(parallel, "_tokenised", slowly)
    with concurrent.futures.ThreadPoolExecutor(2) as both:
        one, other = both.map(lambda _: read(path, cache), range(2))
    assert equal(one, other)
    assert calls == [0]


def test_files_of_another_length_are_not_taken_for_ours(tmp_path, monkeypatch):
    """A start that was killed, and another version that keeps fewer rows a file."""
    path, cache = many(tmp_path / "a.jsonl", 40), tmp_path / "cache"
    monkeypatch.setattr(parallel, "SHARD", 20)
    before = read(path, cache)
    (done,) = cache.glob("*/done.json")
    done.unlink()
    monkeypatch.setattr(parallel, "SHARD", 10)
    assert equal(read(path, cache), before)


def test_other_code_is_another_folder(tmp_path, monkeypatch):
    source = Source(str(written(tmp_path / "a.jsonl", [GOOD])), "preference_chat")
    before = parallel.identity(source, HOW)
    copies = [tmp_path / folder.name for folder in parallel.CODE]
    for folder, copy in zip(parallel.CODE, copies, strict=True):
        shutil.copytree(folder, copy)
    monkeypatch.setattr(parallel, "CODE", copies)
    assert parallel.identity(source, HOW) == before
    for name in (
        "rows/formats.py",
        "chats/layouts.py",
        "ids/pair_ids.py",
        "ids/examples.py",
        "text/fast_bpe.py",
    ):
        path = tmp_path / name
        text = path.read_text()
        path.write_text(text + "# another reading")
        assert parallel.identity(source, HOW) != before
        path.write_text(text)
    assert parallel.identity(source, HOW) == before


def test_another_tokenizer_template_or_setting_is_another_folder(tmp_path):
    path = written(tmp_path / "a.jsonl", [GOOD])
    source = Source(str(path), "preference_chat")
    template = tmp_path / "a.jinja"
    template.write_text((pathlib.Path(MODEL) / "chat_template.jinja").read_text())
    before = parallel.identity(source, HOW)
    for other in (
        dict(max_length=65),
        dict(over_length="cut_answer"),
        dict(scored_turns="last"),
        dict(chat_template=str(template)),
    ):
        assert parallel.identity(source, HOW._replace(**other)) != before
    assert parallel.identity(source, HOW._replace(max_malformed_fraction=0.1)) == before
    assert parallel.identity(source._replace(layout="hh"), HOW) != before
    written(path, [GOOD, GOOD])
    assert parallel.identity(source, HOW) != before


def template_of(how):
    step = lambda *_: contextlib.nullcontext()
    own, _ = encode_rows.ready(how, parallel.files_of(how), False, step)
    return own.chat_template


def test_a_template_changed_in_between_is_seen_within_one_process(tmp_path):
    path, cache = written(tmp_path / "a.jsonl", [GOOD]), tmp_path / "cache"
    template = tmp_path / "a.jinja"
    text = (pathlib.Path(MODEL) / "chat_template.jinja").read_text()
    template.write_text(text)
    how = HOW._replace(chat_template=str(template))
    before = read(path, cache, chat_template=str(template)).ids[0]
    assert template_of(how) == text
    template.write_text(
        text.replace("user", "person").replace("{{ bos_token }}", "{{ bos_token }}X")
    )
    after = read(path, cache, chat_template=str(template)).ids[0]
    assert len(after.prompt) == len(before.prompt) + 1
    assert template_of(how) != text


def test_a_source_changed_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    path, cache = written(tmp_path / "a.jsonl", [GOOD]), tmp_path / "cache"
    encode = parallel._tokenised

    def meanwhile(*given):
        written(path, [GOOD, GOOD])
        return encode(*given)

    with monkeypatch.context() as patched, pytest.raises(ValueError, match="changed while it was"):
        patched.setattr(parallel, "_tokenised", meanwhile)
        read(path, cache)
    written(path, [GOOD])
    assert len(read(path, cache).ids) == 1


def test_parts_are_bounded_by_their_bytes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "BYTES", 1000)
    path = many(tmp_path / "a.jsonl", 40)
    assert len(list(parallel._parts(Source(str(path), "preference_chat"), 99))) > 4
    assert equal(read(path, tmp_path / "cache"), read(path))


def looping(tmp_path, word):
    """A template that does not end where a message says so."""
    text = (pathlib.Path(MODEL) / "chat_template.jinja").read_text()
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    path = tmp_path / "loops.jinja"
    path.write_text(f"{{% for m in messages if '{word}' in m.content %}}{loop}{{% endfor %}}{text}")
    return str(path)


@pytest.fixture
def impatient(monkeypatch):
    """Workers with little time."""
    limits = Limits(seconds=0.5, loading=20.0)
    monkeypatch.setattr(confined, "Limits", lambda: limits)
    with parallel.Crew(HOW) as crew:
        yield crew


def test_a_row_that_takes_too_long_costs_itself_alone(tmp_path, impatient):
    slow = GOOD | {"chosen": [USER, turn("for ever")]}
    path = written(tmp_path / "a.jsonl", [GOOD, slow, GOOD])
    how = HOW._replace(chat_template=looping(tmp_path, "for ever"))
    for cache in (None, places.Disk(tmp_path / "cache")):
        found = source_pairs.read(Source(str(path), "preference_chat"), how, cache, impatient)
        told = "to render and tokenise it takes more than 0.5 seconds of CPU time"
        assert found.counts.dropped == {told: 1}
        assert found.counts.first[told] == f"{path}:2"
        assert [pair.row for pair in found.ids] == [0, 2]


def test_a_template_that_takes_too_long_is_refused_at_once(tmp_path, impatient):
    how = HOW._replace(chat_template=looping(tmp_path, "way"))
    told = "the chat template cannot be used: to try it takes more than 0.5 seconds of CPU time"
    with pytest.raises(BadInput, match=re.escape(told)):
        parallel.prepared(how, impatient, None, plain=False)


def test_a_row_that_ends_the_worker_is_named(tmp_path, impatient):
    folder = catastrophic(tmp_path)
    bad = GOOD | {"chosen": [USER, turn("a" * 300)]}
    path = written(tmp_path / "a.jsonl", [GOOD, bad, GOOD])
    how = HOW._replace(tokenizer=str(folder))
    impatient.how = how
    with pytest.raises(BadInput) as error:
        source_pairs.read(Source(str(path), "preference_chat"), how, None, impatient)
    assert str(error.value) == (
        f"{path}:2: the tokenizer in {folder} or its chat template took more than 0.5 seconds of "
        "CPU time in a library, and was ended: leave this row out, or give another template "
        "(--config.chat_template) or tokenizer (--config.tokenizer)"
    )
    path = written(tmp_path / "b.jsonl", [GOOD, GOOD])
    assert (
        len(source_pairs.read(Source(str(path), "preference_chat"), how, None, impatient).ids) == 2
    )


def test_where_all_is_kept_no_worker_is_started(tmp_path, monkeypatch):
    path, cache = written(tmp_path / "a.jsonl", [GOOD]), places.Disk(tmp_path / "cache")
    with parallel.Crew(HOW) as crew:
        ready = parallel.prepared(HOW, crew, cache, plain=False)
        before = source_pairs.read(Source(str(path), "preference_chat"), HOW, cache, crew)
    monkeypatch.setattr(confined, "_started", None)
    with parallel.Crew(HOW) as crew:
        assert parallel.prepared(HOW, crew, cache, plain=False) == ready
        assert equal(
            source_pairs.read(Source(str(path), "preference_chat"), HOW, cache, crew), before
        )
    assert ready == encode_rows.Ready((1, 4), True)


def test_interrupted_it_leaves_no_worker(tmp_path, monkeypatch):
    path = many(tmp_path / "a.jsonl", 40)
    rows = parallel._parts

    def interrupted(*given):
        yield from rows(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(parallel, "_parts", interrupted)
    with pytest.raises(KeyboardInterrupt), parallel.Crew(HOW) as crew:
        crew.call(encode_rows.prepare, HOW._asdict(), parallel.files_of(HOW), False)
        (one,) = crew._all
        pid = one._running.process.pid
        source_pairs.read(Source(str(path), "preference_chat"), HOW, None, crew)
    assert gone(pid)


def test_pairs_that_share_nothing_are_split_by_what_is_asked(tmp_path):
    ask = lambda text: [{"role": "user", "content": text}, turn("yes")]
    rows = [{"chosen": ask(f"good {i}"), "rejected": ask(f"bad {i}")} for i in range(60)]
    found = read(written(tmp_path / "a.jsonl", rows))
    assert found.counts.notes["no_user_turn"] == 60
    assert len({*found.keys.tolist()}) == 60
    _, held_out = source_pairs.split(found, 0.3)
    assert 5 < len(held_out) < 35


def test_tools_that_the_template_ignores_are_counted(tmp_path):
    tools = [{"type": "function", "function": {"name": "look"}}]
    found = read(written(tmp_path / "a.jsonl", [GOOD | {"tools": tools}, GOOD]))
    assert found.counts.notes["ignored"] == 1
    told = "1 with tools or template settings that the chat template ignores"
    assert told in found.counts.lines()


def test_what_is_told_can_neither_steer_a_terminal_nor_fill_it(tmp_path):
    rows = [GOOD | {"chosen": [{"role": f"\x1b[2J\n{i}", "content": "a"}]} for i in range(99)]
    path = written(tmp_path / "a.jsonl", [*rows, GOOD | {"\x1b[31m\nfake\ud800" + "x" * 999: 1}])
    _, line = source_pairs.recognised(Source(str(path)))
    told = [line, *read(path, max_malformed_fraction=1.0).counts.lines()]
    assert len(told) < 30
    assert all(len(line) < 900 and line.isprintable() for line in told)


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot be kept in .*No space left.*token_cache"):
        read(written(tmp_path / "a.jsonl", [GOOD]), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/*"))


VALUES = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.text(strategies.characters(), max_size=20)
    | strategies.sampled_from(
        ["user", "assistant", "system", "human", "gpt", "text", "\n\nHuman:"]
    ),
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.fixed_dictionaries({"role": inner, "content": inner})
        | strategies.fixed_dictionaries({"from": inner, "value": inner, "tool_calls": inner})
    ),
    max_leaves=8,
)
COLUMNS = strategies.sampled_from(
    sorted(set().union(*(layout.columns for layout in layouts.LAYOUTS.values())))
)
LINE = (
    strategies.dictionaries(COLUMNS, VALUES, max_size=5).map(json.dumps)
    | strategies.just(json.dumps(GOOD))
    | strategies.tuples(strategies.just(json.dumps(GOOD)), strategies.integers(0, 90)).map(
        lambda both: both[0][: both[1]]
    )
)


def accounted(lines, layout, path):
    """Every line is used or counted, and nothing else is raised."""
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    how = HOW._replace(max_malformed_fraction=1.0)
    shards = parallel.in_memory(Source(str(path), layout), how, CREW)
    rows = sum(shard.counts.rows for shard in shards)
    used = sum(len(shard.ids) for shard in shards)
    lost = sum(s.counts.malformed.total() + s.counts.dropped.total() for s in shards)
    assert rows == used + lost == sum(bool(line.strip()) for line in lines)


def fuzzed(number):
    @settings(max_examples=number, deadline=None, database=None)
    @given(
        lines=strategies.lists(LINE, min_size=8, max_size=12),
        layout=strategies.sampled_from(sorted(layouts.LAYOUTS)),
    )
    def run(path, lines, layout):
        accounted([line.replace("\n", " ") for line in lines], layout, path)

    return run


def test_no_row_is_lost_whatever_it_holds(tmp_path):
    fuzzed(50)(tmp_path / "a.jsonl")


@pytest.mark.full
def test_no_row_of_ten_thousand_is_lost(tmp_path):
    fuzzed(1100)(tmp_path / "a.jsonl")


def mutants(content, number, seed):
    """Some bytes changed, removed, repeated, or the end cut off."""
    draw = np.random.default_rng(seed)
    for _ in range(number):
        harmed = bytearray(content)
        for _ in range(draw.integers(1, 6)):
            at = int(draw.integers(len(harmed)))
            size = int(draw.integers(1, 40))
            match draw.integers(4):
                case 0:
                    harmed[at] = int(draw.integers(256))
                case 1:
                    del harmed[at : at + size]
                case 2:
                    harmed[at:at] = harmed[at : at + size]
                case _:
                    del harmed[max(at, 1) :]
            harmed = harmed or bytearray(b"x")
        yield bytes(harmed)


def read_mutants(folder, number):
    """Of every kind of file: rows come, with fields or with a reason, and an end."""
    from tests.recipes.data.rows.test_sources import CONTENT, array_records

    contents = CONTENT | {"a.array_record": array_records(folder / "whole.array_record")}
    for seed, (name, content) in enumerate(contents.items()):
        for harmed in mutants(content, number, seed):
            (folder / name).write_bytes(harmed)
            for row in sources.read(str(folder / name)):
                assert (row.fields is None) == bool(row.reason)
                assert row.where.startswith(str(folder / name))


def test_harmed_files_are_rows_with_reasons(tmp_path):
    read_mutants(tmp_path, 20)


@pytest.mark.full
def test_ten_thousand_harmed_files_are_rows_with_reasons(tmp_path):
    read_mutants(tmp_path, 900)

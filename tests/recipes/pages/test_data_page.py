"""What is shown of the data: all of it true, and none of it able to do harm."""

import collections
from html.parser import HTMLParser
import itertools
import re

import numpy as np
import pytest

from recipes.data import run_data, shown
from recipes.data.ids.counts import Counts
from recipes.data.ids.examples import Answer, AnswerIds, ListIds, PairIds, described
from recipes.data.packed.packing import Shape
from recipes.pages import data_page
from tests.conftest import TINY
from zoo.text import tokenizer

SHAPE = Shape(rows=4, row_length=64, examples=2, answers=2, few=4)
SCRIPT = "<script>alert('1 & 2')</script>"


@pytest.fixture(scope="module")
def own():
    return tokenizer.load(TINY / "model")


def pair(own, prompt, chosen, rejected, row=0, notes=()):
    """A pair of plain texts; in each answer, what stands in [ ] is not scored."""
    ids, scored = [], []
    for answer in (chosen, rejected):
        parts = [own.encode(part)[0] for part in re.split(r"[\[\]]", answer)]
        ids.append(np.array([*itertools.chain(*parts)], np.int32))
        scored.append(np.repeat(np.arange(len(parts)) % 2 == 0, [len(part) for part in parts]))
    return PairIds(row, np.array(own.encode(prompt)[0], np.int32), *ids, *scored, notes)


def part(pairs, *, name="train", reasons=None, notes=None, told=None, lost=0, **other):
    counter, reasons = collections.Counter, collections.Counter(reasons or {})
    rows = len(pairs) + reasons.total() + lost
    counts = Counts(rows, counter(), reasons, counter(notes or {}), dict.fromkeys(reasons, "a:1"))
    told = [f"{len(pairs)} of {rows} rows used"] if told is None else told
    given = dict(source="pairs.jsonl", layout="plain_text") | other
    return run_data.Told(
        name=name, lines=told, counts=counts, examples=pairs, **given,
    )  # fmt: skip


class Page(HTMLParser):
    """A page as its tables, its texts of tokens, and what is open where; tags must close."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.cells, self.texts, self.titles = [], [], [], [], []
        self.words = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("meta", "br"):
            return
        self.open.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag == "dd":
            self.texts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        inside = [tag for tag, _ in self.open]
        if "style" in inside:
            return
        self.words += data
        if "td" in inside or "th" in inside:
            self.cells[-1][-1] += data
        if "dd" in inside and "summary" not in inside:
            self.texts[-1] += data

    def counts(self):
        return {row[0]: int(row[1].replace(",", "")) for row in self.cells if row[1:2] > [""]
                and row[1].replace(",", "").isdigit()}  # fmt: skip


def test_a_small_report_to_the_letter(own):
    pairs = [
        pair(own, "Which way?", " Onwards!", " Back, and[ then] home."),
        pair(own, "A\nB", " C", " D", row=2, notes=("moved",)),
    ]
    one = part(
        pairs,
        reasons={"chosen equals rejected": 1},
        notes={"moved": 1, "special": 0},
        told=["2 of 3 rows used", "1 dropped: chosen equals rejected (first: pairs.jsonl:2)"],
    )
    assert (
        data_page.text([one], own, SHAPE, color=False)
        == """\
train: pairs.jsonl, read as plain_text
  2 of 3 rows used
  1 dropped: chosen equals rejected (first: pairs.jsonl:2)
  1 pair with a token that spans the end of the prompt (it counts as part of the answer)

  tokens      min median    90%    99%    max  0 … 14, a block is 1
  prompt        3      3      5      5      5     █ █
  chosen        1      1      6      6      6   █    █
  rejected      1      1     10     10     10   █        █
  scored        2      2     14     14     14    █           █
  The chosen answer is longer in 0% of the pairs, shorter in 50%.

  rows of  filled  micro-batches  positions per real token  pairs in two rows
       64    8.6%            1.0                      7.53               0.0%  (the run)
     1024    2.1%            1.0                     30.12               0.0%
     2048    1.1%            1.0                     60.24               0.0%
     4096    0.5%            1.0                    120.47               0.0%

  row 0
    prompt    Which way?
    chosen    ⟦ Onwards!⟧
    rejected  ⟦ Back, and⟧ then⟦ home.⟧

  row 2
    with a token that spans the end of the prompt (it counts as part of the answer)
    prompt    A↵
              B
    chosen    ⟦ C⟧
    rejected  ⟦ D⟧
"""
    )


def test_colours_are_added_to_the_same_text(own):
    one = part([pair(own, "a", " b[ c]", " d")], reasons={SCRIPT: 2}, told=[])
    painted = data_page.text([one], own, SHAPE, color=True)
    assert "\x1b[32m⟦ b⟧\x1b[0m\x1b[33m c\x1b[0m" in painted
    plain = re.sub(r"\x1b\[\d+m", "", painted)
    assert plain == data_page.text([one], own, SHAPE, color=False)
    assert f"2 rows lost: {SCRIPT}" in plain


def test_a_page_asks_for_nothing_and_runs_nothing(own):
    bad = pair(own, SCRIPT, f"{SCRIPT} \"'>", "</dd></style><img src=x onerror=y>")
    one = part([bad], name=SCRIPT, source=SCRIPT, layout=SCRIPT, reasons={SCRIPT: 3}, told=[SCRIPT])
    html = data_page.page([one, one], own, SHAPE)
    page = Page(html)
    assert {"script", "img", "link", "iframe"}.isdisjoint(tag for tag, _ in page.tags)
    names = {name for _, attrs in page.tags for name in attrs}
    assert not any(name.startswith("on") or name in ("src", "srcset", "style") for name in names)
    links = [attrs["href"] for _, attrs in page.tags if "href" in attrs]
    assert links == ["#part-1", "#part-2"]
    assert "url(" not in html and "@import" not in html and "://" not in html
    policy = {"http-equiv": "Content-Security-Policy"}
    policy["content"] = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("meta", policy) in page.tags
    assert page.texts[:3] == [SCRIPT, f"{SCRIPT} \"'>", "</dd></style><img src=x onerror=y>"]
    assert page.words.count(SCRIPT) > 10


def test_a_page_counts_as_it_was_told(own):
    pairs = [pair(own, "a", " b", " c", row=i) for i in range(3)]
    reasons = {"chosen equals rejected": 1200, "`chosen` is missing": 1}
    one = part(pairs, reasons=reasons, notes={"moved": 2, "special": 0})
    page = Page(data_page.page([one], own, SHAPE))
    lost = {f"lost: {why}": n for why, n in reasons.items()}
    want = {"used": 3, "read": 1204, described("moved"): 2} | lost
    assert want.items() <= page.counts().items()
    assert described("special") not in page.words
    assert "accounted for" not in page.words
    assert ["prompt", *"11111"] in page.cells and ["scored", *"22222"] in page.cells
    alarm = "1,204 rows were read, and 1,203 are accounted for."
    fewer = collections.Counter({"chosen equals rejected": 1200})
    for odd in (
        one._replace(examples=pairs[1:]),
        one._replace(counts=one.counts._replace(dropped=fewer)),
    ):
        assert alarm in Page(data_page.page([odd], own, SHAPE)).words
        assert "1,203 of 1,204 rows are accounted for" in data_page.text(
            [odd], own, SHAPE, color=False
        )


TEXTS = [
    "Plain words, and  two spaces.\n\n\tA tab",
    " leads with a space",
    "日本語と 한국어 and မြန်မာ",
    "👩‍👩‍👧 𠀀𠀁 naïve \ufffd",
    "<|eot_id|> & <b>",
]


@pytest.mark.parametrize("said", TEXTS)
def test_the_tokens_of_a_text_are_the_whole_text(own, said):
    one = pair(own, said, f"[{said}]{said}", said[::-1])
    pieces = shown.pieces_of(one, own)
    for name, ids in (("prompt", one.prompt), ("chosen", one.chosen), ("rejected", one.rejected)):
        assert [i for piece in pieces[name] for i in piece.ids] == ids.tolist()
        assert "".join(piece.text for piece in pieces[name]) == own.decode(ids.tolist())
        assert not any("\ufffd" in piece.text for piece in pieces[name] if piece.text[1:])
    assert Page(data_page.page([part([one])], own, SHAPE)).texts == [said, said * 2, said[::-1]]
    told = data_page.text([part([one])], own, SHAPE, color=False)
    inside = lambda text: text.replace("\n", "↵\n" + " " * 14)
    assert f"    chosen    {inside(said)}⟦{inside(said)}⟧\n" in told


def test_a_special_token_is_one_and_says_its_id(own):
    html = data_page.page([part([pair(own, "a<|eot_id|>", "b", "c")])], own, SHAPE)
    id = own.special["<|eot_id|>"]
    assert f'<b class="special" title="token {id}">&lt;|eot_id|&gt;</b>' in html


def test_what_would_not_be_seen_is_named(own):
    one = part([pair(own, "a\x1b[31m\r\n", "b\u202eright\u200b", "c\x00")], name="\x1b[2J\ud800")
    for said in (data_page.text([one], own, SHAPE, color=False), data_page.page([one], own, SHAPE)):
        said.encode()
        assert not re.search("[\x00\x1b\r\u202e\u200b]", said)
        for name in ("␛[2J⟨U+D800⟩", "␛", "␍", "⟨U+202E⟩", "⟨U+200B⟩", "␀"):
            assert name in Page(said).words if "<html" in said else name in said


def test_a_long_text_is_whole_on_the_page_and_short_in_the_terminal(own):
    said = "".join(f" {i}" for i in range(2000))
    one = part([pair(own, said, "a", "b")])
    html = data_page.page([one], own, SHAPE)
    assert Page(html).texts[0] == said
    assert html.count("<details><summary>… ") == 1
    told = data_page.text([one], own, SHAPE, color=False)
    n = len(one.examples[0].prompt)
    assert f" … {n - shown.HEAD - shown.TAIL:,} tokens … " in told
    assert len(told) < len(said)
    assert told.count("the longest pair does not fit") == sum(n > t for t in (64, 1024, 2048, 4096))


def test_lengths_far_off_share_the_last_bin(own):
    pairs = [pair(own, "a", " b", " c") for _ in range(999)] + [pair(own, " a" * 5000, " b", " c")]
    prompt = data_page.histograms(pairs, 40)[0]
    assert prompt.labels[-1].endswith(" or more")
    assert len(prompt.counts) == len(prompt.labels) <= 40
    assert (prompt.counts[1], prompt.counts[-1]) == (999, 1)
    assert prompt.quantiles == {"min": 1, "median": 1, "90%": 1, "99%": 1, "max": 5000}


def test_pairs_in_two_rows_are_told(own):
    pairs = [pair(own, " a" * 30, " b" * 20, " c" * 30)] * 4
    assert data_page.packs(pairs, SHAPE)[64].in_two == 1.0
    one_row = data_page.packs(pairs, SHAPE._replace(rows=1, few=1))
    assert one_row[64] is None and one_row[1024].in_two == 0.0
    assert data_page.packs(pairs, SHAPE._replace(row_length=32))[32] is None


def test_many_parts_and_empty_ones(own):
    parts = [part([pair(own, "a", " b", " c")], name=f"source {i}") for i in range(12)]
    parts.append(part([], name="nothing", lost=1))
    page = Page(data_page.page(parts, own, SHAPE))
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == [
        f"part-{i + 1}" for i in range(13)
    ]
    told = data_page.text(parts, own, SHAPE, color=False)
    assert [line for line in told.splitlines() if line.startswith("source ")] == [
        f"source {i}: pairs.jsonl, read as plain_text" for i in range(12)
    ]
    last = ["nothing: pairs.jsonl, read as plain_text", "  0 of 1 rows used"]
    assert told.splitlines()[-3:] == [*last, "  0 of 1 rows are accounted for"]


def test_rows_are_from_all_over(own):
    pairs = [pair(own, "a", " b", " c", row=i) for i in range(100)]
    assert [p.row for p in run_data.spread(pairs, 3)] == [0, 50, 99]
    assert [p.row for p in run_data.spread(pairs[:2], 20)] == [0, 1]
    assert run_data.spread(pairs, 0) == []


def test_single_answers_are_told_as_such(own):
    texts = [(" Which way? " * 20, " Onwards!"), ("A", " B C")]
    ids = [[np.array(own.encode(text)[0], np.int32) for text in both] for both in texts]
    some = [
        AnswerIds(row, prompt, answer, np.arange(len(answer)) > 0, ("moved",))
        for row, (prompt, answer) in enumerate(ids)
    ]
    one = part(some, layout="plain_answer", source="rows.jsonl", notes={"moved": 2})
    shape = SHAPE._replace(answers=1)
    told, html = data_page.text([one], own, shape, color=False), data_page.page([one], own, shape)
    assert "  2 answers with a token that spans the end of the prompt" in told
    assert "the longest answer does not fit" in told
    page = Page(html)
    assert page.texts == [text for both in texts for text in both]
    assert "2 answers from 2 rows." in page.words and "an update is 2 answers." in page.words
    assert "Answers, token by token" in page.words and "Of the answers used" in page.words
    assert [row[0] for row in page.cells if row[0] in ("prompt", "answer", "scored")] == [
        "prompt", "answer", "scored"
    ]  # fmt: skip
    assert "the longest answer does not fit" in page.words
    for words in (told, page.words):
        assert not re.search("pair|chosen|rejected|both|longer one", words)


def test_lists_are_told_as_such(own):
    """The second has fewer answers than the first."""
    texts = [(" Which way? " * 3, " Onwards!", " Left", " Back!"), ("A", " B C", " D")]
    ids = [[np.array(own.encode(text)[0], np.int32) for text in all_] for all_ in texts]
    some = [
        ListIds(
            row, prompt, tuple(Answer(one, np.ones(len(one), bool)) for one in answers),
            tuple(range(len(answers))), ("tied",),
        )
        for row, (prompt, *answers) in enumerate(ids)
    ]  # fmt: skip
    one = part(some, layout="best_and_worst", source="rows.jsonl", notes={"tied": 2})
    shape = SHAPE._replace(answers=3, rows=4, few=4)
    told, html = data_page.text([one], own, shape, color=False), data_page.page([one], own, shape)
    assert "  2 lists with answers of equal rank" in told
    assert "The best answer is longer than the worst in" in told
    page = Page(html)
    assert page.texts == [text for all_ in texts for text in all_]
    assert "2 lists from 2 rows." in page.words and "an update is 2 lists." in page.words
    assert "here two share it" in page.words
    for words in (told, page.words):
        assert {f"answer_{i}" in words for i in (1, 2, 3)} == {True}
        assert "both answers" not in words

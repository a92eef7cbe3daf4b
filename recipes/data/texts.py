"""Plain texts that a model is measured on: how well it still writes what is no pair."""

from collections.abc import Iterator, Sequence
import itertools
from typing import NamedTuple

import numpy as np

from checkpoints_io.errors import BadInput
from recipes.data.ids import encode_texts, parallel
from recipes.data.ids.encode_rows import How
from recipes.data.ids.examples import AnswerIds
from recipes.data.ids.parallel import Crew
from recipes.data.rows import sources

AT_ONCE = 64  # texts that a worker is given


class Texts(NamedTuple):
    """A named set of texts, in windows of at most so many tokens as a prompt with its answer has.

    Every token is scored once, after as many of those before it as its window holds.
    """

    name: str
    windows: list[AnswerIds]
    texts: int
    tokens: int  # scored
    bytes: int  # of the texts as UTF-8

    def told(self) -> str:
        """The set of texts described in one line."""
        return f"{self.name}: {self.how_many()}, {self.tokens} tokens, {self.bytes} bytes"

    def how_many(self) -> str:
        """The number of texts, with the noun."""
        return "1 text" if self.texts == 1 else f"{self.texts} texts"


def read(name: str, path: str, how: How, crew: Crew, most: int | None, *, plain: bool) -> Texts:
    """The texts of a file or dataset; at most so many, from all over it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a row holds no text, or there are none.
    """
    rows = [*_rows(name, path)]
    if not rows:
        raise BadInput(f"--config.validation_texts.{name}={path} has no texts")
    if most is not None and most < len(rows):
        chosen = np.linspace(0, len(rows) - 1, most).round().astype(int).tolist()
        rows = [rows[i] for i in chosen]
    parts = (rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE))
    given = how._asdict(), parallel.files_of(how), plain
    work = lambda some: crew.call(encode_texts.encode, some, *given)
    found = [*itertools.chain(*crew.each(work, ((some,) for some in parts)))]
    windows: list[AnswerIds] = []
    for ids, _ in found:
        windows += cut(ids, how.max_length, len(windows))
    tokens = sum(len(window.answer) for window in windows)
    if not tokens:
        raise BadInput(f"--config.validation_texts.{name}={path} has no tokens")
    return Texts(name, windows, len(found), tokens, sum(size for _, size in found))


def cut(ids: Sequence[int], longest: int, first: int = 0) -> list[AnswerIds]:
    """Windows over a text, which are numbered from `first`; of its ids the first is not scored.

    Each but the last begins with the token before those that it scores; the last is filled up with
    what stands before them.
    """
    found = []
    step = max(1, longest - 1)
    for start in range(1, len(ids), step):
        stop = min(start + step, len(ids))
        prompt, answer = ids[max(0, stop - longest) : start], ids[start:stop]
        scored = np.ones(len(answer), bool)
        asked, told = (np.array(part, np.int32) for part in (prompt, answer))
        found.append(AnswerIds(first + len(found), asked, told, scored))
    return found


def _rows(name: str, path: str) -> Iterator[list[str]]:
    """Where each text is, and the text; those without a character say nothing."""
    for row in sources.read_texts(path):
        text = (row.fields or {}).get("text")
        if not isinstance(text, str):
            told = row.reason or "there is no text in `text`"
            raise BadInput(f"--config.validation_texts.{name}: {row.where}: {told}")
        if text:
            yield [row.where, text]

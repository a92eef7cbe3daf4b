"""An example shown: its tokens as text, with what is scored marked."""

from collections.abc import Callable, Sequence
import itertools
from typing import NamedTuple

import numpy as np

from checkpoints_io.unseen import visible
from recipes.data.ids.examples import Example, LabelledIds, called, is_ranked
from zoo.text.tokenizer import Tokenizer, text_after

HEAD, TAIL = 40, 80  # tokens shown of the beginning and the end of a long text


class Piece(NamedTuple):
    """A token, or several that are whole characters only together."""

    ids: list[int]
    text: str
    kind: str  # prompt, scored, unscored
    is_control: bool


def lines_of(
    pair: Example, tokenizer: Tokenizer, painted: Callable[[str, str], str] = lambda what, _: what
) -> list[str]:
    """A pair as text, its scored stretches between ⟦ and ⟧; `painted` may colour them."""
    return [
        line
        for name, pieces in pieces_of(pair, tokenizer).items()
        for line in f"{name:<8}  {_marked(pieces, painted, ' ' * 10)}".split("\n")
    ]


def pieces_of(pair: Example, tokenizer: Tokenizer) -> dict[str, list[Piece]]:
    """The tokens of the prompt and of either answer, with their texts."""
    kinds = lambda scored: np.where(scored, "scored", "unscored").tolist()
    prompt = cut(tokenizer, [], pair.prompt.tolist(), ["prompt"] * len(pair.prompt))
    found = {"prompt": prompt}
    names = called(pair, len(pair.answers))
    if isinstance(pair, LabelledIds):
        names = "wanted" if pair.ratings[0] else "unwanted", *names[1:]
    for name, (ids, scored) in zip(names, pair.answers, strict=True):
        found[name] = cut(tokenizer, prompt[-1].ids, ids.tolist(), kinds(scored))
    return found


def noun(examples: Sequence[Example]) -> str:
    """What such examples are called."""
    if not any(map(is_ranked, examples)):
        return "answers"
    return "pairs" if all(len(one.answers) == 2 for one in examples) else "lists"


def cut(
    tokenizer: Tokenizer, before: list[int], ids: list[int], kinds: Sequence[str] | None = None
) -> list[Piece]:
    """The texts of the pieces, joined, are what `ids` say after `before`."""
    kinds = ["scored"] * len(ids) if kinds is None else kinds
    whole = text_after(tokenizer, before, ids)
    found, at, start = [], 0, 0
    for stop in range(1, len(ids) + 1):
        some = ids[start:stop]
        said = whole[at:] if stop == len(ids) else text_after(tokenizer, before, some)
        if stop < len(ids) and not (said and whole.startswith(said, at)):
            continue  # its last character continues in the next token
        kind = min(kinds[start:stop])  # scored, if any of it is
        found.append(Piece(some, said, kind, not tokenizer.control.isdisjoint(some)))
        before, at, start = some, at + len(said), stop
    return found


def runs(pieces: list[Piece], whole: bool = False) -> list[tuple[str, list[Piece]]]:
    """By kind; the middle of a long text is a run of a kind of its own, unless all is wanted."""
    if len(pieces) > 1.25 * (HEAD + TAIL) and not whole:
        middle = "left_out", pieces[HEAD:-TAIL]
        return [*runs(pieces[:HEAD]), middle, *runs(pieces[-TAIL:])]
    return [(kind, list(run)) for kind, run in itertools.groupby(pieces, lambda one: one.kind)]


def _marked(pieces: list[Piece], painted: Callable[[str, str], str], indent: str) -> str:
    marked = ""
    for kind, run in runs(pieces):
        said = visible("".join(piece.text for piece in run)).replace("\n", f"↵\n{indent}")
        left_out = f" … {sum(len(piece.ids) for piece in run):,} tokens … "
        said = {"scored": f"⟦{said}⟧", "left_out": left_out}.get(kind, said)
        marked += painted(said, kind)
    return marked

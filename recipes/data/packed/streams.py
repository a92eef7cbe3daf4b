"""Examples -> streams: every two answers one stream with their prompt once, where they may be.

A stream holds the chosen answer backwards, then the prompt, then the rejected answer, so that every
token sees one contiguous run of keys. Prompt "ab", chosen "xyz", rejected "uv" (the last token of
an answer is only a target and is not stored):

  stored      y x a b u
  position    3 2 0 1 2
  first key   0 1 2 2 2
  last key    4 4 3 4 5      y: yxab   x: xab   a: a   b: ab   u: abu
  scored      b->x x->y y->z   b->u u->v      (from where in the row, to which token)

A pair too long for one row is stored as two ordinary streams, each answer after its own prompt; so
is one whose answers' lengths rotate the prompt differently (`Shape.alike`). A single answer is one
ordinary stream. Of a list every two answers that follow each other are stored like a pair, and what
is left of an odd number like a single answer: K answers take ceil(K / 2) copies of the prompt.
"""

from collections.abc import Iterator

import numpy as np

from recipes.data.ids.examples import Example
from recipes.data.packed.packing import Item, Shape, Stream


def item(example: Example, shape: Shape) -> Item:
    """An example as it is packed into rows of this shape."""
    made = tuple(_streams(example, shape))
    if shape.ld_alpha is not None:
        made = discounted(made, shape.ld_alpha)
    return Item(example.row, made)


def outline(example: Example, shape: Shape) -> Item:
    """An item with nothing but lengths in its streams: enough to pack it, and quickly made."""
    p, scored = len(example.prompt), scored_tokens(example)
    alone = [p + len(answer.ids) - 1 for answer in example.answers]
    streams = [
        _blank(sum(alone[i] for i in one) - p * (len(one) - 1), sum(scored[i] for i in one), alone)
        for one in _behind_one_prompt(example, shape)
    ]
    return Item(example.row, tuple(streams))


def _blank(stored: int, scores: int, alone: list[int]) -> Stream:
    """A stream of so many tokens and scores; `alone` are the lengths of the answers' texts."""
    tokens, target = (np.broadcast_to(np.int32(0), (size,)) for size in (stored, scores))
    return Stream(tokens, tokens, tokens, tokens, max(alone), target, target, target)


def discounted(streams: tuple[Stream, ...], alpha: float) -> tuple[Stream, ...]:
    """The streams with weights: scores beyond the length of the shortest answer count `alpha`.

    Source: LD-DPO, https://arxiv.org/abs/2409.06411; TRL's ld_alpha, of policy and reference.
    """
    answers = np.concatenate([stream.answer for stream in streams])
    shared = min(np.unique(answers, return_counts=True)[1])
    found = []
    for stream in streams:
        weights = np.ones(len(stream.answer), np.float32)
        for answer in np.unique(stream.answer):
            weights[np.flatnonzero(stream.answer == answer)[shared:]] = alpha
        found.append(stream._replace(weights=weights))
    return tuple(found)


def _streams(example: Example, shape: Shape) -> Iterator[Stream]:
    for first, *other in _behind_one_prompt(example, shape):
        yield prompt_once(example, first) if other else _alone(example, first)


def _behind_one_prompt(example: Example, shape: Shape) -> Iterator[range]:
    """The numbers of the answers of each stream: two, or one alone."""
    count = len(example.answers)
    for first, once in zip(range(0, count, 2), shared(example, shape), strict=True):
        two = range(first, min(first + 2, count))
        yield from [two] if once else (range(i, i + 1) for i in two)


def prompt_once(example: Example, first: int = 0) -> Stream:
    """An answer backwards, the prompt, the next answer. See the head of this file."""
    (ids, scored), (other_ids, other_scored) = example.answers[first : first + 2]
    c, p, r = len(ids) - 1, len(example.prompt), len(other_ids) - 1
    chosen, prompt, rejected = np.arange(c), np.arange(p), np.arange(r)
    # The first token of either answer is read off the last of the prompt.
    from_chosen = np.concatenate([[c + p - 1], chosen[::-1]])[scored]
    from_rejected = np.concatenate([[c + p - 1], c + p + rejected])[other_scored]
    targets = ids[scored], other_ids[other_scored]
    return Stream(
        tokens=np.concatenate([ids[:-1][::-1], example.prompt, other_ids[:-1]]),
        positions=np.concatenate([p + chosen[::-1], prompt, p + rejected]),
        first=np.concatenate([chosen, np.full(p + r, c)]),
        last=np.concatenate([np.full(c, c + p), c + prompt + 1, c + p + rejected + 1]),
        length=p + max(c, r) + 1,
        read_at=np.concatenate([from_chosen, from_rejected]),
        target=np.concatenate(targets),
        answer=np.repeat([first, first + 1], [len(targets[0]), len(targets[1])]),
    )


def separate(example: Example) -> tuple[Stream, ...]:
    """A causal stream for each answer, after its own copy of the prompt."""
    return tuple(_alone(example, number) for number in range(len(example.answers)))


def _alone(example: Example, number: int) -> Stream:
    answer, scored = example.answers[number]
    tokens = np.concatenate([example.prompt, answer[:-1]])
    steps = np.arange(len(tokens))
    return Stream(
        tokens=tokens,
        positions=steps,
        first=np.zeros_like(steps),
        last=steps + 1,
        length=len(example.prompt) + len(answer),
        read_at=(len(example.prompt) - 1 + np.arange(len(answer)))[scored],
        target=answer[scored],
        answer=np.full(int(scored.sum()), number),
    )


def longest(example: Example) -> int:
    """Positions of the longest answer after its own prompt: a row must hold them."""
    return len(example.prompt) + max(len(answer.ids) for answer in example.answers) - 1


def stored_length(example: Example) -> int:
    """Positions that an example takes in a row that is long enough."""
    return sum(two_by_two(example))


def two_by_two(example: Example) -> list[int]:
    """Positions of each two answers with one prompt, and of one that is left.

    After a prompt of one token two have one score more than tokens, and it needs a place.
    """
    p, lengths = len(example.prompt), [len(answer.ids) - 1 for answer in example.answers]
    two = lambda i: max(p, 2) + lengths[i] + lengths[i + 1]
    return [two(i) if i + 1 < len(lengths) else p + lengths[i] for i in range(0, len(lengths), 2)]


def _separate_length(example: Example) -> int:
    return sum(len(example.prompt) + len(answer.ids) - 1 for answer in example.answers)


def real_tokens(example: Example) -> int:
    """Tokens of all answers, each with its prompt: what a padded trainer would call real."""
    return sum(len(example.prompt) + len(answer.ids) for answer in example.answers)


def scored_tokens(example: Example) -> list[int]:
    """The number of scored tokens of each answer."""
    return [int(answer.scored.sum()) for answer in example.answers]


def shared(example: Example, shape: Shape) -> list[bool]:
    """Of every two answers: are they one stream, which fits into a row? One that is left always is.

    And may they share the prompt's rotations?
    """
    may = _may_share(example, shape.alike)
    return [may and length <= shape.row_length for length in two_by_two(example)]


def fits_once(example: Example, shape: Shape) -> bool:
    """Does the prompt stand once for every two answers?"""
    return all(shared(example, shape))


def fits_a_row(example: Example, shape: Shape) -> bool:
    """Does one row hold an example, with its prompt once or, if need be, with every answer?"""
    return needed(example, shape.alike) <= shape.row_length


def needed(example: Example, alike: int | None) -> int:
    """The shortest row that holds all of it, of shapes with this `alike`."""
    return stored_length(example) if _may_share(example, alike) else _separate_length(example)


def _may_share(example: Example, alike: int | None) -> bool:
    """May the answers share the prompt's rotations? A single answer has them for itself."""
    return len(example.answers) == 1 or alike is None or longest(example) < alike

"""Encodes a `Pair` as token ids: one prompt, its answers, and which of their tokens are scored."""

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from checkpoints_io.errors import BadInput
from recipes.data.chats import chat, rendering, unusual
from recipes.data.chats.pair import Pair
from recipes.data.ids.examples import LEFT_OUT, Answer, AnswerIds, Encoded, ListIds, PairIds
from zoo.text.tokenizer import Tokenizer


def encode(
    pair: Pair,
    tokenizer: Tokenizer,
    template: chat.Chat | None,
    *,
    row: int,
    max_length: int,
    over_length: str,
    lists: bool = False,
    labelled: bool = False,
) -> Encoded:
    """Token ids of a pair, at most `max_length` for the prompt with either answer.

    A single answer becomes `AnswerIds`, with its rating if it is `labelled`; with `lists`, all
    others become `ListIds`.

    Prompt and answer are tokenised as one text, as the model will see them. If a token spans the
    boundary, or the two answers tokenise the prompt differently, the boundary moves back: no token
    is lost, and the prompt ids are a true prefix of both.

    Raises:
      ValueError: nothing would be scored, or it is too long, or the template refuses it.
    """
    rendered = unusual.checked(pair, rendering.render(pair, template), template)
    plain = isinstance(pair.prompt, str)
    encoded = _encode_texts(rendered, tokenizer, plain=plain)
    n, moved = _boundary(encoded, rendered[0].prompt_end)
    if n == 0:
        raise BadInput(f"the prompt is empty{_opens(pair)}")
    left_out = list(dict.fromkeys(name for text in rendered for name in text.left_out))
    notes = _notes(pair, tokenizer, template, left_out, moved=moved)
    parted = _Parted(
        encoded[0].ids[:n], [Answer(side.ids[n:], side.scored[n:]) for side in encoded]
    )
    (prompt, answers), cut = _fitted(parted, max_length, over_length, tokenizer.bos_id)
    notes += [cut] if cut else []
    if len(answers) == 1:
        label = (pair.ratings[0],) if labelled and pair.ratings else None
        return AnswerIds(row, prompt, *answers[0], tuple(notes), label)
    distinct = _distinct(answers, pair.ranks or (0, 1), left_out)
    notes += ["said_again"] if len(distinct) < len(answers) else []
    return _compared(pair, row, prompt, answers, distinct, tuple(notes), lists=lists)


def _notes(
    pair: Pair,
    tokenizer: Tokenizer,
    template: chat.Chat | None,
    left_out: Sequence[str],
    *,
    moved: bool,
) -> list[str]:
    """The names of what is unusual about a pair (`examples.NOTES`) before it is cut."""
    holds = {
        "moved": moved,
        "empty_turn": pair.has_empty_turn,
        "wants_nothing": pair.wants_nothing,
        "no_user_turn": pair.shares_no_user_turn,
        "asks_twice": pair.asks_twice,
        "special": any(map(tokenizer.specials.search, pair.texts)),
        "quiet": bool(template) and template.scored_turns != "all" and pair.has_quiet_turn,
        "no_id": any(word in text for word in tokenizer.unknown for text in pair.texts),
        "other_format": unusual.of_another_format(pair),
        "asks_again": unusual.asks_again(pair),
        "ignored": chat.ignores(pair, template),
        "unscored": len(pair.answers) > 1 and pair.ratings is not None and _ratings(pair) is None,
    }
    found = [name for name, is_so in holds.items() if is_so]
    return [*found, *(LEFT_OUT + key for key in left_out), *pair.notes]


def _ratings(pair: Pair) -> tuple[float, ...] | None:
    """The ratings of a pair's answers, if all of them have one."""
    return pair.ratings if pair.ratings and np.isfinite(pair.ratings).all() else None


def _distinct(
    answers: Sequence[Answer], ranks: Sequence[int], left_out: Sequence[str]
) -> list[int]:
    """Which of the answers do not repeat an earlier one.

    Raises:
      ValueError: all of them are ranked alike, so that nothing is left to compare.
    """
    new = [i for i, one in enumerate(answers) if not _says_again(one, answers[:i])]
    if ranks[new[-1]] == ranks[0]:
        hidden = f" once the chat template has left out {', '.join(left_out)}" if left_out else ""
        raise BadInput(f"chosen equals rejected{hidden}")
    return new


def _compared(
    pair: Pair,
    row: int,
    prompt: np.ndarray,
    answers: Sequence[Answer],
    distinct: Sequence[int],
    notes: tuple[str, ...],
    *,
    lists: bool,
) -> PairIds | ListIds:
    """A list of the distinct answers, or the pair."""
    ratings = _ratings(pair)
    if lists:
        of: Callable[[Sequence], tuple] = lambda values: tuple(values[i] for i in distinct)
        rated, ranks = of(ratings) if ratings else None, of(pair.ranks or (0, 1))
        return ListIds(row, prompt, of(answers), ranks, notes, rated, pair.worth)
    chosen, rejected = answers
    masks = chosen.scored, rejected.scored
    return PairIds(row, prompt, chosen.ids, rejected.ids, *masks, notes, ratings, pair.worth)


def _opens(pair: Pair) -> str:
    """Why there is no prompt, if a conversation begins with an answer."""
    if isinstance(pair.chosen, str) or all(turn["role"] != "user" for turn in pair.chosen):
        return ""
    remedy = "--config.data.scored_turns=last takes all turns before the last one as the prompt"
    return f": it opens with an answer, and {remedy}"


def _says_again(answer: Answer, before: Sequence[Answer]) -> bool:
    return any(np.array_equal(answer.ids, other.ids) for other in before)


class _Parted(NamedTuple):
    prompt: np.ndarray
    answers: list[Answer]


class _Encoded(NamedTuple):
    ids: np.ndarray
    scored: np.ndarray
    characters: Callable[[int], tuple[int, int]]  # the span of a token
    prompt: int  # tokens that are wholly in the prompt
    exact: bool  # the prompt's tokens are the same as without an answer


def _encode_texts(
    rendered: tuple[rendering.Rendered, ...], tokenizer: Tokenizer, *, plain: bool
) -> list[_Encoded]:
    """Tokenises what the answers share once, up to the last special token before they differ."""
    text, end = rendered[0].text, rendered[0].prompt_end
    cut = max((m.start() for m in tokenizer.cuts.finditer(text, max(end - 256, 0), end)), default=0)
    head, _ = tokenizer.encode(text[:cut]) if cut else ([], [])
    asked, _ = tokenizer.encode(text[cut:end])
    given = head, asked, cut, tokenizer
    return [_encode_text(answer, *given, plain=plain) for answer in rendered]


def _encode_text(
    rendered: rendering.Rendered,
    head: list[int],
    asked: list[int],
    cut: int,
    tokenizer: Tokenizer,
    *,
    plain: bool,
) -> _Encoded:
    """Tokenises an answer after its prompt, whose ids are `head` up to `cut`, and then `asked`.

    A template writes its own special tokens; plain text gets a first and a last one, unless it has
    them itself.
    """
    text, prompt_end, spans = rendered[:3]
    tail, offsets = tokenizer.encode(text[cut:])
    ids, before = [*head, *tail], len(head)
    if plain:
        first = [i for i in tokenizer.first if ids[:1] != [i]]
        last = [i for i in [tokenizer.eos_id] if ids[-1:] != [i]]
        ids, before = [*first, *ids, *last], before + len(first)
        spans = [(prompt_end, len(text) + 1)]

    def characters(i: int) -> tuple[int, int]:
        """The span of a token: for the head all of it; a token without text has the next one's."""
        i -= before
        if i < 0:
            return -1, cut
        begin, end = offsets[i] if i < len(tail) else (len(text) - cut, 0)
        return cut + begin, cut + max(end, begin + 1)

    def reaching_behind(character: int) -> int:
        """The first token with text after it, except white space that a special token takes."""
        i = bisect.bisect_right(range(len(ids)), character, key=lambda i: characters(i)[1])
        if i < len(ids) and (begin := characters(i)[0]) < character:
            own = next((word for word, j in tokenizer.special.items() if j == ids[i]), None)
            i += own is not None and begin + len(own) <= character
        return i

    exact = tail[: len(asked)] == asked  # then these are the tokens of just this text
    prompt = before + len(asked) if exact else reaching_behind(prompt_end)
    scored = np.zeros(len(ids), bool)
    for start, stop in spans:
        first = prompt if start == prompt_end else reaching_behind(start)
        last = len(ids)
        if stop < len(text):
            last = bisect.bisect_left(range(last), stop, key=lambda i: characters(i)[0])
        scored[first:last] = True
    return _Encoded(np.array(ids, np.int32), scored, characters, prompt, exact)


def _boundary(sides: Sequence[_Encoded], prompt_end: int) -> tuple[int, bool]:
    """The number of tokens of the shared prompt, and whether answers got some of its text."""
    first = sides[0].prompt
    if first > 0 and all(side.exact and side.prompt == first for side in sides):
        return first, False
    shared = min(_common(sides[0].ids, side.ids) for side in sides)
    if not any(side.prompt for side in sides):  # nothing shared: they differ from their first words
        words = [np.flatnonzero(side.scored) for side in sides]
        return min([shared, *(int(at[0]) for at in words if len(at))]), False
    n = min(shared, *(side.prompt for side in sides))
    for side in sides:  # never between two bytes of a character
        while 0 < n < len(side.ids) and side.characters(n)[0] < side.characters(n - 1)[1]:
            n -= 1
    begins = [side.characters(n)[0] for side in sides if n < len(side.ids)]
    return n, any(begin < prompt_end for begin in begins)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    shortest = min(len(a), len(b))
    differ = np.flatnonzero(a[:shortest] != b[:shortest])
    return int(differ[0]) if len(differ) else shortest


def _fitted(
    parted: _Parted, most: int, over_length: str, bos: int | None
) -> tuple[_Parted, str | None]:
    """Cuts to at most `most` tokens, answers at their last scored one; returns notes on cuts."""
    prompt = parted.prompt
    answers = [_ended(answer, "nothing to score") for answer in parted.answers]
    longest, n = max(len(answer.ids) for answer in answers), len(prompt)
    if n + longest <= most:
        return _Parted(prompt, answers), None
    if over_length == "cut_answer" and n < most:
        otherwise = f"nothing to score is left within train_seq_len ({most} tokens)"
        cut = [Answer(ids[: most - n], scored[: most - n]) for ids, scored in answers]
        return _Parted(prompt, [_ended(answer, otherwise) for answer in cut]), "answer_cut"
    room = most - longest  # for the prompt
    if over_length == "cut_prompt" and room > 0:
        first = prompt[:1] if room > 1 and prompt[0] == bos else prompt[:0]
        prompt = np.concatenate([first, prompt[n - room + len(first) :]])
        return _Parted(prompt, answers), "prompt_cut"
    what = {"cut_answer": "prompt ", "cut_prompt": "answer "}.get(over_length, "")
    raise BadInput(f"{what}longer than train_seq_len ({most} tokens)")


def _ended(answer: Answer, otherwise: str) -> Answer:
    """The answer up to its last scored token; nothing after that affects the loss."""
    if len(answer.scored) and answer.scored[-1]:  # true of almost all
        return answer
    if not answer.scored.any():
        raise BadInput(otherwise)
    stop = int(np.flatnonzero(answer.scored)[-1]) + 1
    return Answer(answer.ids[:stop], answer.scored[:stop])

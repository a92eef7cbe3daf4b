"""A `Pair` as token ids: one prompt, two answers, and which of their tokens count."""

import bisect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from checkpoints_io.errors import BadInput
from recipes.data import chat, layouts, rendering, unusual
from recipes.data.layouts import Pair
from zoo.text.tokenizer import Tokenizer


class PairIds(NamedTuple):
    """Token ids of a pair. Both answers follow the same prompt ids; their last token counts."""

    row: int  # its number in the source
    prompt: np.ndarray  # int32, at least one
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_scored: np.ndarray  # bool, as long as `chosen`
    rejected_scored: np.ndarray
    notes: tuple[str, ...] = ()  # `described` says what they mean
    scores: tuple[float, float] | None = None  # of chosen and rejected, by whoever preferred


# What may be said of a pair that is used.
NOTES = {
    "moved": "with a token across the end of the prompt (it went to the answer, whole)",
    "prompt_cut": "with a prompt cut from the left at train_seq_len",
    "answer_cut": "with an answer cut at train_seq_len (its end is not scored)",
    "empty_turn": "with a turn that says nothing",
    "no_user_turn": "with answers that share no user turn",
    "special": "with words that are special tokens of this tokenizer (they are read as such)",
    "other_format": (
        "with marks of a chat format in their prompt (Human:, [INST], <|im_start|>, …) or at the "
        "end of an answer (</s>, …)"
    ),
    "asks_again": "of which both answers begin with the question",
    "ignored": "with tools or template settings that the chat template does not look at",
    "unscored": "with chosen_score and rejected_score that are not two numbers (they are left out)",
}
UNREAD = "unread/"  # and a key of a message: what nothing here reads of it
LEFT_OUT = "left_out/"  # and a key of a message: what the chat template does not show of it
OVER_LENGTH = ("drop", "cut_prompt", "cut_answer")


def described(note: str) -> str:
    """What a note says of a pair."""
    if note in NOTES:
        return NOTES[note]
    if note.startswith(UNREAD):
        return f"with `{note.removeprefix(UNREAD)}` in their messages, which is not read"
    key = note.removeprefix(LEFT_OUT)
    return f"of which the chat template leaves out {'words' if key == 'content' else f'`{key}`'}"


def encode(
    pair: Pair,
    tokenizer: Tokenizer,
    template: chat.Chat | None,
    *,
    row: int,
    max_length: int,
    over_length: str,
) -> PairIds:
    """Token ids of a pair, of at most `max_length` for the prompt and either answer together.

    Prompt and answer are tokenised as one text, as the model will meet them. Where a token spans
    the boundary, or the two answers tokenise the prompt differently, the boundary moves back: no
    token is lost, and the prompt ids are a true prefix of both.

    Raises:
      ValueError: nothing would be scored, or it is too long, or the template refuses it.
    """
    rendered = unusual.checked(pair, rendering.render(pair, template), template)
    plain = isinstance(pair.prompt, str)
    chosen, rejected = _encode_texts(rendered, tokenizer, plain=plain)
    n, moved = _boundary(chosen, rejected, rendered[0].prompt_end)
    if n == 0:
        raise BadInput("the prompt is empty")
    scores = pair.scores if pair.scores and np.isfinite(pair.scores).all() else None
    notes = {
        "moved": moved,
        "empty_turn": layouts.has_empty_turn(pair),
        "no_user_turn": layouts.shares_no_user_turn(pair),
        "special": any(map(tokenizer.specials.search, layouts.texts(pair))),
        "other_format": unusual.of_another_format(pair),
        "asks_again": unusual.asks_again(pair),
        "ignored": chat.ignores(pair, template),
        "unscored": pair.scores is not None and scores is None,
    }
    left_out = dict.fromkeys(name for text in rendered for name in text.left_out)
    said = [name for name, holds in notes.items() if holds] + [LEFT_OUT + key for key in left_out]
    ids = PairIds(
        row, chosen.ids[:n], chosen.ids[n:], rejected.ids[n:], chosen.scored[n:],
        rejected.scored[n:], tuple(said), scores,
    )  # fmt: skip
    ids = _fitted(ids, max_length, over_length, tokenizer.bos_id)
    if np.array_equal(ids.chosen, ids.rejected):
        hidden = f" once the chat template has left out {', '.join(left_out)}" if left_out else ""
        raise BadInput(f"chosen equals rejected{hidden}")
    return ids


def as_bytes(pair: PairIds) -> bytes:
    """Its tokens and masks: equal for pairs that train alike, whatever machine they are on."""
    parts = pair.prompt, pair.chosen, pair.rejected
    sized = (len(array).to_bytes(8) + array.astype("<i4").tobytes() for array in parts)
    return b"".join([*sized, pair.chosen_scored.tobytes(), pair.rejected_scored.tobytes()])


class _Encoded(NamedTuple):
    ids: np.ndarray
    scored: np.ndarray
    characters: Callable[[int], tuple[int, int]]  # of a token: from .. to
    prompt: int  # tokens that lie wholly in the prompt
    exact: bool  # the prompt's text is tokenised as it is alone


def _encode_texts(
    rendered: tuple[rendering.Rendered, rendering.Rendered], tokenizer: Tokenizer, *, plain: bool
) -> list[_Encoded]:
    """What the two share is tokenised once, up to the last special token before they part."""
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
    """One answer behind its prompt: up to `cut` that is `head`, and `asked`, tokenised alone.

    A template writes its own special tokens; plain text is given a first and a last one, where it
    does not write them itself.
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
        """Of the head it is only known that they lie there; a token without any has the next."""
        i -= before
        if i < 0:
            return -1, cut
        begin, end = offsets[i] if i < len(tail) else (len(text) - cut, 0)
        return cut + begin, cut + max(end, begin + 1)

    def reaching_behind(character: int) -> int:
        """The first token that does; white space that a special token swallows is not its text."""
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


def _boundary(chosen: _Encoded, rejected: _Encoded, prompt_end: int) -> tuple[int, bool]:
    """Tokens of the shared prompt; and whether it gave some of its text to the answers."""
    if chosen.exact and rejected.exact and chosen.prompt == rejected.prompt > 0:
        return chosen.prompt, False
    shared = _common(chosen.ids, rejected.ids)
    if not chosen.prompt and not rejected.prompt:  # nothing shared: they part at their first words
        words = [np.flatnonzero(side.scored) for side in (chosen, rejected)]
        return min([shared, *(int(at[0]) for at in words if len(at))]), False
    n = min(chosen.prompt, rejected.prompt, shared)
    for side in (chosen, rejected):  # not between two bytes of a character
        while 0 < n < len(side.ids) and side.characters(n)[0] < side.characters(n - 1)[1]:
            n -= 1
    begins = [side.characters(n)[0] for side in (chosen, rejected) if n < len(side.ids)]
    return n, any(begin < prompt_end for begin in begins)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    shortest = min(len(a), len(b))
    differ = np.flatnonzero(a[:shortest] != b[:shortest])
    return int(differ[0]) if len(differ) else shortest


def _fitted(ids: PairIds, most: int, over_length: str, bos: int | None) -> PairIds:
    """Of at most so many tokens, each answer up to its last scored one: the rest is never seen."""
    ids = _ended(ids, "nothing to score")
    longest = max(len(ids.chosen), len(ids.rejected))
    n = len(ids.prompt)
    if n + longest <= most:
        return ids
    if over_length == "cut_answer" and n < most:
        room = most - n
        ids = ids._replace(
            chosen=ids.chosen[:room],
            rejected=ids.rejected[:room],
            chosen_scored=ids.chosen_scored[:room],
            rejected_scored=ids.rejected_scored[:room],
            notes=(*ids.notes, "answer_cut"),
        )
        return _ended(ids, "nothing to score is left within train_seq_len")
    room = most - longest  # for the prompt
    if over_length == "cut_prompt" and room > 0:
        first = ids.prompt[:1] if room > 1 and ids.prompt[0] == bos else ids.prompt[:0]
        prompt = np.concatenate([first, ids.prompt[n - room + len(first) :]])
        return ids._replace(prompt=prompt, notes=(*ids.notes, "prompt_cut"))
    what = {"cut_answer": "prompt ", "cut_prompt": "answer "}.get(over_length, "")
    raise BadInput(f"{what}longer than train_seq_len")


def _ended(ids: PairIds, otherwise: str) -> PairIds:
    for side in ("chosen", "rejected"):
        scored = getattr(ids, f"{side}_scored")
        if not scored.any():
            raise BadInput(otherwise)
        if not scored[-1]:
            stop = int(np.flatnonzero(scored)[-1]) + 1
            shorter = {side: getattr(ids, side)[:stop], f"{side}_scored": scored[:stop]}
            ids = ids._replace(**shorter)
    return ids

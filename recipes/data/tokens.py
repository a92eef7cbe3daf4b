"""A `Pair` as token ids: one prompt, two answers, and which of their tokens count."""

from typing import NamedTuple

import numpy as np

from recipes.data import chat
from recipes.data.layouts import Pair


class PairIds(NamedTuple):
    """Token ids of a pair. Both answers follow the same prompt ids; their last token counts."""

    row: int  # its number in the source
    prompt: np.ndarray  # int32, at least one
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_scored: np.ndarray  # bool, as long as `chosen`
    rejected_scored: np.ndarray
    boundary_moved: bool  # a token spanned prompt and answer, and went to the answer
    truncated: bool


OVER_LENGTH = ("drop", "cut_answer")


def encode(
    pair: Pair,
    tokenizer: chat.Tokenizer,
    *,
    row: int,
    max_length: int,
    over_length: str,
    mask_user_turns: bool = True,
) -> PairIds:
    """Token ids of a pair, of at most `max_length` for the prompt and either answer together.

    Prompt and answer are tokenised as one text, as the model will meet them. Where a token spans
    the boundary, or the two answers tokenise the prompt differently, the boundary moves back: no
    token is lost, and the prompt ids are a true prefix of both.

    Raises:
      ValueError: nothing would be scored, or it is too long, or the template refuses it.
    """
    rendered = chat.render(pair, tokenizer, mask_user_turns=mask_user_turns)
    plain = isinstance(pair.prompt, str)
    chosen, rejected = (_encode_text(text, tokenizer, plain=plain) for text in rendered)
    shared = _common(chosen.ids, rejected.ids)
    n = min(chosen.prompt, rejected.prompt, shared)
    if n == 0:
        raise ValueError("the prompt is empty")
    moved = chosen.straddles or rejected.straddles or n < max(chosen.prompt, rejected.prompt)
    ids = PairIds(
        row, chosen.ids[:n], chosen.ids[n:], rejected.ids[n:], chosen.scored[n:],
        rejected.scored[n:], boundary_moved=moved, truncated=False,
    )  # fmt: skip
    longest = n + max(len(ids.chosen), len(ids.rejected))
    if longest > max_length:
        if over_length == "drop":
            raise ValueError("longer than train_seq_len")
        room = max(max_length - n, 0)
        ids = ids._replace(
            chosen=ids.chosen[:room],
            rejected=ids.rejected[:room],
            chosen_scored=ids.chosen_scored[:room],
            rejected_scored=ids.rejected_scored[:room],
            truncated=True,
        )
    return _ended(ids)


class _Encoded(NamedTuple):
    ids: np.ndarray
    scored: np.ndarray
    prompt: int  # tokens that lie wholly in the prompt
    straddles: bool  # the token after them begins in the prompt


def _encode_text(text: chat.Rendered, tokenizer: chat.Tokenizer, *, plain: bool) -> _Encoded:
    """A template writes its own special tokens; plain text is given a first and a last one."""
    try:
        encoded = tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True)
    except (TypeError, UnicodeError) as error:  # half a surrogate pair
        raise ValueError("the text is not valid Unicode") from error
    ids = list(encoded.input_ids)
    begin, end = np.asarray(encoded.offset_mapping, np.int64).reshape(-1, 2).T
    scored = np.zeros(len(ids), bool)
    for start, stop in text.scored:
        scored |= (end > start) & (begin < stop)
    prompt = int(np.argmax(end > text.prompt_end)) if (end > text.prompt_end).any() else len(ids)
    straddles = prompt < len(ids) and bool(begin[prompt] < text.prompt_end)
    if plain:
        first = tokenizer("").input_ids[:1]  # the begin-of-text token, where the model has one
        first = [i for i in first if i == tokenizer.bos_token_id]
        ids = [*first, *ids, tokenizer.eos_token_id]
        scored = np.concatenate([np.zeros(len(first), bool), scored, [True]])
        prompt += len(first)
    return _Encoded(np.asarray(ids, np.int32), scored, prompt, straddles)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    shortest = min(len(a), len(b))
    differ = np.flatnonzero(a[:shortest] != b[:shortest])
    return int(differ[0]) if len(differ) else shortest


def _ended(ids: PairIds) -> PairIds:
    """Each answer up to its last scored token: nothing after it is seen by a score."""
    sides = {}
    for side, scored in (("chosen", ids.chosen_scored), ("rejected", ids.rejected_scored)):
        if not scored.any():
            raise ValueError("nothing to score is left" if ids.truncated else "nothing to score")
        stop = int(np.flatnonzero(scored)[-1]) + 1
        sides |= {side: getattr(ids, side)[:stop], f"{side}_scored": scored[:stop]}
    ids = ids._replace(**sides)
    if np.array_equal(ids.chosen, ids.rejected):
        raise ValueError("chosen equals rejected")
    return ids

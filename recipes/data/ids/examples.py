"""What a row becomes: token ids of a prompt and its answers, which are scored, and notes."""

from typing import NamedTuple

import numpy as np

from recipes.data.chats.pair import Worth


class Answer(NamedTuple):
    """One answer to a prompt."""

    ids: np.ndarray  # int32
    scored: np.ndarray  # bool, as long as `ids`


class PairIds(NamedTuple):
    """Token ids of a pair; both answers follow the same prompt, and their last token is scored."""

    row: int  # its number in the source
    prompt: np.ndarray  # int32, at least one
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_scored: np.ndarray  # bool, as long as `chosen`
    rejected_scored: np.ndarray
    notes: tuple[str, ...] = ()  # `described` says what they mean
    ratings: tuple[float, ...] | None = None  # of chosen and rejected, by the annotator
    worth: Worth = Worth()

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Chosen and rejected, in this order."""
        return Answer(self.chosen, self.chosen_scored), Answer(self.rejected, self.rejected_scored)


class AnswerIds(NamedTuple):
    """Token ids of a prompt and the single answer to it, whose last token is scored."""

    row: int  # its number in the source
    prompt: np.ndarray  # int32, at least one
    answer: np.ndarray
    scored: np.ndarray  # bool, as long as `answer`
    notes: tuple[str, ...] = ()
    ratings: tuple[float] | None = None  # 1: wanted, 0: unwanted; None if no loss needs it
    worth: Worth = Worth()

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The one answer, as a tuple."""
        return (Answer(self.answer, self.scored),)


class LabelledIds(NamedTuple):
    """Token ids of a prompt, the answer to it and, for comparison, an answer to another prompt."""

    row: int  # its number in the source
    prompt: np.ndarray  # int32, at least one
    answers: tuple[Answer, Answer]  # its own, and the one to another prompt
    ratings: tuple[float, float]  # 1 if its own is wanted, 0 if not; NaN for the other
    notes: tuple[str, ...] = ()
    worth: Worth = Worth()


class ListIds(NamedTuple):
    """Token ids of a prompt and several answers to it, from the best to the worst."""

    row: int  # its number in the source
    prompt: np.ndarray  # int32, at least one
    answers: tuple[Answer, ...]  # two or more; the last token of each is scored
    ranks: tuple[int, ...]  # of each, 0 the best; those that are ranked alike are not compared
    notes: tuple[str, ...] = ()
    ratings: tuple[float, ...] | None = None  # of each, by the annotator
    worth: Worth = Worth()


# What a row becomes, and what a run trains on: `prompt`, `answers` and `row` are all that packing
# reads.
Encoded = PairIds | AnswerIds | ListIds
Example = Encoded | LabelledIds

# Notes on pairs, or single answers, that are used.
NOTES = {
    "moved": "with a token that spans the end of the prompt (it counts as part of the answer)",
    "prompt_cut": "with a prompt cut from the left to fit train_seq_len",
    "answer_cut": "with an answer cut off at train_seq_len (its end is not scored)",
    "empty_turn": "with an empty turn",
    "wants_nothing": "with an empty chosen answer (the policy would learn to stop immediately)",
    "no_user_turn": "without a user turn in their prompt",
    "asks_twice": "with two user turns in a row (is a turn between them missing?)",
    "special": "containing special-token strings (encoded as special tokens)",
    "quiet": (
        "with turns that are marked as not to be trained (weight 0, train or loss false: they are "
        "not scored)"
    ),
    "no_id": (
        "containing what tokenizer_config.json calls special tokens, but no file of the tokenizer "
        "gives an id (encoded as words)"
    ),
    "other_format": (
        "with chat markup in their prompt (Human:, [INST], <|im_start|>, …) or at the end of an "
        "answer (</s>, …), around which the chat template is written again; "
        "--config.data.layout=plain_text takes texts as they are"
    ),
    "asks_again": "in which every answer begins with the question",
    "ignored": "with tools or template settings that the chat template ignores",
    "unscored": "whose chosen_score and rejected_score are not two numbers (both are ignored)",
    "tied": "with answers of equal rank (they are not compared with each other)",
    "unranked": "with answers that have no score or rank (those answers are left out)",
    "left_over": (
        "with more answers than --config.data.answers, in unknown order (some of the rejected ones "
        "are left out)"
    ),
    "said_again": "with identical answers (only the best one of them is used)",
}
UNREAD = "unread/"  # and a key of a message that nothing here reads
LEFT_OUT = "left_out/"  # and a key of a message that the chat template does not show


def called(example: Example, answers: int) -> tuple[str, ...]:
    """The names of the answers of examples like this one, if some have that many."""
    if isinstance(example, LabelledIds):
        return "answer", "other"
    names = {1: ("answer",), 2: ("chosen", "rejected")}
    return names.get(answers) or tuple(f"answer_{i}" for i in range(1, answers + 1))


def is_ranked(example: Example) -> bool:
    """Whether the first answer of an example is better than its last one."""
    return isinstance(example, PairIds | ListIds)


def ranks_of(example: Example) -> tuple[int, ...]:
    """The rank of each answer, where 0 is the best."""
    return example.ranks if isinstance(example, ListIds) else (0, 1)[: len(example.answers)]


def described(note: str) -> str:
    """The text of a note about a pair."""
    if note in NOTES:
        return NOTES[note]
    if note.startswith(UNREAD):
        return f"with `{note.removeprefix(UNREAD)}` in their messages, which is not read"
    key = note.removeprefix(LEFT_OUT)
    return (
        f"for which the chat template leaves out {'some text' if key == 'content' else f'`{key}`'}"
    )


def as_bytes(example: Example) -> bytes:
    """All that training sees of an example as bytes: equal for equal examples on any machine."""
    ratings = None if is_ranked(example) else example.ratings
    label = b"" if ratings is None else np.array(ratings[:1], "<i4").tobytes()
    worth = b"" if example.worth == Worth() else np.array(example.worth, "<f8").tobytes()
    return texts_as_bytes(example) + label + worth


def turned(pair: PairIds) -> PairIds:
    """The pair with the preference reversed."""
    return pair._replace(
        chosen=pair.rejected, rejected=pair.chosen,
        chosen_scored=pair.rejected_scored, rejected_scored=pair.chosen_scored,
    )  # fmt: skip


def texts_as_bytes(example: Example) -> bytes:
    """The tokens and masks of an example: equal if a model gives the same log-probabilities."""
    answers = example.answers
    parts = example.prompt, *(answer.ids for answer in answers)
    sized = (len(array).to_bytes(8) + array.astype("<i4").tobytes() for array in parts)
    ranked = isinstance(example, ListIds)
    ranks = np.array([len(answers), *ranks_of(example)] if ranked else [], "<i4").tobytes()
    return b"".join([ranks, *sized, *(answer.scored.tobytes() for answer in answers)])

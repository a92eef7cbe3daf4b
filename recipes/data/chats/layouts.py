"""One function per dataset layout, from a raw row to a `Pair` or a prompt with a single answer."""

from collections.abc import Callable
from typing import NamedTuple

from checkpoints_io.errors import BadInput
from recipes.data.chats import columns, conversation, forming, messages, ranked, transcripts
from recipes.data.chats.pair import Pair

Row = dict[str, object]


def preference_chat(row: Row) -> Pair:
    """Columns `chosen` and `rejected`: two whole conversations, lists of `{role, content}`.

    Their common beginning is the prompt, assistant turns included. A column `prompt` is not read:
    in UltraFeedback it repeats the first message.

    Raises:
      ValueError: a column is missing or malformed, or the two are equal.
    """
    both = [messages.read(row.get(name), name) for name in ("chosen", "rejected")]
    asks = [any(turn["role"] == "user" for turn in turns) for turns in both]
    if asks[0] != asks[1]:
        raise BadInput("one of `chosen` and `rejected` has user turns, but the other has none")
    return forming.forked(row, *both)


def whole_conversation(row: Row) -> Pair:
    """Column `messages`: a conversation that ends with an answer, for supervised fine-tuning.

    The prompt is what comes before the assistant's first turn.

    Raises:
      ValueError: the column is missing or malformed, or does not end with an answer.
    """
    return forming.single(row, [], messages.read(row.get("messages"), "messages"), "messages")


def sharegpt_conversation(row: Row) -> Pair:
    """Column `conversations`: a conversation that ends with an answer, `{from, value}`.

    Raises:
      ValueError: the column is missing or malformed, or does not end with an answer.
    """
    turns = messages.read(row.get("conversations"), "conversations")
    return forming.single(row, [], turns, "conversations")


def prompt_answer(row: Row) -> Pair:
    """Columns `prompt` and `answer`: messages, or strings that become one turn each.

    This is for supervised fine-tuning, like the next two.

    Raises:
      ValueError: a column is missing or malformed.
    """
    prompt = messages.read(row.get("prompt"), "prompt", role="user")
    prompt = conversation.history(row.get("history")) + prompt
    turns = conversation.continued(prompt, row.get("answer"), "answer")
    return forming.single(row, prompt, turns, "answer")


def instruction_answer(row: Row) -> Pair:
    """Columns `instruction`, `answer`, and `input`, which follows on a line of its own.

    Raises:
      ValueError: a column is missing or not text.
    """
    prompt = forming.instructed(row)
    turns = conversation.continued(prompt, row.get("answer"), "answer")
    return forming.single(row, prompt, turns, "answer")


def plain_answer(row: Row) -> Pair:
    """Columns `prompt` and `answer`: strings used unchanged, without a chat template.

    Raises:
      ValueError: a column is missing or not text.
    """
    prompt, answer = (messages.text(row.get(name), name) for name in ("prompt", "answer"))
    forming.refuse_beside_plain(row)
    return Pair(prompt, answer, None, *forming.besides(row), forming.label(row))


def prompt_chosen_rejected(row: Row, answers: int = 2) -> Pair:
    """Columns `prompt`, `chosen`, `rejected`: messages, or strings that become one turn each.

    In this layout and the next four `rejected` may be a list of answers in unknown order.

    Raises:
      ValueError: a column is missing or malformed, or the answers are equal.
    """
    return forming.answered(row, forming.prompted(row), answers=answers)


def messages_so_far(row: Row, answers: int = 2) -> Pair:
    """Column `messages`: the messages so far; `chosen` and `rejected` answer.

    Raises:
      ValueError: a column is missing or malformed, or the answers are equal.
    """
    return forming.answered(row, messages.read(row.get("messages"), "messages"), answers=answers)


def sharegpt(row: Row, answers: int = 2) -> Pair:
    """Column `conversations`: the messages so far, `{from, value}`; `chosen` and `rejected` answer.

    Raises:
      ValueError: a column is missing or malformed, or the answers are equal.
    """
    prompt = messages.read(row.get("conversations"), "conversations")
    return forming.answered(row, prompt, answers=answers)


def instruction(row: Row, answers: int = 2) -> Pair:
    """Columns `instruction`, `chosen`, `rejected`, and `input`, which follows on a line of its own.

    `history` is what was said before: pairs of a question and its answer, or messages.

    Raises:
      ValueError: a column is missing or not text, or the answers are equal.
    """
    return forming.answered(row, forming.instructed(row), answers=answers)


def orca(row: Row, answers: int = 2) -> Pair:
    """Columns `system`, `question`, `chosen`, `rejected`, as in Intel's orca_dpo_pairs.

    Raises:
      ValueError: a column is missing or malformed, or the answers are equal.
    """
    prompt = messages.read(row.get("question"), "question", role="user")
    return forming.answered(row, prompt, answers=answers)


def openai_preference(row: Row) -> Pair:
    """Columns `input` (`messages`, `tools`), `preferred_output`, `non_preferred_output`.

    Raises:
      ValueError: a column is missing or malformed, or the answers are equal.
    """
    given = messages.parsed(row.get("input"))
    if not isinstance(given, dict):
        raise BadInput("no object with `messages` in `input`")
    if tools := given.get("tools") or given.get("functions"):  # the latter is its older name
        row = {**row, "tools": tools}
    prompt = messages.read(given.get("messages"), "input.messages")
    return forming.answered(row, prompt, "preferred_output", "non_preferred_output")


def swift(row: Row) -> Pair:
    """Columns `messages`, a whole conversation, and `rejected_response` or `rejected_messages`.

    As in ms-swift, a rejected answer replaces the last turn, a conversation all of them.

    Raises:
      ValueError: a column is missing or malformed, or the answers are equal.
    """
    chosen = messages.read(row.get("messages"), "messages")
    if chosen[-1]["role"] != "assistant":
        raise BadInput(
            "the last message in `messages` is not the assistant's: there is no chosen answer"
        )
    name = "rejected_messages" if row.get("rejected_messages") is not None else "rejected_response"
    rejected = messages.read(row.get(name), name, role="assistant")
    whole = rejected[0]["role"] != "assistant"
    return forming.forked(row, chosen, rejected if whole else chosen[:-1] + rejected)


def best_and_worst(row: Row, answers: int = 2) -> Pair:
    """Columns `completions` or `answers`: answers with a score or rank; the best against the worst.

    This is as in UltraFeedback, Nectar and NeMo RL. The question is `context`, `instruction` or
    `prompt`. With more than two `answers`, those between the best and the worst are used as well.

    Raises:
      ValueError: a column is missing or malformed, or all answers are ranked alike.
    """
    found = ranked.best_to_worst(row, answers)
    names = [found.name] * len(found.answers)
    pair = forming.listed(row, forming.asked(row), found.answers, found.ranks, names)
    return pair._replace(ratings=found.scores or pair.ratings, notes=found.notes)


def compared(row: Row) -> Pair:
    """Columns `context`, `response1`, `response2`, `overall_preference`, as in HelpSteer3.

    Raises:
      ValueError: a column is missing or malformed, or neither response is preferred.
    """
    better, worse = ranked.preferred(row)
    return forming.answered(row, forming.asked(row), better, worse)


def hh(row: Row) -> Pair:
    r"""Columns `chosen` and `rejected`: transcripts with `\n\nHuman:` and `\n\nAssistant:`.

    This is as in Anthropic's hh-rlhf. White space around each turn is not part of it.

    Raises:
      ValueError: a column is missing or not such a transcript, or the two are equal.
    """
    return forming.forked(
        row, *(forming.transcript(row.get(name), name) for name in ("chosen", "rejected"))
    )


def plain_text(row: Row) -> Pair:
    """Columns `prompt`, `chosen`, `rejected`: strings used unchanged, without a chat template.

    Raises:
      ValueError: a column is missing or not text, or the answers are equal.
    """
    names = ("prompt", "chosen", "rejected")
    return forming.plain(row, *(messages.text(row.get(name), name) for name in names))


def plain_transcripts(row: Row) -> Pair:
    """Columns `chosen` and `rejected`: whole texts, whose common beginning is the prompt.

    The prompt ends before the white space in front of the first differing word, never inside one.

    Raises:
      ValueError: a column is missing or not text, or the two are equal.
    """
    chosen, rejected = (messages.text(row.get(name), name) for name in ("chosen", "rejected"))
    end = transcripts.shared(chosen, rejected)
    return forming.plain(row, chosen[:end], chosen[end:], rejected[end:])


class Layout(NamedTuple):
    """How rows of one kind are read."""

    read: Callable[..., Pair]
    columns: frozenset[str]
    single: bool = False  # a row holds one answer, not two
    lists: bool = False  # a row may hold several: `read` takes their maximum


# Reasons to drop sound rows without a preference: they do not count as malformed.
SAYS_NOTHING = (forming.EQUAL, ranked.TIE, ranked.NO_PREFERENCE, forming.UNWANTED)


def _layout(
    read: Callable[[Row], Pair],
    asked: str,
    answers: str = "chosen rejected",
    *,
    single: bool = False,
    lists: bool = False,
) -> Layout:
    besides = forming.BESIDES + (forming.LABEL if single else forming.RATINGS)
    return Layout(read, frozenset([*asked.split(), *answers.split(), *besides]), single, lists)


LAYOUTS: dict[str, Layout] = {
    "preference_chat": _layout(preference_chat, ""),
    "prompt_chosen_rejected": _layout(prompt_chosen_rejected, "prompt history", lists=True),
    "messages": _layout(messages_so_far, "messages", lists=True),
    "sharegpt": _layout(sharegpt, "conversations", lists=True),
    "instruction": _layout(instruction, "instruction input history", lists=True),
    "orca": _layout(orca, "question", lists=True),
    "openai_preference": _layout(
        openai_preference, "input", "preferred_output non_preferred_output"
    ),
    "swift": _layout(swift, "messages", "rejected_response rejected_messages"),
    "best_and_worst": _layout(
        best_and_worst,
        " ".join(ranked.ASKED),
        " ".join((*ranked.ANSWERS, *ranked.LISTS)),
        lists=True,
    ),
    "compared": _layout(compared, " ".join(ranked.ASKED), "response1 response2 overall_preference"),
    "hh": _layout(hh, ""),
    "plain_text": _layout(plain_text, "prompt"),
    "plain_transcripts": _layout(plain_transcripts, ""),
    "conversation": _layout(whole_conversation, "messages", "", single=True),
    "sharegpt_conversation": _layout(sharegpt_conversation, "conversations", "", single=True),
    "prompt_answer": _layout(prompt_answer, "prompt history", "answer", single=True),
    "instruction_answer": _layout(
        instruction_answer, "instruction input history", "answer", single=True
    ),
    "plain_answer": _layout(plain_answer, "prompt", "answer", single=True),
}
PLAIN = ("plain_text", "plain_transcripts", "plain_answer")


def read(layout: str, row: Row, answers: int = 2) -> Pair:
    """The pair in a row of this layout, or the list of at most `answers` answers.

    Raises:
      ValueError: the row holds none.
    """
    found = LAYOUTS[layout]
    return found.read(row, answers) if found.lists else found.read(row)


def named(*, single: bool) -> dict[str, Layout]:
    """The layouts of pairs, or those of single answers."""
    return {name: layout for name, layout in LAYOUTS.items() if layout.single == single}


def columns_of(*, single: bool) -> frozenset[str]:
    """The columns that any layout of pairs, or of single answers, reads."""
    found = frozenset().union(*(layout.columns for layout in named(single=single).values()))
    return found if single else found | {*columns.WORTH}


def wanted(called: dict[str, str], *, single: bool) -> frozenset[str]:
    """The columns that any layout might read or check, by the dataset's names.

    `called` are the names that the user gives.
    """
    answers = frozenset(columns.SINGLE_ANSWERS) if single else frozenset().union(*columns.ANSWERS)
    others = (
        columns.LIKE_QUESTIONS
        | columns.LIKE_TOOLS
        | columns.LIKE_MEDIA
        | {*columns.ALSO, *called.values()}
    )
    others |= {"chosen", "rejected", "output"}  # errors mention these
    return columns_of(single=single) | answers | others

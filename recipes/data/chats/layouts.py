"""One function per dataset layout: a raw row in, a `Pair` out, or a prompt with a single answer."""

from collections.abc import Callable, Iterable, Mapping
import json
import math
from typing import Any, NamedTuple

from checkpoints_io.errors import BadInput
from recipes.data.chats import columns, conversation, messages, ranked, transcripts
from recipes.data.chats.messages import Turns

Row = dict[str, object]


class Worth(NamedTuple):
    """How the loss takes a pair, by the data."""

    weight: float = 1.0  # its loss is multiplied by it
    margin: float = 0.0  # by how much the chosen reward must exceed the rejected one, in nats


class Pair(NamedTuple):
    """Two answers to one prompt, of which `chosen` was preferred; or `chosen` is the only one.

    Or a list of more, from the best to the worst. All are lists of messages, to be rendered by a
    chat template, or all are plain text.
    """

    prompt: Turns | str
    chosen: Turns | str
    rejected: Turns | str | None
    tools: list | None = None  # tools, as the template is given them

    template_kwargs: dict[str, object] = {}  # noqa: RUF012, never changed
    ratings: tuple[float, ...] | None = None  # of each answer; of one alone 1: wanted, 0: unwanted
    prefill: str = ""  # the end of the prompt, with which all answers begin
    more: tuple[Turns | str, ...] = ()  # of a list: those that are no better than `rejected`
    ranks: tuple[int, ...] | None = None  # of a list: of each, 0 the best; equal ones are no pair
    notes: tuple[str, ...] = ()  # on its ranks: `pair_ids.NOTES` says what they mean
    worth: Worth = Worth()

    @property
    def answers(self) -> tuple[Turns | str, ...]:
        """Chosen, rejected and the others of a list, or the one there is."""
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected, *self.more)


def preference_chat(row: Row) -> Pair:
    """Columns `chosen` and `rejected`: two whole conversations, lists of `{role, content}`.

    What both begin with is the prompt, assistant turns included. A column `prompt` is not read:
    in UltraFeedback it repeats the first message.

    Raises:
      ValueError: a column is missing or malformed, or the two are equal.
    """
    both = [messages.read(row.get(name), name) for name in ("chosen", "rejected")]
    asks = [any(turn["role"] == "user" for turn in turns) for turns in both]
    if asks[0] != asks[1]:
        raise BadInput("one of `chosen` and `rejected` asks something, and the other only answers")
    return _forked(row, *both)


def whole_conversation(row: Row) -> Pair:
    """Column `messages`: a conversation that ends with an answer. For supervised fine-tuning.

    The prompt is what comes before the assistant's first turn.

    Raises:
      ValueError: the column is missing or malformed, or does not end with an answer.
    """
    return _single(row, [], messages.read(row.get("messages"), "messages"), "messages")


def sharegpt_conversation(row: Row) -> Pair:
    """Column `conversations`: the same, `{from, value}`.

    Raises:
      ValueError: the column is missing or malformed, or does not end with an answer.
    """
    turns = messages.read(row.get("conversations"), "conversations")
    return _single(row, [], turns, "conversations")


def prompt_answer(row: Row) -> Pair:
    """Columns `prompt` and `answer`: messages, or strings that become one turn each.

    For supervised fine-tuning, as the next two.

    Raises:
      ValueError: a column is missing or malformed.
    """
    prompt = messages.read(row.get("prompt"), "prompt", role="user")
    prompt = conversation.history(row.get("history")) + prompt
    turns = conversation.continued(prompt, row.get("answer"), "answer")
    return _single(row, prompt, turns, "answer")


def instruction_answer(row: Row) -> Pair:
    """Columns `instruction`, `answer`, and `input`, which follows on a line of its own.

    Raises:
      ValueError: a column is missing or not text.
    """
    prompt = _instructed(row)
    turns = conversation.continued(prompt, row.get("answer"), "answer")
    return _single(row, prompt, turns, "answer")


def plain_answer(row: Row) -> Pair:
    """Columns `prompt` and `answer`: strings taken as they are, without a chat template.

    Raises:
      ValueError: a column is missing or not text.
    """
    prompt, answer = (messages.text(row.get(name), name) for name in ("prompt", "answer"))
    _refuse_beside_plain(row)
    return Pair(prompt, answer, None, *_besides(row), _label(row))


def prompt_chosen_rejected(row: Row, answers: int = 2) -> Pair:
    """Columns `prompt`, `chosen`, `rejected`: messages, or strings that become one turn each.

    In this layout and the next four `rejected` may be a list of answers, in no order that is known.

    Raises:
      ValueError: a column is missing or malformed, or the answers are equal.
    """
    return _answered(row, _prompted(row), answers=answers)


def messages_so_far(row: Row, answers: int = 2) -> Pair:
    """Column `messages`: the messages so far; `chosen` and `rejected` answer.

    Raises:
      ValueError: a column is missing or malformed, or the answers are equal.
    """
    return _answered(row, messages.read(row.get("messages"), "messages"), answers=answers)


def sharegpt(row: Row, answers: int = 2) -> Pair:
    """Column `conversations`: the messages so far, `{from, value}`; `chosen` and `rejected` answer.

    Raises:
      ValueError: a column is missing or malformed, or the answers are equal.
    """
    prompt = messages.read(row.get("conversations"), "conversations")
    return _answered(row, prompt, answers=answers)


def instruction(row: Row, answers: int = 2) -> Pair:
    """Columns `instruction`, `chosen`, `rejected`, and `input`, which follows on a line of its own.

    `history` is what was said before: pairs of a question and its answer, or messages.

    Raises:
      ValueError: a column is missing or not text, or the answers are equal.
    """
    return _answered(row, _instructed(row), answers=answers)


def orca(row: Row, answers: int = 2) -> Pair:
    """Columns `system`, `question`, `chosen`, `rejected`, as in Intel's orca_dpo_pairs.

    Raises:
      ValueError: a column is missing or malformed, or the answers are equal.
    """
    prompt = messages.read(row.get("question"), "question", role="user")
    return _answered(row, prompt, answers=answers)


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
    return _answered(row, prompt, "preferred_output", "non_preferred_output")


def swift(row: Row) -> Pair:
    """Columns `messages`, a whole conversation, and `rejected_response` or `rejected_messages`.

    As in ms-swift: an answer takes the place of the last turn, a conversation that of all.

    Raises:
      ValueError: a column is missing or malformed, or the answers are equal.
    """
    chosen = messages.read(row.get("messages"), "messages")
    if chosen[-1]["role"] != "assistant":
        raise BadInput("the last of `messages` is not the assistant's: there is no chosen answer")
    name = "rejected_messages" if row.get("rejected_messages") is not None else "rejected_response"
    rejected = messages.read(row.get(name), name, role="assistant")
    whole = rejected[0]["role"] != "assistant"
    return _forked(row, chosen, rejected if whole else chosen[:-1] + rejected)


def best_and_worst(row: Row, answers: int = 2) -> Pair:
    """Columns `completions` or `answers`: answers with a score or rank; the best against the worst.

    As in UltraFeedback, Nectar and NeMo RL. The question is `context`, `instruction` or `prompt`.
    With more `answers`, those between as well.

    Raises:
      ValueError: a column is missing or malformed, or all answers are ranked alike.
    """
    found = ranked.best_to_worst(row, answers)
    pair = _listed(found.row, _prompted(found.row), found.answers, found.ranks)
    return pair._replace(ratings=found.scores or pair.ratings, notes=found.notes)


def compared(row: Row) -> Pair:
    """Columns `context`, `response1`, `response2`, `overall_preference`, as in HelpSteer3.

    Raises:
      ValueError: a column is missing or malformed, or neither response is preferred.
    """
    return prompt_chosen_rejected(ranked.preferred(row))


def hh(row: Row) -> Pair:
    r"""Columns `chosen` and `rejected`: transcripts with `\n\nHuman:` and `\n\nAssistant:`.

    As in Anthropic's hh-rlhf. White space around what is said is not part of it.

    Raises:
      ValueError: a column is missing or no such transcript, or the two are equal.
    """
    return _forked(row, *(_transcript(row.get(name), name) for name in ("chosen", "rejected")))


def plain_text(row: Row) -> Pair:
    """Columns `prompt`, `chosen`, `rejected`: strings taken as they are, without a chat template.

    Raises:
      ValueError: a column is missing or not text, or the answers are equal.
    """
    names = ("prompt", "chosen", "rejected")
    return _plain(row, *(messages.text(row.get(name), name) for name in names))


def plain_transcripts(row: Row) -> Pair:
    """Columns `chosen` and `rejected`: whole texts. The prompt is what both begin with.

    It ends before the white space that leads into the first differing word, never inside one.

    Raises:
      ValueError: a column is missing or not text, or the two are equal.
    """
    chosen, rejected = (messages.text(row.get(name), name) for name in ("chosen", "rejected"))
    end = transcripts.shared(chosen, rejected)
    return _plain(row, chosen[:end], chosen[end:], rejected[end:])


class Layout(NamedTuple):
    """How rows of one kind are read."""

    read: Callable[..., Pair]
    columns: frozenset[str]
    single: bool = False  # a row holds one answer, not two
    lists: bool = False  # or several: `read` takes the most that are wanted


# Columns that any layout reads, where a row has them; and those that any layout of pairs does.
BESIDES = ("system_prompt", "tools", "chat_template_kwargs")
RATINGS = ("chosen_score", "rejected_score")
LABEL = ("label",)  # of single answers: whether it is wanted
# Template settings that a row may not give: the rest of the row and the recipe do.
TAKEN = ("messages", "tools", "documents", "add_generation_prompt")
# Reasons to drop sound rows without a preference: they do not count as malformed.
EQUAL = "chosen equals rejected"
UNWANTED = "its `label` is false: the answer is not wanted"
SAYS_NOTHING = (EQUAL, ranked.TIE, ranked.NO_PREFERENCE, UNWANTED)


def _layout(
    read: Callable[[Row], Pair],
    asked: str,
    answers: str = "chosen rejected",
    *,
    single: bool = False,
    lists: bool = False,
) -> Layout:
    besides = BESIDES + (LABEL if single else RATINGS)
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
    """The pair in a row of this layout, or the list of at most so many answers.

    Raises:
      ValueError: there is none.
    """
    found = LAYOUTS[layout]
    return found.read(row, answers) if found.lists else found.read(row)


def named(*, single: bool) -> dict[str, Layout]:
    """The layouts of pairs, or those of single answers."""
    return {name: layout for name, layout in LAYOUTS.items() if layout.single == single}


def columns_of(*, single: bool) -> frozenset[str]:
    """The columns that any of them reads."""
    found = frozenset().union(*(layout.columns for layout in named(single=single).values()))
    return found if single else found | {*columns.WORTH}


def wanted(called: dict[str, str], *, single: bool) -> frozenset[str]:
    """The columns that any layout might read, or look at, by the names that the dataset gives them.

    `called` are those that the user gives.
    """
    answers = columns.SINGLE_ANSWERS if single else frozenset().union(*columns.ANSWERS)
    others = columns.LIKE_QUESTIONS | columns.LIKE_TOOLS | {*columns.ALSO, *called.values()}
    others |= {"chosen", "rejected", "output"}  # which an error names
    return columns_of(single=single) | answers | others


def worth(row: Row, named: Mapping[str, str]) -> Worth:
    """Of a pair, from a row as the dataset has it; `named` gives its names for our columns.

    Raises:
      ValueError: one holds no number, or the weight is below 0.
    """
    found = {}
    for name in columns.WORTH:
        if name in named:
            found[name] = _number(row.get(named[name]))
            if not math.isfinite(found[name]):
                raise BadInput(f"no number in `{named[name]}`, the {name} of the pair")
    if found.get("weight", 0.0) < 0:
        raise BadInput(f"a number below 0 in `{named['weight']}`, the weight of the pair")
    return Worth(**found)


def check_label(row: Row, pair: Pair, *, labelled: bool, named: bool) -> None:
    """Refuses an answer without a label where each needs one, and unwanted ones where none does.

    A number in a column that is not `named` for it may be the class of something else.

    Raises:
      ValueError: it is one of these.
    """
    if not labelled:
        is_number = isinstance(row.get("label"), int | float) and row["label"] is not False
        if pair.ratings == (0.0,) and (named or not is_number):
            raise BadInput(UNWANTED)
    elif pair.ratings is None:
        raise BadInput(
            f"no `label`, which says whether the answer is wanted; if it has another name: "
            f"{columns.flag({'label': 'liked'})}"
        )
    elif math.isnan(pair.ratings[0]):
        raise BadInput("`label` is neither true nor false")


def asked(pair: Pair) -> str:
    """Everything in a pair that the assistant did not say."""
    if isinstance(pair.prompt, str) or isinstance(pair.chosen, str):
        return str(pair.prompt)
    said = [*pair.prompt, *pair.chosen]
    return "\n".join(m["content"] for m in said if m["role"] != "assistant")


def has_empty_turn(pair: Pair) -> bool:
    """Is a turn, or a plain answer, empty?"""
    if isinstance(pair.prompt, str):
        return any(isinstance(answer, str) and not answer.strip() for answer in pair.answers)
    turns = (turn for part in (pair.prompt, *pair.answers) for turn in part)
    return any(not isinstance(turn, str) and messages.is_blank(turn) for turn in turns)


def shares_no_user_turn(pair: Pair) -> bool:
    """Do the two conversations differ before anything was asked?"""
    return not isinstance(pair.prompt, str) and not any(m["role"] == "user" for m in pair.prompt)


def texts(pair: Pair) -> Iterable[str]:
    """All texts in it."""
    for part in (pair.prompt, *pair.answers):
        if isinstance(part, str):
            yield part
        else:
            yield from (message["content"] for message in part)


def _prompted(row: Row) -> Turns:
    prompt = messages.read(row.get("prompt"), "prompt", role="user")
    return conversation.history(row.get("history")) + prompt


def _answered(
    row: Row, prompt: Turns, chosen: str = "chosen", rejected: str = "rejected", answers: int = 2
) -> Pair:
    """The chosen answer and the rejected one, or the list of them, all of which are worse."""
    others = row.get(rejected)
    if isinstance(others, list) and others and _are_answers(others):
        kept = ranked.at_most([row.get(chosen), *others], answers)
        pair = _listed(row, prompt, kept, (0, *(1 for _ in kept[1:])))
        return pair._replace(notes=("left_over",) if len(kept) <= len(others) else ())
    return _forked(
        row, *(conversation.continued(prompt, row.get(name), name) for name in (chosen, rejected))
    )


def _are_answers(held: list) -> bool:
    """Is it a list of answers, texts or lists of messages? One of messages is a single answer."""
    return any(all(isinstance(one, kind) for one in held) for kind in (str, list))


def _listed(row: Row, prompt: Turns, said: list[object], ranks: tuple[int, ...]) -> Pair:
    """The pair, or list, of answers from the best to the worst."""
    named = zip(said, ("chosen", *("rejected" for _ in said[1:])), strict=True)
    pair = _forked(row, *(conversation.continued(prompt, one, name) for one, name in named))
    if not pair.more:
        return pair
    return pair._replace(ranks=ranks, ratings=None)  # its columns say what two are worth


def _forked(row: Row, *conversations: Turns) -> Pair:
    first, *others = _with_system_prompt(row, *conversations)
    if all(other == first for other in others):
        raise BadInput(EQUAL)
    shortest = min(map(len, (first, *others)))
    fork = 0
    while fork < shortest and all(other[fork] == first[fork] for other in others):
        fork += 1
    if fork == shortest:
        raise BadInput("one conversation is only the beginning of the other")
    prompt, (chosen, rejected, *more) = first[:fork], [turns[fork:] for turns in (first, *others)]
    begun, prefill = prompt[-1] if prompt else None, ""
    if begun and all(conversation.goes_on(begun, one[0]) for one in (chosen, rejected, *more)):
        prompt, prefill = prompt[:-1], begun["content"]
    return Pair(prompt, chosen, rejected, *_besides(row), _ratings(row), prefill, tuple(more))


def _with_system_prompt(row: Row, *conversations: Turns) -> list[Turns]:
    """With the system prompt of the column; it may stand in both places."""
    if not row.get("system_prompt"):
        return [*conversations]
    system = {"role": "system", "content": messages.text(row["system_prompt"], "system_prompt")}
    first = [turns[0] for turns in conversations]
    if all(turn == system for turn in first):
        return [*conversations]
    if "system" in (turn["role"] for turn in first):
        raise BadInput("a system prompt in its column, and another among the messages")
    return [[system, *turns] for turns in conversations]


def _instructed(row: Row) -> Turns:
    asked = messages.text(row.get("instruction"), "instruction")
    if row.get("input"):
        asked += "\n" + messages.text(row["input"], "input")
    return [*conversation.history(row.get("history")), {"role": "user", "content": asked}]


def _single(row: Row, prompt: Turns, turns: Turns, name: str) -> Pair:
    """A conversation that ends with an answer; without a prompt, that is what comes before any."""
    if turns[-1]["role"] != "assistant":
        raise BadInput(f"the last of `{name}` is not the assistant's: there is no answer")
    begins = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    if prompt and turns[: len(prompt)] == prompt:
        begins = len(prompt)
    answer, before = turns[begins:], len(turns) - begins
    (turns,) = _with_system_prompt(row, turns)
    prompt = turns[: len(turns) - before]
    if prompt and conversation.goes_on(prompt[-1], answer[0]):
        begun = prompt[-1]["content"]
        return Pair(prompt[:-1], answer, None, *_besides(row), _label(row), prefill=begun)
    return Pair(prompt, answer, None, *_besides(row), _label(row))


def _plain(row: Row, prompt: str, chosen: str, rejected: str) -> Pair:
    if chosen == rejected:
        raise BadInput(EQUAL)
    _refuse_beside_plain(row)
    return Pair(prompt, chosen, rejected, *_besides(row), _ratings(row))


def _refuse_beside_plain(row: Row) -> None:
    for name in BESIDES:
        if row.get(name):
            raise BadInput(f"plain text has no place for `{name}`")


def _besides(row: Row) -> tuple[list | None, dict[str, object]]:
    tools = _parsed(row.get("tools"), "tools") or None
    if isinstance(tools, list):  # each may be written as text, so that all have one type
        written = lambda tool: isinstance(tool, str) and tool.lstrip().startswith("{")
        tools = [_parsed(tool, "tools") if written(tool) else tool for tool in tools]
    kwargs = _parsed(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    listed = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    if tools is not None and not listed:
        raise BadInput("`tools` is not a list of descriptions")
    if not isinstance(kwargs, dict):
        raise BadInput("`chat_template_kwargs` is not an object")
    if taken := sorted(name for name in kwargs if name in TAKEN or name.endswith("_token")):
        raise BadInput(f"`chat_template_kwargs` may not say `{taken[0][:40]}`")
    for name, value in (("tools", tools), ("chat_template_kwargs", kwargs)):
        if value:
            messages.check_data(value, name)
    return tools, kwargs


def _ratings(row: Row) -> tuple[float, float] | None:
    """Of both answers, NaN for what is not a number; None where the row has none."""
    chosen, rejected = (row.get(name) for name in RATINGS)
    return None if chosen is rejected is None else (_number(chosen), _number(rejected))


def _label(row: Row) -> tuple[float] | None:
    """1 where the answer is wanted, 0 where it is not, NaN for what is no label."""
    said = row.get("label")
    if said is None:
        return None
    known = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}
    return (known.get(str(said).strip().lower(), math.nan),)


def _number(value: Any) -> float:
    try:
        return float(value)  # also of text: cells of CSV are
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _parsed(value: object, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        found = messages.parsed(value)  # as pandas writes it
        if found is value:
            raise BadInput(f"`{name}` is not valid JSON") from error
        return found


def _transcript(value: object, name: str) -> Turns:
    said = transcripts.turns(messages.text(value, name))
    if not said:
        raise BadInput(f"`{name}` is not a transcript that begins with Human: or Assistant:")
    if odd := conversation.odd(said):
        raise BadInput(f"roles out of order: {odd}")
    return said

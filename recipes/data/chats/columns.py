"""Recognises the columns of unknown tables by name: those of the question and of the answers.

No layout is guessed that would leave a question unread, and if columns are missing, the error names
those that exist.
"""

from collections.abc import Iterable
import math
import re

from checkpoints_io.errors import BadInput
from recipes.data.chats import messages, ranked, transcripts
from recipes.data.rows import records

Row = dict[str, object]

# Other names that well-known datasets use for our columns.
ALSO = {
    "score_chosen": "chosen_score",
    "score_rejected": "rejected_score",
    "kto_tag": "label",
    "system": "system_prompt",
    "system_message": "system_prompt",
}
NUMBERS = ("chosen_score", "rejected_score", "overall_preference")
# Columns of pairs that are read only if they are named, whatever else they are read as: in many
# datasets columns of these names mean something else.
WORTH = ("weight", "margin")
# The same for the answers, which are renamed together or not at all.
ANSWERS = (
    *((f"chosen_{what}", f"rejected_{what}") for what in messages.ANSWER_WORDS),
    *((f"{what}_chosen", f"{what}_rejected") for what in messages.ANSWER_WORDS),
    ("response", "rejected_response"),
)
# Names of columns that hold one part of a question among others, or the system prompt.
PARTS = (
    "developer", "developer_message", "developer_prompt", "initial_reason_steps", "options",
    "system", "system_instruction", "system_instructions", "system_message", "system_msg",
    "system_prompt",
)  # fmt: skip
# Names of columns that hold a question, or a part of it; see LIKE_QUESTIONS.
QUESTIONS = (
    *PARTS, "article", "chat", "chat_history", "contents", "context", "context_messages",
    "conversation", "conversation_history", "conversations", "dialog", "dialog_history", "dialogue",
    "dialogue_history", "document", "full_prompt", "history", "human_message", "human_prompt",
    "input", "input_messages", "input_text", "inputs", "instruction", "instructions", "message",
    "message_history", "messages", "passage", "past_messages", "post", "previous_messages",
    "previous_turns", "prior_messages", "problem", "problem_statement", "prompt",
    "prompt_messages", "prompt_text", "prompts", "query", "queries", "question", "question_text",
    "questions", "raw_prompt", "request", "source_text", "task_description", "trajectory", "turns",
    "user_input", "user_message", "user_msg", "user_prompt", "user_query", "user_question",
)  # fmt: skip


def _spellings(name: str) -> set[str]:
    """The usual spellings of a name: `user_prompt`, `USER_PROMPT`, `User Prompt`, `userPrompt`."""
    names = {name, name.replace("_", " "), name.replace("_", "-")}
    joined = name.title().replace("_", "")
    names |= {joined, joined[0].lower() + joined[1:]}
    return names | {way(one) for one in names for way in (str.upper, str.title, str.capitalize)}


LIKE_QUESTIONS = frozenset().union(*map(_spellings, QUESTIONS))
LIKE_PARTS = frozenset().union(*map(_spellings, PARTS))
TOOLS = (
    "available_functions", "available_tools", "function_definitions", "functions",
    "tool_definitions", "tool_list", "tool_schemas", "tools", "tools_list",
)  # fmt: skip
LIKE_TOOLS = frozenset().union(*map(_spellings, TOOLS))
LIKE_MEDIA = frozenset().union(*map(_spellings, records.MEDIA))
# Keys of an object that holds a question.
SPOKEN = LIKE_QUESTIONS - _spellings("options") | {"human", "user"}
# What decides the layout, in this order: a column besides `chosen` and `rejected`, or without them.
ASKED = {
    "conversations": "sharegpt",
    "instruction": "instruction",
    "prompt": "prompt_chosen_rejected",
    "messages": "messages",
}
WITHOUT_CHOSEN = {
    ("preferred_output", "non_preferred_output"): "openai_preference",
    ("messages", "rejected_response"): "swift",
    ("messages", "rejected_messages"): "swift",
    ("response1", "response2", "overall_preference"): "compared",
    **dict.fromkeys(((name,) for name in ranked.ANSWERS), "best_and_worst"),
}
PLAIN = "plain_transcripts"  # the only layout of whole texts that is guessed
# Words in the name of the better answer, and of the worse; what an answer is not.
BETTER = r"chosen|prefer(red|able)?|better|best|accept\w*|win|winner|winning|won|positive|good"
WORSE = (
    r"reject\w*|(dis|un|non)prefer\w*|dispref\w*|worse|worst|lose|loser|losing|lost|negative|bad"
)
NO_ANSWER = r"scores?|ratings?|rank|models?|rewards?|log\w*|ids?|len\w*|tokens?|counts?"
# Names of the one answer of a row; the first that is there counts.
SINGLE_ANSWERS = ("answer", "assistant", "completion", "output", "response", "target")
# Other names that it may have; then it must be named.
REPLIES = ("answers", "reply", "solution", "completions", "responses", "bot", "gpt", "model",
           "summary", "highlights", "generation", "generated_text", "output_text")  # fmt: skip
LABELS = ("label", "labels", "kto_tag", "feedback", "thumbs", "is_chosen")
SINGLE = ("completion", "response", "output", "answer", "messages", "conversations", "text")


def renamed(row: Row, columns: dict[str, str], *, single: bool = False, cells: bool = False) -> Row:
    """The row with our column names; `columns` gives the dataset's.

    In a row of a `single` answer, answer and question may have any usual name. In `cells` of text a
    list of rejected answers is written out; elsewhere text is never parsed.
    """
    named = {o: t for t, o in ALSO.items() if t in row and o not in row}
    if single:
        answers = [] if "answer" in row else [name for name in SINGLE_ANSWERS if name in row]
        named |= {"answer": answers[0]} if len(answers) == 1 else {}
        if not {"prompt", "instruction", "messages"} & row.keys():
            asked = [name for name in ("question", "query", "problem", "input") if name in row]
            named |= {"prompt": asked[0]} if len(asked) == 1 else {}
    elif not {"chosen", "rejected"} & (row.keys() | columns.keys()):
        both = next((pair for pair in ANSWERS if {*pair} <= row.keys()), None)
        named |= zip(("chosen", "rejected"), both, strict=True) if both else ()
    named |= {ours: theirs for ours, theirs in columns.items() if ours not in WORTH}
    kept = {k: v for k, v in row.items() if k not in named and k not in named.values()}
    kept |= {ours: row[theirs] for ours, theirs in named.items() if theirs in row}
    missing = lambda value: isinstance(value, float) and math.isnan(value)  # as pandas writes it
    kept = {name: x for name, x in kept.items() if name in NUMBERS or not missing(x)}
    if cells and not isinstance(messages.parsed(kept.get("chosen")), list):
        others = messages.parsed(kept.get("rejected"))
        kept |= {"rejected": others} if isinstance(others, list) else {}
    return kept


def recognised(row: Row) -> str:
    """The layout whose columns the row has.

    Raises:
      ValueError: there is no such layout.
    """
    has = lambda *names: all(row.get(name) is not None for name in names)
    if not {"chosen", "rejected"} & row.keys():
        for names, layout in WITHOUT_CHOSEN.items():
            if has(*names):
                return layout
    if not {"chosen", "rejected"} <= row.keys():
        raise BadInput(absent(row))
    answer = messages.unwritten(row["chosen"] if has("chosen") else row["rejected"], "chosen")
    answer = messages.unnested(answer)
    if isinstance(answer, dict) and answer and all(map(str.isdigit, answer)):
        raise BadInput(
            "the file holds one object of columns, as pandas writes by default: write rows, with "
            "to_json(…, orient='records', lines=True)"
        )
    first = answer[0] if isinstance(answer, list) and answer else answer
    if messages.role_of(messages.unwritten(first, "chosen")) not in (None, "assistant"):
        return "preference_chat"  # whole conversations, whatever other columns there are
    said = transcripts.turns(answer) if isinstance(answer, str) else []
    if said and said[0]["role"] == "user":
        return "hh"
    for name, layout in ASKED.items():
        if has(name):
            return layout
    if "system_prompt" in row and has("question"):
        return "orca"
    if isinstance(answer, str):
        return "hh" if said else "plain_transcripts"
    return "preference_chat"


def recognised_single(row: Row, *, labelled: bool = False) -> str:
    """The layout of single answers whose columns the row has.

    If they are `labelled`, each is wanted or unwanted.

    Raises:
      ValueError: there is no such layout.
    """
    has = lambda name: row.get(name) is not None
    if has("answer") and has("instruction"):
        return "instruction_answer"
    if has("answer") and has("prompt"):
        return "prompt_answer"
    if has("messages"):
        return "conversation"
    if has("conversations"):
        return "sharegpt_conversation"
    names = [name for name in row if isinstance(name, str)]
    if {"chosen", "rejected"} <= row.keys():
        if labelled:
            raise BadInput(
                "its rows hold pairs, but --config.loss=kto takes single answers, each with a "
                "`label`: --config.loss=bco_pair is a similar loss for pairs"
            )
        asked = has("prompt") or has("instruction")
        known = {"answer": "chosen"} if asked else {"messages": "chosen"}
        raise BadInput(
            "its rows hold pairs: to train on them, run recipes/dpo.py with "
            f"--config.loss=sigmoid; to train on one of the answers, name it, as in {flag(known)}"
        )
    if told := _wrapped(names):
        raise BadInput(told)
    what = (
        f"among its columns ({', '.join(names)[:300]}) there are neither `messages` nor `prompt` "
        "and "
    )
    if found := _single_by_other_names(row, names):
        raise BadInput(f"{what}`answer`: name them, as in {flag(found)}")
    raise BadInput(f"{what}`answer`: write the turns that `text` holds as one of these")


def _single_by_other_names(row: Row, names: list[str]) -> dict[str, str]:
    """The likely columns of a single answer, by our names; none if `text` holds all of it."""
    for name in names:
        if messages.are_messages(messages.unwritten(row[name], name)):
            return {"messages": name}
    texts = [name for name in names if not isinstance(row[name], list | dict)]
    answer = next((name for name in (*SINGLE_ANSWERS, *REPLIES) if name in texts), None)
    question = _question([name for name in texts if name != answer], SPOKEN)
    if "text" in names and not answer and not question:
        return {}
    asked = {"prompt", "instruction"} & {*names}
    found = {} if asked else {"prompt": question or "question"}
    return found | ({} if answer == "answer" else {"answer": answer or "reply"})


def check_question(row: Row, heard: str, layout: str) -> None:
    """Refuses a row whose question a guessed layout would leave out.

    `heard` is what the pair asks. A column that repeats it, like UltraFeedback's `prompt`, is fine.

    Raises:
      ValueError: a column that looks like the question holds something else, or an answer of plain
        text holds messages written as text.
    """
    for name in ("chosen", "rejected") if layout == PLAIN else ():
        if not isinstance(messages.unwritten(row[name], name), str):
            raise BadInput(f"`{name}` holds messages, which layout {layout} would read as text")
        if not isinstance(messages.parsed(row[name]), str):
            raise BadInput(
                f"`{name}` is a list or object written as text, and layout {layout} would train "
                f"on it as plain text: if that is intended, set --config.data.layout={layout}"
            )
    for name in unheard(row, heard):
        if name != "system_prompt" or layout != PLAIN:  # that has an error of its own
            raise BadInput(unread(name, heard, layout))


def unheard(row: Row, heard: str) -> list[str]:
    """Columns that look like the question but hold something other than `heard`."""
    return [name for name in row if name in LIKE_QUESTIONS and not holds(heard, row[name])]


def check_tools(row: Row, layout: str) -> None:
    """Refuses a row whose tools a guessed layout would leave out.

    Raises:
      ValueError: a column that looks like tools holds some, but `tools` does not.
    """
    for name in unread_tools(row) if layout != PLAIN else ():
        raise BadInput(
            f"`{name}` looks like tools, but layout {layout} does not read it: read it with "
            f"{flag({'tools': name})}, or leave it out with --config.data.layout={layout}"
        )


def unread_tools(row: Row) -> list[str]:
    """Columns that look like tools and hold some, if `tools` holds none."""
    if row.get("tools"):
        return []
    held = {name: messages.parsed(row[name]) for name in LIKE_TOOLS.intersection(row)}
    some = lambda one: isinstance(one, list) and one and all(isinstance(x, dict) for x in one)
    return sorted(name for name, one in held.items() if some(one))


def check_media(row: Row, layout: str) -> None:
    """Refuses a row with an image, a video or audio, which a guessed layout would leave out.

    Raises:
      ValueError: a column that looks like one of them holds something.
    """
    for name in unread_media(row):
        raise BadInput(
            f"`{name}` does not hold text, and layout {layout} only reads text: to train on the "
            f"text without it, set --config.data.layout={layout}"
        )


def unread_media(row: Row) -> list[str]:
    """Columns that look like images, videos or audio and hold some."""
    held = {name: messages.parsed(row[name]) for name in LIKE_MEDIA.intersection(row)}
    return sorted(name for name, one in held.items() if one not in (*messages.EMPTY, False))


def unread(name: str, heard: str, layout: str) -> str:
    """The error about a column that looks like the question but is not in the pair."""
    remedy = "put it into the prompt"
    if any(who in name.lower() for who in ("system", "developer")):
        remedy = f"read it with {flag({'system_prompt': name})}"
    elif not heard or layout == PLAIN:
        remedy = f"read it with {flag({'prompt': name})}"
    elif layout == "preference_chat" and name in ASKED:
        remedy = f"read it with --config.data.layout={ASKED[name]}"
    return (
        f"`{name}` looks like the question, but layout {layout} does not read it: {remedy}, or "
        f"leave it out with --config.data.layout={layout}"
    )


def holds(heard: str, value: object) -> bool:
    """Whether `heard` contains all that `value` asks, white space aside; numbers ask nothing."""
    text = isinstance(value, str)
    if value is None or (text and (value in heard or re.fullmatch(r"\s*[-+]?\d+\.?\d*\s*", value))):
        return True
    for text in map(str.strip, asked(value)):
        if text not in heard and " ".join(text.split()) not in " ".join(heard.split()):
            return False
    return True


def asked(value: object, most: int = 8) -> Iterable[str]:
    """What a column asks: a text, or whatever is not the assistant's in messages or turns.

    At most `most` nested lists and objects are searched.
    """
    if isinstance(value, str):
        held = messages.parsed(value)  # text in a table may encode messages or pairs
        written = held is not value
        held = held if written else transcripts.turns(value)
        silent = written and (not held or messages.are_messages(held))
        yield from list(asked(held, most)) or ([] if silent else [value])
    elif most and isinstance(value, dict):
        if "role" in value or "from" in value:
            said = value.get("value") if value.get("content") is None else value["content"]
            yield from asked(said, most - 1) if messages.role_of(value) != "assistant" else ()
        elif value.get("type") == "text":  # a part of a message
            yield from asked(value.get("text") or value.get("value"), most - 1)
        else:
            known = value.keys() & SPOKEN
            for text in (text for name in known or value for text in asked(value[name], most - 1)):
                if known or len(text.split()) > 1:  # other keys may hold ids and labels
                    yield text
    elif most and isinstance(value, list | tuple):
        pair = len(value) == 2 and all(isinstance(one, str) for one in value)
        for one in value[:1] if pair else value:  # of a question and its answer
            yield from asked(one, most - 1)


def absent(row: Row) -> str:
    """The error about a row without `chosen` and `rejected`."""
    names = [name for name in row if isinstance(name, str)]
    near = {ours: _near(ours, names) for ours in ("chosen", "rejected")}
    single = next((name for name in SINGLE if name in row), None)
    if told := _wrapped(names):
        return told
    if not any(near.values()):
        if single == "output" and isinstance(row["output"], list):
            return (
                "`output` holds several answers: write the preferred one to a column `chosen`, "
                "and the other to `rejected`"
            )
        if single:
            label = next((name for name in names if name.lower() in LABELS), None)
            label = label if single != "text" else None  # in tables of texts it is a class
            wanted = f", and whether it is wanted (`{label}`)" if label else ""
            other = "" if single == "text" else "; recipes/sft.py trains on one"
            other = (
                "; recipes/dpo.py trains on such rows with --config.loss=kto" if label else other
            )
            return (
                f"its rows hold one answer each (`{single}`){wanted}, not pairs: this recipe "
                f"needs two answers to each prompt, one preferred over the other{other}"
            )
    both = _numbered(names)
    if both and not all(near.values()) and {"chosen", "rejected"}.isdisjoint(names):
        return (
            f"which of `{both[0]}` and `{both[1]}` is preferred differs from row to row: write "
            "them to columns `chosen` and `rejected`"
        )
    missing = [ours for ours in near if ours not in row]
    near["chosen"] = near["chosen"] or single
    found = {ours: theirs for ours, theirs in near.items() if ours in missing and theirs}
    if len(found) < len(missing):
        found = {ours: {"chosen": "better", "rejected": "worse"}[ours] for ours in missing}
    elif question := _question(names):
        found = {"prompt": question} | found
    what = f"there is no `{missing[0]}`: name it" if len(missing) == 1 else MISSING
    told = f"among its columns ({', '.join(map(str, row))[:300]}) {what}, as in {flag(found)}"
    alone = missing == ["rejected"] and not near["rejected"]
    return told + ("; without one, recipes/sft.py trains on `chosen`" if alone else "")


# Keys that may hold the rows in a file that is one object, and its other keys.
HOLDERS = ("data", "rows", "row", "instances", "examples", "records", "train", "validation", "test")
BESIDE_ROWS = frozenset((
    "columns", "index", "schema", "version", "metadata", "type", "features", "row_idx",
    "truncated_cells", "num_rows_total", "num_rows_per_page", "partial", *HOLDERS,
))  # fmt: skip
MISSING = "there are no `chosen` and `rejected`: name them"


def _wrapped(names: list[str]) -> str:
    """The error about a file that is one object with the rows in it, or ''."""
    inside = next((name for name in HOLDERS if name in names), None)
    if inside and BESIDE_ROWS.issuperset(names):
        return (
            f"its rows are inside `{inside}`: a .json file must be a list of rows, or one per line"
        )
    if names and all(map(str.isdigit, names)):
        return (
            "the file holds one object of rows by their numbers, as pandas writes it with "
            "orient='index': write rows, with to_json(…, orient='records', lines=True)"
        )
    return ""


def _near(ours: str, names: list[str]) -> str | None:
    """The first column whose name means the answer that we call `ours`."""
    if ours in names:
        return ours
    for name in names:
        words = re.sub(r"([a-z])([A-Z])|[\W_]+", r"\1 \2", name).lower().split()
        means = lambda some, words=words: any(re.fullmatch(some, word) for word in words)
        negated = not {"non", "not", "un", "dis"}.isdisjoint(words)
        better = means(BETTER) and not negated
        worse = means(WORSE) or (means(BETTER) and negated)
        if (worse if ours == "rejected" else better and not worse) and not means(NO_ANSWER):
            return name
    return None


def _numbered(names: list[str]) -> list[str]:
    """Two answer columns whose names differ in a number or letter: `response_0`, `response_1`."""
    found: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?)[\W_]?[012abjk]", name, re.IGNORECASE)
        if match and not re.search(rf"(^|[\W_])({NO_ANSWER})([\W_]|$)", match[1]):
            found.setdefault(match[1], []).append(name)
    both = [names for names in found.values() if len(names) == 2]
    answers = (*messages.ANSWER_WORDS, "ref", "summary", "reply", "generation")
    said = (names for names in both if any(word in names[0].lower() for word in answers))
    return next(said, both[0] if both else [])


def flag(columns: dict[str, str]) -> str:
    """The flag that names columns."""
    return f'--config.data.columns="{columns}"'


def _question(names: list[str], known: frozenset[str] = LIKE_QUESTIONS) -> str | None:
    """The column that holds the question, if none has one of our names."""
    if {"prompt", "instruction", "conversations", "messages"} & {*names}:
        return None
    return next((n for n in names if n in known and n not in LIKE_PARTS), None)

"""A `Pair` as text: rendered by the chat template, with the stretches that count marked."""

import pathlib
import re
from typing import Any, NamedTuple, cast

import transformers
from transformers.utils import chat_template_utils

from recipes.data.layouts import Pair, Turns

Tokenizer = Any  # a fast tokenizer of transformers, which types its attributes loosely
Span = tuple[int, int]  # characters, from .. to


class Rendered(NamedTuple):
    """One answer behind its prompt, as text."""

    text: str
    prompt_end: int  # characters of the prompt
    scored: list[Span]  # the characters that count


PROBE: Turns = [
    {"role": "user", "content": "Which way?"},
    {"role": "assistant", "content": "Onwards."},
]


def load_tokenizer(folder: pathlib.Path, chat_template: str | None) -> Tokenizer:
    """The tokenizer of a model folder; `chat_template` is a file that replaces its template.

    Raises:
      FileNotFoundError: the folder holds no tokenizer, or there is no such template file.
      ValueError: it cannot tell which characters a token stands for.
    """
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a stranger's files make of it
        raise FileNotFoundError(
            f"{folder} holds no readable tokenizer: {str(error)[:300]}"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer in {folder} has no tokenizer.json, which masks need")
    if chat_template:
        path = pathlib.Path(chat_template).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no chat template {chat_template!r}")
        tokenizer.chat_template = path.read_text("utf-8")
    return tokenizer


def check_template(tokenizer: Tokenizer) -> None:
    """Renders two turns, so that a template that cannot work stops the run before any work.

    Raises:
      ValueError: there is no template, or it fails, or it shows nothing of the answer.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: give one with --config.chat_template=FILE, or use "
            "--config.data.layout=plain_text"
        )
    try:
        rendered, _ = render(Pair(PROBE[:1], PROBE[1:], PROBE[1:]), tokenizer, mask_user_turns=True)
    except ValueError as error:
        raise ValueError(f"the chat template cannot be used: {error}") from error
    if not rendered.scored:
        raise ValueError("the chat template marks no part of an assistant turn as generated")


def render(pair: Pair, tokenizer: Tokenizer, *, mask_user_turns: bool) -> tuple[Rendered, Rendered]:
    """Both answers as text. What counts comes from the template's `{% generation %}` blocks.

    A template without them is asked turn by turn: what turn k adds to the rendering of the turns
    before it is its text. Tokens of user turns count only if `mask_user_turns` is false.

    Raises:
      ValueError: the template refuses the messages, or renders a text again in other words when
        it grows, so that no part of it is the answer's.
    """
    prompt, chosen, rejected = cast(Any, pair)
    if isinstance(prompt, str):
        return _plain(prompt, chosen), _plain(prompt, rejected)
    asked = _render(prompt, tokenizer, ask=True)[0] if prompt else ""
    return (
        _answer(prompt, chosen, asked, tokenizer, mask_user_turns),
        _answer(prompt, rejected, asked, tokenizer, mask_user_turns),
    )


def _plain(prompt: str, answer: str) -> Rendered:
    text = prompt + answer
    return Rendered(text, len(prompt), [(len(prompt), len(text))])


def _answer(
    prompt: Turns, answer: Turns, asked: str, tokenizer: Tokenizer, mask_user_turns: bool
) -> Rendered:
    text, marked = _render(prompt + answer, tokenizer)
    if answer and answer[0]["role"] != "assistant":  # the two part ways at a user turn
        asked = _render(prompt, tokenizer)[0] if prompt else ""
    if not text.startswith(asked):
        raise ValueError("the chat template changes the prompt when an answer follows")
    if marked is not None and mask_user_turns:
        spans = [(max(start, len(asked)), end) for start, end in marked if end > len(asked)]
    else:
        spans = _by_prefix(prompt, answer, text, tokenizer, mask_user_turns)
    return Rendered(text, len(asked), spans)


def _by_prefix(
    prompt: Turns, answer: Turns, text: str, tokenizer: Tokenizer, mask_user_turns: bool
) -> list[Span]:
    spans = []
    for i, message in enumerate(answer):
        said = message["role"] == "assistant"
        if mask_user_turns and not said:
            continue
        turns = prompt + answer[:i]
        before = _render(turns, tokenizer, ask=said)[0] if turns else ""
        after = _render([*turns, message], tokenizer)[0]
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError("the chat template changes earlier turns when later ones follow")
        if len(after) > len(before):
            spans.append((len(before), len(after)))
    return spans


def _render(
    turns: Turns, tokenizer: Tokenizer, *, ask: bool = False
) -> tuple[str, list[Span] | None]:
    """The text of some turns (with the header of an answer to come if `ask`), its marked spans."""
    marks = bool(re.search(r"\{%-?\s*generation\b", tokenizer.chat_template))
    render: Any = chat_template_utils.render_jinja_template
    try:
        (text,), spans = render(
            conversations=[turns],
            chat_template=tokenizer.chat_template,
            add_generation_prompt=ask,
            return_assistant_tokens_mask=marks,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template is a program, and may fail as one
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    return text, list(spans[0]) if marks and spans and spans[0] else None


def check_plain(tokenizer: Tokenizer) -> None:
    """Raises a sentence if plain text could not be ended."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "--config.data.layout=plain_text ends each answer with the end-of-text token, and this "
            "tokenizer has none"
        )


def stop_ids(tokenizer: Tokenizer, *, plain: bool = False) -> tuple[int, ...]:
    """The ids that end an answer: end of text, and the template's end of turn unless `plain`."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template and not plain:
        text, _ = _render(PROBE, tokenizer)
        _, _, tail = text.rpartition(PROBE[-1]["content"])
        ids = tokenizer(tail, add_special_tokens=False).input_ids
        ends += [i for i in ids if i in tokenizer.added_tokens_decoder][:1]
    return tuple(dict.fromkeys(ends))

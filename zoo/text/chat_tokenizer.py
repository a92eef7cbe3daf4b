"""A tokenizer with its chat template, for notebooks: encodes texts and conversations, and decodes.

The patterns and templates of untrusted files run in a worker process.
"""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import datetime
import functools
import operator
import os
import pathlib
from typing import Any, NamedTuple, SupportsIndex

from checkpoints_io import hf_folder
from checkpoints_io.errors import BadInput
from zoo.text import template, tokenizer
from zoo.text.confined import Worker
from zoo.text.tokenizer import Tokenizer
from zoo.text.worker import Step

Messages = object  # a list of dicts: role, content, and what else the template reads
PROBE = (
    {"role": "user", "content": "Which way?"},
    {"role": "assistant", "content": "Onwards."},
)
# Settings of transformers' apply_chat_template that no template has.
NOT_OF_TEMPLATES = {
    "tokenize", "return_tensors", "return_dict", "return_assistant_tokens_mask", "padding",
    "truncation", "max_length", "chat_template",
}  # fmt: skip
TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # written after a text that is to be continued


class ChatTokenizer(NamedTuple):
    """Encodes texts and conversations as the model expects them.

    >>> words = load_tokenizer("recipes/tiny/model")
    >>> words.decode(words.encode("Hello there"))
    'Hello there'
    >>> prompt = words.chat([{"role": "user", "content": "Name a river."}])
    >>> words.decode(prompt).strip().splitlines()[-1]
    'Name a river.<|eot_id|><|start_header_id|>assistant<|end_header_id|>'
    >>> words.stop_ids
    (1, 4)
    """

    special: Mapping[str, int]  # tokens that stand for themselves wherever their text is met
    vocabulary_size: int
    bos_id: int | None
    eos_id: int | None
    stop_ids: tuple[int, ...]  # that end an answer: what `zoo.generate` is given
    chat_template: str | None
    source: pathlib.Path
    own: Tokenizer
    worker: Worker

    def __repr__(self) -> str:
        return f"<the tokenizer of {self.source}: {self.vocabulary_size} tokens>"

    def __reduce__(self) -> tuple:
        """A copy, and one in another process, is read from the folder again: its worker is new."""
        return load_tokenizer, (self.source,)

    def encode(self, text: str) -> list[int]:
        """The ids of a plain text, after the BOS token if the model has one.

        Raises:
          ValueError: it is not a string.
        """
        if not isinstance(text, str):
            raise BadInput(f"encode takes one text, and not {text!r:.60}; messages are for chat")
        ids, _ = self.own.encode(text)
        return ids if ids[: len(self.own.first)] == [*self.own.first] else [*self.own.first, *ids]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of some ids, with special tokens; ids beyond the vocabulary give nothing.

        Raises:
          ValueError: they are not the ids of one text.
        """
        try:
            some = [operator.index(i) for i in ids]
        except TypeError as error:
            raise BadInput(f"decode takes the ids of one text, and not {ids!r:.60}") from error
        if some and min(some) < 0:
            raise BadInput(f"id {min(some)} is none of a tokenizer: labels are no ids")
        return self.own.decode([i for i in some if i < 2**31])

    def chat(self, messages: Messages, **given: Any) -> list[int]:
        """The ids of a conversation, as `chat_text` writes it."""
        ids, _ = self.own.encode(self.chat_text(messages, **given))
        return ids

    def chat_text(
        self,
        messages: Messages,
        *,
        tools: Sequence[object] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        **given: object,
    ) -> str:
        """The conversation as text, written by the chat template.

        It ends with the generation prompt unless the last message is an answer;
        `add_generation_prompt` overrides that. With `continue_final_message` it ends with the text
        of the last message (or with the field of that name), as in transformers. `given` are
        variables of the template itself, such as `enable_thinking=False`.

        Raises:
          ValueError: there is no template, or it refuses the messages.
        """
        if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
            raise BadInput(
                "a conversation is a list of messages, as "
                "[{'role': 'user', 'content': 'Name a river.'}]"
            )
        if odd := sorted(NOT_OF_TEMPLATES & given.keys()):
            raise BadInput(
                f"{odd[0]}={given[odd[0]]!r:.60} is no setting of a template: chat gives ids, "
                "chat_text the text, both by the folder's own template; leave it out"
            )
        if continue_final_message and add_generation_prompt:
            raise BadInput(
                f"continue_final_message={continue_final_message!r} continues the last message, "
                "and add_generation_prompt=True begins another: leave one of them out"
            )
        if add_generation_prompt is None:
            answered = messages and messages[-1].get("role") == "assistant"
            add_generation_prompt = not answered and not continue_final_message
        turns, begun = [dict(m) for m in messages], ""
        if continue_final_message:
            field = "content" if continue_final_message is True else continue_final_message
            turns, begun = _tagged(turns, field)
        asked = {"messages": turns, "tools": tools and [*tools], **given}
        today = datetime.date.today().isoformat()
        asked |= {"add_generation_prompt": add_generation_prompt}
        try:
            text = self.worker.call(written, str(self.source), asked, today)
        except TypeError as error:
            raise BadInput(
                f"a template is given what JSON can say: {error}; a tool is described by a dict"
            ) from error
        return _until_tag(text, begun) if continue_final_message else text


def _tagged(turns: list[dict], field: str) -> tuple[list[dict], str]:
    """The messages with a tag after the last one's text, and that text."""
    said = turns[-1].get(field) if turns else None
    if isinstance(said, str):
        return [*turns[:-1], turns[-1] | {field: said + TAG}], said
    parts = [*said] if isinstance(said, list | tuple) else []
    for i in reversed(range(len(parts))):
        if isinstance(parts[i], Mapping) and isinstance(text := parts[i].get("text"), str):
            parts[i] = {**parts[i], "text": text + TAG}
            return [*turns[:-1], turns[-1] | {field: parts}], text
    raise BadInput(
        f"continue_final_message: the last message has no text {field!r} to continue: give it one, "
        "as {'role': 'assistant', 'content': 'Sure, '}"
    )


def _until_tag(text: str, begun: str) -> str:
    """What was written, up to the tag; where the template trims, without the spaces before it."""
    before, tag, after = text.rpartition(TAG.strip())
    if not tag or begun.strip() not in text:
        raise BadInput(
            f"continue_final_message: the chat template does not write {begun!r:.60} as it is: "
            "leave it out"
        )
    return before if after.startswith(TAG[len(tag) :]) else before.rstrip()


def load_tokenizer(path_or_id: str | os.PathLike[str]) -> ChatTokenizer:
    """Loads the tokenizer of a model folder or hub id, without downloading the weights.

    Raises:
      FileNotFoundError: there is no tokenizer.
      ValueError: its files cannot be read as one.
    """
    folder = hf_folder.find(os.fspath(path_or_id), files=hf_folder.TOKENIZER_FILES).absolute()
    worker = Worker(
        f"the tokenizer in {folder} or its chat template", "use those of another model folder"
    )
    own = tokenizer.apart(folder, None, worker)
    stops = tuple(worker.call(stop_ids, str(folder)))
    own = tokenizer.ended_by(own, stops)
    return ChatTokenizer(
        own.special, own.size, own.bos_id, own.eos_id, stops, own.chat_template, folder, own, worker
    )


def stop_ids(step: Step, folder: str) -> list[int]:
    """The ids that end an answer; in a worker."""
    own, after = tokenizer.here(folder), ""
    said, today = PROBE[1]["content"], datetime.date.today().isoformat()
    in_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in PROBE]
    for messages in ([*PROBE], in_parts) if own.chat_template else ():
        given = {"messages": messages, "tools": None, "add_generation_prompt": False}
        # A template that wants something else says so when it is used.
        with contextlib.suppress(ValueError):
            _, there, after = written(step, folder, given, today).rpartition(said)
            if there:
                break
            after = ""
    return [*tokenizer.stop_ids(own, after)]


def written(step: Step, folder: str, given: Mapping[str, object], date: str) -> str:
    """The text that the template writes; runs in a worker."""
    own = tokenizer.here(folder)
    if not own.chat_template:
        raise BadInput(
            f"the tokenizer in {folder} has no chat template: encode a text that you write yourself"
        )
    text = own.chat_template
    if given["tools"]:
        text = own.chat_templates.get("tool_use", text)
    with step(folder, "the chat template cannot be used: to run it"):
        program = _compiled(text, date if template.prints_the_date(text) else None)
        return template.render(program, {"documents": None, **own.named, **given})[0]


_compiled = functools.lru_cache(maxsize=4)(template.compiled)

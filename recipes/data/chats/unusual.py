"""Pairs that few templates were made for: used if the text shows them as they are."""

from checkpoints_io.errors import BadInput
from recipes.data.chats import conversation
from recipes.data.chats.chat import Chat
from recipes.data.chats.pair import Pair
from recipes.data.chats.rendering import Rendered

# Markup that other templates write around turns: a mistake in the messages given to a template.
MARKS = (
    "<|im_start|>", "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>", "<|turn>", "<|user|>",
    "<|assistant|>", "<|system|>", "<|start|>", "<|User|>", "<｜User｜>", "[INST]", "[/INST]",
    "<<SYS>>", "<s>", "<|endoftext|>", "<|begin_of_text|>", "<bos>", "### Instruction:",
    "### Response:", "\n\nHuman:", "\n\nAssistant:", "USER:", "ASSISTANT:", "<extra_id_1>",
)  # fmt: skip
ENDS = (  # ends of an answer that a template writes itself
    "</s>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>",
    "<end_of_turn>", "<eos>", "<extra_id_1>",
)  # fmt: skip
ASKED = 4  # words of a question with which no answer begins by chance


def checked(pair: Pair, rendered: tuple[Rendered, ...], chat: Chat | None) -> tuple[Rendered, ...]:
    """The texts; an answer that the prompt begins is scored from where it continues.

    Raises:
      ValueError: turns in an unusual order, or the beginning of an answer, are not shown as such.
    """
    for turns, shown in zip(pair.conversations, rendered, strict=False):
        odd = conversation.odd(turns)
        if odd and not (conversation.in_order(turns, shown.text) and _behind_headers(shown, chat)):
            raise BadInput(f"roles out of order: {odd}, which the chat template does not render")
    return _begun(pair.prefill, rendered) if pair.prefill else rendered


def _behind_headers(shown: Rendered, chat: Chat | None) -> bool:
    """Whether each answer is scored from the end of its header, and no header is."""
    header = (chat.header or "").strip() if chat else ""
    if chat is None or chat.marked or chat.scored_turns == "all" or not header:
        return True
    text = shown.text
    return all(
        (a == shown.prompt_end or text[:a].rstrip().endswith(header)) and header not in text[a:b]
        for a, b in shown.scored
    )


def _begun(prefill: str, rendered: tuple[Rendered, ...]) -> tuple[Rendered, ...]:
    ends = [max(side.text.find(prefill, side.prompt_end), 0) for side in rendered]
    end = ends[0] + len(prefill)
    if not all(ends) or len({side.text[:end] for side in rendered}) > 1:
        raise BadInput("the chat template changes the beginning of the answer")
    return tuple(
        side._replace(prompt_end=end, scored=[(max(a, end), b) for a, b in side.scored if b > end])
        for side in rendered
    )


def of_another_format(pair: Pair) -> bool:
    """Whether the prompt or an answer's end has the markup of another chat format."""
    if isinstance(pair.prompt, str):
        return False
    if any(turns[-1]["content"].rstrip().endswith(ENDS) for turns in pair.conversations):
        return True
    said = [turn["content"] for turn in pair.prompt if turn["role"] != "assistant"]
    return any(mark in text for text in said for mark in MARKS)


def asks_again(pair: Pair) -> bool:
    """Whether every answer begins with the whole question."""
    if isinstance(pair.prompt, str) or not pair.prompt:
        return False
    asked, n = pair.prompt[-1]["content"].strip(), len(pair.prompt)
    answers = [turns[n]["content"].lstrip() for turns in pair.conversations]
    return len(asked.split()) >= ASKED and all(said.startswith(asked) for said in answers)

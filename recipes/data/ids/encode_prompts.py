"""Encodes prompts without answers as ids: what a worker does with a file of prompts.

The ids are those that such a prompt has before an answer in training.
"""

from checkpoints_io.errors import BadInput
from recipes.data.chats import chat, messages
from recipes.data.chats.pair import Pair
from recipes.data.ids import encode_rows
from recipes.data.ids.encode_rows import ByName, How
from zoo.text.tokenizer import Tokenizer
from zoo.text.worker import Step


def encode(step: Step, rows: list[list], how: ByName, files: str, plain: bool) -> list[list[int]]:
    """The ids of the prompt in each row, which is given as its `where`, `fields`, `reason`.

    Raises:
      ValueError: a row holds no prompt, or one that is too long.
    """
    given = How(**how)
    own, talk = encode_rows.ready(given, files, plain, step)
    found = []
    for where, fields, reason in rows:
        with step(where, "to render and tokenise it"):
            if fields is None:
                raise BadInput(f"{where}: {reason}")
            try:
                ids = _ids(fields, own, talk)
            except ValueError as error:
                raise BadInput(f"{where}: {error}") from error
            if len(ids) >= given.max_length:
                raise BadInput(
                    f"{where}: a prompt of {len(ids)} tokens leaves no room for an answer within "
                    f"--config.train_seq_len={given.max_length}: shorten it"
                )
        found.append(ids)
    return found


def _ids(fields: dict[str, object], own: Tokenizer, talk: chat.Chat | None) -> list[int]:
    name = "messages" if "messages" in fields else "prompt"
    if talk is None:
        ids, _ = own.encode(messages.text(fields.get("prompt"), "prompt"))
        return [*(i for i in own.first if ids[:1] != [i]), *ids]
    turns = messages.read(fields.get(name), name, role="user")
    while turns and turns[-1]["role"] == "assistant":  # the row's own answer
        turns = turns[:-1]
    if not turns:
        raise BadInput(f"`{name}` asks nothing")
    text, _ = chat.write(turns, talk, Pair(turns, turns, None), ask=True)
    return own.encode(text)[0]

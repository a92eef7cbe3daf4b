"""Plain texts -> ids: what a worker makes of some rows of a file of texts."""

from typing import Any

from checkpoints_io.errors import BadInput
from recipes.data.ids import encode_rows
from recipes.data.ids.encode_rows import BYTES_A_SECOND, How
from zoo.text.worker import Step


def encode(
    step: Step, rows: list[list], how: dict[str, Any], files: str, plain: bool
) -> list[tuple[list[int], int]]:
    """Of each row, its `where` and `text`, the ids and how many bytes of UTF-8 they stand for.

    The first id stands for no byte: what texts begin with, or else what they end with.

    Raises:
      ValueError: the tokenizer has neither; or a text cannot be written as UTF-8.
    """
    own, _ = encode_rows.ready(How(**how), files, plain, step)
    begin = own.eos_id if own.bos_id is None else own.bos_id
    if begin is None:
        raise BadInput(
            "--config.validation_texts: the tokenizer has neither a BOS nor an EOS token, so "
            "nothing would precede the first token"
        )
    found = []
    for where, text in rows:
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise BadInput(
                f"{where}: half of a surrogate pair, which UTF-8 cannot encode"
            ) from error
        with step(where, "to tokenise it", float(size // BYTES_A_SECOND)):
            ids, _ = own.encode(text)
        found.append((ids if ids[:1] == [begin] else [begin, *ids], size))
    return found

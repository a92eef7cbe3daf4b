"""Encodes plain texts as ids: what a worker does with the rows of a file of texts."""

from checkpoints_io.errors import BadInput
from recipes.data.ids import encode_rows
from recipes.data.ids.encode_rows import BYTES_A_SECOND, ByName, How
from zoo.text.worker import Step


def encode(
    step: Step, rows: list[list], how: ByName, files: str, plain: bool
) -> list[tuple[list[int], int]]:
    """The ids of each row, given as its `where` and `text`, and the number of its UTF-8 bytes.

    The first id stands for no byte: it is the BOS token, or else the EOS token.

    Raises:
      ValueError: the tokenizer has neither; or a text cannot be encoded as UTF-8.
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

"""Reward models: a model of the zoo that gives a text one number in place of logits.

They are `…ForSequenceClassification` models of transformers with one label, like Skywork's and most
others on the hub: a linear head over the final hidden state of the last token.
"""

from collections.abc import Mapping, Sequence
import functools
import os
import re
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from checkpoints_io import hf_folder
from checkpoints_io.errors import BadInput
from zoo import reading
from zoo.generate import room_for
from zoo.models import Model, abstract
from zoo.parts import sharding, spans, text_half, token_rows
from zoo.parts.text_half import SCORE, SCORES

TOKENS = 2**15  # per batch of texts


class RewardModel(NamedTuple):
    """A model without an LM head, and its scalar head."""

    model: Model
    head: Float[Array, " D"]


def load(
    path_or_id: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
) -> RewardModel:
    """Loads the reward model of a Hugging Face folder or hub id; `dtype` is for all but the head.

    Without a mesh everything is on the first device.

    Raises:
      FileNotFoundError: there is no such folder, repository or file.
      ValueError: it is not a reward model, has several labels, or has no architecture here.
    """
    folder = hf_folder.look_up(path_or_id)
    _refuse_others(folder.config, str(path_or_id))
    # Tied: an LM head is not loaded, and need not exist.
    model = abstract({**folder.config, "tie_word_embeddings": True}, dtype, mesh=mesh)
    model.source = folder
    model, beside = reading.with_extra(model, f"^{re.escape(SCORE)}$")
    if SCORE not in beside:
        raise BadInput(f"{path_or_id} has no {SCORE}: a reward model has one, beside its layers")
    head = sharding.sharding("D", beside[SCORE][0].shape, sharding.mesh_under(model.embedding[...]))
    return RewardModel(model, jax.device_put(beside[SCORE][0], head))


def rewards(of: RewardModel, texts: Sequence[Sequence[int]]) -> list[float]:
    """The reward of each text, given as token ids; higher is better.

    A conversation is encoded by the reward model's own tokenizer: `words.chat(messages)`.

    Raises:
      ValueError: a text is empty, longer than the model reads, or holds an id that has no
        embedding.
    """
    if not isinstance(of, RewardModel):
        raise BadInput(
            f"rewards(of, texts) is given a {type(of).__name__} as a reward model: "
            "zoo.reward.load(path) gives one"
        )
    token_rows.check_several(texts, "texts")
    token_rows.check_length(max(map(len, texts), default=0), of.model.config)
    if len(texts):
        ids = np.concatenate(token_rows.cut(texts, None))
        token_rows.check_ids(ids, of.model.config.vocab_size)
    graph, state = nnx.split(of.model)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = np.zeros(len(texts), np.float32)
    while order:
        length = room_for(len(texts[order[0]]))
        some = [i for i in order if len(texts[i]) <= length][: max(1, TOKENS // length)]
        order = order[len(some) :]
        rows = np.zeros((len(some), length), np.int32)
        for row, i in zip(rows, some, strict=True):
            row[: len(texts[i])] = texts[i]
        lengths = np.array([len(texts[i]) for i in some], np.int32)
        found[some] = _rewards(graph, state, of.head, rows, lengths)
    return found.tolist()


@functools.partial(jax.jit, static_argnums=0)
def _rewards(
    graph: nnx.GraphDef,
    state: nnx.State,
    head: Float[Array, " D"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> Float[Array, " B"]:
    model = nnx.merge(graph, state)
    B, T = tokens.shape
    hidden = model.hidden(tokens, spans.causal(B, T, lengths))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last.astype(jnp.float32) @ head


def _refuse_others(config: Mapping[str, object], name: str) -> None:
    kinds = config.get("architectures")
    if not text_half.scores(config):
        raise BadInput(
            f"{name} is a {kinds[0] if isinstance(kinds, list) and kinds else None}: a reward "
            f"model is a …{SCORES} with one label, which gives a number "
            "for a text"
        )
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    if count != 1:
        raise BadInput(f"{name} has {count} labels: a reward model has one")

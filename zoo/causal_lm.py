"""What every model of the zoo can do with its hidden states; a Model takes these as its own.

A Model has `config`, `embedding`, `blocks`, `dtype`, `attention`, `remat`, `source` and
`hidden(tokens, where, run)`, and a `head` unless it is tied.
"""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from zoo import layers, spans


def logits(model: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Logits of the next token at every position, each row one text.

    Raises:
      ValueError: an id is beyond the model's vocabulary.
    """
    check_ids(model, tokens)
    return model.unembed(model.hidden(tokens, spans.causal(*tokens.shape)))


def check_ids(model: Any, tokens: Any) -> None:
    """Refuses ids that have no embedding; inside of jit they cannot be looked at.

    Raises:
      ValueError: there is such an id.
    """
    if isinstance(tokens, jax.core.Tracer) or not np.size(tokens):
        return
    if isinstance(tokens, jax.Array) and not tokens.is_fully_addressable:
        return  # parts of it are other processes'
    ids = np.asarray(tokens)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(
            f"token id {low if low < 0 else high} is beyond the model's "
            f"{model.config.vocab_size} ids: is this another model's tokenizer?"
        )


def unembed(model: Any, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Hidden states -> logits, in float32."""
    wide = layers.einsum("BTD,VD->BTV", hidden, model.unembedding(), out=jnp.float32)
    return layers.capped(wide, model.logit_softcap())


def unembedding(model: Any) -> nnx.Param:
    """The head: axes "V D"."""
    return model.embedding if model.config.tie_word_embeddings else model.head


def logit_softcap(model: Any) -> float | None:
    """Where the architecture bends its logits."""
    return getattr(model.config, "final_logit_softcapping", None)

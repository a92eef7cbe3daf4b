"""What every model of the zoo is: an embedding, blocks, a last norm, a head unless it is tied."""

from collections.abc import Callable
import pathlib
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from checkpoints_io.errors import BadInput
from zoo import layers, spans, stack


class CausalLM(nnx.Module):
    """A decoder. An architecture gives its `Block` and `hidden`, and what else differs."""

    # What its blocks are; where layers are of several kinds, by those that `Config.kinds` names.
    Block: ClassVar[Callable[[Any, nnx.Rngs], nnx.Module] | dict[str, Callable[..., nnx.Module]]]
    # What a layer keeps in generation, by kind: name -> axes. Unless named here: keys and values.
    keeps: ClassVar[dict[str, dict[str, str]]] = {}
    attention: str | None = None  # one of attention.BACKENDS; unset: the platform's
    remat: str = "full"  # one of stack.REMAT
    source: pathlib.Path | None = None  # the folder it was read from
    config: Any  # a hf_config.Config

    def __init__(self, config: Any, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike = jnp.float32):
        self.embedding = layers.weight("V D", config.sizes, rngs)
        self.blocks = _blocks(self.Block, config, rngs)
        self.norm = self.last_norm(config, rngs)
        if not config.tie_word_embeddings:
            self.head = layers.weight("V D", config.sizes, rngs)
        self.config = config
        self.dtype = dtype  # of the activations; the weights may be kept in a wider one

    def hidden(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the last norm; `run` is how the blocks are gone through."""
        raise NotImplementedError

    def last_norm(self, config: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The norm behind the blocks."""
        return layers.RmsNorm("D", config.sizes, rngs, eps=config.rms_norm_eps)

    def last_step(self) -> layers.LastStep:
        """What makes logits of the product with the head."""
        return layers.LastStep()

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the next token at every position, each row one text.

        Raises:
          ValueError: an id is beyond the model's vocabulary.
        """
        check_ids(self, tokens)
        return self.unembed(self.hidden(tokens, spans.causal(*tokens.shape)))

    def unembed(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Hidden states -> logits, in float32."""
        product = layers.einsum("BTD,VD->BTV", hidden, self.unembedding(), out=jnp.float32)
        return layers.finished(product, self.last_step())

    def unembedding(self) -> nnx.Param:
        """The head: axes "V D"."""
        return self.embedding if self.config.tie_word_embeddings else self.head


def _blocks(of: Callable | dict[str, Callable], config: Any, rngs: nnx.Rngs) -> nnx.Module:
    if not isinstance(of, dict):
        return of(config, rngs)
    return nnx.Dict({kind: one(config, rngs) for kind, one in of.items()})


def check_ids(model: CausalLM, tokens: Any) -> None:
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
        raise BadInput(
            f"token id {low if low < 0 else high} is beyond the model's "
            f"{model.config.vocab_size} ids: is this another model's tokenizer?"
        )

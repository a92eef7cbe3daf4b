"""The base class of every model: an embedding, blocks, a final norm, and an untied or tied head."""

from collections.abc import Callable
import functools
import os
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from checkpoints_io.errors import BadInput
from zoo.parts import hf_config, last_step, layers, spans, stack, token_rows


class CausalLM(nnx.Module):
    """A decoder-only model. An architecture supplies `Block`, `residual` and what else differs."""

    # The class of its blocks; with several kinds of layers, one class per kind in `Config.kinds`.
    Block: ClassVar[Callable[..., nnx.Module] | dict[str, Callable[..., nnx.Module]]]
    # What a layer caches in generation, by kind: name -> axes. Kinds not named here cache KV.
    keeps: ClassVar[dict[str, dict[str, str]]] = {}
    attention: str | None = None  # one of attention.BACKENDS; unset: the platform's
    remat: str = "full"  # one of remat.POLICIES
    remat_layers: int | None = None  # the last layers that use `remat`; the others keep attention
    source: os.PathLike[str] | None = None  # the hf_folder.Folder it was loaded from, or another
    is_new: bool = False  # random weights: only config.json and tokenizer come from its folder
    described: str | None = None  # the config.json that it was created from, if not from a folder
    config: Any  # a hf_config.Config

    def __init__(self, config: Any, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike = jnp.float32):
        if type(self) is CausalLM:
            raise TypeError("no model is a CausalLM alone: zoo.fresh(config) makes one")
        self.embedding = layers.weight("V D", config.sizes, rngs)
        self.blocks = _blocks(self.Block, config, rngs)
        self.norm = self.last_norm(config, rngs)
        if not config.tie_word_embeddings:
            self.head = layers.weight("V D", config.sizes, rngs)
        self.config = config
        self.dtype = dtype  # of the activations; the weights may be kept in a wider one

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        raise NotImplementedError

    def last_norm(self, config: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The final norm, after the blocks."""
        return layers.RmsNorm("D", config.sizes, rngs, eps=config.rms_norm_eps)

    def last_step(self) -> last_step.LastStep:
        """The step that turns the product with the head into logits (a scale or soft cap)."""
        return last_step.LastStep()

    def hidden(
        self,
        tokens: token_rows.Tokens,
        where: spans.Spans | None = None,
        run: stack.Run = stack.run,
        *,
        lengths: token_rows.Lengths | None = None,
    ) -> Float[Array, "*B T D"]:
        """The residual stream after the final norm, from which `unembed` computes the logits.

        Without `where` each row is one text, as in a call of the model. With it, `tokens` is an
        array [B, T] whose values are not checked, and `run` applies the blocks.

        Raises:
          ValueError: as in a call of the model.
        """
        if where is not None:
            if lengths is not None:
                raise BadInput("`where` has the lengths: hidden(ids, spans.causal(B, T, lengths))")
            return self.residual(jnp.asarray(tokens), where, run)
        if run is not stack.run:
            raise BadInput("`run` goes with `where`: hidden(ids, spans.causal(*ids.shape), run)")
        return _called(_hidden, self, tokens, lengths)

    def hidden_states(
        self, tokens: token_rows.Tokens, *, lengths: token_rows.Lengths | None = None
    ) -> Float[Array, "L1 *B T D"]:
        """The residual stream before the first block and after every block; the last is normed.

        As in transformers there are L + 1 of them, and the last equals `hidden`.

        Raises:
          ValueError: as in a call of the model.
        """
        return _called(_hidden_states, self, tokens, lengths)

    def __call__(
        self, tokens: token_rows.Tokens, lengths: token_rows.Lengths | None = None
    ) -> Float[Array, "*B T V"]:
        """Logits of the next token at every position.

        `tokens` is one text, [T], or one text per row, [B, T]; lists or an array. Rows of a list
        may differ in length; those of an array end at `lengths` [B]. A text's logits do not depend
        on the other rows; positions after its end give zeros.

        Raises:
          ValueError: `tokens` holds no tokens, or an id is beyond the model's vocabulary.
        """
        return _called(_logits, self, tokens, lengths)

    def unembed(self, hidden: Float[Array, "*B T D"]) -> Float[Array, "*B T V"]:
        """Projects hidden states, of one text or of rows, to logits in float32."""
        if hidden.ndim == 2:
            return self.unembed(hidden[None])[0]
        product = layers.einsum("BTD,VD->BTV", hidden, self.unembedding(), out=jnp.float32)
        return last_step.finished(product, self.last_step())

    def unembedding(self) -> nnx.Param:
        """The weight of the output head, with axes "V D"; the embedding if they are tied."""
        return self.embedding if self.config.tie_word_embeddings else self.head


_What = Callable[[CausalLM, Int[Array, "B T"], spans.Spans], Float[Array, "..."]]


def _called(
    what: _What, model: CausalLM, tokens: token_rows.Tokens, lengths: token_rows.Lengths | None
) -> Float[Array, "..."]:
    ids, lengths, is_one_text = token_rows.read(tokens, lengths, model.config.vocab_size)
    token_rows.check_length(ids.shape[1], model.config)
    return _program(model, ids, lengths, what=what, is_one_text=is_one_text)


# Without jit, the scans over layers would be compiled again at every call.
@functools.partial(jax.jit, static_argnames=("what", "is_one_text"), inline=True)
def _program(
    model: CausalLM,
    ids: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None,
    *,
    what: _What,
    is_one_text: bool,
) -> Float[Array, "..."]:
    B, T = ids.shape
    found = what(model, ids, spans.causal(B, T, lengths))
    return token_rows.as_given(found, lengths, is_one_text=is_one_text)


def _logits(model: CausalLM, ids: Int[Array, "B T"], where: spans.Spans) -> Float[Array, "B T V"]:
    return model.unembed(model.residual(ids, where))


def _hidden(model: CausalLM, ids: Int[Array, "B T"], where: spans.Spans) -> Float[Array, "B T D"]:
    return model.residual(ids, where)


def _hidden_states(
    model: CausalLM, ids: Int[Array, "B T"], where: spans.Spans
) -> Float[Array, "L1 B T D"]:
    kept: list[Array] = []
    last = model.residual(ids, where, stack.keeping(kept))
    return jnp.concatenate([*kept, last[None]])


def _blocks(
    of: Callable | dict[str, Callable], config: hf_config.Config, rngs: nnx.Rngs
) -> nnx.Module:
    if not isinstance(of, dict):
        return of(config, rngs)
    there = set(config.kinds)
    return nnx.Dict({kind: one(config, rngs) for kind, one in of.items() if kind in there})

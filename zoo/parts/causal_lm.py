"""What every model of the zoo is: an embedding, blocks, a last norm, a head unless it is tied."""

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
    """A decoder. An architecture gives its `Block` and `residual`, and what else differs."""

    # What its blocks are; where layers are of several kinds, by those that `Config.kinds` names.
    Block: ClassVar[Callable[..., nnx.Module] | dict[str, Callable[..., nnx.Module]]]
    # What a layer keeps in generation, by kind: name -> axes. Unless named here: keys and values.
    keeps: ClassVar[dict[str, dict[str, str]]] = {}
    attention: str | None = None  # one of attention.BACKENDS; unset: the platform's
    remat: str = "full"  # one of remat.POLICIES
    remat_layers: int | None = None  # the last so many; the others keep attention alone
    source: os.PathLike[str] | None = None  # the hf_folder.Folder it was read from, or another
    is_new: bool = False  # its weights were drawn: of its folder it has config.json and tokenizer
    described: str | None = None  # the config.json that it was made from, if not from a folder
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
        """The residual stream after the last norm; `run` applies the blocks."""
        raise NotImplementedError

    def last_norm(self, config: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The norm after the blocks."""
        return layers.RmsNorm("D", config.sizes, rngs, eps=config.rms_norm_eps)

    def last_step(self) -> last_step.LastStep:
        """What turns the product with the head into logits."""
        return last_step.LastStep()

    def hidden(
        self,
        tokens: token_rows.Tokens,
        where: spans.Spans | None = None,
        run: stack.Run = stack.run,
        *,
        lengths: token_rows.Lengths | None = None,
    ) -> Float[Array, "*B T D"]:
        """The residual stream after the last norm, as it becomes logits.

        Without `where` each row is one text, as in a call of the model. With it `tokens` are an
        array [B, T], whose values are not checked, and `run` applies the blocks.

        Raises:
          ValueError: as a call of the model.
        """
        if where is not None:
            return self.residual(jnp.asarray(tokens), where, run)
        if run is not stack.run:
            raise BadInput("`run` goes with `where`: hidden(ids, spans.causal(*ids.shape), run)")
        return _called(_hidden, self, tokens, lengths)

    def hidden_states(
        self, tokens: token_rows.Tokens, *, lengths: token_rows.Lengths | None = None
    ) -> Float[Array, "L1 *B T D"]:
        """The residual stream before the first block and after each; the last one normed.

        As transformers has it: L + 1 of them, and the last is what `hidden` gives.

        Raises:
          ValueError: as a call of the model.
        """
        return _called(_hidden_states, self, tokens, lengths)

    def __call__(
        self, tokens: token_rows.Tokens, lengths: token_rows.Lengths | None = None
    ) -> Float[Array, "*B T V"]:
        """Logits of the next token at every position.

        `tokens` are one text, [T], or rows of one text each, [B, T]: lists, or an array. Rows of a
        list may differ in length; those of an array end where `lengths` [B] says. A text's logits
        are the same alone and in any rows; positions after its end give zeros.

        Raises:
          ValueError: these are not tokens, or an id is beyond the model's vocabulary.
        """
        return _called(_logits, self, tokens, lengths)

    def unembed(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Hidden states -> logits, in float32."""
        product = layers.einsum("BTD,VD->BTV", hidden, self.unembedding(), out=jnp.float32)
        return last_step.finished(product, self.last_step())

    def unembedding(self) -> nnx.Param:
        """The head: axes "V D"."""
        return self.embedding if self.config.tie_word_embeddings else self.head


_What = Callable[[CausalLM, Int[Array, "B T"], spans.Spans], Float[Array, "..."]]


def _called(
    what: _What, model: CausalLM, tokens: token_rows.Tokens, lengths: token_rows.Lengths | None
) -> Float[Array, "..."]:
    ids, lengths, is_one_text = token_rows.read(tokens, lengths, model.config.vocab_size)
    token_rows.check_length(ids.shape[1], model.config)
    return _program(model, ids, lengths, what=what, is_one_text=is_one_text)


# Operation by operation, the scans over layers would be compiled again at every call.
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

"""How blocks mix tokens: attention and recurrences, with or without a cache.

A block gets one object, which it calls with queries, keys and values, or asks to `recur` if it is
recurrent. In training that object knows the spans of whole rows; in generation it also holds the
cache of earlier tokens. A block need not know which.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.parts import attention, attention_decoding, sharding, spans

# The cache of one kind of layer: by name, each array with a leading L axis.
State = dict[str, Array]

# The cache axes of a block that attends once, as most do.
KEYS_AND_VALUES = {"keys": "L B S K H", "values": "L B S K H"}


class Narrow(NamedTuple):
    """Attention over a latent narrower than keys and values, which alone is cached.

    `widened` expands cached latents [B, S, R] into keys and values. Decoding never expands them:
    `asking` projects queries to [B, T, N, R] so that they give the same scores on latents, and
    `after` projects the outputs, [B, T, N, R], to values.
    """

    widened: Callable[[Array], tuple[Array, Array]]
    asking: Callable[[Array], Array]
    after: Callable[[Array], Array]


class Recurrence(NamedTuple):
    """A recurrent rule by which tokens read earlier ones, in place of attention.

    `whole(where, *inputs)` gives the output of each token of whole rows, and the state after the
    last token of each text if a row is one text from index 0 to its length (it is never used for
    packed rows). `step(state, *inputs)` gives the same for one more token of each row, with inputs
    [B, 1, …]. States are in float32.
    """

    whole: Callable[..., tuple[Array, Array]]
    step: Callable[..., tuple[Array, Array]]


@runtime_checkable
class Mix(Protocol):
    """The object that a block gets; a block that only calls it may type it `attention.Attend`."""

    def __call__(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K U"],
        **how,
    ) -> Float[Array, "B T N U"]:  # fmt: skip
        """Softmax attention; `how` takes the keyword arguments of `attention.attend`."""
        ...

    def over(
        self, q: Float[Array, "B T N H"], name: str, kept: Float[Array, "B S R"], narrow: Narrow,
        **how,
    ) -> Array:  # fmt: skip
        """Attention over a narrower latent, which is cached under `name`."""
        ...

    def recur(self, name: str, rule: Recurrence, *inputs: Array) -> Array:
        """The output of each token by `rule`, whose state is cached under `name`."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Whole:
    """The Mix of training: over rows of whole texts, without a cache."""

    where: spans.Spans
    backend: str | None = dataclasses.field(metadata={"static": True})

    def __call__(self, q: Array, k: Array, v: Array, **how) -> Array:
        """Softmax attention over the spans."""
        return attention.attend(q, k, v, self.where, backend=self.backend, **how)

    def over(self, q: Array, name: str, kept: Array, narrow: Narrow, **how) -> Array:
        """Softmax attention over keys and values expanded from a latent."""
        del name
        return self(q, *narrow.widened(kept), **how)

    def recur(self, name: str, rule: Recurrence, *inputs: Array) -> Array:
        """Runs the recurrence over whole rows, and drops the final state."""
        del name
        return rule.whole(self.where, *inputs)[0]


class Beginning:
    """The `Mix` of prefill for layer `i` of its kind: over whole prompts, filling the cache.

    `state` is the cache of the layers of that kind, before the block is called and after it. The
    object lives only for that call: the cache goes in and comes out as arrays.
    """

    def __init__(self, state: State, i: Array, where: spans.Spans, backend: str | None):
        self.state, self.i, self.where, self.backend = state, i, where, backend

    def __call__(self, q: Array, k: Array, v: Array, **how) -> Array:
        """Causal attention within each prompt, whose keys and values are cached."""
        self._keep("keys", k)
        self._keep("values", v)
        return attention.attend(q, k, v, self.where, backend=self.backend, **how)

    def over(self, q: Array, name: str, kept: Array, narrow: Narrow, **how) -> Array:
        """The same, over keys and values expanded from the cached latent."""
        self._keep(name, kept)
        k, v = narrow.widened(kept)
        return attention.attend(q, k, v, self.where, backend=self.backend, **how)

    def recur(self, name: str, rule: Recurrence, *inputs: Array) -> Array:
        """Runs the recurrence from the start of each prompt, and caches the final state."""
        out, after = rule.whole(self.where, *inputs)
        self.state = self.state | {name: self.state[name].at[self.i].set(after)}
        return out

    def _keep(self, name: str, new: Float[Array, "B T *each"]) -> None:
        at = (self.i, *[jnp.zeros((), self.i.dtype)] * new.ndim)
        whole = jax.lax.dynamic_update_slice(self.state[name], new[None], at)
        self.state = self.state | {name: whole}


class Prompts(NamedTuple):
    """The prompt cache of one kind of layer, [L, P, S, …]; several answers share a prompt."""

    kept: State
    lengths: Int[Array, " P"]


class Growing:
    """The `Mix` of decoding for layer `i` of its kind: one more token of each answer.

    `state` is the cache of the answers only, [L, B, …], with the answers to one prompt next to each
    other. As in `Beginning`, it is the cache before the block is called and after it.
    """

    def __init__(self, state: State, i: Array, where: spans.Spans, prompts: Prompts):
        self.state, self.i, self.prompts = state, i, prompts
        self.positions = where.positions[:, 0]

    def __call__(self, q: Array, k: Array, v: Array, **how) -> Array:
        """Writes the token's key and value into the cache; the token sees all before it."""
        return self._attend(q, [self._kept("keys", k), self._kept("values", v)], **how)

    def over(self, q: Array, name: str, kept: Array, narrow: Narrow, **how) -> Array:
        """The same, directly over cached latents: one per token, key and value for all heads."""
        one = [x[:, :, None] for x in self._kept(name, kept)]
        return narrow.after(self._attend(narrow.asking(q), [one, one], **how))

    def recur(self, name: str, rule: Recurrence, *inputs: Array) -> Array:
        """Continues the recurrence from the cached state."""
        out, after = rule.step(self.state[name][self.i], *inputs)
        self.state = self.state | {name: self.state[name].at[self.i].set(after)}
        return out

    def _attend(self, q: Array, kept: Sequence[Sequence[Array]], **how) -> Array:
        of_prompts, of_answers = zip(*kept, strict=True)
        return attention_decoding.attend(
            q, of_prompts, of_answers, self.prompts.lengths, self.positions, **how
        )

    def _kept(self, name: str, new: Float[Array, "B 1 *each"]) -> tuple[Array, Array]:
        """This layer's cache of prompts and of answers, after adding the new token."""
        rows, lengths = jnp.arange(len(new)), self.prompts.lengths
        places = self.positions - jnp.repeat(lengths, len(rows) // len(lengths))
        grown = self.state[name].at[self.i, rows, places].set(new[:, 0])
        self.state = self.state | {name: grown}
        return self.prompts.kept[name][self.i], grown[self.i]


def blank(axes: Mapping[str, str], sizes: Mapping[str, int], dtype: jax.typing.DTypeLike) -> State:
    """An empty cache of zeros, sharded over the devices by its axes.

    Per-token arrays (S) have the dtype of activations; recurrent states are in float32.
    """

    def zeros(own: str) -> Array:
        shape = [sizes[letter] for letter in own.split()]
        wide = jnp.zeros(shape, dtype if by_token(own) else jnp.float32)
        return sharding.constrain(wide, own)

    return {name: zeros(own) for name, own in axes.items()}


def by_token(axes: str) -> bool:
    """Whether a cached array has an entry per token, rather than being a recurrent state."""
    return "S" in axes.split()

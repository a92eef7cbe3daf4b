"""What a block mixes its tokens with: attention, recurrences, and what generation keeps of them.

A block is handed one object, calls it with queries, keys and values, and where it is recurrent
asks it to `recur`. In training that object knows where the tokens of whole rows stand; in
generation it also has what was kept of the tokens before these. A block need not know which.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.parts import attention, attention_decoding, sharding, spans

# What the layers of one kind keep: by name, each array with a leading L.
State = dict[str, Array]

# The axes of what a block keeps that attends once, as most do.
KEYS_AND_VALUES = {"keys": "L B S K H", "values": "L B S K H"}


class Narrow(NamedTuple):
    """How heads attend over something narrower than keys and values, which alone is kept.

    `widened` makes keys and values of what is kept of tokens, [B, S, R]. In decoding they are never
    made: `asking` turns queries into queries [B, T, N, R] of what is kept, with the same scores,
    and `after` turns what those gather, [B, T, N, R], into values.
    """

    widened: Callable[[Array], tuple[Array, Array]]
    asking: Callable[[Array], Array]
    after: Callable[[Array], Array]


class Recurrence(NamedTuple):
    """How tokens gather what comes before them, if not by attention.

    `whole(where, *inputs)` gives what each token of whole rows gathers, and the state after the
    last token of each text, where a row is one text from place 0 to its length (rows in which
    several are packed are never asked for it). `step(state, *inputs)` gives the same for one more
    token of each row: inputs [B, 1, …]. A state is kept in float32.
    """

    whole: Callable[..., tuple[Array, Array]]
    step: Callable[..., tuple[Array, Array]]


@runtime_checkable
class Mix(Protocol):
    """What a block is handed; one that only calls it may name it `attention.Attend`."""

    def __call__(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K U"],
        **how,
    ) -> Float[Array, "B T N U"]:  # fmt: skip
        """Softmax attention: `how` as in `attention.attend`."""
        ...

    def over(
        self, q: Float[Array, "B T N H"], name: str, kept: Float[Array, "B S R"], narrow: Narrow,
        **how,
    ) -> Array:  # fmt: skip
        """The same over something narrower, which is kept under `name`."""
        ...

    def recur(self, name: str, rule: Recurrence, *inputs: Array) -> Array:
        """What each token gathers by `rule`; its state is kept under `name`."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Whole:
    """A Mix over rows of whole texts, of which nothing is kept: training."""

    where: spans.Spans
    backend: str | None = dataclasses.field(metadata={"static": True})

    def __call__(self, q: Array, k: Array, v: Array, **how) -> Array:
        """Softmax attention over the spans."""
        return attention.attend(q, k, v, self.where, backend=self.backend, **how)

    def over(self, q: Array, name: str, kept: Array, narrow: Narrow, **how) -> Array:
        """The same, of keys and values that are made of something narrower."""
        del name
        return self(q, *narrow.widened(kept), **how)

    def recur(self, name: str, rule: Recurrence, *inputs: Array) -> Array:
        """Over whole rows; the state after them is not kept."""
        del name
        return rule.whole(self.where, *inputs)[0]


class Beginning:
    """The `Mix` of layer `i` of its kind over whole prompts; it keeps what later tokens need.

    `state` is what the layers of that kind keep, before the block is called and after it. This
    object lives no longer: state goes in and comes out as arrays.
    """

    def __init__(self, state: State, i: Array, where: spans.Spans, backend: str | None):
        self.state, self.i, self.where, self.backend = state, i, where, backend

    def __call__(self, q: Array, k: Array, v: Array, **how) -> Array:
        """A prompt sees itself."""
        self._keep("keys", k)
        self._keep("values", v)
        return attention.attend(q, k, v, self.where, backend=self.backend, **how)

    def over(self, q: Array, name: str, kept: Array, narrow: Narrow, **how) -> Array:
        """The same, of keys and values that are made of what is kept."""
        self._keep(name, kept)
        k, v = narrow.widened(kept)
        return attention.attend(q, k, v, self.where, backend=self.backend, **how)

    def recur(self, name: str, rule: Recurrence, *inputs: Array) -> Array:
        """From the beginning."""
        out, after = rule.whole(self.where, *inputs)
        self.state = self.state | {name: self.state[name].at[self.i].set(after)}
        return out

    def _keep(self, name: str, new: Float[Array, "B T *each"]) -> None:
        at = (self.i, *[0] * new.ndim)
        whole = jax.lax.dynamic_update_slice(self.state[name], new[None], at)
        self.state = self.state | {name: whole}


class Prompts(NamedTuple):
    """What the layers of one kind kept of prompts, [L, P, S, …]; several answers share one."""

    kept: State
    lengths: Int[Array, " P"]


class Growing:
    """The `Mix` of layer `i` of its kind over one more token of each answer.

    `state` is what the layers keep of answers alone, [L, B, …]: those to one prompt stand next to
    each other. As of a `Beginning`, it is what is kept before the block is called and after it.
    """

    def __init__(self, state: State, i: Array, where: spans.Spans, prompts: Prompts):
        self.state, self.i, self.prompts = state, i, prompts
        self.positions = where.positions[:, 0]

    def __call__(self, q: Array, k: Array, v: Array, **how) -> Array:
        """A token goes to its place, and sees all before it."""
        return self._attend(q, [self._kept("keys", k), self._kept("values", v)], **how)

    def over(self, q: Array, name: str, kept: Array, narrow: Narrow, **how) -> Array:
        """The same, of what is kept itself: for all heads one key, which is the value as well."""
        one = [x[:, :, None] for x in self._kept(name, kept)]
        return narrow.after(self._attend(narrow.asking(q), [one, one], **how))

    def recur(self, name: str, rule: Recurrence, *inputs: Array) -> Array:
        """From the state that was kept."""
        out, after = rule.step(self.state[name][self.i], *inputs)
        self.state = self.state | {name: self.state[name].at[self.i].set(after)}
        return out

    def _attend(self, q: Array, kept: Sequence[Sequence[Array]], **how) -> Array:
        of_prompts, of_answers = zip(*kept, strict=True)
        return attention_decoding.attend(
            q, of_prompts, of_answers, self.prompts.lengths, self.positions, **how
        )

    def _kept(self, name: str, new: Float[Array, "B 1 *each"]) -> tuple[Array, Array]:
        """What is there of this layer, of prompts and of answers, with a token more."""
        rows, lengths = jnp.arange(len(new)), self.prompts.lengths
        places = self.positions - jnp.repeat(lengths, len(rows) // len(lengths))
        grown = self.state[name].at[self.i, rows, places].set(new[:, 0])
        self.state = self.state | {name: grown}
        return self.prompts.kept[name][self.i], grown[self.i]


def blank(axes: Mapping[str, str], sizes: Mapping[str, int], dtype: jax.typing.DTypeLike) -> State:
    """A state before any token: zeros, laid out over the devices as the axes say.

    What has a place for each token (S) has the dtype of activations; a running state has float32.
    """

    def zeros(own: str) -> Array:
        shape = [sizes[letter] for letter in own.split()]
        wide = jnp.zeros(shape, dtype if by_token(own) else jnp.float32)
        return sharding.constrain(wide, own)

    return {name: zeros(own) for name, own in axes.items()}


def by_token(axes: str) -> bool:
    """Is this kept of each token, or does it run on from one to the next?"""
    return "S" in axes.split()

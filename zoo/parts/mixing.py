"""What a block mixes its tokens with: attention, recurrences, and what generation keeps of them.

A block is handed one object, calls it with queries, keys and values, and where it is recurrent
asks it to `recur`. In training that object knows where the tokens of whole rows stand; in
generation it also has what was kept of the tokens before these. A block need not know which.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.parts import attention, sharding, spans

# What the layers of one kind keep: by name, each array with a leading L.
State = dict[str, Array]

# The axes of what a block keeps that attends once, as most do.
KEYS_AND_VALUES = {"keys": "L B S K H", "values": "L B S K H"}


Made = Callable[..., tuple[Array, Array]]  # what is kept of tokens, by name -> keys and values


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
    """What a block that is recurrent is handed; one that only attends takes `attention.Attend`."""

    def __call__(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K U"],
        **how,
    ) -> Float[Array, "B T N U"]:  # fmt: skip
        """Softmax attention: `how` as in `attention.attend`."""
        ...

    def over(self, q: Float[Array, "B T N H"], made: Made, kept: dict[str, Array], **how) -> Array:
        """The same over keys and values `made` of arrays [B, S, …], which are kept instead."""
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

    def over(self, q: Array, made: Made, kept: dict[str, Array], **how) -> Array:
        """The same, of keys and values that are made of something narrower."""
        return self(q, *made(**kept), **how)

    def recur(self, name: str, rule: Recurrence, *inputs: Array) -> Array:
        """Over whole rows; the state after them is not kept."""
        del name
        return rule.whole(self.where, *inputs)[0]


class Growing:
    """A Mix of layer `i` of its kind in generation: over prompts, or over one more token a row.

    `state` is what the layers of that kind keep, before the block is called and after it. This
    object lives no longer: state goes in and comes out as arrays.
    """

    def __init__(
        self, state: State, i: Array, where: spans.Spans, backend: str | None, *, begins: bool
    ):
        self.state, self.i, self.where, self.backend, self.begins = state, i, where, backend, begins

    def __call__(self, q: Array, k: Array, v: Array, **how) -> Array:
        """A prompt sees itself; a further token goes to its place, and sees all before it."""
        return self.over(q, lambda keys, values: (keys, values), {"keys": k, "values": v}, **how)

    def over(self, q: Array, made: Made, kept: dict[str, Array], **how) -> Array:
        """The same, of keys and values that are made of what is kept of each token."""
        for name, new in kept.items():
            self._keep(name, new)
        if self.begins:
            return attention.attend(q, *made(**kept), self.where, backend=self.backend, **how)
        keys, values = made(**{name: self.state[name][self.i] for name in kept})
        places = jnp.broadcast_to(jnp.arange(keys.shape[1], dtype=jnp.int32), keys.shape[:2])
        return attention.attend(q, keys, values, self.where, key_positions=places, **how)

    def recur(self, name: str, rule: Recurrence, *inputs: Array) -> Array:
        """From the beginning, or from the state that was kept."""
        if self.begins:
            out, after = rule.whole(self.where, *inputs)
        else:
            out, after = rule.step(self.state[name][self.i], *inputs)
        self.state = self.state | {name: self.state[name].at[self.i].set(after)}
        return out

    def _keep(self, name: str, new: Float[Array, "B T *each"]) -> None:
        kept = self.state[name]
        if self.begins:
            kept = jax.lax.dynamic_update_slice(kept, new[None], (self.i, *[0] * new.ndim))
        else:
            rows = jnp.arange(len(new))
            kept = kept.at[self.i, rows, self.where.positions[:, 0]].set(new[:, 0])
        self.state = self.state | {name: kept}


def blank(axes: Mapping[str, str], sizes: Mapping[str, int], dtype: jax.typing.DTypeLike) -> State:
    """A state before any token: zeros, laid out over the devices as the axes say.

    What has a place for each token (S) has the dtype of activations; a running state has float32.
    """

    def zeros(own: str) -> Array:
        shape = [sizes[letter] for letter in own.split()]
        wide = jnp.zeros(shape, dtype if "S" in own.split() else jnp.float32)
        return sharding.constrain(wide, own)

    return {name: zeros(own) for name, own in axes.items()}

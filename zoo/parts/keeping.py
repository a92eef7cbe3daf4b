"""The KV caches and recurrent states of a model in generation, for prompts and their answers.

The keys of a prompt with several answers are stored once.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from zoo.parts import blocks, causal_lm, mixing, spans

State = dict[str, mixing.State]  # the cache of each kind of layer


def blank(model: causal_lm.CausalLM, rows: int, room: int) -> State:
    """An empty cache with `room` tokens in each row."""
    held = {"B": rows, "S": room}
    return {
        kind: mixing.blank(axes_of(model, kind), model.config.sizes_of(kind) | held, model.dtype)
        for kind in blocks.by_kind(model, model.blocks)
    }


def axes_of(model: causal_lm.CausalLM, kind: str) -> dict[str, str]:
    """The arrays that a layer of this kind caches: name -> axes."""
    return model.keeps.get(kind, mixing.KEYS_AND_VALUES)


@functools.partial(jax.jit, static_argnums=(2, 3))
def begun(model: causal_lm.CausalLM, read: State, answers: int, room: int) -> State:
    """The cache for `answers` answers to each prompt, before their first token.

    A recurrent state is copied from the prompt; per-token arrays start out empty.
    """
    P = jax.tree.leaves(read)[0].shape[1]
    free = blank(model, P * answers, room)
    running = lambda kind, name: jnp.repeat(read[kind][name], answers, axis=1)
    return {
        kind: {
            name: x if mixing.by_token(axes_of(model, kind)[name]) else running(kind, name)
            for name, x in some.items()
        }
        for kind, some in free.items()
    }


def forward(
    model: causal_lm.CausalLM,
    tokens: Int[Array, "B T"],
    where: spans.Spans,
    kept: State,
    prompts: dict[str, mixing.Prompts] | None = None,
) -> tuple[Float[Array, "B T D"], State]:
    """Runs the model on new tokens with a cache; returns hidden states and the new cache.

    The tokens are whole prompts (prefill, with an empty cache) or, with `prompts`, one more token
    of each answer (decoding).
    """
    keeping = Keeping(kept, prompts)
    hidden = model.hidden(tokens, where, keeping)
    return hidden, keeping.state


class Keeping:
    """A stand-in for `stack.run` that reads and updates the cache `state`."""

    def __init__(self, state: State, prompts: dict[str, mixing.Prompts] | None):
        self.state, self.prompts = state, prompts

    def __call__(
        self,
        model: causal_lm.CausalLM,
        x: Array,
        where: spans.Spans,
        *shared: PyTree,
        each: PyTree = None,
        handed: PyTree = None,
    ) -> Array:
        layout, weights = blocks.taken_apart(model)
        graphs, each = dict(layout.graphs), blocks.by_kind(model, each)

        def layer(carry: tuple[blocks.Entering, State], kind: str, i: Array) -> tuple:
            entering, state = carry
            mix = (
                mixing.Beginning(state[kind], i, where, model.attention)
                if self.prompts is None
                else mixing.Growing(state[kind], i, where, self.prompts[kind])
            )
            own = blocks.at(weights[kind], i), blocks.at(each[kind], i)
            left = blocks.block_of(graphs[kind], entering, *own, (mix, *shared))
            return (left, state | {kind: mix.state}), None

        (left, self.state), _ = blocks.through(layout, layer, ((x, handed), self.state))
        return left[0]

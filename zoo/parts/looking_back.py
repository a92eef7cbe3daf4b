"""Gemma 4's attention: wider heads in full-attention layers; layers that reuse earlier keys.

Agrees with Gemma4TextAttention in transformers/models/gemma4/modeling_gemma4.py.
"""

import functools
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.parts import attention, layers, rope
from zoo.parts.hf_config import FULL, SLIDING

# Kinds of layers that reuse the keys and values of an earlier one.
LOOKS_BACK = {SLIDING: "sliding_shared", FULL: "full_shared"}
KINDS = (SLIDING, FULL, *LOOKS_BACK.values())

KeysAndValues = tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]
Handed = dict[str, KeysAndValues]  # from layer to layer, by kind


def kinds(config: Any) -> tuple[str, ...]:
    """The kind of every layer: sliding or full, with keys of its own or an earlier layer's."""
    first = len(config.layer_types) - (config.num_kv_shared_layers or 0)
    shared = map(LOOKS_BACK.get, config.layer_types[first:])
    return (*config.layer_types[:first], *filter(None, shared))


def sizes_of(config: Any, kind: str, sizes: dict[str, int]) -> dict[str, int]:
    """Axis sizes per kind: full-attention layers have wider heads, maybe other key heads."""
    if kind in LOOKS_BACK.values() and config.use_double_wide_mlp:
        sizes = sizes | {"F": 2 * config.intermediate_size}
    if sliding(kind):
        return sizes
    K = config.num_global_key_value_heads if config.attention_k_eq_v else None
    return sizes | {"H": config.global_head_dim, "K": K or config.num_key_value_heads}


def sliding(kind: str) -> bool:
    """Whether the layers of a kind have a sliding window."""
    return kind in (SLIDING, LOOKS_BACK[SLIDING])


def nothing_yet(config: Any, x: Float[Array, "B T D"]) -> Handed | None:
    """The initial keys and values to hand on, if later layers reuse earlier ones."""
    if not config.num_kv_shared_layers:
        return None
    sizes = {kind: config.sizes_of(kind) for kind in (SLIDING, FULL)}
    shapes = {kind: (*x.shape[:2], own["K"], own["H"]) for kind, own in sizes.items()}
    return {kind: (jnp.zeros(shape, x.dtype),) * 2 for kind, shape in shapes.items()}


class Attention(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs, kind: str):
        sizes = config.sizes_of(kind)
        self.q = layers.weight("L D N H", sizes, rngs)
        self.o = layers.weight("L N H D", sizes, rngs)
        norm = functools.partial(layers.RmsNorm, eps=config.rms_norm_eps, wide=True)
        self.q_norm = norm("L H", sizes, rngs)
        self.looks_back = kind in LOOKS_BACK.values()
        if not self.looks_back:
            self.k = layers.weight("L D K H", sizes, rngs)
            keys_alone = config.attention_k_eq_v and kind == FULL
            self.v = None if keys_alone else layers.weight("L D K H", sizes, rngs)
            self.k_norm = norm("L H", sizes, rngs)
        self.eps = config.rms_norm_eps
        self.window = config.sliding_window if sliding(kind) else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turn: rope.Turn,
        before: KeysAndValues | None,
    ) -> tuple[Float[Array, "B T D"], KeysAndValues]:
        """Returns the output and the keys and values used: its own or those from `before`."""
        q = rope.rotate(self.q_norm(layers.einsum("BTD,DNH->BTNH", x, self.q)), turn)
        seen = before if self.looks_back else self._own(x, turn)
        assert seen is not None
        mixed = attend(q, *seen, scale=1.0, window=self.window)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o), seen

    def _own(self, x: Float[Array, "B T D"], turn: rope.Turn) -> KeysAndValues:
        k = layers.einsum("BTD,DKH->BTKH", x, self.k)
        v = k if self.v is None else layers.einsum("BTD,DKH->BTKH", x, self.v)
        return rope.rotate(self.k_norm(k), turn), layers.unit(v, self.eps).astype(x.dtype)


# Our weight -> its HF name within a layer and the order of its axes there.
HF_WEIGHTS = {
    "attention.q":            ("self_attn.q_proj.weight", "(N H) D"),
    "attention.k":            ("self_attn.k_proj.weight", "(K H) D"),
    "attention.v":            ("self_attn.v_proj.weight", "(K H) D"),
    "attention.o":            ("self_attn.o_proj.weight", "D (N H)"),
    "attention.q_norm.scale": ("self_attn.q_norm.weight", "H"),
    "attention.k_norm.scale": ("self_attn.k_norm.weight", "H"),
}  # fmt: skip


def unused(config: Any) -> tuple[str, ...]:
    """Patterns of the unused key and value weights in files, for layers that reuse earlier ones.

    No program uses them, but some require them.
    """
    count, shared = len(config.layer_types), config.num_kv_shared_layers or 0
    of_them = "|".join(map(str, range(count - shared, count)))
    inside = r"^(model|model\.language_model|language_model\.model)\.layers"
    return (rf"{inside}\.({of_them})\.self_attn\.([kv]_proj|k_norm)\.",) if shared else ()

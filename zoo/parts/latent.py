"""Multi-head latent attention: keys and values come from a narrow latent, which alone is cached.

One part of each head has no positions; rope rotates the other, whose key all heads share.

Source: https://arxiv.org/abs/2405.04434, Eq. 9 to 19.
"""

from collections.abc import Mapping
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from checkpoints_io.errors import BadInput
from zoo.parts import layers, mixing, rope

# What a layer caches in generation: the latent after its norm, and the rotated part of the keys.
KEEPS = {"latents": "L B S R"}
EPS = 1e-6  # of the norms of latents, whatever a config says of the others

# Derived from the other widths: transformers works them out, and writes them too.
IGNORED = frozenset({"head_dim", "qk_head_dim"})


def read(hf: Mapping[str, object]) -> dict[str, object]:
    """Drops the number of key heads from a config.json: it equals that of query heads.

    Raises:
      ValueError: the numbers differ.
    """
    rest, heads = dict(hf), hf.get("num_attention_heads")
    if (keys := rest.pop("num_key_value_heads", None)) not in (None, heads):
        raise BadInput(
            f"config.json: num_key_value_heads is {keys!r}, and latent attention has as many as "
            f"num_attention_heads, {heads!r}"
        )
    return rest


def written(said: Mapping[str, object]) -> dict[str, object]:
    """Adds the number of key heads that `read` drops."""
    return dict(said) | {"num_key_value_heads": said["num_attention_heads"]}


def sizes_of(config: Any) -> dict[str, int]:
    """The axis sizes: R is what is cached per token, Q what a head computes from the latent.

    The latents themselves are narrower, and that of queries has its own width; each is R in the
    weights that produce and read it.
    """
    nope, turned, U = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    return {
        "K": config.num_attention_heads, "H": nope + turned, "U": U, "Q": nope + U,
        "R": config.kv_lora_rank + turned,
    }  # fmt: skip


def scale_of(config: Any) -> float:
    """The scale of the attention scores, which YaRN changes here in addition to the angles."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    ropes = config.rope_parameters
    if not ropes.mscale_all_dim or not ropes.factor or ropes.factor <= 1:
        return scale
    return scale * (0.1 * ropes.mscale_all_dim * math.log(ropes.factor) + 1.0) ** 2


class LatentAttention(nnx.Module):
    def __init__(self, config: Any, sizes: dict[str, int], rngs: nnx.Rngs):
        if config.q_lora_rank:
            low = sizes | {"R": config.q_lora_rank}
            self.q_down = layers.weight("L D R", low, rngs)
            self.q_norm = layers.RmsNorm("L R", low, rngs, eps=EPS)
            self.q_up = layers.weight("L R N H", low, rngs)
        else:
            self.q = layers.weight("L D N H", sizes, rngs)
        low = sizes | {"R": config.kv_lora_rank}
        self.kv_down = layers.weight("L D R", sizes, rngs)
        self.kv_norm = layers.RmsNorm("L R", low, rngs, eps=EPS)
        self.kv_up = layers.weight("L R N Q", low, rngs)
        self.o = layers.weight("L N U D", sizes, rngs)
        self.rank, self.unturned = config.kv_lora_rank, config.qk_nope_head_dim
        self.has_query_latent = bool(config.q_lora_rank)
        self.scale = scale_of(config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mix: mixing.Mix,
        turn: rope.Turn,
        grown: Float[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The attention output of each token; queries are scaled by `grown` if it is given."""
        if self.has_query_latent:
            latent = self.q_norm(layers.einsum("BTD,DR->BTR", x, self.q_down))
            q = layers.einsum("BTR,RNH->BTNH", latent, self.q_up)
        else:
            q = layers.einsum("BTD,DNH->BTNH", x, self.q)
        q, turned = jnp.split(q, [self.unturned], axis=-1)
        q = jnp.concatenate([q, rope.rotate_neighbours(turned, turn)], axis=-1)
        if grown is not None:
            q = q * grown.astype(q.dtype)[..., None, None]
        latent, k = jnp.split(layers.einsum("BTD,DR->BTR", x, self.kv_down), [self.rank], axis=-1)
        k = rope.rotate_neighbours(k[:, :, None], turn)[:, :, 0]
        kept = jnp.concatenate([self.kv_norm(latent), k], axis=-1)
        narrow = mixing.Narrow(self._heads, self._asking, self._after)
        mixed = mix.over(q, "latents", kept, narrow, scale=self.scale)
        return layers.einsum("BTNU,NUD->BTD", mixed, self.o)

    def _asking(self, q: Float[Array, "B T N H"]) -> Float[Array, "B T N R"]:
        """Absorbs the key projection into the queries, so that they score the latents directly."""
        q, turned = jnp.split(q, [self.unturned], axis=-1)
        none = jnp.zeros((*q.shape[:3], self.rank), q.dtype)
        # The transpose of the key projection, taken by its gradient, so that adapters of the weight
        # are included as they are in the keys.
        heads, back = jax.vjp(self._of_each_head, none)
        wide = jnp.pad(q, [(0, 0)] * 3 + [(0, heads.shape[-1] - self.unturned)])
        return jnp.concatenate([back(wide)[0], turned], axis=-1)

    def _after(self, gathered: Float[Array, "B T N R"]) -> Float[Array, "B T N U"]:
        """Projects what each head attended to from latents to values."""
        return self._of_each_head(gathered[..., : self.rank])[..., self.unturned :]

    def _of_each_head(self, latents: Float[Array, "B T N R"]) -> Float[Array, "B T N Q"]:
        """Projects a separate latent for each head."""
        return layers.einsum("BTNR,RNQ->BTNQ", latents, self.kv_up)

    def _heads(
        self, latents: Float[Array, "B S R"]
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N U"]]:
        """The keys and values of every head."""
        latent, turned = jnp.split(latents, [self.rank], axis=-1)
        k, v = jnp.split(layers.einsum("BSR,RNQ->BSNQ", latent, self.kv_up), [self.unturned], -1)
        turned = jnp.broadcast_to(turned[:, :, None], (*k.shape[:3], turned.shape[-1]))
        return jnp.concatenate([k, turned], axis=-1), v


# Our weight -> its HF name within a layer and the order of its axes there.
HF_WEIGHTS = {
    "attention.q":             ("self_attn.q_proj.weight",             "(N H) D"),
    "attention.q_down":        ("self_attn.q_a_proj.weight",           "R D"),
    "attention.q_norm.scale":  ("self_attn.q_a_layernorm.weight",      "R"),
    "attention.q_up":          ("self_attn.q_b_proj.weight",           "(N H) R"),
    "attention.kv_down":       ("self_attn.kv_a_proj_with_mqa.weight", "R D"),
    "attention.kv_norm.scale": ("self_attn.kv_a_layernorm.weight",     "R"),
    "attention.kv_up":         ("self_attn.kv_b_proj.weight",          "(N Q) R"),
    "attention.o":             ("self_attn.o_proj.weight",             "D (N U)"),
}  # fmt: skip

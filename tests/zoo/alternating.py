"""An architecture whose layers are of several kinds, as an architecture's file would have it.

Layers that slide have heads of 8, those that see everything one key head of 12, as in Gemma 4; a
third kind is a recurrence, whose state decays.
"""

import dataclasses
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.parts import attention, causal_lm, hf_config, layers, mixing, mlp, rope, spans, stack

DECAY = 0.8


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    model_type: ClassVar[str] = "alternating"
    architecture: ClassVar[str] = "AlternatingForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    global_head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.Rope
    sliding_window: int
    layer_types: tuple[str, ...]

    layers_may_be: ClassVar[frozenset[str]] = frozenset(
        {"sliding_attention", "full_attention", "decay"}
    )

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.layer_types

    def sizes_of(self, kind: str) -> dict[str, int]:
        full = {"H": self.global_head_dim, "K": 1} if kind == "full_attention" else {}
        return super().sizes_of(kind) | full


class Attention(nnx.Module):
    def __init__(self, sizes: dict[str, int], rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", sizes, rngs)
        self.k = layers.weight("L D K H", sizes, rngs)
        self.v = layers.weight("L D K H", sizes, rngs)
        self.o = layers.weight("L N H D", sizes, rngs)
        self.scale = sizes["H"] ** -0.5

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn, window: Any
    ) -> Float[Array, "B T D"]:
        q = rope.rotate(layers.einsum("BTD,DNH->BTNH", x, self.q), turn)
        k = rope.rotate(layers.einsum("BTD,DKH->BTKH", x, self.k), turn)
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        mixed = attend(q, k, v, scale=self.scale, window=window)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Sliding(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        sizes = config.sizes_of("sliding_attention")
        self.attention_norm = layers.RmsNorm("L D", sizes, rngs, eps=config.rms_norm_eps)
        self.attention = Attention(sizes, rngs)
        self.mlp_norm = layers.RmsNorm("L D", sizes, rngs, eps=config.rms_norm_eps)
        self.mlp = mlp.GatedMlp(sizes, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turns: dict[str, rope.Turn],
        window: Int[Array, ""],
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), attend, turns["narrow"], window)
        return x + self.mlp(self.mlp_norm(x))


class Full(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        sizes = config.sizes_of("full_attention")
        self.attention_norm = layers.RmsNorm("L D", sizes, rngs, eps=config.rms_norm_eps)
        self.attention = Attention(sizes, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turns: dict[str, rope.Turn]
    ) -> Float[Array, "B T D"]:
        return x + self.attention(self.attention_norm(x), attend, turns["wide"], None)


def whole(
    where: spans.Spans, v: Float[Array, "B T N H"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N H"]]:
    """What a token sees counts less by DECAY for each position that it is back."""
    v = v.astype(jnp.float32)
    seen = spans.seen(where.first, where.last, jnp.arange(v.shape[1]))
    back = where.positions[:, :, None] - where.positions[:, None, :]
    shares = jnp.where(seen, DECAY ** jnp.maximum(back, 0).astype(jnp.float32), 0)
    gathered = layers.dot("BTS,BSNH->BTNH", shares, v)
    ends = (where.lengths[:, :1] - 1)[..., None, None]
    return gathered, jnp.take_along_axis(gathered, ends, axis=1)[:, 0]


def step(
    state: Float[Array, "B N H"], v: Float[Array, "B 1 N H"]
) -> tuple[Float[Array, "B 1 N H"], Float[Array, "B N H"]]:
    state = DECAY * state + v[:, 0].astype(jnp.float32)
    return state[:, None], state


class Decay(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        sizes = config.sizes_of("decay")
        self.norm = layers.RmsNorm("L D", sizes, rngs, eps=config.rms_norm_eps)
        self.v = layers.weight("L D N H", sizes, rngs)
        self.o = layers.weight("L N H D", sizes, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], mix: mixing.Mix, turns: dict[str, rope.Turn]
    ) -> Float[Array, "B T D"]:
        v = layers.einsum("BTD,DNH->BTNH", self.norm(x), self.v)
        gathered = mix.recur("state", mixing.Recurrence(whole, step), v).astype(x.dtype)
        return x + layers.einsum("BTNH,NHD->BTD", jax.nn.silu(gathered), self.o)


class Model(causal_lm.CausalLM):
    Block = {"sliding_attention": Sliding, "full_attention": Full, "decay": Decay}  # noqa: RUF012
    keeps = {"decay": {"state": "L B N H"}}  # noqa: RUF012

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        ropes = self.config.rope_parameters
        widths = {"narrow": self.config.head_dim, "wide": self.config.global_head_dim}
        turns = {name: rope.turn(ropes, width, where) for name, width in widths.items()}
        count = self.config.kinds.count("sliding_attention")  # a window of each layer's own
        windows = self.config.sliding_window + jnp.arange(count, dtype=jnp.int32)
        x = layers.embed(self.embedding, tokens, self.dtype)
        return self.norm(run(self, x, where, turns, each={"sliding_attention": windows}))


HF_WEIGHTS = {
    "embedding": ("model.embed_tokens.weight", "V D"),
    "norm.scale": ("model.norm.weight", "D"),
    "head": ("lm_head.weight", "V D"),
    "blocks.decay.norm.scale": ("model.layers.{L}.input_layernorm.weight", "D"),
    "blocks.decay.v": ("model.layers.{L}.decay.v_proj.weight", "(N H) D"),
    "blocks.decay.o": ("model.layers.{L}.decay.o_proj.weight", "D (N H)"),
}
for _kind in ("sliding_attention", "full_attention"):
    HF_WEIGHTS |= {
        f"blocks.{_kind}.attention_norm.scale": ("model.layers.{L}.input_layernorm.weight", "D"),
        f"blocks.{_kind}.attention.q": ("model.layers.{L}.self_attn.q_proj.weight", "(N H) D"),
        f"blocks.{_kind}.attention.k": ("model.layers.{L}.self_attn.k_proj.weight", "(K H) D"),
        f"blocks.{_kind}.attention.v": ("model.layers.{L}.self_attn.v_proj.weight", "(K H) D"),
        f"blocks.{_kind}.attention.o": ("model.layers.{L}.self_attn.o_proj.weight", "D (N H)"),
    }
HF_WEIGHTS |= {
    "blocks.sliding_attention.mlp_norm.scale": ("model.layers.{L}.mlp_norm.weight", "D"),
    "blocks.sliding_attention.mlp.gate": ("model.layers.{L}.mlp.gate_proj.weight", "F D"),
    "blocks.sliding_attention.mlp.up": ("model.layers.{L}.mlp.up_proj.weight", "F D"),
    "blocks.sliding_attention.mlp.down": ("model.layers.{L}.mlp.down_proj.weight", "D F"),
}

SHORT = {"s": "sliding_attention", "f": "full_attention", "d": "decay"}
LAYERS = "dssfssfs"  # one that leads, a pattern twice, and a part of it


def config_of(kinds: str) -> Config:
    return Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=len(kinds),
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=12,
        rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters=rope.Rope(rope_theta=1e4),
        sliding_window=4, layer_types=tuple(SHORT[kind] for kind in kinds),
    )  # fmt: skip


def untrained(kinds: str = LAYERS) -> Model:
    """With weights large enough to matter."""
    from tests.conftest import large_weights

    model = large_weights(Model(config_of(kinds), nnx.Rngs(0)), scale=0.3)
    model.attention = "dense"  # which compiles faster
    return model

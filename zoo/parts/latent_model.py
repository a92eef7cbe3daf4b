"""The model behind DeepSeek V2 and V3, GLM 4.7 Flash and Mistral 4: latent attention and experts.

Their Configs define the routing (`choice`) and other options of the experts (`of_experts`, passed
to `experts.GatedExperts`).
"""

from collections.abc import Callable
import functools
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from zoo.parts import (
    causal_lm,
    dense_first,
    latent,
    layers,
    mixing,
    mlp,
    pattern,
    rope,
    spans,
    stack,
)
from zoo.parts.dense_first import DENSE, SPARSE


class Block(nnx.Module):
    """All layers of a kind, stacked: every weight has a leading L axis."""

    def __init__(self, config: Any, rngs: nnx.Rngs, kind: str):
        sizes = config.sizes_of(kind)
        norm = lambda: layers.RmsNorm("L D", sizes, rngs, eps=config.rms_norm_eps)
        self.attention_norm = norm()
        self.attention = latent.LatentAttention(config, sizes, rngs)
        self.mlp_norm = norm()
        if kind == DENSE:
            self.mlp = mlp.GatedMlp(sizes, rngs)
        else:
            how = config.of_experts
            self.mlp = dense_first.WithShared(config, sizes, rngs, config.choice, **how)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mix: mixing.Mix,
        turn: rope.Turn,
        grown: Float[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), mix, turn, grown)
        return x + self.mlp(self.mlp_norm(x))


BLOCKS: dict[str, Callable[..., nnx.Module]] = {
    kind: functools.partial(Block, kind=kind) for kind in (DENSE, SPARSE)
}
KEEPS = dict.fromkeys((DENSE, SPARSE), latent.KEEPS)


class Model(causal_lm.CausalLM):
    Block: ClassVar = BLOCKS
    keeps: ClassVar = KEEPS

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.qk_rope_head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        return self.norm(run(self, x, where, turn))


# Our weight -> its HF name within a layer and the order of its axes there.
IN_EVERY_LAYER = {
    "attention_norm.scale": ("input_layernorm.weight", "D"),
    "mlp_norm.scale": ("post_attention_layernorm.weight", "D"),
    **latent.HF_WEIGHTS,
}


def table(of_experts: dict[str, tuple[str, str]] | None = None) -> dict[str, tuple[str, str]]:
    """The HF_WEIGHTS of an architecture, whose files may lay out experts differently."""
    mlps = dense_first.MLP_OF | {SPARSE: dense_first.MLP_OF[SPARSE] | (of_experts or {})}
    return {
        "embedding": ("model.embed_tokens.weight", "V D"),
        "norm.scale": ("model.norm.weight", "D"),
        "head": ("lm_head.weight", "V D"),
        **pattern.of_kinds({kind: IN_EVERY_LAYER | own for kind, own in mlps.items()}),
    }

"""Nemotron H and 3: each layer is Mamba-2, attention without positions, an MLP, or experts.

Agrees with transformers/models/nemotron_h/modeling_nemotron_h.py
(https://arxiv.org/abs/2504.03624, 2512.20848).
"""

import dataclasses
import functools
from typing import ClassVar

from flax import nnx
import jax
from jaxtyping import Array, Float, Int

from checkpoints_io.errors import BadInput
from zoo.parts import (
    attention,
    causal_lm,
    experts,
    hf_config,
    layers,
    mamba2,
    mixing,
    pattern,
    spans,
    stack,
)
from zoo.parts.hf_config import FULL
from zoo.parts.mamba2 import LINEAR

MLP, EXPERTS = "mlp", "moe"
SHORTEST = 0.001  # the smallest Mamba time step
KINDS = {"M": LINEAR, "*": FULL, "-": MLP, "E": EXPERTS}  # letters of hybrid_override_pattern


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "nemotron_h"
    architecture: ClassVar[str] = "NemotronHForCausalLM"
    layers_may_be: ClassVar[frozenset[str]] = frozenset(KINDS.values())
    tie_word_embeddings: ClassVar[bool] = False  # transformers ignores the key of this name
    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]  # called `layers_block_type` in the files
    num_hidden_layers: int
    layer_norm_epsilon: float
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    mamba_num_heads: int
    mamba_head_dim: int
    n_groups: int
    ssm_state_size: int
    conv_kernel: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    moe_latent_size: int | None  # the width of the experts' inputs, if not D
    routed_scaling_factor: float

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "attention_bias": False, "mlp_bias": False, "use_bias": False, "mamba_proj_bias": False,
        "use_conv_bias": True, "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu",
        "time_step_min": SHORTEST, "norm_topk_prob": True, "n_group": 1, "topk_group": 1,
        "residual_in_fp32": False, "sliding_window": None, "tie_word_embeddings": False,
    }  # fmt: skip
    # Keys that transformers does not read: duplicates of others, ropes, initial weights, chunks,
    # multi-token prediction layers.
    ignored: ClassVar[frozenset[str]] = frozenset({
        "norm_eps", "rms_norm_eps", "expand", "n_shared_experts", "moe_shared_expert_overlap",
        "rope_theta", "partial_rotary_factor", "time_step_floor", "time_step_max",
        "time_step_limit", "time_step_rank", "rescale_prenorm_residual", "chunk_size",
        "use_mamba_kernels", "mamba_ssm_cache_dtype", "num_logits_to_keep",
        "num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern",
    })  # fmt: skip
    assumed: ClassVar[dict[str, object]] = {
        "vocab_size": 131072, "hidden_size": 4096,
        "layer_norm_epsilon": 1e-5, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 21504, "mamba_num_heads": mamba2.HEADS,
        "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688, "routed_scaling_factor": 1.0,
    }  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer."""
        return self.layer_types

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        return super().sizes | {"E": self.n_routed_experts}

    def sizes_of(self, kind: str) -> dict[str, int]:
        """The axis sizes of one kind of layer, with those of the state space in its layers."""
        if kind != LINEAR:
            return super().sizes_of(kind)
        return super().sizes_of(kind) | mamba2.sizes_of(
            inner=self.mamba_num_heads * self.mamba_head_dim, heads=self.mamba_num_heads,
            groups=self.n_groups, state=self.ssm_state_size, taps=self.conv_kernel,
        )  # fmt: skip

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the kind of each layer, which files of transformers 4 spell as one word."""
        rest = dict(hf)
        word = rest.pop("hybrid_override_pattern", None)
        listed = rest.pop("layers_block_type", None) or rest.get("layer_types")
        if listed is None and word is not None:
            if not isinstance(word, str) or not word or set(word) - KINDS.keys():
                raise BadInput(f"config.json: hybrid_override_pattern is {word!r}: M, *, - or E")
            listed = [KINDS[letter] for letter in word]
        if isinstance(listed, list):
            rest["num_hidden_layers"] = len(listed)  # whatever the file says
        if (width := rest.pop("attention_head_dim", None)) is not None:
            rest.setdefault("head_dim", width)
        return rest | {"layer_types": mamba2.kinds(listed)}

    def to_hf(self) -> dict[str, object]:
        """The `config.json` of this Config, for a model that was not loaded from a folder."""
        said = super().to_hf()
        return said | {"layers_block_type": said.pop("layer_types")}


class Attention(nnx.Module):
    def __init__(self, config: Config, sizes: dict[str, int], rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", sizes, rngs)
        self.k = layers.weight("L D K H", sizes, rngs)
        self.v = layers.weight("L D K H", sizes, rngs)
        self.o = layers.weight("L N H D", sizes, rngs)
        self.scale = config.head_dim**-0.5

    def __call__(self, x: Float[Array, "B T D"], attend: attention.Attend) -> Float[Array, "B T D"]:
        q = layers.einsum("BTD,DNH->BTNH", x, self.q)
        k = layers.einsum("BTD,DKH->BTKH", x, self.k)
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        return layers.einsum("BTNH,NHD->BTD", attend(q, k, v, scale=self.scale), self.o)


class Mlp(nnx.Module):
    def __init__(self, sizes: dict[str, int], rngs: nnx.Rngs):
        self.up = layers.weight("L D F", sizes, rngs)
        self.down = layers.weight("L F D", sizes, rngs)

    def __call__(self, x: Float[Array, "B T D"], mix: mixing.Mix) -> Float[Array, "B T D"]:
        del mix  # an MLP mixes no tokens
        made = layers.einsum("BTD,DF->BTF", x, self.up)
        return layers.einsum("BTF,FD->BTD", _bent(made), self.down)


class Experts(nnx.Module):
    """Experts, over a narrower latent in the larger models, and an MLP for all tokens."""

    def __init__(self, config: Config, sizes: dict[str, int], rngs: nnx.Rngs):
        self.router = layers.router(sizes, rngs, wide=True)
        self.correction = layers.constant("L E", sizes)
        own = sizes | {"F": config.moe_intermediate_size}
        if config.moe_latent_size is not None:
            low = sizes | {"R": config.moe_latent_size}
            self.into = layers.weight("L D R", low, rngs)
            self.out = layers.weight("L R D", low, rngs)
            own |= {"D": config.moe_latent_size}
        self.up = layers.weight("L E D F", own, rngs)
        self.down = layers.weight("L E F D", own, rngs)
        width = config.moe_shared_expert_intermediate_size
        self.shared = Mlp(sizes | {"F": width}, rngs)
        self.has_latent = config.moe_latent_size is not None
        self.choice = experts.Choice(
            config.num_experts_per_tok, to_one=True, scores=experts.sigmoid,
            scale=config.routed_scaling_factor,
        )  # fmt: skip

    def __call__(self, x: Float[Array, "B T D"], mix: mixing.Mix) -> Float[Array, "B T D"]:
        logits = experts.logits(x, self.router, wide=True)
        route = experts.chosen(logits, self.choice, self.correction[...])
        low = layers.einsum("BTD,DR->BTR", x, self.into) if self.has_latent else x
        weights = {"up": (self.up[...], "E D F"), "down": (self.down[...], "E F D")}
        made = experts.mixed(low, route, weights, _expert)
        made = layers.einsum("BTR,RD->BTD", made, self.out) if self.has_latent else made
        return made + self.shared(x, mix)


def _bent(x: Array) -> Array:
    return jax.nn.relu(x) ** 2


def _expert(x: Array, own: experts.Weights) -> Array:
    return layers.times("tF,FD->tD", _bent(layers.times("tD,DF->tF", x, own["up"])), own["down"])


class Block(nnx.Module):
    """All layers of a kind, stacked: every weight has a leading L axis."""

    def __init__(self, config: Config, rngs: nnx.Rngs, kind: str):
        sizes, eps = config.sizes_of(kind), config.layer_norm_epsilon
        self.norm = layers.RmsNorm("L D", sizes, rngs, eps=eps, wide=True)
        if kind == LINEAR:
            self.mixer = mamba2.Mamba2(sizes, rngs, eps=eps, shortest=SHORTEST)
        elif kind == FULL:
            self.mixer = Attention(config, sizes, rngs)
        else:
            self.mixer = Mlp(sizes, rngs) if kind == MLP else Experts(config, sizes, rngs)

    def __call__(self, x: Float[Array, "B T D"], mix: mixing.Mix) -> Float[Array, "B T D"]:
        return x + self.mixer(self.norm(x), mix)


class Model(causal_lm.CausalLM):
    Block: ClassVar = {kind: functools.partial(Block, kind=kind) for kind in KINDS.values()}
    keeps: ClassVar = {LINEAR: mamba2.KEEPS, MLP: {}, EXPERTS: {}}

    def last_norm(self, config: Config, rngs: nnx.Rngs) -> layers.RmsNorm:
        """The final norm, which multiplies by its scale in float32."""
        return layers.RmsNorm("D", config.sizes, rngs, eps=config.layer_norm_epsilon, wide=True)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        return self.norm(run(self, layers.embed(self.embedding, tokens, self.dtype), where))


# Our weight -> its HF name within a layer and the order of its axes there.
NORM = {"norm.scale": ("norm.weight", "D")}
IN_LAYERS = {
    LINEAR: NORM | mamba2.named("mixer", "mixer"),
    FULL: NORM | {
        "mixer.q": ("mixer.q_proj.weight", "(N H) D"),
        "mixer.k": ("mixer.k_proj.weight", "(K H) D"),
        "mixer.v": ("mixer.v_proj.weight", "(K H) D"),
        "mixer.o": ("mixer.o_proj.weight", "D (N H)"),
    },
    MLP: NORM | {
        "mixer.up":   ("mixer.up_proj.weight",   "F D"),
        "mixer.down": ("mixer.down_proj.weight", "D F"),
    },
    EXPERTS: NORM | {
        "mixer.router":      ("mixer.gate.weight",                     "E D"),
        "mixer.correction":  ("mixer.gate.e_score_correction_bias",    "E"),
        "mixer.into":        ("mixer.fc1_latent_proj.weight",          "R D"),
        "mixer.out":         ("mixer.fc2_latent_proj.weight",          "D R"),
        "mixer.up":          ("mixer.experts.{E}.up_proj.weight",      "F D"),
        "mixer.down":        ("mixer.experts.{E}.down_proj.weight",    "D F"),
        "mixer.shared.up":   ("mixer.shared_experts.up_proj.weight",   "F D"),
        "mixer.shared.down": ("mixer.shared_experts.down_proj.weight", "D F"),
    },
}  # fmt: skip
HF_WEIGHTS = {
    "embedding": ("backbone.embeddings.weight", "V D"),
    "norm.scale": ("backbone.norm_f.weight", "D"),
    "head": ("lm_head.weight", "V D"),
    **pattern.of_kinds(IN_LAYERS, "backbone"),
}

# transformers 5 renamed the modules but not the weights in the files.
HF_NAMES = ((r"^model\.", "backbone."),)
HF_MODULES = ((r"^backbone\.", "model."),)

# Multi-token prediction layers are not loaded.
HF_OTHERS = (r"^mtp\.",)

"""Rotary position embedding: the angles by which each token's heads are rotated.

Frequencies follow transformers/modeling_rope_utils.py step by step in float32: checkpoints were
trained with these roundings, and a difference of one bit shows in the logits.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from checkpoints_io.errors import BadInput
from zoo.parts import spans

BY_LENGTH = ("dynamic", "longrope")  # kinds whose angles depend on the length of the text

# The cosine and sine of each token's angles.
Turn = tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]
TwoTurns = tuple[Float[Array, "2 B T 1 half"], Float[Array, "2 B T 1 half"]]


@dataclasses.dataclass(frozen=True)
class Rope:
    """The settings of a rope, with the keys of HF's `rope_parameters`; see rope_config.py."""

    rope_theta: float
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0  # of the channels of a head; the others are not rotated
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None  # cosine and sine are multiplied by it
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    original_max_position_embeddings: int | None = None
    max_position_embeddings: int | None = None  # in the file a key beside `rope_parameters`


@dataclasses.dataclass(frozen=True)
class TwoRopes:
    """One rope for full-attention layers and one for sliding-window layers."""

    full_attention: Rope
    sliding_attention: Rope


def check_head(head_dim: int, rope: Rope) -> None:
    """Refuses a head whose channels cannot be paired, or factors that are not one per pair.

    Raises:
      ValueError: the head width or the factors do not fit.
    """
    turned = int(head_dim * rope.partial_rotary_factor)
    if rope.rope_type == "proportional":  # the other pairs are rotated by 0
        turned = head_dim
    if turned % 2 or not 0 < turned <= head_dim:
        raise BadInput(
            f"config.json: rope would rotate {turned} channels of head_dim {head_dim}, and must "
            "rotate an even number of them, above 0"
        )
    if rope.rope_type == "dynamic" and turned == 2:
        raise BadInput("config.json: a dynamic rope needs heads that rotate more than one pair")
    for name in ("short_factor", "long_factor"):
        factors = getattr(rope, name)
        if factors is not None and len(factors) != turned // 2:
            raise BadInput(
                f"config.json: {name} has {len(factors)} numbers, and a head rotates {turned // 2} "
                "pairs of channels"
            )


def limit(ropes: object) -> int | None:
    """The longest text whose angles match those of shorter ones; None: no limit."""
    if not isinstance(ropes, Rope) or ropes.rope_type not in BY_LENGTH:
        return None
    if ropes.rope_type == "dynamic":
        return ropes.max_position_embeddings
    return ropes.original_max_position_embeddings


def turn(rope: Rope, head_dim: int, where: spans.Spans) -> Turn:
    """The cosine and sine of every token's angles, for `rotate`."""
    check_head(head_dim, rope)
    frequencies = jnp.asarray(_frequencies(rope, head_dim, where.lengths))
    angles = where.positions[..., None].astype(jnp.float32) * frequencies
    scale = np.float32(_attention_factor(rope))
    return (jnp.cos(angles) * scale)[:, :, None], (jnp.sin(angles) * scale)[:, :, None]


def unturned(turn: Turn) -> Turn:
    """A rotation by 0, for layers without positions."""
    cos, sin = turn
    return jnp.ones_like(cos), jnp.zeros_like(sin)


def either(first: Turn, second: Turn) -> TwoTurns:
    """Stacks two rotations, from which each layer picks one by index: see `of_layer`."""
    return jax.tree.map(lambda *both: jnp.stack(both), first, second)


def of_layer(turns: TwoTurns, which: Int[Array, ""]) -> Turn:
    """Picks rotation 0 or 1 of `either`."""
    return jax.tree.map(lambda both: both[which], turns)


def rotate(x: Float[Array, "B T N H"], turn: Turn) -> Float[Array, "B T N H"]:
    """Rotary position embedding, in the half-split convention of the HF checkpoints.

    Source: https://arxiv.org/abs/2104.09864, Eq. 34.
    """
    cos, sin = turn
    turned, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.size else turned


def rotate_neighbours(x: Float[Array, "B T N H"], turn: Turn) -> Float[Array, "B T N H"]:
    """Rotary position embedding for checkpoints that pair adjacent channels, as GPT-J did."""
    halves = jnp.moveaxis(x.reshape(*x.shape[:-1], -1, 2), -1, -2).reshape(x.shape)
    turned = rotate(halves, turn)
    return jnp.moveaxis(turned.reshape(*x.shape[:-1], 2, -1), -2, -1).reshape(x.shape)


def _first_ones(rope: Rope, head_dim: int) -> np.ndarray:
    """Those of the first pairs of channels as if all were rotated; 0 for the others."""
    count = int(rope.partial_rotary_factor * head_dim // 2)
    exponents = np.arange(0, 2 * count, 2).astype(np.float32) / np.float32(head_dim)
    found = np.zeros(head_dim // 2, np.float32)
    found[:count] = np.float32(1) / np.float32(rope.rope_theta) ** exponents
    return found / np.float32(rope.factor or 1)


def _frequencies(rope: Rope, head_dim: int, lengths: Int[Array, "B T"]) -> np.ndarray | Array:
    """Radians per position of each pair of channels, fastest first: [half], or [B, T, half]."""
    if rope.rope_type == "proportional":
        return _first_ones(rope, head_dim)
    one, turned = np.float32(1), int(head_dim * rope.partial_rotary_factor)
    exponents = np.arange(0, turned, 2).astype(np.float32) / np.float32(turned)
    widths = np.float32(rope.rope_theta) ** exponents
    if rope.rope_type == "linear":
        return one / widths / np.float32(rope.factor)
    if rope.rope_type == "dynamic":
        return _stretched_with_length(rope, turned, exponents, lengths)
    if rope.rope_type == "llama3":
        return _slow_ones_stretched(rope, one / widths)
    if rope.rope_type == "yarn":
        return _ramped(rope, turned, widths)
    if rope.rope_type == "longrope":
        short, long = (
            one / (np.asarray(factors, np.float32) * widths)
            for factors in (rope.short_factor, rope.long_factor)
        )
        assert rope.original_max_position_embeddings
        is_long = lengths[..., None] > rope.original_max_position_embeddings
        return jnp.where(is_long, long, short)
    return one / widths


def _stretched_with_length(rope: Rope, turned: int, exponents: np.ndarray, lengths: Array) -> Array:
    """NTK scaling: the base grows with the text, from `max_position_embeddings` on."""
    assert rope.factor and rope.max_position_embeddings
    longest = rope.max_position_embeddings
    lengths = jnp.maximum(lengths, longest).astype(jnp.float32)
    stretch = (rope.factor * lengths / longest) - (rope.factor - 1)
    base = rope.rope_theta * stretch ** (turned / (turned - 2))
    return 1 / base[..., None] ** exponents


def _slow_ones_stretched(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1: a pair is stretched by how often it turns within the original context."""
    assert rope.low_freq_factor and rope.high_freq_factor and rope.original_max_position_embeddings
    one = np.float32(1)
    turns = rope.original_max_position_embeddings / (np.float32(2 * math.pi) / plain)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep.astype(np.float32), 0, 1)
    return (one - keep) * plain / np.float32(rope.factor) + keep * plain


def _ramped(rope: Rope, turned: int, widths: np.ndarray) -> np.ndarray:
    """YaRN (https://arxiv.org/abs/2309.00071): fast pairs are kept, slow ones stretched."""
    assert rope.factor and rope.original_max_position_embeddings
    longest = rope.original_max_position_embeddings
    # The pair that turns this often within the original context.
    pair = lambda times: (
        turned * math.log(longest / (times * 2 * math.pi)) / (2 * math.log(rope.rope_theta))
    )
    low, high = pair(rope.beta_fast or 32), pair(rope.beta_slow or 1)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    if low == high:
        high += 0.001
    one, steps = np.float32(1), np.arange(turned // 2, dtype=np.float32)
    stretched = np.clip((steps - np.float32(low)) / np.float32(high - low), 0, 1).astype(np.float32)
    keep = one - stretched
    return one / (np.float32(rope.factor) * widths) * (one - keep) + one / widths * keep


def _attention_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = rope.factor or 1.0
    if rope.rope_type == "longrope" and factor > 1:
        assert rope.original_max_position_embeddings
        return math.sqrt(1 + math.log(factor) / math.log(rope.original_max_position_embeddings))
    if rope.rope_type == "yarn":
        grown = lambda m: 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0
        if rope.mscale and rope.mscale_all_dim:
            return grown(rope.mscale) / grown(rope.mscale_all_dim)
        return grown(1)
    return 1.0

"""Building blocks that every architecture shares: weights, matrix products, norms, lookups.

One letter means one axis everywhere: in shapes, einsums, shardings and weight tables, also in
recipes (the letters of attention are those of `jax.nn.dot_product_attention`):

  B rows               T tokens, as queries    S tokens, as keys
  N query heads        K key/value heads       G query heads per key head
  H head width         U head width of the values, if it differs
  D model width        F MLP width             V vocabulary
  L layers             E experts               R rank of an adapter, or of a latent
  P pairs              A answers               I tiles of a longer axis
  Z shards of a batch: all tokens in one device's rows form one list
  C scored tokens of such a list
  M learned positions                          W taps of a convolution
  X state-space heads                          Y state width of such a head
  J matrices fused into one tensor: gate and up, or q, k and v; Q their heads, if the numbers
    differ, or their channels, if the widths differ

A lower-case letter is a part of the axis of its capital: t of the T tokens, in one tile.
"""

from collections.abc import Callable, Mapping
import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.parts import adapted, grouped, quantised, remat, sharding

Weight = Array | adapted.Adapted | quantised.Quantised  # the value of a parameter
Bias = nnx.Param | Array | grouped.Grouped | None


def weight(
    axes: str,
    sizes: Mapping[str, int],
    rngs: nnx.Rngs,
    init: nnx.initializers.Initializer = nnx.initializers.normal(0.02),
) -> nnx.Param:
    """A new parameter that records its axes: `weight("D N H", sizes, rngs).axes == "D N H"`."""
    shape = tuple(sizes[letter] for letter in axes.split())
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def constant(axes: str, sizes: Mapping[str, int]) -> nnx.Param:
    """A tensor of a checkpoint that takes no gradient, in float32 whatever the model's dtype."""
    shape = tuple(sizes[letter] for letter in axes.split())
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes, exact=True)


def router(sizes: Mapping[str, int], rngs: nnx.Rngs, *, wide: bool) -> nnx.Param:
    """The weight of an expert router; if `wide`, in float32 whatever the model's dtype."""
    return nnx.Param(weight("L D E", sizes, rngs)[...], axes="L D E", exact=wide)


def is_matrix(axes: str) -> bool:
    """Whether a weight is a matrix over D or R, unlike norm scales, biases and sinks."""
    own = [letter for letter in axes.split() if letter not in "LJ"]
    # E D is a bias of experts.
    return not {"D", "R"}.isdisjoint(own) and len(own) > 1 and own != ["E", "D"]


def dot(
    equation: str,
    x: Array,
    y: Array | grouped.Grouped,
    out: jax.typing.DTypeLike | None = None,
) -> Array:
    """`jnp.einsum` in full float32 precision: by default GPUs and TPUs round the operands."""
    if isinstance(y, grouped.Grouped):
        return y.product(equation, x, out)
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=exact, preferred_element_type=out or x.dtype)


def ready(w: Weight, axes: str, dtype: jax.typing.DTypeLike) -> Weight:
    """Casts a weight for a product, then gathers it: devices thus exchange the narrow dtype."""
    return jax.tree.map(sharding.gather, adapted.cast(w, dtype), adapted.axes_of(w, axes))


def einsum(equation: str, x: Array, w: nnx.Param, out: jax.typing.DTypeLike | None = None) -> Array:
    """Multiplies `x` by a weight, in the dtype of `x`; the weight may be stored in another."""
    letters = equation.split(",")[1].split("->")[0]
    return times(equation, x, ready(w[...], " ".join(letters), x.dtype), out, by=_product)


def times(
    equation: str,
    x: Array,
    w: Weight | grouped.Grouped,
    out: jax.typing.DTypeLike | None = None,
    by: Callable[..., Array] = dot,
) -> Array:
    """Multiplies `x` by a weight from `ready`: x W, or with an adapter x W + s (x A) B."""
    if not isinstance(w, adapted.Adapted):
        return remat.as_product(by(equation, x, w, out))
    of_x, of_out = re.split(",.*->", equation)
    into, made = adapted.lettered(w.into), adapted.lettered(w.out)
    rest = "".join(letter for letter in of_x if letter not in into)
    y = by(equation, x, w.base, out)
    low = by(f"{of_x},{into}r->{rest}r", x, w.adapter.a)
    low = (low * w.scale).astype(x.dtype)
    y = remat.as_product(y + by(f"{rest}r,r{made}->{of_out}", low, w.adapter.b, out))
    if w.adapter.magnitude is None:
        return y
    turn = adapted.turn(w)  # its axes are in the order of the file; reorder them for y
    order = sorted(range(len(made)), key=lambda i: of_out.index(made[i]))
    sizes = [turn.shape[made.index(c)] if c in made else 1 for c in of_out]
    return (y * turn.transpose(order).reshape(sizes)).astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _product(equation: str, x: Array, w: Array, out: jax.typing.DTypeLike | None = None) -> Array:
    return dot(equation, x, w, out)


def _product_forward(equation: str, x: Array, w: Array, out: jax.typing.DTypeLike | None) -> tuple:
    return dot(equation, x, w, out), (x, w)


def _product_backward(
    equation: str, out: jax.typing.DTypeLike | None, kept: tuple, gradient: Array
) -> tuple:
    """The usual gradient, but with `x` as the first operand, which XLA transposes on CPUs.

    JAX puts the gradient first, and computing that transposed would cost three times as much.
    """
    del out
    x, w = kept
    of_x, of_w, of_out = re.split(",|->", equation)
    gradient = gradient.astype(x.dtype)
    return (
        dot(f"{of_out},{of_w}->{of_x}", gradient, w),
        dot(f"{of_x},{of_out}->{of_w}", x, gradient),
    )


_product.defvjp(_product_forward, _product_backward)


def embed(
    table: nnx.Param, ids: Int[Array, "B T"], dtype: jax.typing.DTypeLike
) -> Float[Array, "B T D"]:
    """Looks up the embedding of each token or position; gradients accumulate in float32."""
    axes = table.get_metadata("axes")
    return sharding.constrain(_looked_up(table[...], ids, dtype, axes), "B T D")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _looked_up(table: Array, tokens: Array, dtype: jax.typing.DTypeLike, axes: str) -> Array:
    return sharding.gather(table.astype(dtype), axes)[tokens]


def _looked_up_forward(
    table: Array, tokens: Array, dtype: jax.typing.DTypeLike, axes: str
) -> tuple:
    return _looked_up(table, tokens, dtype, axes), (table, tokens)


def _looked_up_backward(_: jax.typing.DTypeLike, axes: str, kept: tuple, gradient: Array) -> tuple:
    table, tokens = kept
    # Each device sums its own columns, so no whole table is summed or sent.
    tokens, gradient = sharding.by_width(tokens, "B T"), sharding.by_width(gradient, "B T D")
    summed = jnp.zeros(table.shape, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))
    return sharding.constrain(summed, axes).astype(table.dtype), None


_looked_up.defvjp(_looked_up_forward, _looked_up_backward)


def unit(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """Normalises `x` to unit mean square over its last axis, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)


class RmsNorm(nnx.Module):
    """Scales `x` to unit mean square, in float32, then by a learned `scale`.

    The mean is over the trailing axes that a layer's scale covers. The scale is `offset` plus the
    weight; `wide` norms multiply in float32 and round once, as Gemma and OLMo do.

    Source: https://arxiv.org/abs/1910.07467, with the rounding orders of transformers.
    """

    def __init__(
        self, axes: str, sizes: Mapping[str, int], rngs: nnx.Rngs, *,
        eps: float, offset: float = 0.0, wide: bool = False,
    ):  # fmt: skip
        init = nnx.initializers.constant(1 - offset)
        self.scale = weight(axes, sizes, rngs, init)
        self.eps, self.offset, self.wide = eps, offset, wide

    def __call__(self, x: Float[Array, "*B"]) -> Float[Array, "*B"]:
        scale = self.scale[...]
        made = unit(x.reshape(*x.shape[: x.ndim - scale.ndim], -1), self.eps)
        made = made if self.wide else made.astype(x.dtype)
        made = scaled(made, scale.reshape(-1), self.offset, x.dtype)
        return made.astype(x.dtype).reshape(x.shape)


class LayerNorm(nnx.Module):
    """Normalises `x` to mean 0 and variance 1 in float32, then applies scale and bias.

    Statistics are over the last axis. With one scale per head, the scale has two axes.

    Source: https://arxiv.org/abs/1607.06450.
    """

    def __init__(
        self, axes: str, sizes: Mapping[str, int], rngs: nnx.Rngs, *, eps: float, bias: bool = True
    ):
        self.scale = weight(axes, sizes, rngs, nnx.initializers.ones)
        self.bias = weight(axes, sizes, rngs, nnx.initializers.zeros) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        made = unit(wide - jnp.mean(wide, axis=-1, keepdims=True), self.eps)
        made = scaled(made, self.scale[...], 0.0, x.dtype)
        if self.bias is not None:
            made = _shifted(made, self.bias[...], x.dtype)
        return made.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def scaled(
    unit: Float[Array, "*B D"],
    scale: Float[Array, "*N D"],
    offset: float,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "*B D"]:
    """Multiplies by `offset + scale`, after rounding the scale from its wider master to `dtype`."""
    return unit * (offset + scale.astype(dtype).astype(unit.dtype))


def _scaled_forward(unit: Array, scale: Array, offset: float, dtype: jax.typing.DTypeLike) -> tuple:
    return scaled(unit, scale, offset, dtype), (unit, scale)


def _scaled_backward(
    offset: float, dtype: jax.typing.DTypeLike, kept: tuple, gradient: Array
) -> tuple:
    unit, scale = kept
    of_tokens = gradient.astype(jnp.float32) * unit.astype(jnp.float32)
    by = offset + scale.astype(dtype).astype(gradient.dtype)
    return gradient * by, _over_tokens(of_tokens, scale)


scaled.defvjp(_scaled_forward, _scaled_backward)


def shifted(x: Float[Array, "*B"], bias: Bias) -> Float[Array, "*B"]:
    """Adds a bias over the last axes of `x`, if there is one."""
    return x if bias is None else _shifted(x, bias[...], x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted(x: Array, bias: Array, dtype: jax.typing.DTypeLike) -> Array:
    return x + bias.astype(dtype).astype(x.dtype)


_shifted.defvjp(
    lambda x, bias, dtype: (_shifted(x, bias, dtype), bias),
    lambda _, bias, gradient: (gradient, _over_tokens(gradient.astype(jnp.float32), bias)),
)


def _over_tokens(gradients: Array, like: Array) -> Array:
    """Sums the gradients of a vector over all tokens, in float32."""
    if gradients.ndim > 2:
        gradients = sharding.as_lists(gradients)
    flat = gradients.reshape(-1, like.size)
    # A product with ones that XLA must not turn into a sum: column sums are slow on CPUs.
    ones = jax.lax.optimization_barrier(jnp.ones(len(flat), jnp.float32))
    return dot("T,TD->D", ones, flat).reshape(like.shape).astype(like.dtype)


def multiplied(x: Float[Array, "*B"], by: float | Float[Array, " D"]) -> Float[Array, "*B"]:
    """Multiplies by a number of the config in float32 and rounds only the result, as torch does."""
    return (x.astype(jnp.float32) * by).astype(x.dtype)


def gelu(x: Array) -> Array:
    """GELU in its tanh approximation, which HF calls `gelu_pytorch_tanh` and `gelu_new`."""
    return jax.nn.gelu(x, approximate=True)


def silu(x: Array) -> Array:
    """`jax.nn.silu` as a plain function that a model can hold: jitted ones cannot be pickled."""
    return jax.nn.silu(x)

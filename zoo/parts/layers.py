"""What every architecture shares: weights, products, norms, lookups.

One alphabet for axes, in shapes, einsums, shardings and weight tables alike, of recipes too; one
letter, one meaning (those of attention as in `jax.nn.dot_product_attention`):

  B rows               T tokens, as queries    S tokens, as keys
  N query heads        K key/value heads       G query heads per key head
  H head width         U width of a head's values, where it is another
  D model width        F MLP width             V vocabulary
  L layers             E experts               R rank of an adapter, or of a latent
  P pairs              A answers               I tiles of a longer axis
  Z shards of a batch: all tokens in one device's rows are a list
  C scored tokens of such a list
  M positions that are learned                 W taps of a convolution
  X heads of a state space                     Y width of what a head's state is read by
  J what one tensor holds side by side: gate and up, or q, k and v; Q their heads, if not as many,
    or their channels, if these are of several widths

A small letter is a part of what its capital counts: t of the T tokens, in one tile.
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
    """A parameter that knows its axes: `weight("D N H", sizes, rngs).axes == "D N H"`."""
    shape = tuple(sizes[letter] for letter in axes.split())
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def constant(axes: str, sizes: Mapping[str, int]) -> nnx.Param:
    """Numbers of a checkpoint that no gradient reaches; in float32, whatever the others are in."""
    shape = tuple(sizes[letter] for letter in axes.split())
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes, exact=True)


def router(sizes: Mapping[str, int], rngs: nnx.Rngs, *, wide: bool) -> nnx.Param:
    """What experts are chosen by; `wide`: in float32, whatever the others are in."""
    return nnx.Param(weight("L D E", sizes, rngs)[...], axes="L D E", exact=wide)


def is_matrix(axes: str) -> bool:
    """Whether a weight multiplies the width or a latent: norm scales, biases and sinks do not."""
    own = [letter for letter in axes.split() if letter not in "LJ"]
    # E D is a bias of experts.
    return not {"D", "R"}.isdisjoint(own) and len(own) > 1 and own != ["E", "D"]


def dot(
    equation: str,
    x: Array,
    y: Array | grouped.Grouped,
    out: jax.typing.DTypeLike | None = None,
) -> Array:
    """`jnp.einsum` whose float32 is float32: GPUs and TPUs would round the operands otherwise."""
    if isinstance(y, grouped.Grouped):
        return y.product(equation, x, out)
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=exact, preferred_element_type=out or x.dtype)


def ready(w: Weight, axes: str, dtype: jax.typing.DTypeLike) -> Weight:
    """A weight as a product wants it: cast, then gathered, so devices exchange the narrow bits."""
    return jax.tree.map(sharding.gather, adapted.cast(w, dtype), adapted.axes_of(w, axes))


def einsum(equation: str, x: Array, w: nnx.Param, out: jax.typing.DTypeLike | None = None) -> Array:
    """`x` times a weight, in the dtype of `x`: the weight may be kept in another one."""
    letters = equation.split(",")[1].split("->")[0]
    return times(equation, x, ready(w[...], " ".join(letters), x.dtype), out, by=_product)


def times(
    equation: str,
    x: Array,
    w: Weight | grouped.Grouped,
    out: jax.typing.DTypeLike | None = None,
    by: Callable[..., Array] = dot,
) -> Array:
    """`x` times what `ready` gave: W, or x W + s (x A) B beside which x W is the frozen model's."""
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
    turn = adapted.turn(w)  # its letters, in the order of the file, to their places in y
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
    """As jax would, but with `x` first in the weight's: XLA on CPUs transposes the first operand.

    `x` exists already; making the gradient transposed would cost three times as much.
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
    """The vector of each token, or position. Their gradients add up in float32."""
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
    # Each device adds up its own columns: no table is added up whole, or sent.
    tokens, gradient = sharding.by_width(tokens, "B T"), sharding.by_width(gradient, "B T D")
    summed = jnp.zeros(table.shape, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))
    return sharding.constrain(summed, axes).astype(table.dtype), None


_looked_up.defvjp(_looked_up_forward, _looked_up_backward)


def unit(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """`x` with unit mean square over its last axis, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)


class RmsNorm(nnx.Module):
    """Scales `x` to unit mean square, in float32, then by a learned `scale`.

    The mean is over as many of the last axes as a layer's scale has. The scale is `offset` plus the
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
    """Scales `x` to mean 0 and variance 1 over its last axis, in float32, then scale and bias.

    Each head may have a scale of its own, which is then over two axes.

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
    """By `offset + scale`, the scale rounded to `dtype` as all weights are: masters are wider."""
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
    """`x` plus a bias over its last axes, if there is one."""
    return x if bias is None else _shifted(x, bias[...], x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted(x: Array, bias: Array, dtype: jax.typing.DTypeLike) -> Array:
    return x + bias.astype(dtype).astype(x.dtype)


_shifted.defvjp(
    lambda x, bias, dtype: (_shifted(x, bias, dtype), bias),
    lambda _, bias, gradient: (gradient, _over_tokens(gradient.astype(jnp.float32), bias)),
)


def _over_tokens(gradients: Array, like: Array) -> Array:
    """The tokens' gradients to a vector add up in float32, however many they are."""
    if gradients.ndim > 2:
        gradients = sharding.as_lists(gradients)
    flat = gradients.reshape(-1, like.size)
    # A product with ones, kept from becoming a sum: CPUs are slow at sums down a column.
    ones = jax.lax.optimization_barrier(jnp.ones(len(flat), jnp.float32))
    return dot("T,TD->D", ones, flat).reshape(like.shape).astype(like.dtype)


def multiplied(x: Float[Array, "*B"], by: float | Float[Array, " D"]) -> Float[Array, "*B"]:
    """By numbers of a config, which torch rounds no more than what comes out."""
    return (x.astype(jnp.float32) * by).astype(x.dtype)


def gelu(x: Array) -> Array:
    """The tanh approximation, which HF calls `gelu_pytorch_tanh` and `gelu_new`."""
    return jax.nn.gelu(x, approximate=True)


def silu(x: Array) -> Array:
    """`jax.nn.silu`, as a function that a model can keep: pickle knows no compiled ones."""
    return jax.nn.silu(x)

"""The MLPs that architectures share: gated ones, and one with biases and no gate."""

from collections.abc import Callable, Mapping

from flax import nnx
from jaxtyping import Array, Float

from zoo.parts import layers


class GatedMlp(nnx.Module):
    """A gated MLP: down(act(gate(x)) * up(x)).

    Gate and up are one fused weight if they are in the file. Source:
    https://arxiv.org/abs/2002.05202, Eq. 6.
    """

    def __init__(
        self, sizes: Mapping[str, int], rngs: nnx.Rngs, act: Callable[[Array], Array] = layers.silu,
        *, together: bool = False, biases: bool = False,
    ):  # fmt: skip
        if together:
            self.gate_up = layers.weight("L J F D", sizes, rngs)
        else:
            self.gate = layers.weight("L D F", sizes, rngs)
            self.up = layers.weight("L D F", sizes, rngs)
        self.down = layers.weight("L F D", sizes, rngs)
        bias = lambda axes: layers.weight(axes, sizes, rngs, nnx.initializers.zeros)
        self.gate_bias = bias("L F") if biases else None
        self.up_bias = bias("L F") if biases else None
        self.down_bias = bias("L D") if biases else None
        self.act, self.together = act, together

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.together:
            gate, up = layers.einsum("BTD,JFD->JBTF", x, self.gate_up)
        else:
            gate = layers.shifted(layers.einsum("BTD,DF->BTF", x, self.gate), self.gate_bias)
            up = layers.shifted(layers.einsum("BTD,DF->BTF", x, self.up), self.up_bias)
        down = layers.einsum("BTF,FD->BTD", self.act(gate) * up, self.down)
        return layers.shifted(down, self.down_bias)


class Mlp(nnx.Module):
    """A plain MLP, down(act(up(x))), with biases."""

    def __init__(self, sizes: Mapping[str, int], rngs: nnx.Rngs, act: Callable[[Array], Array]):
        zeros = nnx.initializers.zeros
        self.up, self.up_bias = (
            layers.weight("L D F", sizes, rngs),
            layers.weight("L F", sizes, rngs, zeros),
        )
        self.down, self.down_bias = (
            layers.weight("L F D", sizes, rngs),
            layers.weight("L D", sizes, rngs, zeros),
        )
        self.act = act

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        up = self.act(layers.shifted(layers.einsum("BTD,DF->BTF", x, self.up), self.up_bias))
        return layers.shifted(layers.einsum("BTF,FD->BTD", up, self.down), self.down_bias)

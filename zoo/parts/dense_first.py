"""Models with a dense MLP in the first layers, and routed plus shared experts in the others.

The keys are those of DeepSeek's config.json, which GLM and others adopted.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from checkpoints_io.errors import BadInput
from zoo.parts import experts, hf_config, mlp

# The kinds of layers.
DENSE, SPARSE = "dense", "sparse"


def read(
    hf: Mapping[str, object], *, first: int, groups: int = 1, kept: int = 1
) -> dict[str, object]:
    """Adds `mlp_layer_types` to a config.json; by default the `first` layers are dense.

    `groups` and `kept` are the defaults of n_group and topk_group.

    Raises:
      ValueError: the groups do not divide the experts, or hold too few for a token.
    """
    rest, count = dict(hf), hf_config.count_of(hf)
    leading: Any = rest.pop("first_k_dense_replace", None)
    leading = first if leading is None else leading
    is_number = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0
    if not is_number(leading):
        raise BadInput(f"config.json: first_k_dense_replace is not a number of layers: {leading!r}")
    if rest.get("mlp_layer_types") is None and count is not None:
        rest["mlp_layer_types"] = [DENSE if i < leading else SPARSE for i in range(count)]
    for name, otherwise in (("n_group", groups), ("topk_group", kept)):
        rest[name] = otherwise if rest.get(name) is None else rest[name]
    kinds: object = rest.get("mlp_layer_types") or ()
    if odd := set(map(str, kinds if isinstance(kinds, list) else [kinds])) - {DENSE, SPARSE}:
        raise BadInput(f"config.json: mlp_layer_types may be {DENSE} or {SPARSE}, not {odd}")
    names = ("n_routed_experts", "n_group", "topk_group", "num_experts_per_tok")
    numbers: Any = [rest.get(name) for name in names]
    if all(is_number(n) and n for n in numbers):
        E, groups, kept, each = numbers
        if E % groups or kept > groups or each > kept * (E // groups):
            raise BadInput(
                f"config.json: {each} experts of a token cannot be chosen from {kept} of {groups} "
                f"groups of {E} experts (num_experts_per_tok, topk_group, n_group, "
                "n_routed_experts)"
            )
    return rest


def written(said: Mapping[str, object]) -> dict[str, object]:
    """The inverse of `read`, for a config.json that counts its leading dense layers."""
    rest = dict(said)
    kinds: Any = rest.pop("mlp_layer_types")
    return rest | {"first_k_dense_replace": kinds.count(DENSE)}


def sizes_of(config: Any, kind: str) -> dict[str, int]:
    """The axis sizes in layers of one kind."""
    if kind == DENSE:
        return {}
    return {"E": config.n_routed_experts, "F": config.moe_intermediate_size}


class WithShared(nnx.Module):
    """Routed experts, and shared experts: one MLP, as wide as several, for all tokens."""

    def __init__(
        self, config: Any, sizes: dict[str, int], rngs: nnx.Rngs, choice: experts.Choice,
        **how: bool,
    ):  # fmt: skip
        self.chosen = experts.GatedExperts(sizes, rngs, choice, **how)
        shared = sizes["F"] * config.n_shared_experts
        self.shared = mlp.GatedMlp(sizes | {"F": shared}, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.chosen(x) + self.shared(x)


def choice(config: Any, scores: experts.Scores, best: int = 2) -> experts.Choice:
    """How the router chooses the experts of a token."""
    return experts.Choice(
        config.num_experts_per_tok,
        to_one=config.norm_topk_prob,
        scores=scores,
        scale=config.routed_scaling_factor,
        groups=config.n_group,
        kept=config.topk_group,
        best=best,
    )


# The MLP of each kind of layer: our weight -> its HF name in a layer, and its axis order there.
MLP_OF: dict[str, dict[str, tuple[str, str]]] = {
    DENSE: {
        "mlp.gate": ("mlp.gate_proj.weight", "F D"),
        "mlp.up":   ("mlp.up_proj.weight",   "F D"),
        "mlp.down": ("mlp.down_proj.weight", "D F"),
    },
    SPARSE: {
        "mlp.chosen.router":     ("mlp.gate.weight",                       "E D"),
        "mlp.chosen.correction": ("mlp.gate.e_score_correction_bias",      "E"),
        "mlp.chosen.gate":       ("mlp.experts.{E}.gate_proj.weight",      "F D"),
        "mlp.chosen.up":         ("mlp.experts.{E}.up_proj.weight",        "F D"),
        "mlp.chosen.down":       ("mlp.experts.{E}.down_proj.weight",      "D F"),
        "mlp.shared.gate":       ("mlp.shared_experts.gate_proj.weight",   "F D"),
        "mlp.shared.up":         ("mlp.shared_experts.up_proj.weight",     "F D"),
        "mlp.shared.down":       ("mlp.shared_experts.down_proj.weight",   "D F"),
    },
}  # fmt: skip

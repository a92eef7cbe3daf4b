"""The registry of architectures by `model_type`, and what a bare `config.json` tells of a model."""

from collections.abc import Mapping
import json
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_io import hf_folder, hf_names
from checkpoints_io.errors import BadInput
from zoo import (
    apertus,
    cohere2,
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    ernie4_5,
    exaone4,
    falcon_h1,
    gemma,
    gemma2,
    gemma3_text,
    gemma4_text,
    gemma4_unified_text,
    glm4_moe,
    glm4_moe_lite,
    glm_moe_dsa,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    granitemoehybrid,
    hunyuan_v1_dense,
    lfm2,
    lfm2_moe,
    llama,
    llama4,
    minimax_m2,
    ministral3,
    mistral,
    mistral4,
    mixtral,
    nemotron_h,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from zoo.parts import (
    blocks,
    causal_lm,
    hf_config,
    mixing,
    pattern,
    rope,
    sharding,
    stack,
    text_half,
)

# `model_type` in an HF config.json -> the module with its `Config`, `Model` and `HF_WEIGHTS`.
ARCHITECTURES: dict[str, types.ModuleType] = {
    "apertus": apertus,
    "cohere2": cohere2,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "deepseek_v32": deepseek_v32,
    "ernie4_5": ernie4_5,
    "exaone4": exaone4,
    "falcon_h1": falcon_h1,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "gemma4_text": gemma4_text,
    "gemma4_unified_text": gemma4_unified_text,
    "glm4_moe": glm4_moe,
    "glm4_moe_lite": glm4_moe_lite,
    "glm_moe_dsa": glm_moe_dsa,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "gpt_oss": gpt_oss,
    "granite": granite,
    "granitemoehybrid": granitemoehybrid,
    "hunyuan_v1_dense": hunyuan_v1_dense,
    "kimi_k2": deepseek_v3,
    "lfm2": lfm2,
    "lfm2_moe": lfm2_moe,
    "llama": llama,
    "llama4_text": llama4,
    "minimax_m2": minimax_m2,
    "ministral3": ministral3,
    "mistral": mistral,
    "mistral4": mistral4,
    "mixtral": mixtral,
    "nemotron_h": nemotron_h,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "olmoe": olmoe,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_5_moe_text": qwen3_5_moe,
    "qwen3_5_text": qwen3_5,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "seed_oss": seed_oss,
    "smollm3": smollm3,
    "stablelm": stablelm,
    "starcoder2": starcoder2,
}
# Config keys that set the length of a list or loop before the weights have been checked.
COUNTED = (
    "num_hidden_layers", "n_layer", "num_experts", "num_local_experts", "n_routed_experts",
)  # fmt: skip
Model = causal_lm.CausalLM  # the base class of every architecture's `Model`


def abstract(
    config: object,
    dtype: jax.typing.DTypeLike = jnp.float32,
    compute_dtype: jax.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """The abstract model of a config: shapes, dtypes and shardings in place of weights.

    `config` is a Config, the contents of a `config.json`, or a config of transformers.

    Raises:
      ValueError: no architecture here has its `model_type`, or that architecture refuses the
        config; or a dtype is not one that weights may have.
    """
    config = config_of(config)
    for name, given in (("dtype", dtype), ("compute_dtype", compute_dtype or dtype)):
        refuse_dtype(name, given)
    if mesh is not None:
        sharding.refuse_mesh(mesh)
    arch = ARCHITECTURES[config.model_type]
    model = nnx.eval_shape(lambda: arch.Model(config, nnx.Rngs(0), compute_dtype or dtype))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def placed(param: nnx.Param) -> nnx.Variable:
        where = sharding.sharding(param.axes, param.shape, mesh) if mesh else here
        kept = dtype_of(param, dtype)
        return param.replace(jax.ShapeDtypeStruct(param.shape, kept, sharding=where))

    is_param = lambda x: isinstance(x, nnx.Variable)
    nnx.update(model, jax.tree.map(placed, nnx.state(model), is_leaf=is_param))
    return model


def refuse_dtype(name: str, dtype: jax.typing.DTypeLike) -> None:
    """Refuses a dtype that weights and activations cannot have.

    Raises:
      ValueError: it is not a dtype, is an integer or 8-bit one, or is wider than jax allows.
    """
    try:
        right = dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
        right &= 1 < jnp.dtype(dtype).itemsize <= (8 if jax.config.read("jax_enable_x64") else 4)
    except TypeError:
        right = False
    if not right:
        raise BadInput(f"{name}={dtype!r}: the zoo computes in float32, bfloat16 and float16")


def refuse_other(model: object, call: str) -> None:
    """Refuses what is no model, as the path of one.

    Raises:
      ValueError: it is none.
    """
    if not isinstance(model, Model):
        kind = type(model).__name__
        raise BadInput(f"{call} is given a {kind} as a model: zoo.load(path) gives one")


def refuse_seed(seed: object) -> None:
    """Refuses what random numbers cannot begin with: others would be those of another seed.

    Raises:
      ValueError: it is no whole number of 32 bits.
    """
    if not isinstance(seed, int | np.integer) or not 0 <= int(seed) < 2**32:
        raise BadInput(f"seed={seed!r:.60}: seeds are whole numbers from 0 to 2**32 - 1")


def dtype_of(param: nnx.Variable, dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """The dtype of this weight in a model of dtype `dtype`: float32 if it is never narrowed."""
    return jnp.float32 if is_exact(param) else dtype


def is_exact(param: nnx.Variable) -> bool:
    """Whether a weight always stays in float32: see `layers.constant` and `layers.router`."""
    return bool(param.get_metadata("exact", False))


def never_narrowed(model: Model) -> frozenset[str]:
    """The paths of the weights that always stay in float32."""
    params = nnx.to_flat_state(nnx.state(model))
    return frozenset(name_of(path) for path, param in params if is_exact(param))


def hf_table(model: Model) -> dict[str, hf_names.Entry]:
    """Our weight -> its HF name and axes, and the layer numbers if only some layers have it."""
    numbers = {f"{stack.STACKS}.{kind}": found
               for kind, found in pattern.numbers(model.config.kinds).items()}  # fmt: skip
    kind_of = lambda path: ".".join(path.split(".")[:2])
    return {
        path: hf_names.Entry(name, axes, numbers.get(kind_of(path)))
        for path, (name, axes) in ARCHITECTURES[model.config.model_type].HF_WEIGHTS.items()
    }


def name_of(path: tuple) -> str:
    """A weight's path as it is written in `HF_WEIGHTS`: "blocks.attention.q"."""
    return ".".join(map(str, path))


def longest_text(of: Mapping[str, object] | Model) -> int | None:
    """The context length in tokens: what the config declares, or a lower limit of this zoo.

    For a model, the config is the one that it was loaded or created from.
    """
    own = text_half.of(of if isinstance(of, Mapping) else said_of(of))
    config = config_of(own) if isinstance(of, Mapping) else of.config
    said = (own.get("max_position_embeddings"), config.longest_text)
    return min((n for n in said if isinstance(n, int)), default=None)


def said_of(model: Model) -> Mapping[str, object]:
    """The config.json that a model was loaded or created from."""
    if model.source is not None:
        return hf_folder.look_up(model.source).config
    return json.loads(model.described) if model.described else model.config.to_hf()


def recurrent(model: Model) -> list[str]:
    """The names of the recurrent states that its layers keep; none if they only attend."""
    kinds = set(model.config.kinds) or {blocks.ALIKE}
    kept = [axes for kind in kinds for axes in model.keeps.get(kind, {}).items()]
    return sorted({name for name, axes in kept if not mixing.by_token(axes)})


def turns_alike_to(config: Mapping[str, object]) -> int | None:
    """The longest text whose rotary embeddings match those of shorter ones; None: no limit."""
    return rope.limit(getattr(config_of(config), "rope_parameters", None))


def said_by(config: object) -> Mapping[str, object]:
    """The contents of a `config.json`, given as they are or as a config of transformers.

    Raises:
      ValueError: `config` is neither.
    """
    if isinstance(config, Mapping):
        return config
    told = getattr(config, "to_dict", None)
    if told is None:
        raise BadInput(f"{config!r:.60} is no Config, nor what a config.json holds")
    return told()


def config_of(config: object) -> hf_config.Config:
    """The Config of the right architecture, from any form of config that `abstract` takes.

    Raises:
      ValueError: as in `abstract`.
    """
    if isinstance(config, hf_config.Config):
        known = ARCHITECTURES.get(config.model_type)
        # A Config built by hand skipped the checks of `from_hf`.
        return type(config).from_hf(config.to_hf()) if known else config
    config = said_by(config)
    own = text_half.of(config)
    kind = own.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        has = ", ".join(sorted(ARCHITECTURES.keys() | text_half.KINDS.keys()))
        raise BadInput(f"config.json has model_type {kind!r}; the zoo has {has}")
    for key in COUNTED:
        hf_config.count_of(own, key)
    return ARCHITECTURES[kind].Config.from_hf(own)

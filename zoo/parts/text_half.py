"""Multimodal checkpoints, whose text part is loaded as a standalone model."""

from collections.abc import Mapping
import re

from checkpoints_io.errors import BadInput
from zoo.parts import rope_config
from zoo.parts.hf_config import QUANTISED

# Multimodal model_type -> that of its text part (for mistral3, if the file does not say).
KINDS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "kimi_k25": "deepseek_v3",
    "lfm2_vl": "lfm2",
    "llama4": "llama4_text",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}
# Kinds whose head is tied by default.
TIED = {"gemma3", "gemma4", "gemma4_unified", "lfm2_vl"}
# Defaults of transformers for the text part that differ from those of a standalone text model.
ASSUMED: dict[str, dict[str, float]] = {
    "qwen2_vl": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "qwen2_5_vl": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "qwen3_vl": {"rope_theta": 5e5},
    "qwen3_vl_moe": {"rope_theta": 5e5},
}
# The vision and audio weights, which are not loaded.
OTHERS = (
    r"^(model\.)?(visual|vision_(model|embedder)|(vision|audio)_tower|embed_(vision|audio)|"
    r"multi_modal_projector|mm_projector)\.",
)
# The class suffix of reward models in transformers, and their head, not loaded with the text.
SCORES, SCORE = "ForSequenceClassification", "score.weight"
# Names in the multimodal checkpoint -> names in a standalone text model.
NAMES = (
    (r"^(model\.language_model|language_model\.model)\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
# Keys about images, in files whose text keys are at the top level too.
OF_IMAGES = {
    "vision_config", "audio_config", "image_token_id", "video_token_id", "vision_start_token_id",
    "vision_end_token_id", "vision_token_id",
}  # fmt: skip
ROPES = {
    "rope_local_base_freq", "rope_parameters", "rope_scaling", "rope_theta",
    "partial_rotary_factor",
}  # fmt: skip


def is_whole(hf: Mapping[str, object]) -> bool:
    """Whether this is the `config.json` of a multimodal checkpoint."""
    kind = hf.get("model_type")
    return isinstance(kind, str) and kind in KINDS


def scores(hf: Mapping[str, object]) -> bool:
    """Whether this is the `config.json` of a model that scores a text instead of giving logits."""
    kinds = hf.get("architectures")
    return isinstance(kinds, list) and bool(kinds) and str(kinds[0]).endswith(SCORES)


def of(hf: Mapping[str, object]) -> dict[str, object]:
    """The text config: the whole `config.json`, or the text part of a multimodal one.

    Raises:
      ValueError: a multimodal config has no text part.
    """
    if not is_whole(hf):
        return dict(hf)
    kind, own = str(hf["model_type"]), hf.get("text_config")
    if own is None and kind in ("qwen2_vl", "qwen2_5_vl"):  # older files have it at the top level
        own = {key: value for key, value in hf.items() if key not in OF_IMAGES}
    if not isinstance(own, dict):
        raise BadInput(f"config.json of a {kind} has no text_config: take the original file")
    outer, inner = hf.get("tie_word_embeddings"), own.get("tie_word_embeddings", kind in TIED)
    # Of one whole the text may be of several kinds.
    text = own.get("model_type", KINDS[kind]) if kind == "mistral3" else KINDS[kind]
    said = {
        "model_type": text,
        "tie_word_embeddings": inner if outer is None else outer,
        QUANTISED: hf.get(QUANTISED) or own.get(QUANTISED),
    }
    return rope_config.of_text(_assumed(kind, own) | own | said)


def _assumed(kind: str, own: Mapping[str, object]) -> dict[str, object]:
    ropes = own.get("rope_parameters")
    says = own.keys() | (ropes.keys() if isinstance(ropes, dict) else set())
    return {key: value for key, value in ASSUMED.get(kind, {}).items() if key not in says}


# The modules of a multimodal model outside its text part, as PEFT matches names.
OTHER_MODULES = r"(?!.*language_model\.).*"


def module_in(hf: Mapping[str, object]) -> tuple[str, str]:
    """A pattern in a text model's module names, and its replacement in a multimodal model."""
    inside = "language_model.model." if hf["model_type"] == "llama4" else "model.language_model."
    return r"^model\.", inside


def spellings(hf: Mapping[str, object], name: str) -> tuple[str, ...]:
    """The names of a text weight or module: in a standalone model, and in a multimodal one."""
    inside = ("model.language_model.", "language_model.model.") if is_whole(hf) else ()
    return (name, *(re.sub(r"^model\.", within, name) for within in inside))


def written(hf: Mapping[str, object], own: Mapping[str, object]) -> dict[str, object]:
    """The text part of a `config.json` as that of a standalone model with the Config `own`.

    Its ropes come from the Config: keys that only images use would make it another model.
    """
    half = {key: value for key, value in of(hf).items() if key not in ROPES and value is not None}
    ids = {key: value for key, value in hf.items() if key.endswith("os_token_id")}
    kind = ("model_type", "architectures", "rope_parameters")
    return half | ids | {key: own[key] for key in kind if key in own}

"""A folder of adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

A file of our own, trained_on.json, says which weights they were trained on; other programs ignore
it. (safetensors writes its metadata in no fixed order, so in it the bytes would differ from run to
run.)

Source: peft 0.21 (peft/tuners/lora/config.py, peft/utils/save_and_load.py).
"""

from collections.abc import Iterator, Mapping
import contextlib
import json
import pathlib
import re
from typing import Any, NamedTuple

from jaxtyping import PyTree
import numpy as np

from checkpoints_io import hf_export, hf_folder, hf_weights, quantised, whole
from checkpoints_io.errors import BadInput, NotFound

CONFIG, WEIGHTS = whole.OF_ADAPTERS, "adapter_model.safetensors"
TRAINED_ON = "trained_on.json"
FILES = [CONFIG, WEIGHTS, TRAINED_ON, *hf_folder.COMPANIONS]
WORDS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a tokenizer has one of these
PREFIX = "base_model.model."

# Options of PEFT that this zoo's LoRA does not support: the key, its meaning, and the remedy.
REFUSED = {
    "modules_to_save": "whole weights next to the adapters: merge them into the base with PEFT",
    "trainable_token_indices": "tokens of its own: merge it into the base with PEFT",
    "lora_bias": "biases of its own: merge it into the base with PEFT",
    "alora_invocation_tokens": "an adapter that takes effect in mid-text (aLoRA)",
    "layer_replication": "replicated layers: merge it into the base with PEFT",
    "use_qalora": "QALoRA's pooled inputs: merge it into the base with PEFT",
    "megatron_config": "Megatron's layers: merge it into the base with PEFT",
}
# Initialisations that change the base too, so that its original weights are no longer the base.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


# Patterns run in this process: one of names and at most this many `.*` ends soon on any input.
MOST_WILD, MOST_PATTERN = 3, 200
WILD = re.compile(r"\.\*|\.\+|\\d\+|\[0-9\]\+")
DTYPES = ("bfloat16", "float16", "float32")


class Said(NamedTuple):
    """The contents of adapter_config.json, under PEFT's names."""

    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    base_model_name_or_path: str | None


class TrainedOn(NamedTuple):
    """Which weights the adapters of a folder were trained on, if it says so."""

    fingerprints: Mapping[str, str]  # by dtype: as they were kept, and in bfloat16
    frozen: str | None  # the few-bit format they were kept in


class Opened(NamedTuple):
    """A folder of adapters, open for reading in parts."""

    folder: pathlib.Path
    said: Said
    trained_on: TrainedOn
    tensors: dict[str, PyTree]  # by name, without PEFT's prefix


@contextlib.contextmanager
def opened(folder: pathlib.Path) -> Iterator[Opened]:
    """Opens a folder of adapters.

    Raises:
      FileNotFoundError, ValueError: as `read_config`; or there is no file of tensors, or it is
        incomplete.
    """
    said = read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        other = folder / "adapter_model.bin"
        why = "a pickle, which is never opened here: load and save it again with PEFT"
        hint = f": {other.name} is {why}" if other.is_file() else ""
        raise NotFound(f"{folder} has no {WEIGHTS}{hint}")
    with hf_weights.opened(path) as file:
        found = {name.removeprefix(PREFIX): file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        yield Opened(folder, said, read_trained_on(folder), found)


def read_config(folder: pathlib.Path) -> Said:
    """The adapter_config.json of a folder.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is another kind of adapter, or uses an option that is not read here.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise NotFound(f"{folder} is not a folder of adapters: it has no {CONFIG}")
    given: dict[str, Any] = hf_folder.read_json(path)
    refuse = lambda why: BadInput(f"{path} asks for {why}")
    if (kind := given.get("peft_type")) != "LORA":
        raise refuse(f"peft_type {kind!r}, but only LORA is read here")
    for key, what in REFUSED.items():
        if given.get(key):
            raise refuse(f"{key}, which is {what}")
    if (bias := given.get("bias", "none")) != "none":
        raise refuse(f"bias={bias!r}: merge it into the base with PEFT")
    begun = given.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.lower().startswith(CHANGES_BASE):
        raise refuse(
            f"init_lora_weights={begun!r}, which changes the base too: convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    rank, alpha = given.get("r", 8), given.get("lora_alpha", 8)
    ranks, alphas = (given.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    for key, values in (("r", {"": rank}), ("rank_pattern", ranks)):
        if not isinstance(values, dict) or not all(map(_is_rank, values.values())):
            raise refuse(f"{key}={given.get(key)!r}, but ranks are whole numbers above 0")
    for key, values in (("lora_alpha", {"": alpha}), ("alpha_pattern", alphas)):
        if not isinstance(values, dict) or not all(map(_is_alpha, values.values())):
            raise refuse(f"{key}={given.get(key)!r}, but alphas are finite numbers")
    if odd := [pattern for pattern in [*ranks, *alphas] if not _is_plain(pattern)]:
        raise refuse(
            f"the pattern {odd[0][:MOST_PATTERN]!r}: a folder's patterns may only have names, "
            f"groups of them (a|b) and at most {MOST_WILD} of .*, .+, \\d+ or [0-9]+"
        )
    base = given.get("base_model_name_or_path")
    return Said(
        r=rank,
        lora_alpha=alpha,
        use_rslora=bool(given.get("use_rslora")),
        use_dora=bool(given.get("use_dora")),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        base_model_name_or_path=base if isinstance(base, str) else None,
    )


def base_of(folder: pathlib.Path) -> str:
    """The base model that a folder of adapters names, with its revision if it names one.

    Raises:
      FileNotFoundError, ValueError: as `read_config`; or it names none.
    """
    base = read_config(folder).base_model_name_or_path
    if not base:
        raise BadInput(f"{folder / CONFIG} does not say which weights its adapters are for")
    revision = hf_folder.read_json(folder / CONFIG).get("revision")
    is_here = pathlib.Path(base).expanduser().is_dir()
    return base if is_here or not revision or "@" in base else f"{base}@{revision}"


def has_tokenizer(folder: pathlib.Path) -> bool:
    """Whether adapters come with a tokenizer and its template, as TRL and axolotl write them."""
    return any((folder / name).is_file() for name in WORDS)


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _is_plain(pattern: str) -> bool:
    rest = WILD.sub("", pattern)
    try:
        re.compile(pattern)
    except re.error:
        return False
    short = len(pattern) <= MOST_PATTERN and len(WILD.findall(pattern)) <= MOST_WILD
    return short and not re.search(r"[*+?{]", rest)


def read_trained_on(folder: pathlib.Path) -> TrainedOn:
    """The contents of trained_on.json; nothing for a folder that another program wrote.

    Raises:
      ValueError: it is not in the form that `write` gives it.
    """
    given: dict[str, Any] = hf_folder.read_if_there(folder / TRAINED_ON)
    known, frozen = given.get("fingerprints", {}), given.get("frozen")
    plain = isinstance(known, dict) and all(isinstance(one, str) for one in known.values())
    if not plain or not known.keys() <= set(DTYPES) or frozen not in (None, *quantised.KINDS):
        raise BadInput(f"{folder / TRAINED_ON} does not name the weights: remove the file")
    return TrainedOn(known, frozen)


def write(
    folder: pathlib.Path,
    config: Mapping[str, object],
    arrays: Mapping[str, np.ndarray],
    trained_on: TrainedOn,
    card: str | None = None,
) -> None:
    """Writes a folder that PEFT and vLLM can read; tensor names are without PEFT's prefix.

    `card` is its README.md.
    """
    if card:
        (folder / hf_folder.CARD).write_text(card, "utf-8")
    named = {PREFIX + name: np.ascontiguousarray(value) for name, value in arrays.items()}
    hf_export.write_file(named, folder / WEIGHTS)
    for name, value in ((TRAINED_ON, trained_on._asdict()), (CONFIG, config)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")

"""Flax NNX models, one file per architecture, read from and written to Hugging Face folders.

`import zoo` imports neither jax nor flax: a name is imported when it is first used, so that a
command line can answer, and a worker start, before they are loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers
    from zoo import generate, lora, reward
    from zoo.folders import check, check_finite, fresh, load, save
    from zoo.models import ARCHITECTURES, Model, abstract, longest_text, turns_alike_to
    from zoo.narrow import narrowed
    from zoo.peft_export import save_adapter
    from zoo.sampling import Sampling
    from zoo.text.chat_tokenizer import load_tokenizer

__all__ = [
    "ARCHITECTURES",
    "Model",
    "Sampling",
    "abstract",
    "check",
    "check_finite",
    "fresh",
    "generate",
    "load",
    "load_tokenizer",
    "longest_text",
    "lora",
    "narrowed",
    "reward",
    "save",
    "save_adapter",
    "turns_alike_to",
]
# The file of each; `generate`, `lora` and `reward` are modules themselves, as every other file is.
HOMES = {
    "ARCHITECTURES": "models",
    "Model": "models",
    "Sampling": "sampling",
    "abstract": "models",
    "check": "folders",
    "check_finite": "folders",
    "fresh": "folders",
    "load": "folders",
    "load_tokenizer": "text.chat_tokenizer",
    "longest_text": "models",
    "narrowed": "narrow",
    "save": "folders",
    "save_adapter": "peft_export",
    "turns_alike_to": "models",
}


def __getattr__(name: str) -> Any:
    """One of the names above, or a file of the zoo or of its parts: `zoo.llama`, `zoo.rope`."""
    if home := HOMES.get(name):
        return getattr(importlib.import_module(f"zoo.{home}"), name)
    for module in (f"zoo.{name}", f"zoo.parts.{name}"):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    raise AttributeError(
        f"the zoo has no {name!r}: dir(zoo) names what it has, and each of its files is there, too"
    )


def __dir__() -> list[str]:
    return __all__

"""Translates the settings of other trainers: a table for each, and a config made from a file."""

from collections.abc import Mapping

from recipes.peers.axolotl import AXOLOTL
from recipes.peers.levanter import LEVANTER
from recipes.peers.llama_factory import LLAMA_FACTORY
from recipes.peers.rows import Source, flat, row_of
from recipes.peers.trl import TRL

SOURCES = (TRL, AXOLOTL, LLAMA_FACTORY, LEVANTER)


def recognised(file: Mapping[str, object]) -> Source | None:
    """The trainer whose file this is, recognised by settings that such files always have."""
    groups = {name: file[name] for name in ("trainer", "optimizer")
              if isinstance(file.get(name), Mapping)}  # fmt: skip
    if any(row_of(name, LEVANTER.rows) for name, _ in flat(groups)):
        return LEVANTER  # other trainers' files may have groups of these names too
    if "base_model" in file:
        return AXOLOTL
    if {"stage", "finetuning_type", "pref_beta"}.intersection(file):
        return LLAMA_FACTORY
    return TRL if "model_name_or_path" in file else None

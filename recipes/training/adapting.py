"""The adapters of a run: which weights have them, and from which values they start."""

from collections.abc import Iterable, Mapping
import math
import pathlib
import re
from typing import NamedTuple, TypeVar

import jax
from jaxtyping import PyTree

from checkpoints_io import hf_folder, peft_folder, quantised
from checkpoints_io.errors import BadInput
from recipes.training import checks, written
from recipes.training.by_name import Values
from recipes.training.settings import ADAPTER
from recipes.training.update import Params
from recipes.training.written import Precision
import zoo
from zoo import adapters, peft, targets
from zoo.parts.adapted import Adapter
from zoo.targets import Lora, Site

Number = TypeVar("Number", int, float)


class Adapting(NamedTuple):
    """The adapters that are trained on frozen weights."""

    sites: list[Site]
    like: Params  # shapes and shardings of the adapters
    folder: pathlib.Path | None  # of the adapters that the run starts from; none: new ones
    zero: str  # the factor of new ones that begins as 0
    lora_plus: float  # the rate of B as a multiple of A's
    export: str

    @property
    def rank(self) -> int:
        """The largest rank of all adapters."""
        return max(rank for site in self.sites for rank in site.ranks)


def blank(
    given: Values, hf_config: Mapping[str, object], precision: Precision, mesh: jax.sharding.Mesh
) -> zoo.Model:
    """The policy without weights: what is frozen is kept as computed with, unless it is said."""
    frozen = given["frozen"]
    kept = precision.compute if checks.adapters_wanted(given) else precision.params
    model = zoo.abstract(hf_config, written.DTYPES.get(frozen, kept), precision.compute, mesh)
    return zoo.narrowed(model, frozen) if frozen in quantised.KINDS else model


def of_settings(given: Values, blank: zoo.Model) -> Adapting | None:
    """The adapters that the settings ask for, on a model without weights; None: there are none.

    Raises:
      ValueError: they do not fit the model.
      FileNotFoundError: `adapter.path` is no folder of adapters.
    """
    if not checks.adapters_wanted(given):
        return None
    own = {n.removeprefix("adapter."): given.get(n, one.default) for n, one in ADAPTER.items()}
    folder, rank, dora = None, own["rank"], own["dora"]
    if own["path"] is not None:
        folder = hf_folder.find(own["path"], files=peft_folder.FILES)
        sites, said = peft.sites_of(blank, folder)
        dora = said.use_dora
        found = max(max(site.ranks) for site in sites)
        if rank not in (None, found):
            raise BadInput(
                f"--config.adapter.rank={rank}, but the adapters in {folder} have rank {found}: "
                "leave it out, or start new adapters without --config.adapter.path"
            )
    else:
        sites = targets.sites(blank, _lora(own))
    like = adapters.layout(blank, sites, dora=dora)
    return Adapting(sites, like, folder, own["zero"], own["lora_plus"] or 1.0, own["export"])


def _lora(own: Mapping) -> Lora:
    return Lora(
        rank=own["rank"],
        alpha=float(own["rank"] if own["alpha"] is None else own["alpha"]),
        targets=tuple(own["targets"]),
        exclude=tuple(own["exclude"]),
        layers=_layers(own["layers"]),
        rslora=own["rslora"],
        dora=own["dora"],
        rank_pattern=_by_pattern("rank", own["rank_pattern"], int),
        alpha_pattern=_by_pattern("alpha", own["alpha_pattern"], float),
    )


def _by_pattern(what: str, texts: Iterable[str], kind: type[Number]) -> dict[str, Number]:
    """The numbers of texts like "v_proj=8", by their patterns."""
    said, found = f"--config.adapter.{what}_pattern", {}
    for text in texts:
        pattern, _, number = text.rpartition("=")
        try:
            value = kind(number)
        except ValueError:
            value = kind(0)  # as wrong as any
        if not pattern or not 0 < value < math.inf:
            whole = "a whole number" if kind is int else "a number"
            raise BadInput(
                f"{said}: {text!r} is not of the form v_proj=8: a name or regular expression, and "
                f"{whole} above 0"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise BadInput(
                f"{said}: {pattern!r} is not a valid regular expression: {error}"
            ) from error
        found[pattern] = value
    return found


def _layers(text: str | None) -> tuple[int, ...] | None:
    """The layers of "0-3,7"."""
    if text is None:
        return None
    found: list[int] = []
    for one in text.split(","):
        first, _, last = one.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) > 10_000:
            raise BadInput(f"--config.adapter.layers={text!r} is not of the form 0-7,12")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def begun(asked: Adapting, base: zoo.Model, frozen: Params, seed: int) -> Params:
    """The adapters before the first step; read again, or drawn again, they are the same.

    Raises:
      ValueError: those of `adapter.path` were trained on other weights, or are not finite.
    """
    if asked.folder is None:
        return adapters.fresh(frozen, asked.like, zero=asked.zero, seed=seed)
    return peft.read(base, asked.folder).adapters


def each(like: Params, of: Adapter) -> PyTree:
    """A tree like the adapters', with the same value for A, B and the magnitude of each."""
    one = lambda adapter: Adapter(of.a, of.b, None if adapter.magnitude is None else of.magnitude)
    return jax.tree.map(one, like, is_leaf=lambda x: isinstance(x, Adapter))

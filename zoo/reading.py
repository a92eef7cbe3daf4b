"""Plans how weights are read from the files of a folder, including those the zoo only carries."""

from collections.abc import Sequence
import dataclasses
from typing import Any

from flax import nnx
import numpy as np

from checkpoints_io import hf_folder, hf_weights
from checkpoints_io.packed import Packed, Split
from zoo.models import ARCHITECTURES, Model, config_of, hf_table, name_of
from zoo.parts import hf_config, text_half
from zoo.parts.quantised import is_quantised


def plan_of(model: Model) -> hf_weights.Plan:
    """The plan for the weight reader: table of names, wanted weights, and duplicate tensors."""
    table = hf_table(model)
    wanted: dict[str, hf_weights.Wanted] = {}
    for path, param in nnx.to_flat_state(nnx.state(model)):
        value, few = param.get_value(), None
        if is_quantised(value):
            few = hf_weights.FewBits(value.kind, value.into, value.out, value.narrow)
        wanted[name_of(path)] = hf_weights.Wanted(
            param.axes, value.shape, np.dtype(value.dtype), value.sharding, few
        )
    tied = {} if "head" in wanted else {table["head"].name: table["embedding"].name}
    return spelling(model)._replace(wanted=wanted, tied=tied)


def spelling(model: Model, text_only: bool = False) -> hf_weights.Plan:
    """The spelling of names in a model's source folder, and the other tensors to carry over.

    With `text_only` only those tensors remain that belong to the text and are not computed here.
    """
    arch = ARCHITECTURES[model.config.model_type]
    source = hf_folder.look_up(model.source) if model.source else None
    few: object = source.config.get("quantization_config") if source else None
    there = config_of(source.config) if source else model.config
    # transformers may keep the multimodal names when it saves only the text part.
    names = (*getattr(arch, "HF_NAMES", ()), *text_half.NAMES)
    kept, others = (_patterns(getattr(arch, of, ()), there) for of in ("HF_KEPT", "HF_OTHERS"))
    if source and text_half.is_whole(source.config):
        others = (*others, *text_half.OTHERS)
    if source and text_half.scores(source.config):
        kept = (*kept, rf"^{text_half.SCORE}$")
    carried = kept if text_only else kept + others
    if source and carried:
        carried = _of_layers(carried, there.sizes["L"], model.config.sizes["L"])
    packed = [Packed(*one) for one in getattr(arch, "HF_PACKED", ())]
    split = [Split(*one) for one in getattr(arch, "HF_SPLIT", ())]
    few = few if isinstance(few, dict) else {}
    return hf_weights.Plan(hf_table(model), {}, {}, names, few, packed, split, carried)


def _patterns(given: Any, config: hf_config.Config) -> tuple[str, ...]:
    """Patterns of names, given as they are or as a function of the Config."""
    return tuple(given(config) if callable(given) else given)


def _of_layers(patterns: Sequence[str], there: int, now: int) -> list[str]:
    """Fills {L} in patterns of names with the first layer number after the last of `there`.

    If the model now has fewer layers, tensors of removed and later layers are not carried over.
    """
    gone = "|".join(map(str, range(now, there + 1))) if now != there else ""
    but = rf"(?!.*\blayers\.({gone})\.)" if gone else ""
    return [but + one.replace("{L}", str(there)) for one in patterns]


def with_extra(model: Model, extra: str) -> tuple[Model, dict[str, np.ndarray]]:
    """Loads the weights of an abstract model from its folder, and extra tensors in float32.

    `extra` is a pattern of their names.

    Raises:
      FileNotFoundError, ValueError: as in `load`.
    """
    assert model.source is not None
    folder = hf_folder.fetched(hf_folder.look_up(model.source))
    plan = plan_of(model)
    with hf_weights.carried(folder.path, plan._replace(carried=(extra,))) as tensors:
        beside = {
            name: np.asarray(one[(slice(None),)], np.float32) for name, one in tensors.items()
        }
    return filled(model, folder, plan._replace(carried=(*plan.carried, extra))), beside


def filled(model: Model, folder: hf_folder.Folder, plan: hf_weights.Plan) -> Model:
    """Fills an abstract model with the weights of its folder."""
    graph, state = nnx.split(model)
    arrays = hf_weights.read(folder.path, plan)
    params = []
    for path, param in nnx.to_flat_state(state):
        like, value = param.get_value(), arrays[name_of(path)]
        value = dataclasses.replace(like, narrow=value) if is_quantised(like) else value
        params.append((path, param.replace(value)))
    model = nnx.merge(graph, nnx.from_flat_state(params))
    model.source = folder
    return model

"""What a run will take, without its weights, its data or its devices.

  python recipes/forecast.py --config=recipes/configs/llama8b.py --chip=v5p --devices=8

Compiles the programs of one update for a mesh of so many chips, and prints what a device holds,
what moves between devices, and about how long an update takes. It asks the compiler for TPUs (pip
install libtpu) or for GPUs (pip install 'jax[cuda13-local]' nvidia-cuda-nvcc), which need no chip,
also about memory. Where there is none for GPUs it compiles for CPUs instead: what stays allocated
through an update is exact, the rest an estimate.
"""

from absl import flags

if __name__ == "__main__":  # a wrong flag is answered before the imports below
    import os

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # compilers would say that there is no chip
    from recipes.training import command, settings

    flags.DEFINE_string("chip", "h100", "One of a100, h100, h200, rtx4080, rtx4090, v5e, v5p, v6e.")
    flags.DEFINE_integer("devices", 8, "Number of chips in all slices.")
    flags.DEFINE_integer("slices", 1, "Number of TPU slices that the chips are in.")
    flags.DEFINE_integer("stored_per_pair", 1000, "Average number of positions per pair.")
    flags.DEFINE_float(
        "real_per_stored",
        1.25,
        "Real tokens per position, counting the prompt once for each answer.",
    )
    command.answer(settings.DPO, writes=False)

import math
import os

import jax
import ml_collections

from checkpoints_io import hf_folder
from checkpoints_io.errors import BadInput
from recipes.preference import metrics, objectives, reference
from recipes.training import (
    absent,
    by_name,
    checks,
    command,
    forecasting,
    plan,
    settings,
    written,
)
from recipes.training.by_name import Values
from recipes.training.chips import CHIPS, REACHED, Chip
from recipes.training.forecasting import Forecast, Job, Sizes
from recipes.training.nearest import did_you_mean


def job_of(given: Values) -> Job:
    """The job that the settings describe."""
    objective = objectives.objective(given)
    return Job(
        precision=written.precision(given["mp"]),
        attention=given["attention"],
        remat=given["remat"],
        mesh=by_name.mesh_sizes(given),
        beside=reference.wanted(given, objective),
        given=given,
        loss=objective.loss,
        figures=lambda answers: metrics.preference(answers, objective),
        is_coupled=objective.is_coupled,
        sizes=by_name.part(Sizes, given),
    )


def told(
    found: Forecast, chip: Chip, real_tokens: float, less_memory: list[str], *, exact: bool
) -> str:
    """The forecast as text; `less_memory` are flags that help where it does not fit."""
    size = plan.size
    parts = lambda bytes_: ", ".join(f"{name} {size(n)}" for name, n in bytes_.items())
    kinds: dict[str, list] = {}
    for one in found.moved:
        kinds.setdefault(one.kind, []).append(one)
    lines = [
        f"persistent                {size(sum(found.persistent.values()))} per device "
        f"({parts(found.persistent)})",
        f"temporary                 {parts(found.temporary)}"
        + ("" if exact else "   (an estimate, compiled for CPUs: see --help)"),
        f"remat                     {found.remat}",
        f"peak                      {size(found.peak)} of {size(chip.memory)}",
        f"largest weight            {size(found.largest_weight)} in the compute dtype",
    ]
    for kind, some in sorted(kinds.items()):
        total = sum(c.bytes * c.times for c in some)
        lines.append(
            f"{kind:<25} {sum(c.times for c in some)} per micro-batch, {size(total)}; the largest "
            f"{size(max(c.bytes for c in some))}"
        )
    lines += _between(found)
    low, high = found.seconds
    lines += [
        f"per update                {found.micro_batches:.1f} micro-batches, "
        f"{found.flops / 1e15:.4g} PFLOP, {real_tokens:.4g} real tokens",
        f"about                     {low:.3g} to {high:.3g} s: products at {REACHED:.0%} of the "
        "chips' peak, with traffic overlapped or not",
    ]
    if found.peak > 0.95 * chip.memory:
        ways = ["more devices in --config.mesh.fsdp", *less_memory]
        lines.append(
            f"it does not fit: {', '.join(ways)}, shorter rows with --config.row_length, or rows "
            "split over devices by --config.mesh.context"
        )
    return "\n".join(lines)


def _between(found: Forecast) -> list[str]:
    """What a chip sends to another slice."""
    if not found.between:
        return []
    of = lambda once: [one for name, one in found.between if (name == "apply") == once]
    total = lambda some: plan.size(sum(one.bytes * one.times for one in some))
    in_loops = sum(one.in_loop for _, one in found.between)
    return [
        f"between slices            {total(of(True))} per update and {total(of(False))} per "
        f"micro-batch from each device; {in_loops or 'none'} of its {len(found.between)} "
        "exchanges in a loop over layers"
    ]


def _checked_flags() -> Chip:
    asked = flags.FLAGS
    if asked.chip not in CHIPS:
        near = did_you_mean(asked.chip, CHIPS)
        raise BadInput(f"--chip={asked.chip} is not one of {', '.join(CHIPS)}{near}")
    for name in ("devices", "slices", "stored_per_pair", "real_per_stored"):
        number = getattr(asked, name)
        if not 0 < number < math.inf:
            raise BadInput(f"--{name} must be above 0, not {number}")
    return CHIPS[asked.chip]


def _devices(chip: Chip) -> list:
    """The devices as a compiler knows them; CPUs if there is none for the chip."""
    asked = flags.FLAGS
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_enable_compilation_cache", False)  # which takes a device to read
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", asked.devices)
    devices = jax.devices()
    if asked.slices > 1 and (not chip.tpu or asked.devices % asked.slices):
        raise BadInput(
            f"--slices={asked.slices} must divide --devices={asked.devices} and only applies to "
            "TPUs: for GPUs forecast one node; gradients are added up between nodes once per "
            "update"
        )
    if chip.tpu:
        devices = absent.tpus(chip.tpu, asked.devices // asked.slices, asked.slices)
    elif chip.gpu:
        known = chip.memory, chip.memory_bytes
        devices = absent.gpus(chip.gpu, *known, asked.devices) or devices
    if len(devices) != asked.devices:
        raise BadInput(
            f"--devices={asked.devices}, and XLA_FLAGS in the environment make {len(devices)}: "
            "unset it"
        )
    return devices


def main(config: ml_collections.ConfigDict) -> None:
    """Prints the forecast.

    Raises:
      ValueError, OSError: a sentence about the settings, the flags or the model.
    """
    asked = flags.FLAGS
    given = checks.checked(config, settings.table_of(settings.DPO))
    chip = _checked_flags()
    hf_config = hf_folder.look_up(given["initialize_from_hf"]).config
    devices = _devices(chip)
    job = job_of(given)
    found = forecasting.forecast(job, hf_config, chip, devices, asked.stored_per_pair)
    real = given["train_batch_size"] * asked.stored_per_pair * asked.real_per_stored
    less = checks.less_memory(given, has_reference=job.beside is not None)
    if found.kept.policy != "full":
        less.insert(0, "--config.remat=full")
    if given["optimizer"] in ("adamw", "lion", "rmsprop", "muon"):
        less.append("--config.optimizer=adamw8bit")
    print(told(found, chip, real, less, exact=devices[0].platform != "cpu"))


if __name__ == "__main__":
    command.main(main, settings.DPO, writes=False)

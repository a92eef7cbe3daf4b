"""What manufacturers say of accelerators, and what products reach of it."""

from typing import NamedTuple

from recipes.training.absent import Gpu


class Chip(NamedTuple):
    """The manufacturer's figures for one chip."""

    bf16_flops: float  # per second, dense
    memory: float  # bytes
    memory_bytes: float  # per second
    link_bytes: float  # per second, to the other chips, in one direction
    tpu: str | None = None  # its name for the TPU compiler
    gpu: Gpu | None = None


ADA = "NVIDIA GeForce RTX 4090"
CHIPS = {
    "a100": Chip(312e12, 80e9, 2.0e12, 300e9, gpu=Gpu("NVIDIA A100", (8, 0), 108)),
    "h100": Chip(989e12, 80e9, 3.35e12, 450e9, gpu=Gpu("NVIDIA H100", (9, 0), 132)),
    "h200": Chip(989e12, 141e9, 4.8e12, 450e9, gpu=Gpu("NVIDIA H200", (9, 0), 132)),
    "rtx4080": Chip(97e12, 16e9, 0.72e12, 32e9, gpu=Gpu(ADA, (8, 9), 76)),
    "rtx4090": Chip(165e12, 24e9, 1.01e12, 32e9, gpu=Gpu(ADA, (8, 9), 128)),
    "v5e": Chip(197e12, 16e9, 0.82e12, 100e9, "v5e"),
    "v5p": Chip(459e12, 95e9, 2.77e12, 300e9, "v5p"),
    "v6e": Chip(918e12, 32e9, 1.64e12, 224e9, "v6e"),
}
# Bytes per second and chip from one slice of TPUs to another: hosts of 4 chips at 200 Gbit/s.
BETWEEN_SLICES = 6.25e9
# Share of the peak that a good kernel reaches on products of this size.
REACHED = 0.6

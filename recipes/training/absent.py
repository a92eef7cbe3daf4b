"""Devices that are not here, as compilers for them need to know them."""

from typing import NamedTuple

from jax.experimental import topologies

from checkpoints_io.errors import BadInput


class Gpu(NamedTuple):
    """What decides which programs a GPU of NVIDIA's can run."""

    name: str  # as its driver says it, of one that jax knows
    capability: tuple[int, int]
    processors: int  # streaming multiprocessors


# Shared memory of a processor in KiB, by compute capability; other ones have 100.
SHARED = {(8, 0): 164, (9, 0): 228, (10, 0): 228}
CHIPS_OF_A_SLICE = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16",
                    256: "16x16"}  # fmt: skip
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
         256: "4x8x8", 512: "8x8x8", 1024: "8x8x16"}  # fmt: skip


def tpus(kind: str, count: int, slices: int) -> list:
    """Devices of so many slices, of `count` chips each.

    Raises:
      ValueError: there is no such slice, or no compiler.
    """
    known = CUBES if kind == "v5p" else CHIPS_OF_A_SLICE
    if count not in known:
        raise BadInput(
            f"--devices={count * slices} in --slices={slices}: a slice of {kind} has "
            f"{', '.join(map(str, known))} chips"
        )
    try:
        name = f"{kind}:{known[count]}"
        more: dict[str, object] = {"chips_per_host_bounds": [1, 1, 1]} if count == 1 else {}
        if slices > 1:
            more["num_slices"] = slices
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **more)
        return list(found.devices)
    except Exception as error:  # jax raises another type for every cause
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(
            f"--chip={kind} needs the TPU compiler, which is not installed (pip install libtpu): "
            f"{reason}"
        ) from error


def gpus(gpu: Gpu, memory: float, bytes_per_second: float, count: int) -> list:
    """So many GPUs of one node; none where their compiler is not here."""
    shared = SHARED.get(gpu.capability, 100) * 1024
    major, minor = gpu.capability
    # The fields of XLA's GpuTargetConfigProto; those that are not named here are alike since 2020.
    target = f"""
        platform_name: "CUDA" device_description_str: "{gpu.name}"
        dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 patch: 0 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {gpu.processors} device_memory_size: {memory:.0f}
          memory_bandwidth: {bytes_per_second:.0f} clock_rate_ghz: 1.8 l2_cache_size: 52428800
          shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
          shared_memory_per_block: 49152 threads_per_block_limit: 1024 threads_per_warp: 32
          threads_per_core_limit: 2048 fpus_per_core: 128 registers_per_core_limit: 65536
          registers_per_block_limit: 65536 block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}"""
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=f"1x1x{count}"
        )
    except Exception:  # jax raises another type for every cause
        return []
    return list(found.devices)

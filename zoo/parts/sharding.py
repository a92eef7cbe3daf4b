"""Which mesh axis splits which array axis: one table for weights, optimizer state and batches.

The mesh has four axes. `data` replicates the weights; `fsdp` splits them and gathers one layer at a
time; `context` splits the tokens of each row, and the weights as `fsdp` does; `tensor` splits the
heads, the experts or the MLP, and always the vocabulary. If devices are in several slices (TPU pods
joined by a slower network), `data` spans the slices and the other axes stay within one.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
import numpy as np

from checkpoints_io.errors import BadInput

MESH_AXES = ("data", "fsdp", "context", "tensor")

# Axis letters as in layers.py; letters not listed here are never split. If two letters of an array
# want the same mesh axis, the first gets it: activations "B T D" are split by row and token, not
# by D.
STORED: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "T": ("context",),
    "Z": ("data", "fsdp", "context"),
    "D": ("fsdp", "context"),
    "N": ("tensor",),
    "K": ("tensor",),
    "Q": ("tensor",),
    "X": ("tensor",),
    "E": ("tensor",),
    "F": ("tensor",),
    "R": ("fsdp", "context"),
    "V": ("tensor",),
    "rows": ("tensor", "fsdp", "context"),  # of a quantised matrix, whose blocks run along rows
}
# The sharding of a weight in a matrix product: whole along `fsdp` and `context`.
GATHERED = {
    letter: tuple(a for a in axes if a not in ("fsdp", "context"))
    for letter, axes in STORED.items()
}

# To sum a gradient over tokens, every device holds all rows and its part of the width.
# One mesh axis at a time: resharding both at once, XLA would replicate the whole array.
BY_WIDTH = (STORED | {"B": ("data",)}, STORED | {"B": ("data",), "T": ()})

Sizes = tuple[int, int, int, int]  # of the mesh, as MESH_AXES


def mesh_of(
    data: int,
    fsdp: int,
    tensor: int,
    context: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices; one of the sizes may be -1 and takes what is left.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `data` does not divide
        among their slices.
    """
    devices = jax.devices() if devices is None else devices
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    sizes = sizes_of((data, fsdp, context, tensor), len(devices))
    if devices[0].platform == "tpu" and len({slice_of(device) for device in devices}) > 1:
        return Mesh(by_slice(sizes, devices), MESH_AXES, axis_types=kinds)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=kinds, devices=devices)


def refuse_mesh(mesh: object) -> None:
    """Refuses a mesh that weights cannot be split over.

    Raises:
      ValueError: it is not a mesh, or has other axes than those of `mesh_of`.
    """
    remedy = "zoo.sharding.mesh_of(data=1, fsdp=-1, tensor=1) makes one"
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise BadInput(f"mesh={mesh!r:.60} is none: {remedy}")
    others = [name for name, size in mesh.shape.items() if size > 1 and name not in MESH_AXES]
    if others or any(kind == AxisType.Explicit for kind in mesh.axis_types):
        raise BadInput(
            f"the mesh {dict(mesh.shape)} is split along other axes than {', '.join(MESH_AXES)}, "
            f"or has explicit ones: {remedy}"
        )


def by_slice(sizes: Sizes, devices: Sequence[object]) -> np.ndarray:
    """Arranges devices in a grid whose first axis spans slices and whose others stay within one.

    Raises:
      ValueError: the slices do not divide `data`.
    """
    slices: dict[int, list] = {}
    for device in devices:
        slices.setdefault(slice_of(device), []).append(device)
    count = len(slices)
    if sizes[0] % count:
        raise BadInput(
            f"these devices are in {count} slices, and --config.mesh.data={sizes[0]} is not a "
            "multiple of that: each slice has a copy of the weights, or several, for other axes "
            "stay within one; set --config.mesh.data=-1 and "
            f"--config.mesh.fsdp={len(devices) // count} or less"
        )
    within = (sizes[0] // count, *sizes[1:])
    grids = [mesh_utils.create_device_mesh(within, slices[index]) for index in sorted(slices)]
    return np.concatenate(grids)


def slice_of(device: Any) -> int:
    """The group of devices joined by a fast network: a TPU slice, or the GPUs of one process.

    Devices are ordered by process, so the first axes of a GPU mesh already span nodes.
    """
    if device.platform == "gpu":
        return device.process_index
    return getattr(device, "slice_index", None) or 0


def slices_over(grid: np.ndarray) -> int:
    """The number of slices that `data` spans; 1 if there is one, or another axis crosses them."""
    met = [{slice_of(device) for device in row.flat} for row in grid]
    return 1 if any(len(row) > 1 for row in met) else len(set.union(*met))


def sizes_of(asked: Sizes, devices: int) -> Sizes:
    """The sizes of a mesh, with a -1 filled in.

    Raises:
      ValueError: they do not multiply to the number of devices.
    """
    sizes = list(asked)
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = devices // max(-math.prod(asked), 1)
    if min(sizes) < 1 or math.prod(sizes) != devices:
        told = ", ".join(f"{n}={s}" for n, s in zip(MESH_AXES, asked, strict=True))
        raise BadInput(
            f"the mesh {told} does not fit {devices} devices: the sizes must multiply to their "
            "number (one of them may be -1)"
        )
    return sizes[0], sizes[1], sizes[2], sizes[3]


def mesh_under(array: jax.Array) -> Mesh:
    """The mesh that an array is laid out on; a mesh of its one device if it is on none."""
    mesh = getattr(array.sharding, "mesh", None)
    if isinstance(mesh, Mesh):
        return mesh
    return mesh_of(1, 1, 1, devices=[*array.devices()])


def data_shards(mesh: Mesh) -> int:
    """The number of parts that the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def parts_of_a_row() -> int:
    """The number of devices that share the tokens of a row, if the row's length divides."""
    return axes_here().get("context", 1)


def as_lists(x: jax.Array, Z: int | None = None) -> jax.Array:
    """Reshapes tokens [B, T, …] into Z lists, by default one for each part of the rows.

    Each list holds tokens of one device, so that none moves.
    """
    parts = parts_of_a_row() if x.shape[1] % parts_of_a_row() == 0 else 1
    Z = Z or parts
    cut = x.reshape(Z // parts, -1, parts, x.shape[1] // parts, *x.shape[2:])
    return cut.swapaxes(1, 2).reshape(Z, -1, *x.shape[2:])


def platform() -> str:
    """The platform that the program will run on (cpu, gpu or tpu): the mesh's, if there is one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def sharding(axes: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """`sharding("D N H", shape, mesh)` splits D over `fsdp` and N over `tensor`."""
    return NamedSharding(mesh, spec(axes, shape, mesh.shape))


def placed_as(
    like: jax.sharding.Sharding, axes: str, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.ShapeDtypeStruct:
    """The shape and sharding of an array of these axes, on the devices of another array."""
    if isinstance(like, NamedSharding) and isinstance(like.mesh, Mesh):
        like = sharding(axes, shape, like.mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=like)


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Keeps an activation split as the table says; without a mesh in context, `x` as it is.

    XLA would otherwise be free to split the residual stream along D, and then it never gathers
    the weights: three times the memory on eight devices.
    """
    return _constrain(x, axes, STORED)


def gather(weight: jax.Array, axes: str) -> jax.Array:
    """Gathers a stored weight along `fsdp` and `context`, as a matrix product needs it."""
    return _constrain(weight, axes, GATHERED)


def by_width(x: jax.Array, axes: str) -> jax.Array:
    """Reshards an activation by its width instead of its rows and tokens."""
    for rules in BY_WIDTH if "D" in axes.split() else BY_WIDTH[-1:]:
        x = _constrain(x, axes, rules)
    return x


def whole(x: jax.Array) -> jax.Array:
    """Replicates an array on every device, so that every process can read it."""
    return _constrain(x, " ".join("." * x.ndim), {})


def axes_here() -> dict[str, int]:
    """The sizes of the mesh in context, without the axes of an enclosing shard_map.

    Nothing here is split over those. Empty without a mesh.

    Raises:
      ValueError: it has explicit axes, as `jax.make_mesh` makes them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        refuse_mesh(mesh)
    named = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in named if kind != AxisType.Manual}


def on_each_device(run: Callable, in_specs: PyTree, out_specs: PyTree) -> Callable:
    """Runs `run` on each device's part of its arguments, over all axes of `axes_here`."""
    return jax.shard_map(
        run, in_specs=in_specs, out_specs=out_specs, axis_names={*axes_here()}, check_vma=False
    )


def names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in an entry of a spec, which gives a single axis as a bare name."""
    return (entry,) if isinstance(entry, str) else entry or ()


def joined(part: jax.Array, spec: PartitionSpec, axis: int) -> jax.Array:
    """Gathers an array along one of its axes within `on_each_device`; the spec is its split."""
    over = tuple(name for name in names(spec[axis]) if jax.lax.axis_size(name) > 1)
    return jax.lax.all_gather(part, over, axis=axis, tiled=True) if over else part


def _constrain(x: jax.Array, axes: str, rules: Mapping[str, tuple[str, ...]]) -> jax.Array:
    sizes = axes_here()
    if not sizes:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, sizes, rules))


def spec(
    axes: str,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    rules: Mapping[str, tuple[str, ...]] = STORED,
) -> PartitionSpec:
    """The mesh axes that split each axis of an array; `sizes` lists the axes that may."""
    taken: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for letter, size in zip(axes.split(), shape, strict=True):
        split, parts = [], 1
        for name in rules.get(letter, ()):
            # An axis that does not divide evenly stays whole: 2 key heads on 4 tensor devices.
            if name in sizes and name not in taken and size % (parts * sizes[name]) == 0:
                split.append(name)
                parts *= sizes[name]
        taken.update(split)
        entries.append(tuple(split) or None)
    return PartitionSpec(*entries)

"""Where `data` goes when devices are in several slices, or nodes."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_io.errors import BadInput
from zoo.parts import sharding


def devices(slices: int, each: int, platform: str = "tpu", **of_device) -> list:
    """Devices of so many slices, one process each, in the order jax gives them."""
    return [
        types.SimpleNamespace(
            platform=platform, device_kind="none that is known", id=i, process_index=i // each,
            **({"slice_index": i // each} | of_device),
        )
        for i in range(slices * each)
    ]  # fmt: skip


def ids(grid: np.ndarray) -> list:
    return np.vectorize(lambda device: device.id)(grid).tolist()


def test_data_goes_over_the_slices_and_the_other_axes_stay_within_one(monkeypatch):
    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", lambda sizes, some: np.array(
        some, dtype=object).reshape(sizes))  # fmt: skip
    pod = devices(2, 4)
    mixed = [pod[i] for i in (4, 0, 5, 1, 6, 2, 7, 3)]
    assert ids(sharding.by_slice((2, 2, 1, 2), mixed)) == [
        [[[0, 1]], [[2, 3]]], [[[4, 5]], [[6, 7]]]
    ]  # fmt: skip
    assert ids(sharding.by_slice((4, 1, 2, 1), pod)) == [
        [[[0], [1]]], [[[2], [3]]], [[[4], [5]]], [[[6], [7]]]
    ]  # fmt: skip


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (1, 1, 8, 1), (3, 2, 1, 1)])
def test_slices_that_data_does_not_divide_among_are_refused(sizes):
    with pytest.raises(BadInput, match=r"in 2 slices.*mesh.data=\d.*--config.mesh.fsdp=4 or less"):
        sharding.by_slice(sizes, devices(2, 4))


def over(grid: list, shape: tuple) -> int:
    return sharding.slices_over(np.array(grid, dtype=object).reshape(shape))


@pytest.mark.parametrize(
    ("grid", "shape", "count"),
    [
        (devices(1, 8), (2, 4, 1), 1),
        (devices(2, 4), (2, 4, 1), 2),
        (devices(2, 4), (4, 2, 1), 2),
        (devices(2, 4), (1, 8, 1), 1),  # fsdp crosses: every weight does
        (devices(2, 4, slice_index=None), (2, 4, 1), 1),
        (devices(2, 4, "gpu", slice_index=0), (2, 4, 1), 2),  # a node a process
        (devices(8, 1, "gpu", slice_index=0), (8, 1, 1), 8),
        (devices(8, 1, "gpu", slice_index=0), (2, 4, 1), 1),
        (devices(2, 4, "cpu", slice_index=None), (2, 4, 1), 1),
    ],
)
def test_over_how_many_slices_data_goes(grid, shape, count):
    assert over(grid, shape) == count


def test_axes_that_an_enclosing_map_has_taken_split_nothing():
    mesh = sharding.mesh_of(1, 1, 1)
    seen = []

    def part(x):
        seen.append(sharding.axes_here())
        return sharding.constrain(x, "B T D")

    with jax.set_mesh(mesh):
        rows = jax.P("data")
        outer = jax.shard_map(part, in_specs=rows, out_specs=rows, axis_names={"data"},
                              check_vma=False)  # fmt: skip
        assert jax.jit(outer)(jnp.ones((2, 3, 4))).shape == (2, 3, 4)
        assert sharding.axes_here() == dict.fromkeys(sharding.MESH_AXES, 1)
    assert seen[0] == {"fsdp": 1, "context": 1, "tensor": 1}
    assert sharding.axes_here() == {}


def test_the_tokens_of_a_device_are_one_list(monkeypatch):
    """Two rows of eight, of whose tokens each of two devices has half."""
    tokens = jnp.arange(16).reshape(2, 8)
    assert sharding.as_lists(tokens).tolist() == [[*range(16)]]
    monkeypatch.setattr(sharding, "parts_of_a_row", lambda: 2)
    shared = [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]
    assert sharding.as_lists(tokens).tolist() == shared
    rows_apart = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert sharding.as_lists(tokens, 4).tolist() == rows_apart
    assert sharding.as_lists(tokens[:, :7]).tolist() == [tokens[:, :7].ravel().tolist()]

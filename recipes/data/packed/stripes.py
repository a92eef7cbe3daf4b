"""Rows that several devices share are cut into stripes, which are dealt out by what they cost.

A token sees what is before it on its path, so in attention a device with one end of a row would
wait for the one with the other. Where each stripe is stored is part of the batch, and attention
puts the keys back in order (`zoo/parts/spans.py`).
"""

import math

from jaxtyping import Int, Shaped
import numpy as np

# As wide as the widest tile of an attention kernel, and the tiles by which its work is counted.
STRIPE, TILE = 512, 128


def width(row_length: int, devices: int) -> int:
    """The width of stripes of rows that this many devices share: each has equally many."""
    return math.gcd(row_length // devices, STRIPE)


def dealt(
    first: Int[np.ndarray, "B T"], last: Int[np.ndarray, "B T"], devices: int
) -> Int[np.ndarray, "B I"]:
    """Where each stripe of these rows is stored, so that every device has as many keys to look at.

    A device has the same number of stripes of every row, one after another: those that cost most
    go first, each to the device that has the least so far.
    """
    each = width(first.shape[1], devices)
    tile = math.gcd(each, TILE)
    tiles = lambda x: x.reshape(len(x), -1, tile)
    keys = tiles(last).max(-1) - tiles(first).min(-1)  # that any query of a tile sees
    costs = keys.reshape(len(first), -1, each // tile).sum(-1)
    room = costs.shape[1] // devices
    load, order = np.zeros(devices), np.zeros(costs.shape, np.int32)
    for b, row in enumerate(costs):
        owners: list[list[int]] = [[] for _ in range(devices)]
        for stripe in np.argsort(-row, kind="stable"):
            free = [device for device in range(devices) if len(owners[device]) < room]
            device = min(free, key=lambda device: load[device])
            owners[device].append(stripe)
            load[device] += row[stripe]
        order[b, [stripe for own in owners for stripe in sorted(own)]] = np.arange(len(row))
    return order


def stored(
    rows: Shaped[np.ndarray, "B T"], order: Int[np.ndarray, "B I"]
) -> Shaped[np.ndarray, "B T"]:
    """Reorders rows as they are stored."""
    striped = rows.reshape(*order.shape, -1)
    found = np.empty_like(striped)
    np.put_along_axis(found, order[..., None], striped, axis=1)
    return found.reshape(rows.shape)


def places(t: Int[np.ndarray, " C"], order: Int[np.ndarray, " I"], T: int) -> np.ndarray:
    """Where tokens `t` of one row of T are stored."""
    each = T // len(order)
    return order[t // each] * each + t % each

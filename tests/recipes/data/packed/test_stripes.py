"""Rows that devices share: each has as many keys to look at, whatever the rows hold."""

import numpy as np
import pytest

from recipes.data.packed import stripes

T = 32 * 1024


def spans_of(*pairs):
    """What tokens of pairs with their prompts once see, in a row of T; lengths of a, prompt, b."""
    first, last, t = np.arange(T), np.arange(T) + 1, 0
    for a, prompt, b in pairs:
        end = t + a + prompt + b
        first[t:end] = t + np.minimum(np.arange(end - t), a)
        last[t : t + a] = t + a + prompt
        last[t + a : end] = np.arange(t + a, end) + 1
        t = end
    return first[None], last[None]


ROWS = {
    "16 pairs": spans_of(*[(768, 512, 768)] * 16),
    "a short prompt and long answers": spans_of((14_336, 4_096, 14_336)),
    "a long prompt and short answers": spans_of((4_096, 24_576, 4_096)),
    "8 uneven pairs": spans_of(
        (300, 400, 324), (2_000, 1_000, 1_096), (100, 500, 424), (5_000, 2_000, 1_192),
        (700, 200, 124), (3_000, 900, 196), (400, 300, 324), (1_500, 7_000, 3_000),
    ),
    "one text": spans_of((0, T, 0)),
    "two texts and padding": spans_of((0, 9_000, 0), (0, 5_000, 0)),
}  # fmt: skip


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("name", ROWS)
def test_no_device_waits_in_attention(name, devices):
    first, last = ROWS[name]
    order = stripes.dealt(first, last, devices)
    assert sorted(order[0]) == list(range(T // 512))
    tiles = lambda x: stripes.stored(x, order).reshape(devices, -1, 128)
    keys = (tiles(last).max(-1) - tiles(first).min(-1)).sum(-1)
    assert keys.max() <= 1.05 * keys.mean()


def test_rows_of_the_same_devices_make_up_for_each_other():
    """A stripe each is not even; of two rows the other half is."""
    first, last = (np.tile(x[:, :1024], (2, 1)) for x in ROWS["one text"])
    order = stripes.dealt(first, last, 2)
    assert order.tolist() == [[1, 0], [0, 1]]
    assert stripes.stored(last, order)[:, [0, 512]].tolist() == [[513, 1], [1, 513]]
    assert stripes.places(np.array([0, 3, 600]), order[0], 1024).tolist() == [512, 515, 88]

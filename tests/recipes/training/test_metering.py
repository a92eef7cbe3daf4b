"""Speed, fill and times of a run, by a clock that is moved by hand."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np

from recipes.data.ids.examples import PairIds
from recipes.data.packed import batches
from recipes.data.packed.batches import Update
from recipes.data.packed.packing import Shape
from recipes.training import compiling, metering


def update(real, stored, positions, scored, ratings):
    """Of as many pairs as there are ratings."""
    rows = np.arange(len(ratings))
    said = np.array(scored), np.array(ratings, float), np.ones(len(rows)), np.zeros(len(rows))
    return Update(rows, [], real, stored, positions, *said, ("chosen", "rejected"))


def test_speed_is_that_of_training_alone(monkeypatch):
    """Waiting for data counts; compiling, evaluation and saving do not, whenever it is read."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(metering, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(compiling, "time", metering.time)
    compiled = compiling.Compiling()
    meter = metering.Meter(compiled)

    def compile_for(seconds, event=f"{compiling.EVENTS}backend_compile_duration"):
        clock.now += seconds
        compiled.hear(event, float(seconds))

    none = math.nan, math.nan
    with meter.waiting():
        clock.now += 1
    meter.add(update(300, 60, 100, [(7, 4), (3, 2)], [(1, 2), none]))
    compile_for(40)
    clock.now += 2
    with meter.paused("evaluation"):
        compile_for(100)
        clock.now += 900
    assert meter.time_of("evaluation") == 1000
    meter.add(update(100, 30, 100, [(1, 5), (1, 1)], [(3, 5), none]))
    clock.now += 5
    assert meter.time_left(7) is None  # devices have computed while programs were compiled
    assert meter.times() == {"time/steps": 7, "time/input": 1, "time/compiling": 40}
    assert meter.read() == {
        "pack_fill": 90 / 200,
        "length_chosen": 12 / 4,
        "length_rejected": 12 / 4,
        "score_chosen": 2,
        "score_rejected": 3.5,
    }
    for what, seconds in (("saving", 400), ("export", 500), ("saving", 100)):
        with meter.paused(what):
            clock.now += seconds
    with meter.waiting():
        clock.now += 3
    meter.add(update(300, 60, 100, [(7, 4), (3, 2)], [none, none]))
    clock.now += 57 + 5
    compile_for(30)  # for rows of another shape
    compile_for(0, "/jax/checkpoint/write")
    compiled.hear(f"{compiling.EVENTS}jaxpr_trace_duration", 5.0 + 30)  # the former was part of it
    assert meter.time_left(7) == "about 7.0 minutes remaining, plus evaluation and saving"
    assert meter.time_left(7) is None  # said once
    assert metering.in_words(45.4) == "45 seconds" and metering.in_words(10_800.0) == "3.0 hours"
    times = {"time/steps": 57, "time/input": 3, "time/saving": 500, "time/export": 500}
    assert meter.times() == times | {"time/compiling": 35}
    assert meter.read() == {
        "tokens_per_second": 300 / 60,
        "input_wait": 3 / 60,
        "pack_fill": 60 / 100,
        "length_chosen": 10 / 2,
        "length_rejected": 6 / 2,
    }
    assert meter.time_left(7) is None  # said once


def test_what_jax_compiles_is_heard():
    with compiling.heard() as compiled:
        jax.jit(lambda x: x + 1)(jnp.zeros(3)).block_until_ready()
        assert (before := compiled.seconds()) > 0
        compiled.forget(since=math.inf)
        assert compiled.seconds() == before
        compiled.forget()
        assert compiled.seconds() == 0
    jax.jit(lambda x: x + 2)(jnp.zeros(3)).block_until_ready()
    assert compiled.seconds() == 0


def test_lengths_are_those_of_each_answers_scored_tokens():
    def pair(chosen, rejected):
        masks = np.array(chosen, bool), np.array(rejected, bool)
        answers = (np.arange(len(mask), dtype=np.int32) for mask in masks)
        return PairIds(0, np.arange(9, dtype=np.int32), *answers, *masks)

    pairs = [pair([1, 0, 1, 1], [0, 1]), pair([1, 1], [1, 1, 1, 0, 1, 1])]
    packed = batches.pack(pairs, Shape(1, 64, 2, 2, 1), [0])
    assert packed.scored.tolist() == [[3, 1], [2, 5]]
    expected = {"length_chosen": 5 / 2, "length_rejected": 6 / 2}
    assert metering.lengths(packed.scored, packed.names) == expected
    assert (packed.real_tokens, packed.stored_tokens) == (4 * 9 + 6 + 8, 2 * 9 + 6 + 8 - 4)

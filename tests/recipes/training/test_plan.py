"""What a plan says of settings that this run cannot give, or that mean something unexpected."""

import dataclasses
import json

import numpy as np
import pytest

from checkpoints_io.errors import BadInput
from checkpoints_io.run_state import Keep
from recipes.configs import tiny
from recipes.data.ids.pair_ids import AnswerIds, PairIds
from recipes.data.mixture import Part
from recipes.data.packed.batches import Place
from recipes.data.packed.packing import Shape
from recipes.data.run_data import HeldOut
from recipes.training import by_name, optimizer, plan
from recipes.training.run import Every, Saving
from tests.conftest import adamw_of, given_by, run_with, small_config
from tests.zoo import twins
import zoo
from zoo import qwen3_5

ID, MASK = np.ones(1, np.int32), np.ones(1, bool)
PAIR, ANSWER = PairIds(0, ID, ID, ID, MASK, MASK), AnswerIds(0, ID, ID, MASK)


def run_of(config, *, pairs=100, steps=60, parts=None, held_out=50, answers=2):
    parts = parts or [Part("train", 1.0, [PAIR] * pairs, pairs - 1)]
    keep = Keep(config.keep_checkpoints, every=config.keep_every, highest=None)
    return run_with(
        total_steps=steps,
        parts=parts,
        examples=[example for part in parts for example in part.examples],
        held_out=[HeldOut("heldout", [PAIR] * held_out)] if held_out else [],
        place=Place(Shape(2, 64, config.train_batch_size, answers, few=1), None),
        adamw=adamw_of(config),
        every=by_name.part(Every, given_by(config)),
        saving=Saving(keep, 2, "float32", text_only=False, chat_template=None),
    )


def notes(config, **run):
    return plan.notes(run_of(config, **run), by_name.part(plan.Asked, given_by(config)))


@pytest.fixture
def config():
    config = tiny.get_config()
    config.learning_rate = 5e-5
    return config


def test_rows_that_devices_cannot_share_are_refused(config):
    refuse = lambda model, length, context: plan.refuse_cut_rows(
        given_by(config, row_length=length), model, context
    )
    said = json.loads(twins.config_of("qwen3_5_text", "plain").to_json_string(use_diff=True))
    config_of = qwen3_5.Config.from_hf(said)
    full = dataclasses.replace(config_of, layer_types=("full_attention",) * len(config_of.kinds))
    llama, recurrent = zoo.abstract(small_config()), zoo.abstract(config_of)
    refuse(recurrent, 640, 1)
    refuse(zoo.abstract(full), 768, 4)
    for length in (None, 768):
        refuse(llama, length, 4)
    told = r"row_length=640 cannot be shared by .*mesh.context=4 devices.*of 256, like 768"
    with pytest.raises(BadInput, match=told):
        refuse(llama, 640, 4)
    told = r"mesh.context=4: layers of a qwen3_5_text go.*state \(inputs, memory\)"
    with pytest.raises(BadInput, match=told):
        refuse(recurrent, None, 4)


def test_an_ordinary_run_has_no_notes(config):
    assert notes(config) == []


TWO = [Part("a", 1000.0, [PAIR] * 90, 89), Part("b", 0.001, [PAIR] * 10, 99)]
UNEVEN = [TWO[0]._replace(weight=19.0), TWO[1]._replace(weight=1.0)]


@pytest.mark.parametrize(
    ("other", "run", "told"),
    [
        ({"train_batch_size": 250}, {}, "about 250 pairs and there are 100: it uses each 2.5"),
        ({"train_batch_size": 101}, {}, "it uses each 1.01 times"),
        ({"warmup": 0.0}, {"parts": TWO, "steps": 5}, "less than one pair of b is drawn in 5"),
        ({"train_batch_size": 99}, {"parts": UNEVEN}, "pairs of a and there are 90"),
        ({"warmup": 100.0}, {}, "5e-05, only 2.95e-05: --config.warmup=100 is 100 steps, and the"),
        ({"warmup": 60.0}, {}, "only 4.92e-05"),
        ({"warmup": 1.0, "lr_schedule": "constant"}, {"steps": 2}, None),
        ({"warmup": 0.1}, {"steps": 4}, "--config.warmup=0.1 of 4 steps rounds to 0 steps"),
        ({"warmup": 0.5, "cooldown": 0.1}, {"steps": 4}, "cooldown=0.1 of 4 steps rounds to 0 "),
        ({"learning_rate": 1e-12}, {}, "weights larger than 3.4e-05 do not change"),
        ({"learning_rate": 5e-9}, {}, None),
        ({"steps_per_eval": 61}, {}, "step 60, the only one due by --config.steps_per_eval=61"),
        ({"steps_per_eval": 61}, {"held_out": 0}, None),
        ({"steps_per_log": 99, "steps_per_checkpoint": 99, "steps_per_hf_export": 99}, {},
         "steps_per_log=99, --config.steps_per_checkpoint=99, --config.steps_per_hf_export=99"),
        ({"steps_per_hf_export": -1, "steps_per_checkpoint": None}, {}, None),
        ({"keep_every": 80}, {}, "--config.keep_every=80 keeps no checkpoint"),
        ({"max_eval_pairs": 51}, {}, "--config.max_eval_pairs=51 is more than"),
        ({"max_eval_pairs": 50}, {}, None),
        ({"num_epochs": 0.1, "warmup": 0.0}, {"steps": 1}, "would be 0.312 updates of 32 pairs"),
        ({"num_epochs": 19.2}, {}, None),
        ({"ema_decay": 0.9}, {}, None),
        ({"ema_decay": 0.999}, {}, "ema_decay=0.999 averages over about 1000 updates, and the "),
    ],
)  # fmt: skip
def test_notes(config, other, run, told):
    config.steps_per_log = config.steps_per_eval = config.steps_per_checkpoint = 1
    config.update_from_flattened_dict(other)
    found = notes(config, **run)
    if told is None:
        assert found == []
    else:
        (note,) = found
        assert told in note


def test_notes_on_single_answers_speak_of_answers(config):
    config.update_from_flattened_dict({"train_batch_size": 99, "num_epochs": 0.1, "warmup": 0.0})
    parts = [part._replace(examples=[ANSWER] * len(part.examples)) for part in (UNEVEN[0], TWO[1])]
    run = run_of(config, parts=parts, steps=5, answers=1)
    found = plan.notes(run, by_name.part(plan.Asked, given_by(config)))
    told = "\n".join([*found, *plan._mixed(run)])
    for words in ("99 answers of a", "one answer of b is", "updates of 99 answers", "90 answers"):
        assert words in told
    assert "pair" not in told.replace("max_eval_pairs", "")


def test_a_run_that_would_learn_nothing_is_refused(config):
    config.warmup = 1.0
    with pytest.raises(ValueError, match="leaves the run's only step there"):
        optimizer.schedule_of(adamw_of(config), 1)
    config.warmup, config.learning_rate = 0.0, 1e-50
    with pytest.raises(ValueError, match="learning_rate=1e-50 is 0 in float32"):
        optimizer.schedule_of(adamw_of(config), 1)
    for steps, warmup in ((10**30, 0.0), (60, 1e300)):
        config.warmup = warmup
        with pytest.raises(ValueError, match="a run must have fewer than"):
            optimizer.schedule_of(adamw_of(config), steps)
    config.warmup, config.learning_rate = 0.1, 1e-5  # which rounds to no step
    assert float(optimizer.schedule_of(adamw_of(config), 1)(0)) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("other", "steps", "told"),
    [
        ({}, 60, "0 to 5e-05 over 6 steps, then linear from 5e-05 to 0 over 54"),
        ({"cooldown": 0.1, "lr_schedule": "cosine", "min_lr_ratio": 0.1}, 60,
         "0 to 5e-05 over 6 steps, then 5e-05, then cosine from 5e-05 to 5e-06 over 6"),
        ({"lr_schedule": "constant", "warmup": 0.0}, 60, "5e-05"),
        ({"lr_schedule": "inverse_sqrt", "warmup": 12.0}, 48,
         "0 to 5e-05 over 12 steps, then inverse_sqrt from 5e-05 to 2.5e-05 over 36"),
        ({}, 1, "linear from 5e-05 to 0 over 1"),
    ],
)  # fmt: skip
def test_the_rate_is_told(config, other, steps, told):
    config.update_from_flattened_dict(other)
    assert plan._schedule(adamw_of(config), steps) == told

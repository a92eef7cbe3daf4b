"""What a plan notes of settings that this run cannot give, or that mean something unexpected."""

import types

import numpy as np
import pytest

from checkpoints_io.run_state import Keep
from recipes.configs import tiny
from recipes.data.ids.examples import AnswerIds, PairIds
from recipes.data.mixture import Part
from recipes.data.packed.batches import Place
from recipes.data.packed.packing import Shape
from recipes.data.run_data import HeldOut
from recipes.training import by_name, notes, plan
from recipes.training.adapting import Adapting
from recipes.training.run import Every, Records, Saving
from tests.conftest import given_by, optimizer_settings_of, run_with

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
        optimizer_settings=optimizer_settings_of(config),
        every=by_name.part(Every, given_by(config)),
        saving=Saving(keep, 2, "float32", text_only=False, chat_template=None),
    )


def notes_of(config, **run):
    return notes.of(run_of(config, **run), config.num_epochs, config.max_eval_pairs)


@pytest.fixture
def config():
    config = tiny.get_config()
    config.learning_rate = 5e-5
    return config


def test_an_ordinary_run_has_no_notes(config):
    assert notes_of(config) == []


TWO = [Part("a", 1000.0, [PAIR] * 90, 89), Part("b", 0.001, [PAIR] * 10, 99)]
UNEVEN = [TWO[0]._replace(weight=19.0), TWO[1]._replace(weight=1.0)]


@pytest.mark.parametrize(
    ("other", "run", "told"),
    [
        ({"train_batch_size": 250}, {}, "pairs but there are only 100: it uses each one 2.5"),
        ({"train_batch_size": 100, "num_train_steps": 5, "warmup": 0.0}, {"steps": 5}, None),
        ({"train_batch_size": 101}, {}, "it uses each one 1.01 times"),
        ({"warmup": 0.0}, {"parts": TWO, "steps": 5}, "less than one pair of b is drawn in 5"),
        ({"train_batch_size": 99}, {"parts": UNEVEN}, "pairs of a but there are only 90"),
        ({"warmup": 100.0}, {}, "5e-05, only 2.95e-05: --config.warmup=100 is 100 steps, but the"),
        ({"warmup": 60.0}, {}, "only 4.92e-05"),
        ({"warmup": 1.0, "lr_schedule": "constant"}, {"steps": 2}, None),
        ({"warmup": 0.1}, {"steps": 4}, "--config.warmup=0.1 of 4 steps rounds to 0 steps"),
        ({"warmup": 0.5, "cooldown": 0.1}, {"steps": 4}, "cooldown=0.1 of 4 steps rounds to 0 "),
        ({"learning_rate": 1e-12}, {}, "weights larger than 3.4e-05 do not change"),
        ({"learning_rate": 5e-9}, {}, None),
        ({"steps_per_eval": 61}, {}, "--config.steps_per_eval=61 never applies within 60 steps"),
        ({"steps_per_eval": 61, "max_eval_pairs": 51}, {"held_out": 0}, "no pairs are held out: "),
        ({"steps_per_log": 99, "steps_per_checkpoint": 99, "steps_per_hf_export": 99}, {},
         "steps_per_log=99, --config.steps_per_checkpoint=99, --config.steps_per_hf_export=99"),
        ({"steps_per_hf_export": -1, "steps_per_checkpoint": None}, {}, None),
        ({"keep_every": 60}, {}, None),
        ({"keep_every": 61}, {}, "--config.keep_every=61 keeps no checkpoint"),
        ({"keep_every": 80}, {}, "--config.keep_every=80 keeps no checkpoint"),
        ({"max_eval_pairs": 51}, {}, "--config.max_eval_pairs=51 exceeds"),
        ({"max_eval_pairs": 50}, {}, None),
        ({"num_epochs": 0.1, "warmup": 0.0}, {"steps": 1}, "would be 0.312 updates of 32 pairs"),
        ({"num_epochs": 19.2}, {}, None),
        ({"ema_decay": 0.9}, {}, None),
        ({"ema_decay": 0.999}, {}, "ema_decay=0.999 averages over about 1000 updates, but the "),
    ],
)  # fmt: skip
def test_a_note_by_eye(config, other, run, told):
    config.steps_per_log = config.steps_per_eval = config.steps_per_checkpoint = 1
    config.update_from_flattened_dict(other)
    found = notes_of(config, **run)
    if told is None:
        assert found == []
    else:
        (note,) = found
        assert told in note


def test_notes_on_single_answers_speak_of_answers(config):
    config.update_from_flattened_dict({"train_batch_size": 99, "num_epochs": 0.1, "warmup": 0.0})
    parts = [part._replace(examples=[ANSWER] * len(part.examples)) for part in (UNEVEN[0], TWO[1])]
    run = run_of(config, parts=parts, steps=5, answers=1)
    found = notes.of(run, config.num_epochs, config.max_eval_pairs)
    told = "\n".join([*found, *plan._mixed(run)])
    for words in ("99 answers of a", "one answer of b is", "updates of 99 answers", "90 answers"):
        assert words in told
    assert "pair" not in told.replace("max_eval_pairs", "")


@pytest.mark.parametrize(("rank", "noted"), [(16, False), (17, True)])
@pytest.mark.parametrize("export", ["adapter", "merged"])
def test_a_rank_that_vllm_takes_only_if_it_is_told(config, rank, noted, export):
    sites = [types.SimpleNamespace(ranks=ranks) for ranks in ([4, 4], [rank, 2])]
    adapting = Adapting(sites, {}, None, "B", 1.0, export)
    run = run_of(config)._replace(adapting=adapting, records=Records(False, None, "", (), {}))
    told = notes.of(run, config.num_epochs, config.max_eval_pairs)
    expected = f"adapters of rank {rank}: vLLM takes at most 16 unless --max-lora-rank is raised"
    assert told == ([expected] if noted and export == "adapter" else [])


@pytest.mark.parametrize(("dtype", "noted"), [("float16", True), ("bfloat16", False)])
@pytest.mark.parametrize("export", ["adapter", "merged"])
def test_adapters_are_written_in_float32_whatever_was_asked(config, dtype, noted, export):
    sites = [types.SimpleNamespace(ranks=[4, 4])]
    run = run_of(config)
    run = run._replace(
        adapting=Adapting(sites, {}, None, "B", 1.0, export),
        records=Records(False, None, "", (), {}),
        saving=run.saving._replace(export_dtype=dtype),
    )
    told = "\n".join(notes.of(run, config.num_epochs, config.max_eval_pairs))
    assert ("hf_save_dtype=float16 has no effect" in told) == (noted and export == "adapter")

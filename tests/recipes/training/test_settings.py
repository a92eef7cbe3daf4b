"""Settings are refused in sentences that name the flag."""

import re
import typing

import ml_collections
import pytest

from recipes.configs import tiny, tiny_sft
from recipes.training import (
    by_name,
    checks,
    forecasting,
    optimizer,
    plan,
    run,
    settings,
    written,
)
from tests.conftest import OF_SOME_RUNS, ROOT, given_by
from zoo.parts import attention, remat


@pytest.fixture
def config():
    return tiny.get_config()


def check(config):
    return checks.checked(config, settings.table_of(settings.DPO))


def test_the_configs_pass(config):
    check(config)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"beta": 0.0}, "--config.beta must be above 0, not 0.0"),
        ({"beta": -1.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"reference_mode": "cache"}, r"did you mean cached\?"),
        ({"reference_cache": "somewhere"}, "no effect"),
        ({"attention": "densse"}, r"did you mean dense\?"),
        ({"remat": "ful"}, r"did you mean full\?"),
        ({"adam_mu_dtype": "f16"}, "adam_mu_dtype"),
        ({"profile": "3"}, "not of the form 11-13"),
        ({"profile": "5-3"}, "not of the form 11-13"),
        ({"data.layout": "preferencechat"}, r"did you mean preference_chat\?"),
        ({"data.over_length": "cut"}, "data.over_length"),
        ({"lr_schedule": "cosin"}, "did you mean cosine"),
        ({"mp": "bf16"}, "p=f32,c=bfloat16"),
        ({"mp": "p=bf16,c=bf16"}, "do not change"),
        ({"mp": "p=f32,c=f16"}, "f32 or bfloat16"),
        ({"hf_save_dtype": "int8"}, "hf_save_dtype"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"validation_split_fraction": 1.0}, "validation_split_fraction"),
        ({"num_epochs": 1.0}, "set only one of"),
        ({"train_seq_len": 512, "row_length": 256}, "row_length"),
        ({"row_length": 1000}, "multiple of 64"),
        ({"train_batch_size": 0}, "train_batch_size"),
        ({"warmup": -0.1}, "warmup"),
        ({"reference_is_hf": False}, "directory of a run"),
        ({"steps_per_hf_export": -3}, "never"),
        ({"push_to_hub": "mine"}, "is not of the form owner/name"),
        ({"push_to_hub": "me/mine", "steps_per_hf_export": -1}, "nothing is exported"),
        ({"push_to_hub": "me/mine", "directory": "gs://b/run"}, "is elsewhere"),
        ({"hub_strategy": "every"}, "hub_strategy=every has no effect without"),
        ({"hub_private": False}, "hub_private=False has no effect without"),
        ({"hub_strategy": "evry"}, r"did you mean every\?"),
        ({"steps_per_hf_export": 0}, "never"),
        ({"adam_beta2": 1.0}, "adam_beta2"),
        ({"optimizer": "rmsprob"}, r"did you mean rmsprop\?"),
        (
            {"optimizer": "lion", "adam_beta1": 0.95},
            "adam_beta1=0.95 has no effect with --config.optimizer=lion: it only applies to adamw, "
            "adamw8bit, muon; leave it out, or set --config.adam_beta1=0.9",
        ),
        ({"optimizer": "rmsprop", "adam_beta2": 0.99}, "no effect with --config.optimizer=rmsprop"),
        ({"optimizer": "adafactor", "adam_epsilon": 1e-30}, "adam_epsilon=1e-30 has no effect"),
        (
            {"optimizer": "adamw8bit", "adam_mu_dtype": "bf16"},
            "it only applies to adamw, muon; leave",
        ),
        ({"ema_decay": 0.0}, "ema_decay must be above 0 and below 1, not 0.0"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**40}, "seed"),
        ({"warmup": float("inf")}, "warmup"),
        ({"data.max_malformed_fraction": -3.0}, "max_malformed_fraction"),
        ({"lr_schedule": "constant", "cooldown": 0.1}, "no effect"),
        ({"data.date": "today"}, "not of the form 2026-01-31"),
        ({"data.scored_turns": "first"}, "data.scored_turns"),
        ({"data.columns": {"chosn": "better"}}, r"did you mean chosen\?"),
        ({"keep_every": 30}, "must be a multiple of"),
        ({"keep_every": 0}, "keep_every must be above 0"),
        ({"keep_best": "heldout/loss"}, "e.g. heldout/dpo_accuracy"),
        ({"keep_best": "heldout/dpo_loss", "steps_per_eval": 15}, "checkpoints without metrics"),
        ({"save_retries": -1}, "save_retries"),
        ({"distributed.num_processes": 2}, "no effect without --config.distributed.enabled=true"),
        ({"beta": "0.1"}, "--config.beta='0.1' is not a number"),
        ({"seed": 1.5}, "--config.seed=1.5 is not a whole number"),
        ({"per_device_parallelism": 65}, "is more rows than the 32 pairs of an update"),
        ({"seed": True}, "--config.seed=True is not a whole number"),
        ({"tensorboard": 1}, "--config.tensorboard=1 is not true or false"),
        ({"tags": "dpo"}, "--config.tags='dpo' is not several texts"),
        ({"validation": "b.jsonl"}, "write --config.validation.heldout=b.jsonl"),
        ({"validation": {"more": {"path": "a.jsonl", "layot": "hh"}}}, "'layot'"),
        ({"validation": {"more": {"path": "a.jsonl", "layout": "h"}}}, "validation.more.layout"),
    ],
)
def test_impossible_settings(config, other, told):
    config.update_from_flattened_dict(other)
    with pytest.raises(ValueError, match=told):
        check(config)


def test_a_setting_that_another_optimizer_takes_may_say_what_it_is_by_default(config):
    config.optimizer, config.adam_mu_dtype = "lion", "f32"
    check(config)


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_trackers_are_extras(config, library, monkeypatch):
    config[f"{library}_project"] = "mine"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=rf"pip install -e '\.\[{library}\]'"):
        check(config)


def test_missing_settings_are_named_as_flags(config):
    config.directory = None
    config.data.over_length = None
    with pytest.raises(
        ValueError, match=r"please set --config.data.over_length=…, --config.directory=…"
    ):
        check(ml_collections.ConfigDict(config))


def test_a_config_has_all_settings_and_no_other(config):
    with config.unlocked():
        config.learning_ratte = 1.0
        with pytest.raises(ValueError, match=r"'learning_ratte' .*did you mean learning_rate"):
            check(config)
        del config.learning_ratte
        config.validation_split_fractoin = 0.1
        with pytest.raises(ValueError, match=r"did you mean validation_split_fraction"):
            check(config)
        del config.validation_split_fractoin
        config.validation = {"mine": "a.jsonl", "theirs": {"path": "b.jsonl"}}
        check(config)


def test_a_setting_that_a_config_does_not_name_has_its_default_or_is_asked_for(config):
    """So that an older config works when there is a new setting."""
    with config.unlocked():
        del config.data.date, config.save_retries, config.mesh, config.lr_schedule
    left = ["data.date", "lr_schedule", "mesh.data", "mesh.fsdp", "mesh.context", "mesh.tensor",
            "save_retries"]  # fmt: skip
    assert [n for n in by_name.left_out(config, settings.ALL) if n not in OF_SOME_RUNS] == left
    given = check(config)
    assert given.keys() == settings.ALL.keys()
    assert [given[name] for name in left] == [None, "linear", 1, -1, 1, 1, 2]
    with config.unlocked():
        del config.directory, config.beta
    with pytest.raises(ValueError, match=r"the config has no beta, directory: add it"):
        check(config)


def test_what_a_config_must_name(config):
    """All else has a default; without one of these, none."""
    must = {name for name, setting in settings.ALL.items() if setting.default is settings.MUST}
    assert must == {
        "directory", "initialize_from_hf", "train_data", "train_seq_len", "loss", "beta",
        "train_batch_size", "learning_rate",
    }  # fmt: skip
    for name in must:
        less = config.copy_and_resolve_references()
        with less.unlocked():
            del less[name]
        with pytest.raises(ValueError, match=f"the config has no {name}: add it"):
            check(less)


def test_a_config_of_what_must_be_named_alone_is_whole(config):
    must = {n: config[n] for n, s in settings.ALL.items() if s.default is settings.MUST}
    given = check(ml_collections.ConfigDict(must | {"num_train_steps": 10}))
    others = settings.ALL.keys() - must.keys() - {"num_train_steps"}
    assert {n: given[n] for n in others} == {n: settings.ALL[n].default for n in others}


@pytest.mark.parametrize("name", settings.ALL)
def test_a_default_is_a_value_that_the_setting_may_have(name):
    setting = settings.ALL[name]
    if setting.default is settings.MUST:
        return
    if setting.default is None:
        assert setting.unset
        return
    assert type(setting.default) is setting.kind
    assert not setting.choices or setting.default in setting.choices
    assert not setting.bound or setting.bound.holds(setting.default)


def test_the_choices_of_the_table_are_those_of_the_code():
    """They are written out there, so that a wrong flag is answered before any of it is imported."""
    choices = lambda name: settings.ALL[name].choices
    assert set(choices("attention")) == set(attention.BACKENDS)
    assert set(choices("remat")) == set(remat.POLICIES)
    assert set(choices("hf_save_dtype")) == set(settings.DTYPES) == set(written.DTYPES)
    assert set(choices("adam_mu_dtype")) < set(written.DTYPES)


PARTS = (optimizer.OptimizerSettings, run.Every, plan.Options, forecasting.Sizes)


def test_the_parts_that_settings_fill_are_annotated_as_the_table_has_it(config):
    for part in PARTS:
        hints = typing.get_type_hints(part)
        for name in part._fields:
            setting = settings.ALL[name]
            kind = setting.kind if setting.unset is None else setting.kind | None
            assert hints[name] == kind, (part, name)
        filled = by_name.part(part, given_by(config))
        assert filled._asdict() == {name: config[name] for name in part._fields}


def test_no_part_is_left_out_above():
    files = (ROOT / "recipes").rglob("*.py")
    named = re.findall(r"by_name\.part\(([\w.]+), ", "".join(path.read_text() for path in files))
    assert {name.rpartition(".")[2] for name in named} == {part.__name__ for part in PARTS}


def test_a_recipe_without_pairs_has_no_settings_of_pairs():
    config = tiny_sft.get_config()
    table = settings.table_of(settings.SFT)
    given = checks.checked(config, table)
    assert given.keys() == table.keys()
    assert settings.ALL.keys() - table.keys() == {*settings.REFERENCE, *settings.PREFERENCE}
    assert all(table[name] is settings.ALL[name] for name in table)
    for best, told in (("heldout/dpo_loss", "e.g. heldout/loss"), ("heldout/loss", None)):
        config.keep_best = best
        if told is None:
            checks.checked(config, table)
        else:
            with pytest.raises(ValueError, match=told):
                checks.checked(config, table)
    config.data.layout = "preference_chat"
    with pytest.raises(ValueError, match=r"layout='preference_chat' is not one of conversation"):
        checks.checked(config, table)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            {"per_device_parallelism": 33},
            "more rows than the 32 answers of .*: each takes at most one",
        ),
        ({"per_device_parallelism": 32}, None),
        ({"max_eval_pairs": 5, "validation": None}, "no effect: nothing is held out"),
    ],
)
def test_impossible_settings_of_single_answers(other, told):
    config, table = tiny_sft.get_config(), settings.table_of(settings.SFT)
    config.update_from_flattened_dict(other)
    if told is None:
        checks.checked(config, table)
    else:
        with pytest.raises(ValueError, match=told):
            checks.checked(config, table)


def test_what_a_config_of_single_answers_must_name():
    config, table = tiny_sft.get_config(), settings.table_of(settings.SFT)
    del config.learning_rate
    told = r"no learning_rate: add it as in recipes/configs/tiny_sft.py"
    with pytest.raises(ValueError, match=told):
        checks.checked(config, table)


def test_groups_and_table_have_the_same_settings_once():
    names = [name for group in settings.DPO.values() for name in group]
    assert len(names) == len(set(names)) == len(settings.ALL)

"""What a resumed run may not change."""

import json

import pytest

from checkpoints_io import places
from recipes.configs import llama8b, tiny, tiny_sft
from recipes.training import by_name, listing, resume, settings
from tests.conftest import given_by

# Each of them shapes the numbers: which pairs, in which order, what is learnt from them and how.
SHAPING = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "adam_mu_dtype", "beta", "cooldown",
    "data.max_malformed_fraction", "data.scored_turns", "dpop_lambda", "initialize_from_hf",
    "label_smoothing", "learning_rate", "loss", "lr_schedule", "max_grad_norm", "min_lr_ratio",
    "mp", "num_train_steps", "optimizer", "reference_is_hf", "reference_model_path", "seed",
    "train_batch_size", "train_data", "train_seq_len", "trainable", "validation_split_fraction",
    "warmup", "weight_decay",
)  # fmt: skip


# What a resumed run may have otherwise: no number depends on it, or only updates that were none.
FREE = {
    "adapter.export", "attention", "compile_cache", "directory", "distributed", "eval_at",
    "hang_minutes", "hf_save_dtype", "hf_text_only", "hub_private", "hub_strategy",
    "minutes_per_checkpoint", "push_to_hub",
    "require_accelerator", "stop_patience", "stop_when",
    "keep_best", "keep_checkpoints", "keep_every", "max_eval_pairs", "mesh",
    "min_pack_fill", "name", "nonfinite", "per_device_parallelism", "profile", "reference_cache",
    "reference_mode", "remat", "row_length", "run_initial_eval", "sample_count",
    "sample_prompts", "sample_temperature", "sample_tokens",
    "save_retries", "steps_per_checkpoint",
    "steps_per_eval", "steps_per_hf_export", "steps_per_log", "steps_per_sample", "tags",
    "tasks", "tasks_folder",
    "tensorboard", "token_cache", "trackio_project", "validation", "validation_texts",
    "wandb_project",
}  # fmt: skip


def test_what_may_change_and_what_not():
    free = {name for name, setting in settings.ALL.items() if setting.free}
    of = lambda name: name if name.startswith("adapter.") else name.split(".")[0]
    assert {of(name) for name in free} == FREE
    assert not [n for n in settings.ALL if of(n) in FREE and n not in free]


@pytest.mark.parametrize("comparing", ["keep_best", "stop_when"])
def test_figures_of_other_data_are_not_compared(comparing):
    config, here = tiny.get_config(), places.at("run")
    given = given_by(config, validation={"heldout": {"path": "a.jsonl"}}, max_eval_pairs=8)
    saved = json.loads(json.dumps({"evaluations": resume.of_evaluations(given)}))
    for name, value in (("validation", {"heldout": "b.jsonl"}), ("max_eval_pairs", None)):
        other = given | {name: value}
        resume.refuse_other_evaluations(saved, other, here)  # nothing compares them
        asked = other | {comparing: "heldout/dpo_accuracy"}
        with pytest.raises(ValueError, match=rf"of other data \({name}.*add --config.{comparing}="):
            resume.refuse_other_evaluations(saved, asked, here)
        resume.refuse_other_evaluations({}, asked, here)  # of an older version
    resume.refuse_other_evaluations(saved, given | {comparing: "heldout/dpo_accuracy"}, here)


@pytest.mark.parametrize("config", [tiny.get_config(), llama8b.get_config()])
def test_what_shapes_the_numbers_may_not_change(config):
    saved = resume.of_settings(given_by(config))
    assert saved.keys() >= set(SHAPING)
    for name in SHAPING:
        with pytest.raises(ValueError, match=rf"other settings \({name}: 'other' there"):
            resume.refuse_other_settings(saved | {name: "other"}, saved, places.at("run"))
    resume.refuse_other_settings(saved, dict(saved), places.at("run"))


def test_what_touches_no_number_may_change():
    config = tiny.get_config()
    saved = resume.of_settings(given_by(config))
    config.keep_checkpoints, config.steps_per_log, config.mesh.fsdp = 7, 7, 1
    config.validation = {"another": "held-out.jsonl"}
    assert resume.of_settings(given_by(config)) == saved


@pytest.mark.parametrize(
    ("config", "groups"), [(tiny, settings.DPO), (tiny_sft, settings.SFT)], ids=["dpo", "sft"]
)
def test_a_run_may_be_made_longer_and_what_else_differs_is_named_alone(config, groups):
    table = settings.table_of(groups)
    saved = resume.of_settings(by_name.plain(config.get_config(), table))
    saved["warmup"], saved["lr_schedule"] = 0.0, "constant"
    steps = saved["num_train_steps"]
    asked = lambda **other: resume.refuse_other_settings(
        saved, saved | other, places.at("run"), step=2, examples=100
    )
    asked(num_train_steps=steps + 1)
    with pytest.raises(ValueError, match=r"other settings \(train_data: ") as told:
        asked(num_train_steps=steps + 1, train_data="b.jsonl")
    assert "num_train_steps" not in str(told.value) and "longer" not in str(told.value)
    with pytest.raises(
        ValueError, match=r"num_train_steps: .*A run can be made longer, not shorter"
    ):
        asked(num_train_steps=steps - 1, train_data="b.jsonl")


@pytest.mark.parametrize(
    ("config", "groups"), [(tiny, settings.DPO), (tiny_sft, settings.SFT)], ids=["dpo", "sft"]
)
def test_what_may_change_is_marked_in_the_help_of_this_recipe(config, groups):
    table = settings.table_of(groups)
    now = resume.of_settings(by_name.plain(config.get_config(), table))
    with pytest.raises(ValueError, match="--help marks what a resume may change"):
        resume.refuse_other_settings(now | {"seed": 7}, now, places.at("run"))
    _, *told = listing.text(groups, {}).split("  --config.")
    marked = {
        one.partition("=")[0] for one in told if "(a resume may change it)" in " ".join(one.split())
    }
    assert marked == {name for name, setting in table.items() if setting.free}
    assert ("reference_mode" in marked) == (groups is settings.DPO)

"""Each setting, set alone by a flag, changes what it says and nothing else."""

import re

import pytest

from checkpoints_io import places
from recipes.configs import tiny
from recipes.preference import objectives, reference
from recipes.training import by_name, checks, overrides, resume, settings
from tests.conftest import ROOT, given_by

CONFIGS = {name: f"--config={ROOT}/recipes/configs/{name}.py" for name in ("tiny", "llama8b")}
# For every setting a text that neither config holds, and the value it means.
OTHER = {
    "adam_beta1": ("0.85", 0.85),
    "adam_beta2": ("0.999", 0.999),
    "adam_epsilon": ("1e-6", 1e-6),
    "adam_mu_dtype": ("bfloat16", "bfloat16"),
    "adapter.alpha": ("16", 16.0),
    "adapter.alpha_pattern": ("(q|v)_proj=8.5", ("(q|v)_proj=8.5",)),
    "adapter.dora": ("true", True),
    "adapter.exclude": ("up_proj,down_proj", ("up_proj", "down_proj")),
    "adapter.export": ("merged", "merged"),
    "adapter.layers": ("0-7,12", "0-7,12"),
    "adapter.lora_plus": ("16", 16.0),
    "adapter.path": ("/runs/first", "/runs/first"),
    "adapter.rank": ("8", 8),
    "adapter.rank_pattern": ("v_proj=8,.*layers\\.0\\..*=4", ("v_proj=8", ".*layers\\.0\\..*=4")),
    "adapter.rslora": ("true", True),
    "adapter.targets": ("q_proj,v_proj", ("q_proj", "v_proj")),
    "adapter.zero": ("B", "B"),
    "ema_decay": ("0.99", 0.99),
    "frozen": ("nf4", "nf4"),
    "optimizer": ("adamw8bit", "adamw8bit"),
    "trainable": (".*q_proj.*", ".*q_proj.*"),
    "attention": ("dense", "dense"),
    "beta": ("0.25", 0.25),
    "chat_template": ("a.jinja", "a.jinja"),
    "compile_cache": ("/tmp/compiled", "/tmp/compiled"),
    "cooldown": ("7", 7.0),
    "data.answers": ("4", 4),
    "data.columns": ('{"chosen": "better"}', {"chosen": "better"}),
    "data.date": ("2026-01-31", "2026-01-31"),
    "data.end_of_turn": ("<|im_end|>", "<|im_end|>"),
    "data.layout": ("hh", "hh"),
    "data.max_malformed_fraction": ("0.5", 0.5),
    "data.over_length": ("cut_prompt", "cut_prompt"),
    "data.scored_turns": ("last", "last"),
    "directory": ("/runs/another", "/runs/another"),
    "distributed.coordinator_address": ("10.0.0.1:99", "10.0.0.1:99"),
    "distributed.enabled": ("true", True),
    "distributed.num_processes": ("2", 2),
    "distributed.process_id": ("1", 1),
    "cpo_alpha": ("0.5", 0.5),
    "desirable_weight": ("1.5", 1.5),
    "undesirable_weight": ("0.5", 0.5),
    "use_weighting": ("true", True),
    "discopop_tau": ("0.1", 0.1),
    "dpop_lambda": ("5", 5.0),
    "f_alpha_divergence_coef": ("0.5", 0.5),
    "f_divergence_type": ("forward_kl", "forward_kl"),
    "gamma_beta_ratio": ("0.3", 0.3),
    "length_alpha": ("0.01", 0.01),
    "hf_save_dtype": ("float32", "float32"),
    "hf_text_only": ("True", True),
    "hang_minutes": ("20", 20.0),
    "hub_private": ("false", False),
    "hub_strategy": ("every", "every"),
    "initialize_from_hf": ("/models/another", "/models/another"),
    "keep_best": ("heldout/dpo_loss", "heldout/dpo_loss"),
    "keep_checkpoints": ("5", 5),
    "keep_every": ("1000", 1000),
    "label_smoothing": ("0.1", 0.1),
    "ld_alpha": ("0.5", 0.5),
    "learning_rate": ("1e-6", 1e-6),
    "list_pairs": ("best", "best"),
    "loss": ("dpop", "dpop"),
    "lr_schedule": ("cosine", "cosine"),
    "max_eval_pairs": ("10", 10),
    "max_grad_norm": ("2", 2.0),
    "mesh.data": ("2", 2),
    "mesh.fsdp": ("4", 4),
    "mesh.context": ("2", 2),
    "mesh.tensor": ("2", 2),
    "min_lr_ratio": ("0.1", 0.1),
    "min_pack_fill": ("0.25", 0.25),
    "minutes_per_checkpoint": ("10", 10.0),
    "mp": ("p=f32,c=bf16", "p=f32,c=bf16"),
    "name": ("another", "another"),
    "nonfinite": ("skip", "skip"),
    "num_epochs": ("2", 2.0),
    "num_train_steps": ("77", 77),
    "per_device_parallelism": ("3", 3),
    "profile": ("3-4", "3-4"),
    "reference_cache": ("/tmp/answers", "/tmp/answers"),
    "reference_is_hf": ("false", False),
    "reference_sync_steps": ("512", 512),
    "reference_mode": ("cached", "cached"),
    "reference_mixup_alpha": ("0.5", 0.5),
    "reference_model_path": ("/models/reference", "/models/reference"),
    "push_to_hub": ("me/mine", "me/mine"),
    "remat": ("none", "none"),
    "require_accelerator": ("true", True),
    "row_length": ("8192", 8192),
    "run_initial_eval": ("false", False),
    "sample_tokens": ("9", 9),
    "steps_per_sample": ("30", 30),
    "eval_at": ("1,5", "1,5"),
    "stop_when": ("heldout/dpo_loss", "heldout/dpo_loss"),
    "stop_patience": ("9", 9),
    "sample_prompts": ("prompts.jsonl", "prompts.jsonl"),
    "sample_count": ("2", 2),
    "sample_temperature": ("0.7", 0.7),
    "save_retries": ("0", 0),
    "seed": ("1", 1),
    "steps_per_checkpoint": ("40", 40),
    "steps_per_eval": ("40", 40),
    "steps_per_hf_export": ("-1", -1),
    "steps_per_log": ("1", 1),
    "tags": ("a,b", ("a", "b")),
    "tasks": ("arc_easy,gsm8k", ("arc_easy", "gsm8k")),
    "tasks_folder": ("a", "a"),
    "tensorboard": ("false", False),
    "token_cache": ("/tmp/tokens", "/tmp/tokens"),
    "tokenizer": ("/models/words", "/models/words"),
    "train_batch_size": ("16", 16),
    "train_data": ("a.jsonl", "a.jsonl"),
    "train_seq_len": ("512", 512),
    "validation": ('{"mine": "b.jsonl"}', {"mine": "b.jsonl"}),
    "validation_split_fraction": ("0.2", 0.2),
    "validation_texts": ('{"wiki": "a.txt"}', {"wiki": "a.txt"}),
    "trackio_project": ("mine", "mine"),
    "wandb_project": ("mine", "mine"),
    "warmup": ("0.2", 0.2),
    "weight_decay": ("0.01", 0.01),
}


def read(*flags):
    """The config of a file with its flags."""
    config, others = overrides.read(["dpo.py", *flags], settings.ALL)
    assert others == ["dpo.py"]
    return config


def given(config, *flags):
    """Every setting by its name; those of which the user chooses the names as they are."""
    return by_name.plain(read(CONFIGS[config], *flags), settings.ALL)


def test_the_sweep_is_of_all_settings():
    assert OTHER.keys() == settings.ALL.keys(), "give each setting another value in OTHER"


@pytest.mark.parametrize("config", CONFIGS)
def test_each_setting_alone_by_a_flag(config):
    before = given(config)
    for name, (text, value) in OTHER.items():
        for flag in ([f"--config.{name}={text}"], [f"--config.{name}", text]):
            now = given(config, *flag)
            assert now == before | {name: value}, flag
            assert type(now[name]) is type(value), flag
            assert now[name] != before[name], flag


@pytest.mark.parametrize("config", CONFIGS)
def test_each_setting_alone_is_unset_or_refused(config):
    before = given(config)
    for name, setting in settings.ALL.items():
        flag = f"--config.{name}=None"
        if setting.unset is not None:
            assert given(config, flag) == before | {name: None}
            assert given(config, f"--config.{name}=null") == before | {name: None}
        else:
            with pytest.raises(ValueError, match=f"--config.{name} cannot be unset"):
                given(config, flag)


def path_of(config):
    """Of its reference."""
    given = given_by(config)
    return reference.wanted(given, objectives.objective(given)).path


def test_a_reference_of_its_own():
    """A flag for the reference leaves the policy; unset, the reference follows the policy."""
    config, _ = overrides.read(
        ["", CONFIGS["tiny"], "--config.reference_model_path=/reference"], settings.ALL
    )
    assert config.initialize_from_hf == "recipes/tiny/model"
    assert path_of(config) == "/reference"
    config, _ = overrides.read(
        ["", CONFIGS["tiny"], "--config.initialize_from_hf=/policy"], settings.ALL
    )
    assert path_of(config) == "/policy"
    flags = ["--config.initialize_from_hf=/policy", "--config.reference_model_path=/reference"]
    for order in (flags, flags[::-1]):
        config = read(CONFIGS["tiny"], *order)
        assert (config.initialize_from_hf, path_of(config)) == (
            "/policy", "/reference"
        )  # fmt: skip


def test_a_run_from_before_the_reference_could_be_unset_goes_on(tmp_path):
    """Its checkpoints name the policy's own folder; unset, it is the same."""
    config = tiny.get_config()
    unset, here = resume.of_settings(given_by(config)), places.at(str(tmp_path))
    config.reference_model_path = config.initialize_from_hf
    resume.refuse_other_settings(resume.of_settings(given_by(config)), unset, here)
    config.reference_model_path = "/another"
    with pytest.raises(ValueError, match="'/another' there, None here"):
        resume.refuse_other_settings(resume.of_settings(given_by(config)), unset, here)


def copied(folder, *lines):
    """A config file of which the last lines are these."""
    file = folder / "copied.py"
    text = (ROOT / "recipes" / "configs" / "tiny.py").read_text()
    file.write_text(text.replace("    return config", "\n    ".join(["", *lines, "return config"])))
    return f"--config={file}"


@pytest.mark.parametrize(
    ("names", "value", "told"),
    [
        (
            ["reference_model_path"],
            'config.get_ref("initialize_from_hf")',
            "initialize_from_hf and reference_model_path of the config share one reference.*"
            r"config_dict.placeholder\(str\)",
        ),
        (
            ["steps_per_eval"],
            'config.get_ref("steps_per_checkpoint")',
            "steps_per_checkpoint and steps_per_eval of the config share one .*its own value",
        ),
        (
            ["keep_every", "row_length"],
            "config_dict.placeholder(int)",
            "keep_every and row_length of the config share one reference",
        ),
    ],
)
def test_two_settings_that_one_flag_would_set(tmp_path, names, value, told):
    own = [f"config.{name}" for name in names]
    file = copied(tmp_path, f"del {', '.join(own)}", " = ".join([*own, value]))
    for flags in ([], ["--config.reference_model_path=/reference"]):
        with pytest.raises(ValueError, match=told):
            read(file, *flags)


def test_a_setting_that_follows_another_may_be_set_alone(tmp_path):
    """What get_oneway_ref gives, or get_ref over a placeholder: only the one that follows moves."""
    file = copied(
        tmp_path,
        "config.reference_model_path = config.get_ref('initialize_from_hf')",
        "config.steps_per_eval = config.get_oneway_ref('steps_per_checkpoint')",
    )
    flags = ["--config.reference_model_path=/reference", "--config.steps_per_eval=7"]
    config = read(file, *flags)
    assert (config.initialize_from_hf, config.steps_per_checkpoint) == ("recipes/tiny/model", 20)
    assert (config.reference_model_path, config.steps_per_eval) == ("/reference", 7)


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--config.tags=a, b"], "tags", ("a", "b")),
        (["--config.tags=('a', 'b')"], "tags", ("a", "b")),
        (["--config.tags=['a']"], "tags", ("a",)),
        (["--config.tags="], "tags", ()),
        (["--noconfig.tensorboard"], "tensorboard", False),
        (["--config.tensorboard", "false"], "tensorboard", False),
        (["--config.tensorboard=No"], "tensorboard", False),
        (["--config.reference_mode=cached", "--config.tensorboard"], "tensorboard", True),
        (["--config.beta", "1"], "beta", 1.0),
        (["-config.beta=2"], "beta", 2.0),
        (["--config.beta=2", "--config.beta=3"], "beta", 3.0),
        (["--config.steps_per_hf_export", "-1"], "steps_per_hf_export", -1),
        (["--config.cooldown", "None"], "cooldown", None),
        (["--config.remat=none"], "remat", "none"),
        (["--config.mesh={'data': 2, 'fsdp': 4}"], "mesh",
         dict(data=2, fsdp=4, context=1, tensor=1)),
        (["--config.data.columns={'chosen':'a'}"], "data.columns", {"chosen": "a"}),
        (["--config.data.columns.chosen=a"], "data.columns", {"chosen": "a"}),
        (["--config.validation.more=b"], "validation",
         {"heldout": "recipes/tiny/heldout.jsonl", "more": "b"}),
        (["--config.validation.heldout=None"], "validation", {}),
        (["--config.validation.heldout.layout=hh"], "validation",
         {"heldout": {"path": "recipes/tiny/heldout.jsonl", "layout": "hh"}}),
        (["--config.validation=None", "--config.validation.a.path=b",
          "--config.validation.a.columns.chosen=c"], "validation",
         {"a": {"path": "b", "columns": {"chosen": "c"}}}),
        (["--config.train_data={'a': {'path': 'b', 'weight': 2}, 'c': {'path': 'd'}}",
          "--config.train_data.c.weight=3"], "train_data",
         {"a": {"path": "b", "weight": 2}, "c": {"path": "d", "weight": 3.0}}),
        (["--config.train_data={'a': {'path': 'b', 'weight': 'rows'}}",
          "--config.train_data.c.path=d", "--config.train_data.c.weight=rows"], "train_data",
         {"a": {"path": "b", "weight": "rows"}, "c": {"path": "d", "weight": "rows"}}),
        (["--config.train_data=s3://a/{b,c}.jsonl"], "train_data", "s3://a/{b,c}.jsonl"),
    ],
)  # fmt: skip
def test_ways_to_write_a_value(flags, name, value):
    config = read(CONFIGS["tiny"], *flags)
    found = config[name]
    assert (found.to_dict() if hasattr(found, "to_dict") else found) == value
    before = read(CONFIGS["tiny"])
    others = dict(by_name.flat(config)).items() - dict(by_name.flat(before)).items()
    assert {other.split(".")[0] for other, _ in others} <= {name.split(".")[0], "reference_mode"}


def test_a_config_that_fixes_kinds_is_told_how_not_to(tmp_path):
    """As configs did that were copied when `tiny` fixed them."""
    file = tmp_path / "copied.py"
    text = (ROOT / "recipes" / "configs" / "tiny.py").read_text()
    text = text.replace("ConfigDict(type_safe=False)", "ConfigDict()")
    line = "    config.train_data = dict(a=dict(path='a.jsonl'))\n"
    file.write_text(text.replace("    return config", f"{line}    return config"))
    number = file.read_text().splitlines().index(line.rstrip()) + 1
    with pytest.raises(ValueError, match=f"copied.py, line {number}: .*type_safe=False"):
        read(f"--config={file}")


def test_a_config_file_may_give_any_setting_another_kind_of_value(tmp_path):
    """A mixture in place of one file, a source with settings in place of a path, none at all."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from recipes.configs import tiny\n\n"
        "def get_config(sources='two'):\n"
        "    config = tiny.get_config()\n"
        "    config.train_data = dict(a=dict(path='a.jsonl', weight=2.0), b=dict(path='b.jsonl'))\n"
        "    config.validation.heldout = dict(path='c.jsonl', layout='hh')\n"
        "    config.warmup = 3\n"
        "    config.cooldown = 3\n"
        "    if sources == 'none':\n"
        "        config.validation = None\n"
        "        config.data.columns = None\n"
        "    return config\n"
    )
    for argument in ("", ":none"):
        config, _ = overrides.read(
            ["", f"--config={file}{argument}", "--config.beta=0.5"], settings.ALL
        )
        checks.checked(config, settings.ALL)
        assert config.train_data.a.weight == 2.0
        assert (config.validation is None) == (argument == ":none")
        assert config.beta == 0.5


def test_a_config_file_may_begin_from_another(tmp_path):
    """As docs/dpo.md shows it; flags change it as any other."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from recipes.configs import tiny\n\n\ndef get_config():\n"
        "    config = tiny.get_config()\n"
        "    config.name = 'mine'\n"
        "    config.beta = 0.25\n"
        "    config.data.scored_turns = 'last'\n"
        "    return config\n"
    )
    changed = {"name": "mine", "beta": 0.25, "data.scored_turns": "last"}
    assert by_name.plain(read(f"--config={file}"), settings.ALL) == given("tiny") | changed
    found = by_name.plain(read(f"--config={file}", "--config.beta=0.5"), settings.ALL)
    assert found == given("tiny") | changed | {"beta": 0.5}


def test_the_config_that_the_docs_begin_with_names_what_it_must(tmp_path):
    (told,) = re.findall(
        r"```python\n(import ml_collections\n.*?)```", (ROOT / "docs/dpo.md").read_text(), re.DOTALL
    )
    file = tmp_path / "mine.py"
    file.write_text(told)
    config = read(f"--config={file}")
    named = {name for name, setting in settings.ALL.items() if setting.default is settings.MUST}
    assert {*config} == named | {"num_epochs", "validation_split_fraction"}
    checks.checked(config, settings.ALL)


def test_a_config_file_may_name_what_it_must_alone(tmp_path):
    """And a flag sets what it does not name."""
    file = tmp_path / "mine.py"
    must = {n: v for n, v in given("tiny").items() if settings.ALL[n].default is settings.MUST}
    file.write_text(
        f"import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({must!r}, type_safe=False)\n"
    )
    flags = ["--config.num_epochs=2", "--config.mesh.fsdp=1", "--config.data.columns.chosen=better",
             "--config.distributed.enabled=false", "--config.tags=a"]  # fmt: skip
    found = checks.checked(read(f"--config={file}", *flags), settings.ALL)
    defaults = {name: setting.default for name, setting in settings.ALL.items()}
    assert found == defaults | must | {
        "num_epochs": 2.0, "mesh.fsdp": 1, "data.columns": {"chosen": "better"},
        "distributed.enabled": False, "tags": ("a",),
    }  # fmt: skip

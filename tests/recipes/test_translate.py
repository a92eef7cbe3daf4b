"""Files of other trainers become configs that the recipe takes, and nothing is lost in silence."""

import json

import pytest
import yaml

from recipes import peers, translate
from recipes.peers import listing, rows
from recipes.preference import objectives
from recipes.training import checks, settings

DPO = settings.table_of(settings.DPO)

TRL = """
model_name_or_path: Qwen/Qwen2-0.5B-Instruct
model_revision: c540970
dataset_name: trl-lib/ultrafeedback_binarized
eval_strategy: steps
eval_steps: 50
save_steps: 100
load_best_model_at_end: true
metric_for_best_model: eval_rewards/accuracies
learning_rate: 5e-6
max_steps: 1000
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
output_dir: Qwen2-0.5B-DPO
loss_type: [sigmoid, bco_pair, sft]
loss_weights: [0.8, 0.2, 1.0]
use_peft: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
load_in_4bit: true
padding_free: true
report_to: [tensorboard, mlflow]
hub_model_id: no-owner
push_to_hub: true
warp_factor: 9
"""
AXOLOTL = """
base_model: meta-llama/Meta-Llama-3-8B-Instruct
model_type: LlamaForCausalLM
special_tokens:
  pad_token: <|finetune_right_pad_id|>
load_in_8bit: true
load_in_4bit: false
chat_template: llama3
rl: dpo
rl_beta: 0.2
datasets:
  - path: owner/pairs
    split: train_prefs
    revision: 3f2a
    type: chat_template.default
    field_messages: conversation
    field_chosen: chosen
val_set_size: 0.05
output_dir: ./outputs/lora-out
sequence_len: 4096
adapter: lora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
"""
LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: dpo
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 2.0
pref_loss: simpo
simpo_gamma: 1.0
pref_ftx: 0.1
dataset: mine
template: llama3
cutoff_len: 2048
output_dir: saves/simpo
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr: 5.0e-7
warmup_ratio: 0.1
fp16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""
LEVANTER = """
data:
  tokenizer: meta-llama/Llama-3.1-8B-Instruct
  components:
    first:
      source: {type: url, train_urls: ["gs://bucket/one/*.jsonl.gz"]}
      format: {type: preference_chat, slice_strategy: left}
    second:
      source: {type: hf, id: owner/pairs}
      format: {type: preference_chat, chosen_field: better}
  train_weights: {first: 3.0, second: 1.0}
train_seq_len: 4096
trainer:
  num_train_steps: 2000
  train_batch_size: 128
  mp: p=f32,c=bfloat16
  checkpointer: {save_interval: 10m, keep: [{every: 500}]}
adapter: {type: lora, r: 64, alpha: 64.0, dropout: 0.05, zero_init_b: true}
reference: {type: adapter_base}
initialize_from_hf: meta-llama/Llama-3.1-8B
beta: 0.1
optimizer: {learning_rate: 5e-6, warmup: 0.1, lr_schedule: linear}
"""
EXAMPLES = {
    TRL: (
        "TRL",
        {
            "directory": "Qwen2-0.5B-DPO", "seed": 42, "train_seq_len": 1024,
            "initialize_from_hf": "Qwen/Qwen2-0.5B-Instruct@c540970",
            "train_data": "trl-lib/ultrafeedback_binarized",
            "validation": {"test": "trl-lib/ultrafeedback_binarized:test"},
            "data.over_length": "cut_answer", "loss": "sigmoid=0.8,bco_pair=0.2,sft", "beta": 0.1,
            "adapter.rank": 32, "adapter.alpha": 16.0, "adapter.targets": ("q_proj", "v_proj"),
            "adapter.zero": "B", "frozen": "nf4", "train_batch_size": 128, "num_train_steps": 1000,
            "learning_rate": 5e-6, "max_grad_norm": 1.0, "adam_beta2": 0.999,
            "mp": "p=f32,c=bfloat16", "steps_per_eval": 50, "steps_per_checkpoint": 100,
            "keep_best": "test/dpo_accuracy",
        },
        {"lora_dropout", "report_to: mlflow", "hub_model_id: no-owner", "warp_factor"},
        {"per_device_train_batch_size", "prompts and answers"},
        {"padding_free"},
    ),
    AXOLOTL: (
        "axolotl",
        {
            "directory": "./outputs/lora-out", "seed": 42, "train_seq_len": 4096,
            "initialize_from_hf": "meta-llama/Meta-Llama-3-8B-Instruct",
            "train_data": {"part1": {"path": "owner/pairs:train_prefs@3f2a",
                                     "columns": {"prompt": "conversation"}}},
            "validation_split_fraction": 0.05, "loss": "sigmoid", "beta": 0.2,
            "adapter.rank": 32, "adapter.alpha": 16.0, "adapter.zero": "B", "frozen": "int8",
            "train_batch_size": 64, "num_epochs": 4.0, "optimizer": "adamw8bit",
            "learning_rate": 2e-4, "lr_schedule": "cosine", "warmup": 10.0, "max_grad_norm": 1.0,
            "adam_beta2": 0.999, "mp": "p=f32,c=bfloat16",
        },
        {"chat_template", "evals_per_epoch: 4"},
        {"micro_batch_size"},
        {"model_type", "special_tokens.pad_token", "flash_attention"},
    ),
    LLAMA_FACTORY: (
        "LLaMA-Factory",
        {
            "directory": "saves/simpo", "seed": 42, "train_seq_len": 2048,
            "initialize_from_hf": "meta-llama/Meta-Llama-3-8B-Instruct",
            "train_data": "data/mine.json", "validation_split_fraction": 0.1,
            "loss": "simpo,sft_seq=0.1", "beta": 2.0, "adapter.rank": 8, "adapter.alpha": 16.0,
            "adapter.zero": "B", "train_batch_size": 64, "num_epochs": 3.0, "learning_rate": 5e-6,
            "lr_schedule": "cosine", "min_lr_ratio": 0.1, "warmup": 0.1, "max_grad_norm": 1.0,
            "adam_beta2": 0.999, "mp": "p=f32,c=bfloat16", "steps_per_log": 500,
            "steps_per_eval": 500, "steps_per_checkpoint": 500, "gamma_beta_ratio": 0.5,
        },
        {"template"},
        {"dataset: mine", "cutoff_len", "fp16", "per_device_train_batch_size"},
        {"plot_loss"},
    ),
    LEVANTER: (
        "Levanter",
        {
            "directory": "runs/theirs", "seed": 0, "train_seq_len": 4096,
            "initialize_from_hf": "meta-llama/Llama-3.1-8B",
            "tokenizer": "meta-llama/Llama-3.1-8B-Instruct",
            "train_data": {"first": {"path": "gs://bucket/one/*.jsonl.gz", "weight": 3.0},
                           "second": {"path": "owner/pairs", "weight": 1.0}},
            "data.columns": {"chosen": "better"}, "data.over_length": "cut_answer",
            "validation_split_fraction": 0.1, "loss": "sigmoid", "beta": 0.1, "adapter.rank": 64,
            "adapter.alpha": 64.0, "adapter.zero": "B", "train_batch_size": 128,
            "num_train_steps": 2000, "learning_rate": 5e-6, "warmup": 0.1, "min_lr_ratio": 0.1,
            "weight_decay": 0.1, "max_grad_norm": 1.0, "mp": "p=f32,c=bfloat16",
            "steps_per_eval": 1000, "steps_per_checkpoint": 500, "keep_every": 500,
            "minutes_per_checkpoint": 10.0, "hf_save_dtype": "float32",
        },
        {"adapter.dropout"},
        set(),
        {"data.components.first.source.type", "data.components.first.format.type",
         "data.components.second.source.type", "data.components.second.format.type"},
    ),
}  # fmt: skip


def config_of(text):
    room = {}
    exec(compile(text, "mine.py", "exec"), room)
    return room["get_config"]()


@pytest.mark.parametrize("file", EXAMPLES, ids=[told[0] for told in EXAMPLES.values()])
def test_a_file_of_theirs_becomes_a_config_that_the_recipe_takes(file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name, wanted, lacking, differs, idle = EXAMPLES[file]
    given = yaml.safe_load(file)
    source = peers.recognised(given)
    assert source.name == name
    text, told = translate.translated(given, "theirs", "theirs.yaml", "mine.py", devices=8)
    config = config_of(text)
    own = checks.checked(config, DPO)
    objectives.objective(own)
    assert own == {n: one.default for n, one in DPO.items()} | {"name": "theirs"} | wanted
    assert "fix this before you run it" not in told
    notes = rows.translated(source, given, 8).notes
    assert {name for name, _ in notes.lacking} == lacking
    assert {name for name, _ in notes.differs} == differs
    assert {name for name, _ in notes.idle} == idle
    for some in notes:
        assert all(f"  {name}: {says}" in told for name, says in some)


@pytest.mark.parametrize("source", peers.SOURCES, ids=lambda source: source.name)
def test_tables_name_settings_that_there_are(source):
    for name, row in source.rows.items():
        assert set(filter(None, row.ours.split(", "))) <= DPO.keys(), name
        assert row.ours or row.says, name  # why there is none
        assert not (row.ours and row.idle), name
    for name in source.defaults:
        assert rows.row_of(name, source.rows).ours, name


def test_the_docs_have_the_tables():
    text = listing.DOCS.read_text("utf-8")
    assert text == text[: text.index(listing.HEADING)] + listing.markdown()


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"loss_type": "ipo"}, {"loss": "ipo"}),
        ({"rpo_alpha": 0.5}, {"loss": "sigmoid,sft=0.5"}),
        ({"rpo_alpha": 1, "loss_type": ["hinge", "bco_pair"], "loss_weights": [0.8, 0.2]},
         {"loss": "hinge=0.8,bco_pair=0.2,sft=1"}),
        ({"dataset_config": "en"}, {"train_data": "c/d:en:train"}),
        ({"desirable_weight": 0.2, "loss_type": "kto"}, {"loss": "kto", "desirable_weight": 0.2}),
        ({"f_divergence_type": "alpha_divergence"}, {"f_alpha_divergence_coef": 0.5}),
        ({"reference_free": True}, {"loss": "reference_free"}),
        ({"reference_free": True, "loss_type": "ipo"}, {"loss": "ipo"}),
        ({"truncation_mode": "keep_end"}, {"data.over_length": "cut_prompt"}),
        ({"sync_ref_model": True}, {"reference_sync_steps": 512, "reference_mixup_alpha": 0.6}),
        ({"precompute_ref_log_probs": True}, {"reference_mode": "cached"}),
        ({"bf16": False}, {"mp": "p=f32,c=f32"}),
        ({"gradient_checkpointing": False}, {"remat": "none"}),
        ({"optim": "paged_lion_8bit", "adam_beta1": 0.9}, {"optimizer": "lion"}),
        ({"optim": "adamw_torch_fused"}, {"optimizer": "adamw"}),
        ({"lr_scheduler_type": "constant", "warmup_steps": 9}, {"warmup": 0.0}),
        ({"lr_scheduler_type": "polynomial"}, {"lr_schedule": "linear"}),
        ({"push_to_hub": True, "hub_model_id": "me/it"}, {"push_to_hub": "me/it"}),
        ({"max_steps": -1, "num_train_epochs": 2}, {"num_epochs": 2.0}),
        ({"save_strategy": "no"}, {"steps_per_checkpoint": None}),
        ({"datasets": [{"path": "json", "data_files": "a.jsonl"}, {"path": "o/n", "split": "x"}]},
         {"train_data": {"part1": {"path": "a.jsonl", "weight": "rows"},
                         "part2": {"path": "o/n:x", "weight": "rows"}}}),
        ({"datasets": [{"path": "json", "data_files": ["a.jsonl", "b.jsonl"]}]},
         {"train_data": {"part1": {"path": "a.jsonl", "weight": "rows"},
                         "part2": {"path": "b.jsonl", "weight": "rows"}}}),
        ({"datasets": [{"path": "o/n", "data_files": "a/b.jsonl"}]},
         {"train_data": "hf://datasets/o/n/a/b.jsonl"}),  # a file of that repository
        ({"max_grad_norm": None}, {"max_grad_norm": None}),  # which clips nothing there
        ({"cpo_alpha": 0.5}, {"loss": "cpo", "cpo_alpha": 0.5}),
        ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0, "beta": 2.0},
         {"loss": "simpo", "gamma_beta_ratio": 0.5}),
        ({"loss_type": "simpo", "beta": 2.0}, {"loss": "simpo,sft=1", "gamma_beta_ratio": 0.25}),
        ({"dpo_loss_type": "dpo_norm", "dpo_beta": 5}, {"loss": "sigmoid_norm", "beta": 5.0}),
        ({"dpo_loss_type": "wpo"}, {"loss": "sigmoid", "use_weighting": True}),
        ({"dataset_mixer": {"o/n": 1.0, "o/m": 0.5}, "dataset_splits": ["a", "b"],
          "eval_strategy": "steps"},
         {"train_data": {"part1": {"path": "o/n:a", "weight": "rows"},
                         "part2": {"path": "o/m:a", "weight": "rows"}},
          "validation": {"test1": "o/n:b", "test2": "o/m:b"}}),
        ({"dataset_mixer": {"o/n": 1.0}, "dataset_splits": ["a", "b"], "eval_strategy": "steps"},
         {"train_data": "o/n:a", "validation": {"test": "o/n:b"}}),
    ],
)  # fmt: skip
def test_what_several_of_trls_say_together(changed, wanted):
    file = {"model_name_or_path": "a/b", "dataset_name": "c/d"} | changed
    found = rows.translated(peers.TRL, file, 1).settings
    assert {name: found.get(name) for name in wanted} == wanted
    assert translate.refused({"name": "x", "directory": "y"} | found) is None


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ({"packing": True, "max_length": 512}, "packing belongs to `trl sft`: .*recipes/sft.py"),
        (
            {"num_generations": 8, "beta": 0.04},
            "num_generations belongs to a trainer that samples answers",
        ),
        ({"center_rewards_coefficient": 0.1}, "center_rewards_coefficient belongs to `trl reward`"),
    ],
)
def test_files_of_trls_other_trainers_are_no_configs_of_dpo(named, told):
    file = {"model_name_or_path": "a/b", "dataset_name": "c/d"} | named
    with pytest.raises(ValueError, match=told):
        translate.translated(file, "theirs", "theirs.yaml", "mine.py")


def test_a_data_file_has_no_split_to_hold_out(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("")
    file = {"model_name_or_path": "a/b", "dataset_name": str(tmp_path / "pairs.jsonl")}
    found = rows.translated(peers.TRL, file | {"eval_strategy": "steps"}, 1)
    assert found.settings["train_data"] == str(tmp_path / "pairs.jsonl")
    assert "validation" not in found.settings
    assert "set validation_split_fraction" in dict(found.notes.lacking)["dataset_test_split"]


@pytest.mark.parametrize("kind", ["cosine", "inverse_sqrt", "cosine_with_min_lr"])
def test_what_no_schedule_reads_is_told(kind):
    file = {"model_name_or_path": "a/b", "dataset_name": "c/d", "lr_scheduler_type": kind}
    file |= {"lr_scheduler_kwargs": {"num_cycles": 2, "min_lr_rate": 0.1}}
    found = dict(rows.translated(peers.TRL, file, 1).notes.lacking)
    assert found["lr_scheduler_kwargs.num_cycles"].startswith("2; lr_schedule is ")
    assert ("lr_scheduler_kwargs.min_lr_rate" in found) == (kind != "cosine_with_min_lr")


def test_of_two_warmups_the_ratio_is_taken_and_that_is_said():
    file = {"model_name_or_path": "a/b", "dataset_name": "c/d", "warmup_ratio": 0.1}
    found = rows.translated(peers.TRL, file | {"warmup_steps": 2}, 1)
    assert found.settings["warmup"] == 0.1
    assert "the ratio is taken" in dict(found.notes.differs)["warmup_ratio, warmup_steps"]
    alone = rows.translated(peers.TRL, file, 1).notes.differs
    assert "warmup_ratio, warmup_steps" not in dict(alone)


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "theirs.yaml").write_text(TRL)
    (tmp_path / "mine.py").write_text("# by hand\n")
    with pytest.raises(ValueError, match=r"mine.py already exists: give another name, or remove"):
        translate.translate([str(tmp_path / "theirs.yaml")], str(tmp_path / "mine.py"), 1)
    assert (tmp_path / "mine.py").read_text() == "# by hand\n"


def test_a_dataset_in_a_folder_is_read_by_the_names_of_its_files(tmp_path):
    def found(*names):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        file = {"model_name_or_path": "a/b", "dataset_name": str(folder), "eval_strategy": "steps"}
        sources = rows.translated(peers.TRL, file, 1).settings
        return [str(sources["train_data"]), sources["validation"]["test"], str(folder)]

    train, test, folder = found("train-00000.parquet", "test.parquet")
    assert (train, test) == (f"{folder}/train*", f"{folder}/test*")
    train, test, folder = found("pairs.jsonl")  # the run says that there is no test*
    assert (train, test) == (folder, f"{folder}/test*")


def test_trackers_are_named_by_their_projects():
    file = {"model_name_or_path": "a/b", "dataset_name": "c/d", "project": "p"}
    file |= {"report_to": ["wandb", "trackio", "comet_ml"]}
    found = rows.translated(peers.TRL, file, 1)
    names = ("wandb_project", "trackio_project", "tensorboard")
    assert [found.settings[name] for name in names] == ["p", "p", False]
    assert [name for name, _ in found.notes.lacking] == ["report_to: comet_ml"]


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"rl": "orpo", "orpo_alpha": 0.1}, {"loss": "sft,orpo=0.1"}),
        ({"rl": "kto", "kto_desirable_weight": 0.2}, {"loss": "kto", "desirable_weight": 0.2}),
        ({"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0},
         {"loss": "simpo", "gamma_beta_ratio": 0.5}),
        ({"rl": "dpo", "dpo_loss_type": ["ipo"]}, {"loss": "ipo"}),
        ({"rl": "ipo"}, {"loss": "ipo", "warmup": 0.03}),
    ],
)  # fmt: skip
def test_losses_of_axolotl(changed, wanted):
    file = {"base_model": "a/b", "datasets": [{"path": "c/d"}], "learning_rate": 1e-6} | changed
    found = rows.translated(peers.AXOLOTL, file, 1).settings
    assert {name: found.get(name) for name in wanted} == wanted
    assert translate.refused({"name": "x", "directory": "y"} | found) is None


@pytest.mark.parametrize(
    ("changed", "loss"),
    [
        ({"pref_loss": "orpo", "pref_beta": 0.2}, "sft_seq,orpo=0.2"),
        ({"pref_bco_weight": 0.25}, "sigmoid=0.8,bco_pair=0.2"),
        ({"pref_loss": "kto_pair"}, "bco_pair"),
        ({"stage": "kto", "kto_chosen_weight": 0.5}, "kto"),
    ],
)
def test_losses_of_llama_factory(changed, loss):
    file = {"stage": "dpo", "model_name_or_path": "a/b", "dataset": "c"} | changed
    found = rows.translated(peers.LLAMA_FACTORY, file, 1).settings
    assert found["loss"] == loss
    assert translate.refused({"name": "x", "directory": "y"} | found) is None


def test_data_that_llama_factory_has_registered_is_named_by_its_file(tmp_path):
    (tmp_path / "dataset_info.json").write_text(
        '{"a": {"file_name": "a.json", "ranking": true, "columns": {"chosen": "good"}}, '
        '"b": {"hf_hub_url": "o/n", "subset": "s", "split": "t", "ranking": true}}'
    )
    file = {"stage": "dpo", "model_name_or_path": "x/y", "dataset": "a, b"}
    file |= {"dataset_dir": str(tmp_path), "eval_dataset": "a,b"}
    found = rows.translated(peers.LLAMA_FACTORY, file, 1)
    a, b = {"path": f"{tmp_path}/a.json", "columns": {"chosen": "good"}}, {"path": "o/n:s:t"}
    concatenated = {"a": a | {"weight": "rows"}, "b": b | {"weight": "rows"}}
    assert found.settings["train_data"] == concatenated
    assert found.settings["validation"] == {"eval1": a, "eval2": b}
    drawn = file | {"mix_strategy": "interleave_under", "interleave_probs": "0.3,0.7"}
    by_weight = rows.translated(peers.LLAMA_FACTORY, drawn, 1).settings["train_data"]
    assert by_weight == {"a": a | {"weight": 0.3}, "b": b | {"weight": 0.7}}
    assert not any(name.startswith("dataset") for name, _ in found.notes.differs)


def test_columns_that_llama_factory_names_are_read_by_their_roles(tmp_path):
    """Its own example; here the question is of two columns, and its data says so."""
    columns = {"prompt": "instruction", "query": "input", "chosen": "good", "images": "pictures"}
    of_kto = {"prompt": "ask", "response": "reply", "kto_tag": "liked", "system": "sys"}
    (tmp_path / "dataset_info.json").write_text(
        json.dumps(
            {
                "a": {"file_name": "a.json", "columns": columns, "num_samples": 9},
                "b": {"file_name": "b.json", "columns": of_kto},
            }
        )
    )
    file = {"stage": "dpo", "model_name_or_path": "x/y", "dataset_dir": str(tmp_path)}
    found = rows.translated(peers.LLAMA_FACTORY, file | {"dataset": "a"}, 1)
    assert found.settings["train_data"] == {
        "a": {"path": f"{tmp_path}/a.json", "columns": {"chosen": "good"}}
    }
    told = [why for name, why in found.notes.lacking if name == "dataset: a"]
    assert told == ["9 of its rows there, and all here: shorten the file",
                    "its column of images is not read"]  # fmt: skip
    found = rows.translated(peers.LLAMA_FACTORY, file | {"dataset": "b"}, 1)
    assert found.settings["train_data"]["b"]["columns"] == {
        "instruction": "ask", "answer": "reply", "label": "liked", "system_prompt": "sys",
    }  # fmt: skip


def test_a_part_of_a_dataset_is_all_of_it_and_that_is_said():
    file = {"model_name_or_path": "a/b", "dataset_mixer": {"o/n": 0.25}}
    found = rows.translated(peers.TRL, file, 1)
    assert found.settings["train_data"] == "o/n"
    assert ("o/n", "0.25 of its rows there, and all here: shorten the file") in found.notes.lacking


def test_what_an_entry_of_several_sources_says_besides_is_told():
    entry = {"path": "o/n", "data_dir": "in", "columns": ["prompt"], "split": "train"}
    file = {"model_name_or_path": "a/b", "datasets": [entry]}
    ((name, says),) = rows.translated(peers.TRL, file, 1).notes.lacking
    assert (name, says[:30]) == ("datasets: o/n: data_dir: in", "all of the dataset is read: na")
    fields = {"field_prompt": "q", "prompt_format": "[INST] {prompt}", "no_input_format": ""}
    roles = {"roles": {"user": ["me"]}, "shards": 4, "message_property_mappings": {"role": "who"}}
    entries = [
        {"path": "o/n", "type": fields}, {"path": "o/m", "type": "chatml.intel"},
        {"path": "o/l", "type": "chat_template.default", "field_messages": "m"} | roles,
    ]  # fmt: skip
    file = {"base_model": "a", "rl": "dpo", "datasets": entries, "learning_rate": 1e-6}
    found = rows.translated(peers.AXOLOTL, file, 1)
    assert [name.partition(": ")[2] for name, _ in found.notes.lacking] == [
        "o/n: prompt_format: [INST] {prompt}", "o/m: type: chatml.intel",
        "o/l: roles: {'user': ['me']}", "o/l: shards: 4",
        "o/l: message_property_mappings: {'role': 'who'}",
    ]  # fmt: skip
    assert found.settings["train_data"]["part1"]["columns"] == {"prompt": "q"}


def test_what_llama_factory_registers_and_is_not_read_is_told(tmp_path):
    known = {
        "a": {"file_name": "a.json", "tags": {"role_tag": "speaker", "user_tag": "human"}},
        "b": {"hf_hub_url": "o/n", "folder": "python", "split": "train"},
        "c": {"ms_hub_url": "o/m"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(known))
    file = {"stage": "dpo", "model_name_or_path": "x/y", "dataset_dir": str(tmp_path)}
    file |= {"dataset": ["a", "b", "c"], "max_grad_norm": None}  # YAML's list, and no clipping
    found = rows.translated(peers.LLAMA_FACTORY, file, 1)
    assert [one["path"] for one in found.settings["train_data"].values()] == [
        f"{tmp_path}/a.json", "o/n", f"{tmp_path}/c"
    ]  # fmt: skip
    assert "max_grad_norm" not in found.settings
    assert found.notes.lacking == [
        ("dataset: a", "its role_tag speaker is not known: rename it in the file, as role"),
        ("dataset: b", "its folder python is not read: name the files of it as the path"),
        ("dataset: c", f"ms_hub_url: only files and datasets of the hub are read; {tmp_path}/c is "
                       "a guess"),
    ]  # fmt: skip
    online = file | {"dataset": "o/n", "dataset_dir": "ONLINE"}
    assert rows.translated(peers.LLAMA_FACTORY, online, 1).settings["train_data"] == "o/n"


def test_axolotls_files_and_test_sets_are_all_there():
    file = {"base_model": "a", "rl": "dpo", "datasets": [
        {"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "field_system": "sys"},
        {"path": "o/n", "name": "en"},
    ]}  # fmt: skip
    file["test_datasets"] = [{"path": "c.jsonl", "ds_type": "json"}, {"path": "o/n", "split": "x"}]
    found = rows.translated(peers.AXOLOTL, file, 1).settings
    renamed = {"columns": {"system_prompt": "sys"}}
    assert found["train_data"] == {
        "part1": {"path": "a.jsonl", "weight": "rows"} | renamed,
        "part2": {"path": "b.jsonl", "weight": "rows"} | renamed,
        "part3": {"path": "o/n:en:train", "weight": "rows"},
    }
    assert found["validation"] == {"test1": {"path": "c.jsonl"}, "test2": {"path": "o/n:x"}}


def test_null_turns_off_what_it_turns_off_there():
    file = yaml.safe_load(LEVANTER)
    assert rows.translated(peers.LEVANTER, file, 1).settings["validation_split_fraction"] == 0.1
    file |= {"validation_split_fraction": None}
    file["optimizer"] |= {"max_grad_norm": None, "weight_decay": None}
    found = rows.translated(peers.LEVANTER, file, 1).settings
    assert "validation_split_fraction" not in found and "max_grad_norm" not in found
    assert found["weight_decay"] == 0.1  # unset
    file = {"model_name_or_path": "a/b", "dataset_name": "c/d", "max_length": None}
    assert "train_seq_len" not in rows.translated(peers.TRL, file, 1).settings  # it is asked for


@pytest.mark.parametrize(
    ("optimizer", "ours"),
    [
        ({"lr_schedule": "inv_sqrt"}, {"lr_schedule": "inverse_sqrt"}),
        (
            {"lr_schedule": "linear", "type": "adam"},
            {"lr_schedule": "linear", "optimizer": "adamw"},
        ),
        ({"type": "muon"}, {"optimizer": "muon"}),
    ],
)
def test_schedules_and_optimizers_of_levanter_by_our_names(optimizer, ours):
    file = yaml.safe_load(LEVANTER)
    found = rows.translated(peers.LEVANTER, file | {"optimizer": optimizer}, 1).settings
    assert found.items() >= ours.items()


def test_a_checkpoint_of_theirs_is_no_reference():
    file = yaml.safe_load(LEVANTER) | {"reference_model_path": "gs://a/b", "reference_is_hf": False}
    notes = rows.translated(peers.LEVANTER, file, 1).notes
    assert dict(notes.lacking)["reference_is_hf: False"].startswith("a checkpoint of Levanter's")


def test_texts_of_a_file_are_texts_of_the_config():
    """Whatever they are, they run nothing."""
    evil = '""" + exit() + """\\\n\'"'
    file = yaml.safe_load(LEVANTER) | {"initialize_from_hf": evil, "run_initial_eval": True}
    text, _ = translate.translated(file, evil, evil, evil)
    config = config_of(text)
    assert (config.name, config.initialize_from_hf) == (evil, evil)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "is not YAML"),
        ("- a\n- b", "is not a file of settings"),
        ("1: a", "is not a file of settings"),
        ("learning_rate: 1", "belongs to no known trainer: TRL, axolotl"),
        # torchtune's, verl's and NeMo Aligner's have groups that Levanter's have, too
        ("optimizer: {_component_: torch.optim.AdamW, lr: 1}", "belongs to no known trainer"),
        (
            "trainer: {project_name: a, total_epochs: 2}\noptim: {lr: 1}",
            "belongs to no known trainer",
        ),
        ("trainer: {num_nodes: 1, dpo: {max_epochs: 1}}", "belongs to no known trainer"),
        ("stage: sft\nmodel_name_or_path: a", "recipes/sft.py"),
        ("base_model: a", "rl: None is not preference training"),
        ("base_model: a\nrl: dpo\ndatasets: [{name: b}]", "not a valid file of axolotl: KeyError"),
    ],
)
def test_what_cannot_be_translated_is_said(text, told, tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        translate.translate([str(path)], None, 1)


def test_what_is_missing_before_it_runs_is_said():
    told = translate.translated({"model_name_or_path": "a/b"}, "x", "x.yaml", "mine.py")[1]
    assert "fix this before you run it: the config has no train_data" in told

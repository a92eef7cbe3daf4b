"""The card of an export: what it says, and to whom."""

import json
import pathlib
import sys

import huggingface_hub
import pytest

from checkpoints_io import places
from checkpoints_io.hf_folder import Folder
from recipes.configs import tiny, tiny_sft
from recipes.training import by_name, card, records, settings
from recipes.training.run import Records
from tests.conftest import run_with

FIGURES = {"dpo_accuracy": 0.875, "dpo_reward_margin": 1.25, "length_chosen": 7.0}
DATA = [
    {"name": "train", "source": "pairs|`.jsonl", "rows": 1200, "used": 1100,
     "lost": {"too long": 99, "not <b>JSON</b> | *": 1}, "notes": {}},
]  # fmt: skip


def run_of(config, directory, base="owner/model@main", revision="abc123", **settings_):
    given = by_name.plain(config, settings.table_of(settings.recipe_of(config))) | settings_
    kept = Records(False, None, given["name"], given["tags"], by_name.nested(given))
    folder = Folder(pathlib.Path("/cache/model"), {}, revision)
    return run_with(directory=places.Disk(directory), base=base, folder=folder, records=kept)


@pytest.fixture
def directory(tmp_path):
    lines = [{"step": step, **{f"eval/mine/{n}": x * step for n, x in FIGURES.items()}}
             for step in (1, 2)]  # fmt: skip
    (tmp_path / records.RECORDS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / records.DATA).write_text(json.dumps(DATA))
    return tmp_path


def test_what_a_hub_reads(directory):
    config = tiny.get_config()
    config.train_data = dict(a=dict(path="hf/ultra:train@1", weight=2.0), b=dict(path="no.jsonl"))
    config.tags = ("dpo", "on: purpose")
    told = huggingface_hub.ModelCard(card.text(run_of(config, directory), 2)).data.to_dict()
    assert told.pop("model-index")[0]["results"][0] == {
        "task": {"type": "text-generation"},
        "dataset": {"name": "mine", "type": "mine"},
        "metrics": [
            {"type": "dpo_accuracy", "value": 1.75}, {"type": "dpo_reward_margin", "value": 2.5},
        ],
    }  # fmt: skip
    assert told == {
        "base_model": "owner/model",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nnx-zoo", "dpo", "on: purpose"],
        "datasets": ["hf/ultra"],
    }


def test_what_a_person_reads(directory, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/recipes/dpo.py", "--config=a.py", "--config.directory=/r",
                                      "--config.name=a b"])  # fmt: skip
    config = tiny.get_config()
    config.name = "one\n# two"
    told = card.text(run_of(config, directory), 1)
    body = told.split("---\n", 2)[2]
    for line in (
        "# one \\# two",
        "`owner/model` (revision `abc123`), trained further. Trained by preference optimization "
        "(loss `sigmoid`, beta 0.1): 1 updates of 32 pairs.",
        "| mine | accuracy | 0.875 |",
        "| `pairs\\|'.jsonl` | train | 1,200 | 1,100 | 99 too long, "
        "1 not \\<b\\>JSON\\</b\\> \\| \\* |",
        "| `learning_rate` | `0.0001` |",
        "    python recipes/dpo.py --config=a.py '--config.name=a b'",
    ):
        assert line in body.splitlines()
    assert "tensorboard" not in body and "/r" not in body


def test_of_a_run_of_a_folder_that_has_said_nothing_yet(tmp_path):
    run = run_of(tiny_sft.get_config(), tmp_path, base="/models/mine", revision=None)
    told = card.text(run, 3)
    assert "base_model" not in told and "Held-out" not in told and "Command" not in told
    assert "`/models/mine`, trained further. Trained by supervised fine-tuning: 3 updates" in told

"""A run that sends its exports to a stand-in of the hub, by the real client."""

import os
import pathlib
import signal
import subprocess
import sys

import huggingface_hub
import pytest

from recipes import dpo
from tests.checkpoints_io.hub import TOKEN
from tests.checkpoints_io.test_hf_hub import hub  # noqa: F401  the fixture
from tests.conftest import ROOT, few_pairs


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["end", "every"])
def test_a_run_that_was_cut_off_sends_the_rest(tiny_config, tmp_path, hub, capfd, strategy):  # noqa: F811
    config = tiny_config
    config.train_data, config.max_eval_pairs = few_pairs(tmp_path, 12), 4
    config.train_batch_size, config.num_train_steps, config.warmup = 8, 2, 0.0
    config.steps_per_hf_export, config.push_to_hub, config.hub_strategy = 1, "me/mine", strategy
    hub.breaks_after = 1
    with pytest.raises(OSError, match="could not be sent to me/mine"):
        dpo.train(config)
    assert hub.repos["me/mine"]["files"] == {} and hub.repos["me/mine"]["private"]
    hub.breaks_after = None
    dpo.train(config)
    told = "".join(capfd.readouterr())
    assert told.count("the run continues:") == (strategy == "every")
    assert hub.repos["me/mine"]["commits"] == ["step 2 of 2"]
    last = pathlib.Path(config.directory) / "hf" / "step-2"
    files = {path.name: path.read_bytes() for path in last.iterdir()}
    assert hub.repos["me/mine"]["files"] == files
    assert len(hub.sent) == len(set(hub.sent))
    # What one who finds the repository reads.
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.tags[:2] == ["nnx-zoo", "dpo"] and "## Data" in card.text
    # A third start sends nothing, and the token is in no file and no line.
    asked = [path for _, path in hub.asked if "commit" in path]
    dpo.train(config)
    assert [path for _, path in hub.asked if "commit" in path] == asked
    every = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(every) > 10 and not [p for p in every if TOKEN.encode() in p.read_bytes()]
    assert TOKEN not in told
    # An export in another form is another one.
    config.hf_save_dtype = "float32"
    dpo.train(config)
    assert hub.repos["me/mine"]["files"]["model.safetensors"] != files["model.safetensors"]
    config.hf_save_dtype = "float32"
    sent = len(hub.sent)
    dpo.train(config)
    assert len(hub.sent) == sent


@pytest.mark.full
def test_a_program_that_is_killed_while_it_sends_goes_on(tmp_path, hub):  # noqa: F811
    words = [
        sys.executable, "recipes/dpo.py", "--config=recipes/configs/tiny.py",
        f"--config.directory={tmp_path}/run", f"--config.token_cache={tmp_path}/tokens",
        f"--config.train_data={few_pairs(tmp_path, 12)}", "--config.max_eval_pairs=4",
        "--config.train_batch_size=8", "--config.num_train_steps=1", "--config.warmup=0",
        "--config.sample_tokens=0", "--config.push_to_hub=me/mine",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": huggingface_hub.constants.ENDPOINT, "HF_HUB_DISABLE_XET": "1"}
    log, lives = tmp_path / "log", []

    def life() -> int:
        with log.open("ab") as out:
            lives.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=out, stderr=out))
        return lives[-1].wait()

    hub.before_upload = lambda: len(lives) == 1 and len(hub.sent) == 1 and lives[0].kill()
    assert life() == -signal.SIGKILL, log.read_text()
    assert hub.repos["me/mine"]["files"] == {}
    assert life() == 0, log.read_text()
    assert hub.repos["me/mine"]["commits"] == ["step 1 of 1"]
    assert len(hub.sent) == len(set(hub.sent)) >= 2
    files = {path.name: path.read_bytes() for path in (tmp_path / "run/hf/step-1").iterdir()}
    assert hub.repos["me/mine"]["files"] == files
    every = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(every) > 10 and not [p for p in every if TOKEN.encode() in p.read_bytes()]

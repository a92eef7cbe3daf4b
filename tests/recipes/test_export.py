"""A checkpoint becomes the folder that the run would have written, without the run's data."""

import json
import pathlib
import shutil

import pytest

from checkpoints_io import places
from checkpoints_io.errors import BadInput, NotFound
from recipes import dpo, export
from recipes.training import exporting
from tests.conftest import few_pairs

RUNS = {
    "weights": {},
    "an average": {"ema_decay": 0.5, "hf_save_dtype": "float32"},
    "an average, and a reference that moves": {"ema_decay": 0.5, "reference_sync_steps": 1},
    "adapters": {"adapter": dict(rank=4, alpha=8.0)},
    "merged": {"adapter": dict(rank=4), "adapter.export": "merged"},
    "some weights": {"trainable": r".*layers\.1\..*"},
    "Muon, in nf4": {"adapter": dict(rank=4), "frozen": "nf4", "optimizer": "muon"},
}


def files(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


@pytest.mark.full
@pytest.mark.parametrize("kind", RUNS)
def test_it_is_the_folder_of_the_run(tiny_config, tmp_path, kind):
    config = tiny_config
    config.train_data, config.validation = few_pairs(tmp_path, 12), {}
    config.train_batch_size, config.num_train_steps, config.warmup = 8, 2, 0.0
    config.learning_rate, config.steps_per_checkpoint, config.keep_checkpoints = 1e-3, 1, 2
    config.steps_per_eval = config.max_eval_pairs = None
    config.steps_per_hf_export = 1
    for name, value in RUNS[kind].items():
        config.update_from_flattened_dict({name: value}) if "." in name else config.update(
            {name: value}
        )
    dpo.train(config)
    pathlib.Path(config.train_data).unlink()
    run = pathlib.Path(config.directory)
    made = {folder.name: files(folder) for folder in (run / "hf").iterdir()}
    assert len(made) == 2 and len({str(sorted(one.items())) for one in made.values()}) == 2
    shutil.rmtree(run / "hf")
    export.export(str(run), 1)
    export.export(str(run))
    assert {folder.name: files(folder) for folder in (run / "hf").iterdir()} == made

    with pytest.raises(NotFound, match=r"no checkpoint of step 7: there are 1, 2$"):
        export.export(str(run), 7)
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | {"seed": 5}))
    with pytest.raises(BadInput, match="seed: 0 there, 5 here"):
        export.export(str(run), 1)


@pytest.mark.full
def test_a_finished_run_that_is_asked_for_another_dtype_writes_it(tiny_config, tmp_path):
    config = tiny_config
    config.train_data, config.validation = few_pairs(tmp_path, 12), {}
    config.train_batch_size, config.num_train_steps, config.steps_per_hf_export = 8, 1, None
    config.max_eval_pairs, config.warmup = None, 0.0
    for dtype in ("bfloat16", "float32", "float32"):
        config.hf_save_dtype = dtype
        dpo.train(config)
        told = files(pathlib.Path(config.directory) / "hf" / "step-1")
        assert json.loads(told["config.json"])["dtype"] == dtype


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(NotFound, match=r"not the directory of a run: it has no settings\.json"):
        exporting.given_to(places.at(str(tmp_path)))
    (tmp_path / "settings.json").write_text("[1]")
    with pytest.raises(BadInput, match="was not written by a run"):
        exporting.given_to(places.at(str(tmp_path)))

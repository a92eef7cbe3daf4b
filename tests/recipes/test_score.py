"""Scores of a file: those of the evaluation of a run, a line for every pair, and nothing lost."""

import functools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

from flax import nnx
import jax
import ml_collections
import numpy as np
import pytest

from recipes import dpo, score
from recipes.data.run_data import HeldOut
from recipes.preference import evaluation, scoring
from recipes.training import checks, logps, prepare, settings
from tests.conftest import ROOT, TINY, devices, few_pairs, records, sigmoid
import zoo


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    """A model that differs a little from the tiny one."""
    folder = tmp_path_factory.mktemp("policy") / "model"
    model = zoo.load(TINY / "model")
    draw = np.random.default_rng(0)
    scale = model.norm.scale
    scale.set_value(scale[...] * draw.uniform(0.9, 1.1, scale.shape).astype(np.float32))
    zoo.save(model, folder, dtype=np.float32, tokenizer=TINY / "model")
    return str(folder)


@pytest.fixture
def config(tiny_config, tmp_path, policy) -> ml_collections.ConfigDict:
    """The tiny config as it is for DPO, with a policy that is not its reference, on few pairs."""
    config = tiny_config
    config.reference_model_path, config.initialize_from_hf = config.initialize_from_hf, policy
    config.train_data, config.token_cache = few_pairs(tmp_path, 12), None
    return config


def lines_of(config: ml_collections.ConfigDict) -> list[dict]:
    text = (pathlib.Path(config.directory) / "scores.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def column(lines: list[dict], name: str) -> np.ndarray:
    return np.array([line[name] for line in lines])


def of_source(config: ml_collections.ConfigDict, name: str) -> list[dict]:
    return [line for line in lines_of(config) if line["source"] == name]


def test_scores_are_those_of_the_evaluation(config, capfd):
    """The same bits of every log-probability, and the same figures; each row once, in order."""
    score.score(config)
    told = capfd.readouterr().out
    assert [path.name for path in pathlib.Path(config.directory).iterdir()] == ["scores.jsonl"]
    given = checks.checked(config, settings.table_of(settings.SCORE))
    run = prepare.scoring(given, scoring.beside(given))
    graph = nnx.split(run.blank)[0]
    with jax.set_mesh(run.computing.mesh):
        forward = logps.compiled(run.computing.mesh)
        ask, other = (
            functools.partial(forward, graph, nnx.to_pure_dict(nnx.state(zoo.load(path))))
            for path in (config.initialize_from_hf, config.reference_model_path)
        )
        sets = [HeldOut("train", run.data.train[0].examples), *run.data.held_out]
        for held_out in sets:
            name, pairs = held_out.name, held_out.examples
            own = of_source(config, name)
            assert [line["row"] for line in own] == [*range(len(pairs))]
            theirs = logps.of_examples(other, pairs, run.place)
            ours = logps.of_examples(ask, pairs, run.place)
            for whose, values in (("policy", ours), ("reference", theirs)):
                for i, answer in enumerate(("chosen", "rejected")):
                    found = column(own, f"{whose}_{answer}").astype(np.float32)
                    np.testing.assert_array_equal(found, values[:, i])
            figures = evaluation.evaluate(held_out, ask, theirs, run.place, sigmoid(config.beta))
            figures = {key.rpartition("/")[2]: value for key, value in figures.items()}
            means = {
                "dpo_accuracy": np.mean(
                    column(own, "reward_chosen") > column(own, "reward_rejected")
                ),
                "dpo_reward_margin": column(own, "margin").mean(),
                "dpo_rejected_reward": column(own, "reward_rejected").mean(),
                "logps_chosen": column(own, "policy_chosen").mean(),
                "length_chosen": column(own, "scored_chosen").mean(),
                "length_rejected": column(own, "scored_rejected").mean(),
            }
            for key, mean in means.items():
                assert mean == pytest.approx(figures[key], rel=1e-4, abs=1e-6), key
            assert 0 < figures["dpo_accuracy"] < 1
    (row,) = re.findall(r"^train +(.*)$", told, re.MULTILINE)[-1:]
    assert row.split()[:2] == [
        "35",
        f"{np.mean(column(of_source(config, 'train'), 'margin') > 0):.3f}",
    ]
    assert f"102 pairs, one per line, in {config.directory}/scores.jsonl\n" in told


@pytest.mark.full
def test_how_pairs_are_packed_changes_no_score(config):
    config.validation = {}
    score.score(config)
    usual = lines_of(config)
    config.row_length, config.per_device_parallelism = 256, 2
    score.score(config)
    for name in ("policy_chosen", "reference_rejected", "margin"):
        np.testing.assert_allclose(
            column(lines_of(config), name), column(usual, name), rtol=1e-5, atol=2e-5
        )
    assert sorted(column(usual, "rank")) == [*range(1, len(usual) + 1)]
    assert usual[np.argmin(column(usual, "rank"))]["margin"] == max(column(usual, "margin"))


@pytest.mark.full
def test_a_run_of_adapters_and_the_scores_of_its_export(tiny_config, tmp_path, capfd):
    """Its last evaluation, from the exported adapters: the reference is what they stand beside."""
    config = tiny_config
    config.train_data, config.token_cache = few_pairs(tmp_path, 12), None
    config.train_batch_size, config.num_train_steps, config.warmup = 8, 3, 0.0
    config.learning_rate, config.steps_per_hf_export = 1e-3, None
    config.steps_per_eval = config.max_eval_pairs = config.steps_per_checkpoint = None
    config.adapter = dict(rank=4, alpha=8.0)
    dpo.train(config)
    last = records(config)[-1]
    config.adapter.path = f"{config.directory}/hf/step-3"
    config.directory = str(tmp_path / "scores")
    score.score(config)
    told = capfd.readouterr().out
    assert "the reference: the policy without its adapters" in told
    own = of_source(config, "heldout")
    wins = column(own, "reward_chosen") > column(own, "reward_rejected")
    assert wins.mean() == pytest.approx(last["eval/heldout/dpo_accuracy"], abs=1e-6)
    margin = last["eval/heldout/dpo_reward_margin"]
    assert column(own, "margin").mean() == pytest.approx(margin, rel=1e-3)
    assert abs(margin) > 1e-3
    beside = lines_of(config)
    config.reference_model_path = config.initialize_from_hf  # read once more, as another model
    score.score(config)
    for name in ("policy_chosen", "reference_chosen", "reference_rejected"):
        np.testing.assert_allclose(
            column(lines_of(config), name), column(beside, name), rtol=1e-5, atol=2e-5
        )


def test_rows_that_give_no_pair_are_counted_and_keep_their_numbers(config, tmp_path, capfd):
    rows = (TINY / "train.jsonl").read_text().splitlines()[:6]
    long = json.loads(rows[3])
    long["chosen"][-1]["content"] *= 60
    rows[1], rows[3] = "{torn", json.dumps(long)
    (tmp_path / "odd.jsonl").write_text("\n".join(rows) + "\n")
    whole, odd = config.train_data, str(tmp_path / "odd.jsonl")
    with config.ignore_type():
        config.train_data = {"whole": {"path": whole, "weight": 3.0}, "odd": {"path": odd}}
    config.data.max_malformed_fraction = 0.5
    score.score(config)
    told = capfd.readouterr().out
    assert "1 malformed: not valid JSON" in told
    assert "1 dropped: longer than train_seq_len" in told
    assert "; 2 rows have no scores, for the reasons above" in told
    names = [line["source"] for line in lines_of(config)]
    assert [*dict.fromkeys(names)] == ["odd", "whole", "heldout"]  # as a config sorts them
    assert [line["row"] for line in of_source(config, "odd")] == [0, 2, 4, 5]
    assert [line["row"] for line in of_source(config, "heldout")] == [*range(67)]
    assert sorted(column(of_source(config, "odd"), "rank")) == [1, 2, 3, 4]


def test_what_is_held_out_of_a_source_is_a_source_with_its_rows(config):
    config.validation_split_fraction = 0.3
    with config.ignore_type():
        config.train_data = {"a": {"path": config.train_data}, "b": {"path": config.train_data}}
    config.validation = {"more": config.train_data.a.path}
    score.score(config)
    for name in "ab":
        held = [line["row"] for line in of_source(config, f"validation/{name}")]
        kept = [line["row"] for line in of_source(config, name)]
        assert held and kept and sorted(held + kept) == [*range(35)]
    assert [line["row"] for line in of_source(config, "more")] == [*range(35)]


def test_ranks_by_hand():
    margins = np.array([0.5, -1.0, 2.0, 0.5, 0.5, -3.0])
    assert scoring.ranks(margins).tolist() == [2, 5, 1, 2, 2, 6]
    assert scoring.ranks(np.zeros(3)).tolist() == [1, 1, 1]


def scores(name: str, policy: list, reference: list, beta: float) -> scoring.Scores:
    source = scoring.Source(name, [], 0)
    arrays = (np.array(x, np.float32) for x in (policy, reference))
    return scoring.of_source(source, *arrays, beta)


def test_the_table_by_eye():
    """A tie is no win."""
    some = scores(
        "helpful", [[-10, -20], [-30, -5], [-7, -7]], [[-12, -18], [-20, -5], [-7, -7]], 0.5
    )
    other = scores("validation/safe", [[-100, -200.25]], [[-101, -200]], 0.5)
    assert some.margins.tolist() == [2.0, -5.0, 0.0]
    assert some.ranks.tolist() == [1, 3, 2]
    assert scoring.table([some, other]).splitlines() == [
        "                                                  policy             reference",
        "source             pairs  accuracy     margin     chosen   rejected     chosen   rejected",
        "helpful                3     0.333     -1.000    -15.667    -10.667    -13.000    -10.000",
        "validation/safe        1     1.000      0.625   -100.000   -200.250   -101.000   -200.000",
    ]


def test_a_log_probability_that_is_not_finite_is_no_score(config, policy):
    given = checks.checked(config, settings.table_of(settings.SCORE))
    run = prepare.scoring(given, scoring.beside(given))
    source = scoring.sources(run.data)[0]
    fine = np.zeros((len(source.pairs), 2), np.float32)
    odd = fine.copy()
    odd[4, 1] = -np.inf
    with pytest.raises(RuntimeError, match=r"row 4 of train .* under the reference that is NaN"):
        scoring.of_source(source, fine, odd, 0.1)


def test_scores_replace_scores_and_nothing_else(config, tmp_path, capfd):
    file = tmp_path / "run" / "scores.jsonl"
    file.parent.mkdir()
    for content in ("", '{"score": 1}\n', "mine\n", "[1]\n"):
        file.write_text(content)
        with pytest.raises(
            FileExistsError, match=r"scores.jsonl holds something other than scores"
        ):
            score.score(config)
        assert file.read_text() == content
    file.unlink()
    score.score(config)
    capfd.readouterr()
    before = file.read_text()
    score.score(config)
    assert f"the scores in {file} will be replaced at the end" in capfd.readouterr().out
    assert file.read_text() == before
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link to"):
        score.score(config)


def test_a_model_is_not_scored_against_itself(config, tmp_path, capfd):
    """The reference was forgotten; of a copy it is said."""
    config.reference_model_path = None
    with pytest.raises(ValueError, match=r"policy and reference are both .*, so every reward"):
        score.score(config)
    config.reference_model_path = f"{config.initialize_from_hf}/"
    with pytest.raises(ValueError, match=r"policy and reference are both .*, so every reward"):
        score.score(config)
    config.validation = {}
    shutil.copytree(config.initialize_from_hf, tmp_path / "copy")
    config.reference_model_path = str(tmp_path / "copy")
    score.score(config)
    assert "\nnote: policy and reference give the same log-prob" in capfd.readouterr().out
    assert {line["margin"] for line in lines_of(config)} == {0.0}
    assert {line["rank"] for line in lines_of(config)} == {1}


@pytest.mark.full
def test_the_newest_checkpoint_of_a_run_may_be_the_reference(tiny_config, tmp_path, policy):
    config = tiny_config
    config.train_data, config.token_cache = few_pairs(tmp_path, 12), None
    config.train_batch_size, config.num_train_steps, config.warmup = 8, 1, 0.0
    config.steps_per_hf_export, config.hf_save_dtype = None, "float32"
    config.validation, config.max_eval_pairs = {}, None
    dpo.train(config)
    run, config.directory = config.directory, str(tmp_path / "scores")
    config.initialize_from_hf = policy
    found = []
    for path, is_hf in ((run, False), (f"{run}/hf/step-1", True)):
        config.reference_model_path, config.reference_is_hf = path, is_hf
        score.score(config)
        found.append(lines_of(config))
    assert found[0] == found[1]


@pytest.mark.full
def test_two_processes_are_one(config, tmp_path):
    """Four devices each, and the first writes the file: the scores of one device."""
    config.validation = {}
    score.score(config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.copy(config.train_data, tmp_path / "two.jsonl")

    def started(number: int) -> subprocess.Popen:
        flags = {
            "initialize_from_hf": config.initialize_from_hf,
            "reference_model_path": config.reference_model_path,
            "train_data": tmp_path / "two.jsonl", "validation": "{}", "token_cache": None,
            "directory": tmp_path / "two", "compile_cache": None,
            "distributed.enabled": "true", "distributed.num_processes": 2,
            "distributed.coordinator_address": f"127.0.0.1:{port}",
            "distributed.process_id": number,
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "recipes/score.py", "--config=recipes/configs/tiny.py",
             *(f"--config.{name}={value}" for name, value in flags.items())],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | devices(4) | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    told = [process.communicate(timeout=600) for process in [started(0), started(1)]]
    assert "35 pairs, one per line" in told[0][0], told[0][1][-3000:]
    assert "pairs" not in told[1][0], told[1][1][-3000:]
    usual, config.directory = lines_of(config), str(tmp_path / "two")
    both = lines_of(config)
    assert [line["row"] for line in both] == [line["row"] for line in usual]
    for name in ("policy_chosen", "policy_rejected", "reference_chosen", "margin"):
        np.testing.assert_allclose(column(both, name), column(usual, name), rtol=1e-5, atol=2e-5)

"""The recipe itself: what it learns, what it saves, and that a stop leaves no trace."""

import json
import math
import pathlib
import re
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import safetensors.numpy

from checkpoints_io.bits import fingerprint
from recipes import dpo
from recipes.preference import gates, objectives, reference
from recipes.training import overrides, policy, settings, written
from recipes.training.run import Computing
from recipes.training.update import Answers
from tests.conftest import (
    ROOT,
    TINY,
    exported,
    held,
    records,
    run_with,
    sigmoid,
    stopped_after,
)
import zoo


def training(config):
    """Figures per step, without those of the clock."""
    return {r["step"]: r for r in records(config) if "train/dpo_loss" in r}


def test_the_tiny_run_learns(tiny_config, capsys, tmp_path):
    config = tiny_config
    (tmp_path / "a.txt").write_text("Ärger: the capital of Peru is Lima.")
    config.validation_texts = {"plain": str(tmp_path / "a.txt")}
    config.num_train_steps = config.steps_per_eval = config.steps_per_hf_export = 20
    config.run_initial_eval = True
    config.max_eval_pairs = 1000
    config.sample_tokens = 48
    dpo.train(config)
    told = capsys.readouterr().out
    page = (pathlib.Path(config.directory) / "report.html").read_text()
    assert "Reward margin" in page and "Where the time went" in page
    data = json.loads((pathlib.Path(config.directory) / "data.json").read_text())
    assert [(part["name"], part["rows"], part["lost"]) for part in data] == [
        ("train", 419, {}), ("heldout", 67, {}),
    ]  # fmt: skip
    steps = records(config, clock=True)
    before, after = (r for r in steps if "eval/heldout/dpo_accuracy" in r)
    first = next(r for r in steps if "train/dpo_loss" in r)
    assert first["train/dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert before["eval/heldout/dpo_accuracy"] == 0  # a tie is no win
    assert before["eval/heldout/drift_chosen"] == 0
    assert after["eval/heldout/dpo_accuracy"] >= 0.75
    assert after["eval/plain/bits_per_byte"] != before["eval/plain/bits_per_byte"]
    assert f"plain texts: {after['eval/plain/bits_per_byte']:.4f} bits per byte" in told
    assert "Bits per byte" in page
    names = (
        "dpo_loss dpo_margin_policy dpo_margin_ref dpo_accuracy dpo_chosen_reward "
        "dpo_rejected_reward dpo_reward_margin logps_chosen logps_rejected drift_chosen "
        "drift_rejected length_chosen length_rejected"
    )
    assert {f"eval/heldout/{name}" for name in names.split()} <= after.keys()
    more = "gradient_norm learning_rate tokens_per_second pack_fill data/dropped data/truncated"
    last = [r for r in steps if "train/dpo_loss" in r][-1]
    assert first["train/learning_rate"] == 0 < last["train/learning_rate"]  # of the step itself
    assert {f"train/{name}" for name in f"{names} {more}".split()} <= last.keys()
    assert "train/tokens_per_second" not in first  # most of its time went into compiling
    # What was learnt is seen by a person,
    share = re.search(r"closer to the chosen one: (\d+)% -> (\d+)%", told)
    assert share and int(share[1]) + 20 <= int(share[2]), told
    assert f"accuracy: no preference -> {after['eval/heldout/dpo_accuracy']:.3f}" in told
    assert "step 20/20" in told and f"vllm serve {config.directory}/hf/step-20" in told
    # and is in the folder for other programs.
    folder = pathlib.Path(config.directory) / "hf" / "step-20"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (TINY / "model" / name).read_bytes()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 4]
    moved = exported(config, 20)["model.norm.weight"]
    assert moved.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("stop", "total", "other"),
    [
        pytest.param(3, 6, {}, id="inside an epoch", marks=pytest.mark.full),
        pytest.param(12, 14, {}, id="in the second epoch", marks=pytest.mark.full),
        pytest.param(3, 5, {"per_device_parallelism": 2}, id="with accumulation"),
        pytest.param(
            3,
            6,
            {
                "train_data": {
                    "mine": {"path": str(TINY / "train.jsonl"), "weight": 3.0},
                    "theirs": {"path": str(TINY / "heldout.jsonl"), "layout": "preference_chat"},
                },
                "validation": {},
                "validation_split_fraction": 0.2,
            },
            id="of mixed sources",
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not(
    tiny_config, tmp_path, monkeypatch, stop, total, other
):
    config = tiny_config
    with config.ignore_type():
        for name, value in other.items():
            config[name] = ml_collections.ConfigDict(value) if isinstance(value, dict) else value
    config.num_train_steps = total
    config.steps_per_checkpoint = stop
    config.hf_save_dtype = "f32"
    config.steps_per_hf_export = total
    whole, parted = (config.copy_and_resolve_references() for _ in range(2))
    whole.directory, parted.directory = str(tmp_path / "whole"), str(tmp_path / "parted")
    from recipes.data.packed import batches

    seen, iterate = {}, batches.iterate

    def watch(kind):
        def noting(endless, place, *, start):
            updates = iterate(endless, place, start=start)
            for at, pairs in enumerate(updates, start=start + 1):
                seen.setdefault(kind, {})[at] = pairs.source_rows.tolist()
                yield pairs

        monkeypatch.setattr(batches, "iterate", noting)

    watch("whole")
    dpo.train(whole)
    monkeypatch.undo()
    with stopped_after(stop):
        dpo.train(parted)
    watch("parted")
    dpo.train(parted)

    assert seen["parted"] == {at: rows for at, rows in seen["whole"].items() if at > stop}
    assert training(parted) == training(whole)
    if "train_data" in other:
        assert "train/theirs/dpo_accuracy" in training(parted)[total]
        last = [name for one in records(parted) if one["step"] == total for name in one]
        assert "eval/validation/mine/dpo_loss" in last
    for name, array in exported(whole, total).items():
        np.testing.assert_array_equal(array, exported(parted, total)[name])


@pytest.mark.full
def test_accumulation_gives_the_update_of_the_whole_batch(tiny_config, tmp_path):
    found = []
    for rows in (16, 2):
        config = tiny_config.copy_and_resolve_references()
        config.num_train_steps = 3
        config.per_device_parallelism = rows
        config.min_pack_fill = 0.1
        config.directory = str(tmp_path / str(rows))
        dpo.train(config)
        found.append(training(config))
    for step in found[0]:
        for name in ("dpo_loss", "logps_chosen", "gradient_norm"):
            whole, parts = (f[step][f"train/{name}"] for f in found)
            assert parts == pytest.approx(whole, rel=1e-4), (step, name)


def test_a_checkpoint_holds_policy_and_optimizer_only(tiny_config):
    config = tiny_config
    config.num_train_steps = 1
    dpo.train(config)
    folder = pathlib.Path(config.directory) / "checkpoints"
    model = zoo.load(TINY / "model")
    weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    assert held(folder) <= 3.1 * weights + 100_000
    names = {path.name for path in next(folder.iterdir()).iterdir()}
    assert {"policy", "optimizer", "facts"} <= names
    assert not any("reference" in str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.full
def test_another_reference_is_refused_on_resume(tiny_config, tmp_path):
    config = tiny_config
    config.num_train_steps = 1
    model = zoo.load(TINY / "model")
    zoo.save(model, tmp_path / "reference")
    config.reference_model_path = str(tmp_path / "reference")
    dpo.train(config)
    path = tmp_path / "reference" / "config.json"
    told = path.read_text()
    path.write_text(json.dumps(json.loads(told) | {"rms_norm_eps": 0.5}))
    with pytest.raises(ValueError, match=r"rms_norm_eps: .* then, 0\.5 now"):
        dpo.train(config)
    path.write_text(told)
    model.norm.scale[...] = model.norm.scale[...] * 1.5
    zoo.save(model, tmp_path / "reference")
    with pytest.raises(ValueError, match="reference weights have changed"):
        dpo.train(config)


@pytest.mark.full
def test_a_flag_for_the_reference_leaves_the_policy(tiny_config, tmp_path):
    """Real flags; what is trained, by next to nothing, is still the model it was."""
    before = zoo.load(TINY / "model")
    other = zoo.load(TINY / "model")
    other.norm.scale[...] = other.norm.scale[...] * 1.5
    zoo.save(other, tmp_path / "reference")
    flags = {
        "initialize_from_hf": TINY / "model", "reference_model_path": tmp_path / "reference",
        "train_data": TINY / "train.jsonl", "directory": tmp_path / "run",
        "token_cache": tiny_config.token_cache, "compile_cache": None, "validation": None,
        "num_train_steps": 1, "learning_rate": 1e-12, "sample_tokens": 0, "tensorboard": False,
    }  # fmt: skip
    config, _ = overrides.read([
        "", f"--config={ROOT}/recipes/configs/tiny.py",
        *(f"--config.{name}={value}" for name, value in flags.items()),
    ], settings.ALL)  # fmt: skip
    dpo.train(config)
    assert abs(training(config)[1]["train/drift_chosen"]) > 0.1  # equal weights: exactly 0
    after = zoo.load(tmp_path / "run" / "hf" / "step-1")
    assert after.norm.scale[...].tolist() == before.norm.scale[...].tolist()
    assert after.embedding[...].tolist() == before.embedding[...].tolist()


def test_other_settings_are_refused_on_resume(tiny_config):
    config = tiny_config
    config.num_train_steps = 1
    dpo.train(config)
    config.beta = 0.3
    with pytest.raises(ValueError, match=r"beta: 0.1 there, 0.3 here"):
        dpo.train(config)
    config.beta = 0.1
    config.steps_per_log = 7  # does not touch the numbers
    dpo.train(config)


@pytest.mark.full
def test_the_reference_may_be_a_run(tiny_config, tmp_path):
    config = tiny_config
    config.num_train_steps = 4
    dpo.train(config)
    second = config.copy_and_resolve_references()
    second.directory = str(tmp_path / "second")
    second.reference_is_hf = False
    with pytest.raises(ValueError, match="give the directory of a run as --config"):
        dpo.train(second)
    second.reference_model_path = config.directory
    second.num_train_steps = 1
    dpo.train(second)
    first = training(second)[1]
    assert first["train/drift_chosen"] != 0  # the policy starts behind the reference
    second.reference_model_path = str(tmp_path)
    second.directory = str(tmp_path / "third")
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        dpo.train(second)


@pytest.mark.full
def test_bfloat16_starts_at_zero_too(tiny_config):
    config = tiny_config
    config.mp = "p=f32,c=bfloat16"
    config.num_train_steps = 2
    config.run_initial_eval = True
    dpo.train(config)
    before = records(config)[0]
    assert before["eval/heldout/dpo_accuracy"] == 0
    assert before["eval/heldout/drift_chosen"] == 0
    assert training(config)[1]["train/dpo_loss"] == pytest.approx(math.log(2), abs=5e-3)


@pytest.mark.full
def test_label_smoothing_and_cut_answers_have_an_effect(tiny_config, tmp_path):
    figures = {}
    for name, other in {
        "as it is": {},
        "smoothed": {"label_smoothing": 0.2},
        "cut": {"train_seq_len": 48, "data.over_length": "cut_answer"},
        "dropped": {"train_seq_len": 48},
    }.items():
        config = tiny_config.copy_and_resolve_references()
        config.num_train_steps = 2
        config.warmup = 0.0
        config.update_from_flattened_dict(other)
        config.directory = str(tmp_path / name)
        dpo.train(config)
        figures[name] = training(config)[2]
    assert figures["smoothed"]["train/dpo_loss"] > figures["as it is"]["train/dpo_loss"]
    assert figures["cut"]["train/data/truncated"] > 0
    assert figures["dropped"]["train/data/dropped"] > figures["as it is"]["train/data/dropped"]


def computed_in(dtype):
    """A run whose products are in this dtype."""
    precision = written.Precision(np.dtype(np.float32), np.dtype(dtype))
    return run_with(computing=Computing(None, precision, None, "full"))


def test_the_gates_see_what_is_wrong():
    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    other = {"w": params["w"].at[1, 2].add(1e-6)}
    assert fingerprint(params) != fingerprint(other)
    swapped = {"w": params["w"][:, ::-1]}
    assert fingerprint(params) != fingerprint(swapped)
    assert fingerprint(params) == fingerprint({"w": params["w"] + 0})
    answers = Answers(*[jnp.zeros((3, 2))] * 2, jnp.ones((3, 2), jnp.int32))
    check = lambda value, dtype, beta: gates.check_first_loss(
        {"dpo_loss": jnp.float32(value)}, sigmoid(beta), computed_in(dtype), answers
    )
    with pytest.raises(RuntimeError, match=r"is 0\.700000 and should be 0\.693147 within 0\.005"):
        check(0.70, jnp.bfloat16, 0.01)
    with pytest.raises(RuntimeError, match=r"not finite .* in bfloat16\..*--config.mp=p=f32"):
        check(math.nan, jnp.bfloat16, 0.01)
    check(0.6931472, jnp.float32, 0.1)
    with pytest.raises(RuntimeError, match=r"is 0\.693167 and should be 0\.693147 within 1e-05"):
        check(0.693167, jnp.float32, 0.1)
    check(0.693167, jnp.float32, 0.5)  # a larger beta makes more of the same rounding
    objective = objectives.objective({"loss": "hinge=0.5,sigmoid,sft", "beta": 0.1})
    check = lambda **values: gates.check_first_loss(
        {name: jnp.float32(value) for name, value in values.items()},
        objective, computed_in(jnp.float32), answers,
    )  # fmt: skip
    check(dpo_loss=3.2, loss_hinge=1.0, loss_sigmoid=0.6931472, loss_sft=2.0)
    with pytest.raises(RuntimeError, match=r"first loss \(hinge\) is 1\.001000 and should be 1\.0"):
        check(dpo_loss=3.2, loss_hinge=1.001, loss_sigmoid=0.6931472, loss_sft=2.0)
    answers = answers._replace(weights=jnp.array([3.0, 2.0, 1.0]))
    check(dpo_loss=6.4, loss_hinge=2.0, loss_sigmoid=2 * 0.6931472, loss_sft=4.0)
    with pytest.raises(RuntimeError, match=r"first loss \(hinge\) is 1\.000000 and should be 2\.0"):
        check(dpo_loss=3.2, loss_hinge=1.0, loss_sigmoid=0.6931472, loss_sft=2.0)


def test_a_model_with_a_nan_is_named_before_anything_is_trained(tiny_config, tmp_path):
    """As the reference, which is read first, and as a policy that another reference judges."""
    harmed = shutil.copytree(TINY / "model", tmp_path / "harmed")
    tensors = safetensors.numpy.load_file(harmed / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.weight"][0, 0] = np.nan
    safetensors.numpy.save_file(tensors, harmed / "model.safetensors", {"format": "pt"})
    for setting in ("reference_model_path", "initialize_from_hf"):
        config = tiny_config.copy_and_resolve_references()
        config.reference_model_path = config.initialize_from_hf
        config[setting] = str(harmed)
        config.validation = ml_collections.ConfigDict()  # about which the reference is asked
        config.max_eval_pairs = None
        with pytest.raises(ValueError, match=r"harmed: model.layers.2.self_attn.k_proj.weight h"):
            dpo.train(config)
        assert not (pathlib.Path(config.directory) / "metrics.jsonl").exists()


@pytest.mark.full
def test_an_export_lost_with_the_process_is_made_on_the_next_start(tiny_config):
    config = tiny_config
    config.num_train_steps = 1
    config.steps_per_hf_export = 1
    dpo.train(config)
    folder = pathlib.Path(config.directory) / "hf" / "step-1"
    before = exported(config, 1)
    shutil.rmtree(folder)
    dpo.train(config)
    for name, array in exported(config, 1).items():
        np.testing.assert_array_equal(array, before[name])


def test_the_export_has_the_tokenizer_and_template_of_the_run(tiny_config, tmp_path):
    config = tiny_config
    config.num_train_steps = 1
    config.steps_per_hf_export = 1
    other = tmp_path / "tokenizer"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((TINY / "model" / name).read_bytes())
    template = (TINY / "model" / "chat_template.jinja").read_text().replace("trim", "trim | trim")
    (other / "chat_template.jinja").write_text(template)
    config.tokenizer = str(other)
    dpo.train(config)
    folder = pathlib.Path(config.directory) / "hf" / "step-1"
    assert (folder / "chat_template.jinja").read_text() == template


@pytest.mark.full
def test_a_run_killed_before_its_first_checkpoint_leaves_no_records(tiny_config, monkeypatch):
    config = tiny_config
    config.num_train_steps = 2
    config.run_initial_eval = True

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(policy, "save", killed)
        dpo.train(config)
    dpo.train(config)
    steps = [record["step"] for record in records(config)]
    assert steps == [0, 1, 2, 2]


def test_another_runs_settings_are_refused_before_anything_is_read(tiny_config):
    config = tiny_config
    config.num_train_steps = 1
    dpo.train(config)
    config.initialize_from_hf = "nowhere/at-all"
    config.beta = 0.3
    with pytest.raises(ValueError, match="a run with other settings"):
        dpo.train(config)


def test_policy_and_reference_that_differ_are_seen_before_the_first_step(tiny_config, monkeypatch):
    """By one bit of one log-probability."""
    ready = reference.ready

    def off(*args):
        found = ready(*args)
        return found._replace(of_batch=lambda *given: found.of_batch(*given) * (1 + 2**-23))

    monkeypatch.setattr(reference, "ready", off)
    with pytest.raises(RuntimeError, match="log-probabilities"):
        dpo.train(tiny_config)


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "shape", "other"),
    [
        ("gemma2", "plain", dict(sliding_window=24)),
        ("qwen3_moe", "plain", {}),
        ("gpt2", "plain", dict(n_positions=256)),
        ("gpt_oss", "plain", {}),
        ("phi3", "long factors", dict(max_position_embeddings=256)),
        ("qwen3_5_text", "plain", {}),
        ("qwen3_5_moe_text", "plain", {}),
        ("gemma4_text", "plain", {}),
        ("gemma4_text", "inputs of each layer, shared keys",
         dict(vocab_size_per_layer_input=1024)),
        ("ministral3", "plain", {}),
        ("glm4_moe", "groups, one key head", {}),
        ("deepseek_v3", "groups, yarn", {}),
        ("minimax_m2", "plain", {}),
        ("glm_moe_dsa", "tied, odd, shared choices", dict(index_topk=256)),
        ("llama4_text", "dense first", dict(attention_chunk_size=50)),
        ("lfm2", "plain", {}),
        ("nemotron_h", "plain", {}),
        ("granitemoehybrid", "plain", {}),
    ],
)  # fmt: skip
def test_other_architectures_are_trained_and_written(tiny_config, tmp_path, family, shape, other):
    """Begun with large random weights: the gates hold, the loss falls, the export is whole."""
    from tests.recipes import random_models

    model = random_models.write(tmp_path / "model", family, shape, **other)
    config = tiny_config
    config.initialize_from_hf = config.reference_model_path = str(tmp_path / "model")
    config.num_train_steps, config.learning_rate, config.sample_tokens = 6, 1e-2, 8
    config.steps_per_hf_export, config.hf_save_dtype = 6, "float32"
    dpo.train(config)
    losses = [step["train/dpo_loss"] for step in training(config).values()]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 0.05
    out = pathlib.Path(config.directory) / "hf" / "step-6"
    assert zoo.load(out).config == model.config


@pytest.mark.full
def test_the_best_by_a_held_out_figure_stays(tiny_config, monkeypatch):
    config = tiny_config
    config.num_train_steps, config.steps_per_checkpoint, config.steps_per_eval = 4, 1, 1
    config.keep_checkpoints, config.keep_best = 1, "heldout/dpo_accuracy"
    from recipes.preference import evaluation

    accuracy, evaluate = iter([0.5, 0.9, 0.6, 0.7]), evaluation.evaluate

    def judged(*args, **kwargs):
        return evaluate(*args, **kwargs) | {"eval/heldout/dpo_accuracy": next(accuracy)}

    monkeypatch.setattr(evaluation, "evaluate", judged)
    dpo.train(config)
    kept = pathlib.Path(config.directory, "checkpoints").iterdir()
    assert sorted(path.name for path in kept) == ["2", "4"]
    config.keep_best = "other/dpo_accuracy"
    with pytest.raises(ValueError, match=r"other is not in \['heldout'\]"):
        dpo.train(config)

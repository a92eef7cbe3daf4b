"""Samples while a run learns: what is asked, what is said, and how likely each word became."""

import json
import pathlib
import types

from flax import nnx
import jax
import numpy as np
import pytest

from checkpoints_io import places
from recipes import dpo, sft
from recipes.configs import tiny, tiny_sft
from recipes.data import prompts
from recipes.data.ids.encode_rows import How
from recipes.data.ids.examples import PairIds
from recipes.data.ids.parallel import Crew
from recipes.data.prompts import Prompt
from recipes.data.run_data import HeldOut
from recipes.training import checks, logps, records, settings, watched
from recipes.training.run import Records, Watching
from tests.conftest import TINY, events, exported, given_by, run_with, stopped_after
from tests.conftest import records as recorded
import zoo
from zoo.text import tokenizer


@pytest.fixture(scope="module")
def own():
    return tokenizer.load(TINY / "model")


@pytest.fixture(scope="module")
def model():
    return zoo.load(TINY / "model")


@pytest.fixture(scope="module")
def run(own):
    """With two held-out pairs, of which the second's answers are longer than a sample."""
    ids = lambda text: np.array(own.encode(text)[0], np.int32)
    ask = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    ask += "<|start_header_id|>assistant<|end_header_id|>\n\n"

    def pair(row, prompt, *answers):
        both = [ids(f"{answer}<|eot_id|>") for answer in answers]
        masks = (np.ones(len(one), bool) for one in both)
        return PairIds(row, ids(ask.format(prompt)), *both, *masks)

    pairs = [
        pair(3, "Could you tell me the capital of Spain?", "It is Madrid.", "Madrid."),
        pair(7, "What is a saw?", "A saw is a tool. " * 9, "A tool. " * 9),
    ]
    return run_with(
        tokenizer=own, held_out=[HeldOut("heldout", pairs)], sample_tokens=12, seed=0,
        stop_ids=(1, 4), watching=Watching(2, None, 4, 0.9),
    )  # fmt: skip


def of_each_token(model, prompt, answer):
    logits = model(np.array([*prompt, *answer]))
    logps = jax.nn.log_softmax(logits[len(prompt) - 1 : -1])
    return np.asarray(logps)[np.arange(len(answer)), answer]


def test_texts_have_the_log_probabilities_of_the_model_itself(model):
    prompts, answers = [[2, 9, 11], [2] * 70, [5]], [[7, 8], [9], []]
    found = logps.of_texts(model, prompts, answers)
    for prompt, answer, ours in zip(prompts, answers, found, strict=True):
        theirs = of_each_token(model, prompt, answer) if answer else []
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_a_sample_says_which_words_the_policy_prefers(run, model):
    noisy = zoo.load(TINY / "model")
    nnx.update(noisy, jax.tree.map(lambda x: x * 1.02, nnx.state(noisy)))
    said = watched.reference_samples(model, run)
    some = watched.taken(noisy, model, said, run, 2)
    assert [(one["temperature"], one["row"]) for one in some] == [
        (0.0, 3), (0.0, 7), (0.9, 3), (0.9, 7),
    ]  # fmt: skip
    first, second, drawn = some[0], some[1], some[2]
    assert (first["step"], first["set"]) == (2, "heldout")
    assert first["prompt"] == "Could you tell me the capital of Spain?"
    assert (first["wanted"], first["unwanted"]) == ("It is Madrid.", "Madrid.")
    assert second["wanted"].startswith("A saw is a tool.") and second["wanted"].endswith("…")
    assert "wanted" not in drawn and drawn["policy"] and drawn["reference"]
    for one, pair in zip(some[:2], run.held_out[0].examples, strict=True):
        prompt, wanted = pair.prompt.tolist(), pair.chosen.tolist()[:12]
        ratios = of_each_token(noisy, prompt, wanted) - of_each_token(model, prompt, wanted)
        texts, found = zip(*one["log_ratios"]["wanted"], strict=True)
        np.testing.assert_allclose(found, ratios, atol=2e-3)
        assert "".join(texts) == one["wanted"].removesuffix("…").rstrip() or texts[-1] == " "
    assert {"policy", "reference", "wanted", "unwanted"} == first["log_ratios"].keys()
    json.dumps(some)
    # Of a reference that has left memory only the texts that stay are compared.
    gone = watched.taken(noisy, None, said, run, 2)
    assert [one["policy"] for one in gone] == [one["policy"] for one in some]
    assert gone[0]["log_ratios"].keys() == {"reference", "wanted", "unwanted"}
    assert gone[0]["log_ratios"]["wanted"] == first["log_ratios"]["wanted"]
    assert watched.taken(noisy, None, None, run, 2)[0]["reference"] is None


def test_equal_weights_have_log_ratios_of_zero(run, model):
    for one in watched.taken(model, model, None, run, 0):
        assert one["policy"] == one["reference"] or one["temperature"]
        assert {ratio for each in one["log_ratios"].values() for _, ratio in each} == {0.0}


def test_nothing_is_asked_of_a_run_without_samples(run, model):
    none = run._replace(watching=run.watching._replace(every=None))
    assert watched.reference_samples(model, none) is None


def test_prompts_are_ones_own_or_held_out_or_trained_on(run):
    texts = lambda run: [one.text for one in watched.prompts_of(run)]
    assert texts(run) == ["Could you tell me the capital of Spain?", "What is a saw?"]
    one = run._replace(watching=run.watching._replace(count=1))
    assert texts(one) == ["Could you tell me the capital of Spain?"]
    (part,) = run.held_out
    trained = run._replace(held_out=[], parts=[types.SimpleNamespace(**part._asdict())])
    assert texts(trained) == texts(run)
    ids = run.held_out[0].examples[1].prompt.tolist()
    mine = run._replace(watching=run.watching._replace(prompts=[Prompt(5, ids)]))
    (asked,) = watched.prompts_of(mine)
    assert (asked.where, asked.ids, asked.given) == ({"row": 5}, ids, {})


def test_prompts_of_ones_own_have_the_ids_of_training(tmp_path):
    how = How(str(TINY / "model"), None, "assistant", None, 256, "drop", 0.0)
    path, first = tmp_path / "prompts.jsonl", json.loads((TINY / "heldout.jsonl").open().readline())
    turns = first["chosen"]
    rows = [{"prompt": turns[0]["content"]}, {"messages": turns}, {"messages": turns[:1]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Crew(how) as crew:
        found = prompts.read(str(path), how, crew, plain=False)
        own = zoo.load_tokenizer(TINY / "model")
        assert [one.row for one in found] == [0, 1, 2]
        assert [one.ids for one in found] == [own.chat(turns[:1])] * 3
        (text,) = prompts.read(_written(path, {"prompt": "Once"}), how, crew, plain=True)
        assert text.ids == own.encode("Once")
        for row, told in [
            ({"prompt": 3}, "prompts.jsonl:1"),
            ({"answer": "a"}, "`prompt`"),
            ({"messages": turns[1:]}, "asks nothing"),
            ({"prompt": "a b " * 200}, "--config.train_seq_len=256"),
        ]:
            with pytest.raises(ValueError, match=told):
                prompts.read(_written(path, row), how, crew, plain=False)
        path.write_text("")
        with pytest.raises(ValueError, match="no rows"):
            prompts.read(str(path), how, crew, plain=False)


def _written(path, row):
    path.write_text(json.dumps(row) + "\n")
    return str(path)


@pytest.mark.parametrize("name", ["sample_prompts", "sample_temperature", "sample_count"])
def test_settings_of_samples_alone_are_refused(name):
    config = tiny.get_config()
    config.steps_per_sample = None
    config[name] = {"sample_prompts": "a.jsonl", "sample_temperature": 0.5, "sample_count": 9}[name]
    with pytest.raises(ValueError, match=f"--config.{name}=.* no effect without"):
        checks.checked(config, settings.table_of(settings.DPO))
    assert given_by(config)["steps_per_sample"] is None


def test_samples_are_cut_to_the_checkpoint_and_go_on(tmp_path):
    here, asked = places.Disk(tmp_path), Records(False, None, "a", (), {}, samples=True)
    for after, steps in [(-1, (0, 2, 4)), (2, (4, 6))]:
        log = records.Log(here, asked, after=after)
        for step in steps:
            assert not records.sampled(here, step)
            log.samples(step, [{"step": step, "policy": f"é\u2028{after}"}] * 2)
            assert records.sampled(here, step)
        log.close()
        with (tmp_path / "samples.jsonl").open("a") as file:
            file.write('{"step": 6, "pol')  # killed
    lines = (tmp_path / "samples.jsonl").read_text().split("\n")[:-1]
    found = [(one["step"], one["policy"]) for one in map(json.loads, lines)]
    kept = [(0, -1), (2, -1), (4, 2), (6, 2)]
    assert found == [(step, f"é\u2028{after}") for step, after in kept for _ in range(2)]
    # A run that takes no more of them still cuts those that were taken again.
    records.Log(here, asked._replace(samples=False), after=2).close()
    assert (tmp_path / "samples.jsonl").read_text().count("\n") == 4
    (tmp_path / "new").mkdir()
    records.Log(places.Disk(tmp_path / "new"), asked._replace(samples=False), after=-1).close()
    assert not (tmp_path / "new" / "samples.jsonl").exists()


def test_tensorboard_shows_texts_as_they_are(tmp_path):
    log = records.Log(
        places.Disk(tmp_path), Records(True, None, "a", (), {}, samples=True), after=-1
    )
    log.samples(5, [{"step": 5, "prompt": "*a*\n<b>", "policy": "c", "reference": None}])
    log.close()
    (event,) = (one for one in events(tmp_path / "tensorboard") if one.summary.value)
    (value,) = event.summary.value
    (text,) = value.tensor.string_val
    assert (event.step, value.tag) == (5, "samples/0/text_summary")
    assert text.decode() == "**prompt**\n\n    *a*\n    <b>\n\n**policy**\n\n    c"


def whole(config, tmp_path):
    config.num_train_steps, config.steps_per_checkpoint, config.steps_per_eval = 4, 2, 2
    config.train_batch_size, config.steps_per_hf_export, config.warmup = 8, 4, 0.0
    config.sample_tokens, config.steps_per_sample, config.sample_temperature = 6, 2, 0.8
    config.directory = str(tmp_path / "whole")
    return config


def samples_of(config):
    text = (pathlib.Path(config.directory) / "samples.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n")[:-1]]


@pytest.mark.full
@pytest.mark.parametrize("what", ["weights", "cached", "adapters", "follows", "alone", "sft"])
def test_a_resumed_run_goes_on_with_its_samples_and_they_move_nothing(
    tiny_config, tmp_path, what, capsys
):
    config, train = tiny_config, dpo.train
    if what == "sft":
        config, train = tiny_sft.get_config(), sft.train
        config.initialize_from_hf = str(TINY / "model")
        config.train_data = str(TINY / "train.jsonl")
        config.validation.heldout = str(TINY / "heldout.jsonl")
        config.compile_cache, config.tensorboard = None, False
        config.steps_per_log, config.max_eval_pairs = 1, 8
    config = whole(config, tmp_path)
    if what == "cached":
        config.reference_mode = "cached"
    if what == "adapters":
        config.adapter = dict(rank=2, alpha=4.0)
    if what == "follows":
        config.reference_sync_steps = 2
    if what == "alone":
        config.loss, config.beta, config.gamma_beta_ratio = "simpo", 2.0, 0.5
    train(config)
    some = samples_of(config)
    assert [one["step"] for one in some] == [0] * 8 + [2] * 8 + [4] * 8
    assert "one of 8 samples" in capsys.readouterr().out
    has_reference = what not in ("alone", "sft")
    assert all((one["reference"] is not None) == has_reference for one in some)
    ratios = [r for s in some for name in s["log_ratios"].values() for _, r in name]
    assert any(ratios) == has_reference
    assert not any(r for s in some[:8] for name in s["log_ratios"].values() for _, r in name)

    without = config.copy_and_resolve_references()
    without.steps_per_sample = without.sample_temperature = None
    without.directory = str(tmp_path / "without")
    train(without)
    assert recorded(without) == recorded(config)
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    for name, array in exported(config, 4).items() if what != "adapters" else ():
        np.testing.assert_array_equal(array.view("u2"), exported(without, 4)[name].view("u2"))

    parts = config.copy_and_resolve_references()
    parts.directory = str(tmp_path / "parts")
    with stopped_after(3):
        train(parts)
    assert [one["step"] for one in samples_of(parts)] == [0] * 8 + [2] * 8
    train(parts)
    assert samples_of(parts) == some
    train(parts)  # finished: nothing is added
    assert samples_of(parts) == some

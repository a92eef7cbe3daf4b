"""Supervised fine-tuning: its loss is that of transformers, and a stop leaves no trace."""

import json

import ml_collections
import numpy as np
import pytest

from recipes import sft
from recipes.configs import tiny_sft
from recipes.data import source_pairs
from recipes.data.chats import layouts
from recipes.data.ids import encode_rows
from recipes.data.rows.source import Source
from tests.conftest import TINY, exported, few_pairs, records, stopped_after
from zoo.text import tokenizer


@pytest.fixture
def config(tmp_path) -> ml_collections.ConfigDict:
    """A run of four steps on a few conversations."""
    config = tiny_sft.get_config()
    config.directory = str(tmp_path / "run")
    config.initialize_from_hf = str(TINY / "model")
    config.train_data = few_pairs(tmp_path, 10)
    config.validation = {}
    config.token_cache = config.compile_cache = None
    config.train_batch_size, config.num_train_steps = 8, 4
    config.steps_per_log = config.steps_per_checkpoint = 1
    config.steps_per_eval, config.sample_tokens, config.tensorboard = None, 0, False
    return config


@pytest.mark.full
def test_a_resumed_run_is_the_uninterrupted_one(config, tmp_path, capfd):
    config.hf_save_dtype = "float32"
    sft.train(config)
    whole, config.directory = config.copy_and_resolve_references(), str(tmp_path / "parts")
    config.num_train_steps, config.cooldown = 4, None
    config.profile = None
    with stopped_after(2):
        sft.train(config)
    capfd.readouterr()
    sft.train(config)
    assert "resuming from step 2" in capfd.readouterr().out
    assert records(config) == records(whole)
    ours, theirs = exported(config, 4), exported(whole, 4)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_its_loss_and_gradient_are_those_of_transformers(config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config.num_train_steps, config.max_grad_norm, config.warmup = 1, None, 0.0
    config.learning_rate = 1e-12
    config.train_batch_size = 42  # all rows, so that their order is of no matter
    sft.train(config)
    (found,) = records(config)
    source = Source(config.train_data, "conversation", (("messages", "chosen"),), single=True)
    how = encode_rows.How(config.initialize_from_hf, None, "assistant", None, 256, "drop", 0.0)
    examples = source_pairs.read(source, how).ids
    assert len(examples) == 42
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.initialize_from_hf, dtype=torch.float32
    )
    longest = max(len(one.prompt) + len(one.answer) for one in examples)
    ids = torch.zeros((42, longest), dtype=torch.long)
    labels, seen = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, one in enumerate(examples):
        text = torch.tensor(np.concatenate([one.prompt, one.answer]))
        ids[row, : len(text)], seen[row, : len(text)] = text, 1
        scored = torch.tensor(np.where(one.scored, one.answer, -100))
        labels[row, len(one.prompt) : len(text)] = scored
    loss = model(input_ids=ids, attention_mask=seen, labels=labels).loss
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
    assert found["train/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["train/gradient_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_held_out_loss_weighs_every_token_the_same(config):
    config.validation = {"heldout": config.train_data}
    config.num_train_steps, config.run_initial_eval = 1, True
    config.train_batch_size, config.learning_rate, config.warmup = 42, 1e-12, 0.0
    assert sft.train(config) is True  # it came to its end
    before, step, after = records(config)
    assert before["eval/heldout/loss"] == pytest.approx(step["train/loss"], rel=1e-5)
    assert after["eval/heldout/loss"] == pytest.approx(step["train/loss"], rel=1e-5)


def test_settings_of_pairs_are_refused(config):
    with config.unlocked():
        config.beta = 0.1
    with pytest.raises(ValueError, match="an unknown setting 'beta'"):
        sft.train(config)


USER, ANSWER = (
    {"role": "user", "content": "Which way?"},
    {"role": "assistant", "content": "Onwards."},
)
GREETING = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]


@pytest.mark.parametrize(
    ("row", "layout", "prompt", "answer"),
    [
        ({"messages": [USER, ANSWER]}, "conversation", [USER], [ANSWER]),
        ({"messages": [*GREETING, USER, ANSWER]}, "conversation", GREETING[:1],
         [GREETING[1], USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "Which way?"},
                            {"from": "gpt", "value": "Onwards."}]},
         "sharegpt_conversation", [USER], [ANSWER]),
        ({"prompt": "Which way?", "completion": "Onwards."}, "prompt_answer", [USER], [ANSWER]),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt_answer", [USER], [ANSWER]),
        ({"prompt": [*GREETING, USER], "answer": [ANSWER]}, "prompt_answer", [*GREETING, USER],
         [ANSWER]),
        ({"question": "Which way?", "answer": "Onwards."}, "prompt_answer", [USER], [ANSWER]),
        ({"instruction": "Which way?", "input": "", "output": "Onwards."}, "instruction_answer",
         [USER], [ANSWER]),
        ({"prompt": "Which way?", "response": "Onwards.", "system": "Be brief."}, "prompt_answer",
         [{"role": "system", "content": "Be brief."}, USER], [ANSWER]),
        ({"messages": [USER, ANSWER], "answer": "42"}, "conversation", [USER], [ANSWER]),
        ({"conversations": [{"from": "human", "value": "Which way?"},
                            {"from": "gpt", "value": "Onwards."}], "output": "Onwards."},
         "sharegpt_conversation", [USER], [ANSWER]),
        ({"messages": [USER], "prompt": "Which way?", "answer": "Onwards."}, "prompt_answer",
         [USER], [ANSWER]),
    ],
)  # fmt: skip
def test_rows_of_a_single_answer(tmp_path, row, layout, prompt, answer):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    found, _ = source_pairs.recognised(Source(str(file), single=True))
    assert found.layout == layout
    from recipes.data.chats import columns

    named = columns.renamed(row, {}, single=True)
    pair = layouts.LAYOUTS[layout].read(named)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, answer, None)
    assert pair.answers == (answer,)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"hold pairs: .*'answer': 'chosen'"),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "{'answer': 'chosen'}"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, USER]}, "{'messages': 'chosen'}"),
        ({"text": "a b c"}, "neither `messages` nor `prompt` and `answer`"),
        ({"prompt": "Which way?", "answer": "Onwards.", "dialogue_history": "We met."},
         "`dialogue_history` looks like the question"),
    ],
)  # fmt: skip
def test_rows_without_one_are_refused(tmp_path, row, told):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=told):
        source_pairs.recognised(Source(str(file), single=True))


def test_every_layout_of_single_answers_has_an_example():
    (shown,) = (mark for mark in test_rows_of_a_single_answer.pytestmark)
    named = {layout for _, layout, *_ in shown.args[1]} | {"plain_answer"}
    assert named == layouts.named(single=True).keys()


def test_an_answer_in_plain_text_is_taken_as_it_is():
    """Asked for by name: a prompt and an answer are otherwise those of a conversation."""
    read = layouts.LAYOUTS["plain_answer"].read
    pair = read({"prompt": "Which way? ", "answer": "Onwards."})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Which way? ", "Onwards.", None)
    with pytest.raises(ValueError, match="answer"):
        read({"prompt": "Which way? ", "answer": [ANSWER]})


def test_ratings_of_pairs_are_not_read_and_cannot_be_named(config, tmp_path):
    row = {"messages": [USER, ANSWER], "chosen_score": 8.5, "rejected_score": "none"}
    assert layouts.LAYOUTS["conversation"].read(row).ratings is None
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    found, line = source_pairs.recognised(Source(str(file), single=True))
    assert line.endswith("not read: chosen_score, rejected_score")
    how = encode_rows.How(str(TINY / "model"), None, "assistant", None, 256, "drop", 0.0)
    assert not +source_pairs.read(found, how).counts.notes
    config.data.columns.chosen_score = "score"
    with pytest.raises(ValueError, match=r"--config.data.columns has no column 'chosen_score'"):
        sft.train(config)


def test_what_is_refused_of_single_answers_speaks_of_answers(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "system", "content": "Be brief."}, ANSWER]}
    file.write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(ValueError, match="has no rows that can be read as answers: "):
        source_pairs.recognised(Source(str(file), single=True))
    file.write_text(f"{json.dumps(row)}\n" * 2)
    how = encode_rows.How(str(TINY / "model"), None, "assistant", None, 256, "drop", 0.0)
    found = source_pairs.read(Source(str(file), "conversation", single=True), how)
    told = "; ".join(found.counts.lines())
    assert "2 without a user turn in their prompt" in told
    assert "1 repeat an earlier one" in told
    with pytest.raises(ValueError, match="all 2 answers have the same prompt"):
        source_pairs.split(found, 0.5)


def test_a_conversation_ends_with_an_answer(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [USER]}) + "\n")
    how = encode_rows.How(str(TINY / "model"), None, "assistant", None, 256, "drop", 0.0)
    with pytest.raises(ValueError, match=r"1 of 1 rows .* hold no answer: .*not the assistant's"):
        source_pairs.read(Source(str(file), "conversation", single=True), how)


def test_every_turn_of_the_assistant_is_scored_or_the_last(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [*GREETING, USER, ANSWER]}) + "\n")
    own = {}
    for turns in ("assistant", "last", "all"):
        how = encode_rows.How(str(TINY / "model"), None, turns, None, 256, "drop", 0.0)
        ((own[turns],), _, _) = source_pairs.read(
            Source(str(file), "conversation", single=True), how
        )
    words = tokenizer.load(TINY / "model")
    said = {name: words.decode(one.answer[one.scored]) for name, one in own.items()}
    assert said["assistant"] == "Hi!<|eot_id|>Onwards.<|eot_id|>"
    assert said["last"] == "Onwards.<|eot_id|>"
    assert said["all"].startswith("Hi!<|eot_id|>") and "Which way?" in said["all"]
    prompts = {words.decode(one.prompt) for one in own.values()}
    assert len(prompts) == 1 and prompts.pop().endswith("assistant<|end_header_id|>\n\n")

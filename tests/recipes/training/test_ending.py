"""What a run says at its end."""

import json
import pathlib
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from checkpoints_io import places
from recipes.data import shown
from recipes.data.ids.examples import PairIds
from recipes.data.run_data import HeldOut
from recipes.own_pairs import answers, prompts
from recipes.training import by_name, command, ending, harness, samples
from recipes.training import settings as settings_of
from recipes.training.run import Records
from tests.conftest import TINY, run_with
import zoo
from zoo.targets import Lora, sites
from zoo.text import tokenizer

OF_LLAMA = dict(
    model_type="llama", vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=1e4,
    tie_word_embeddings=False,
)  # fmt: skip
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"


@pytest.fixture(scope="module")
def own():
    return tokenizer.load(TINY / "model")


def pair(prompt, chosen, rejected):
    prompt, chosen, rejected = (np.array(ids, np.int32) for ids in (prompt, chosen, rejected))
    masks = np.ones(len(chosen), bool), np.ones(len(rejected), bool)
    return PairIds(0, prompt, chosen, rejected, *masks)


@pytest.mark.parametrize(
    ("answer", "chosen", "rejected", "most", "wanted"),
    [
        ([7, 8, 9], [7, 8, 1], [3, 4, 5], 8, True),
        ([3, 4, 9], [7, 8, 1], [3, 4, 5], 8, False),
        ([1, 2, 3], [7, 8, 9], [4, 5, 6], 8, False),  # neither
        ([7] * 30, [7, *range(30)], [*range(30)], 99, False),  # one word in common is chance
        ([1, 2, 9], [1, 2], [9, 2, 1], 8, True),  # the order counts
        ([1, 2], [1, 2], [1, 2, 3, 4, 5, 6], 8, True),  # and so does the length
        ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8, 9, 9], [1, 2, 3], 4, True),  # all cut alike
    ],
)
def test_the_wanted_manner_is_that_of_the_nearer_answer(answer, chosen, rejected, most, wanted):
    assert samples.is_wanted(answer, pair([1], chosen, rejected), most) == wanted


@pytest.mark.parametrize(
    ("prompts", "length", "asked"), [(0, 1, 0), (1, 90_000, 1), (5, 9, 5), (200, 9, 64),
                                     (200, 500, 16), (200, 2000, 4)],
)  # fmt: skip
def test_prompts_are_spread_and_their_number_bounded(prompts, length, asked):
    pairs = [pair([i] * length, [1], [2]) for i in range(prompts)]
    some = [int(one.prompt[0]) for one in samples.at_once(pairs, 128)]
    assert len(some) == asked
    assert some == sorted(set(some))
    if asked == 4:
        assert some == [0, 50, 100, 150]


def test_of_a_prompt_the_last_turn_is_shown(own):
    ask = lambda *turns: own.encode(
        "<|begin_of_text|>"
        + "".join(HEAD.format(role) + f"{said}<|eot_id|>" for role, said in turns)
        + HEAD.format("assistant")
    )[0]
    short = ask(("user", "What is a saw?\nBe brief."))
    long = ask(("system", "Stay polite."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"))
    assert samples.last_turns(own, [short, long]) == ["What is a saw?\nBe brief.", "Why?"]
    plain = [own.encode(text)[0] for text in ("user\nOne red bird", "user\nOne owl")]
    assert samples.last_turns(own, plain) == ["One red bird", "One owl"]  # of ChatML
    assert samples.last_turns(own, plain[:1]) == ["user\nOne red bird"]
    assert samples.last_turns(own, [own.encode("so " * 300)[0]])[0].startswith("…")


def test_samples_stand_side_by_side_without_special_tokens(own):
    ids = lambda text: own.encode(text)[0]
    one = pair(ids("<|begin_of_text|>Three?"), ids("- a\n- b<|eot_id|>"), ids("a and b<|eot_id|>"))
    same, after = ids("none<|eot_id|>"), ids("- a\n- b\n- c")
    texts = {"before": [same, ids("a and b\x1b<|eot_id|>")], "after": [same, after]}
    told = samples.side_by_side(own, samples.Answers([one, one], len(after), texts))
    assert told.splitlines() == [
        "",
        "1 of 2 greedy answers to held-out prompts changed:",
        "",
        "prompt    Three?",
        "wanted    - a",
        "          - b",
        "unwanted  a and b",
        "before    a and b␛",
        "after     - a",
        "          - b",
        "          - c…",
    ]
    gone = samples.side_by_side(own, samples.Answers([one], 99, {"after": [same]}))
    assert "before" not in gone and gone.endswith("after     none")


def test_figures_before_and_after():
    pairs = [pair([1], [7, 8], [3, 4]), pair([2], [7, 8], [3, 4])]
    sets = [HeldOut("mine", pairs), HeldOut("theirs", pairs[:1])]
    figures = {"eval/mine/dpo_accuracy": 1.0, "eval/mine/dpo_reward_margin": 0.5}
    assert ending.figures(sets, figures) == [
        "mine accuracy: no preference -> 1.000 (2 pairs)",
        "mine reward margin: 0 -> 0.500 (2 pairs)",
    ]
    answers = samples.Answers(pairs, 4, {"before": [[3], [4]], "after": [[7], [3]]})
    (told,) = ending.manner(answers, {3, 4, 7, 8})
    assert told.startswith("answers closer to the chosen one: 0% -> 50% (2 greedy answers")
    (told,) = ending.manner(answers._replace(texts={"after": [[7], [8]]}), {7, 8})
    assert told.startswith("answers closer to the chosen one: not generated -> 100%")
    assert ending.manner(None, ()) == []
    _, told = ending.manner(answers, (3, 4))
    assert told == "answers cut off at 4 tokens: 0 -> 1"
    _, told = ending.manner(answers._replace(texts={"after": [[7], [8]]}), (8,))
    assert told == "answers cut off at 4 tokens: 1"
    assert ending.figures(sets, figures, has_reference=False) == [
        "mine accuracy: 1.000 (2 pairs)",
        "mine reward margin: 0.500 (2 pairs)",
    ]
    after = answers._replace(texts={"after": [[7], [8]]})
    (told,) = ending.manner(after, {7, 8}, has_reference=False)
    assert told.startswith("answers closer to the chosen one: 100% (2 greedy")


def ended(directory, template=None):
    tokenizer = SimpleNamespace(chat_template=template)
    return run_with(directory=places.Disk(pathlib.Path(directory)), tokenizer=tokenizer)


def test_lines_to_paste_name_the_folder():
    folder = "/my runs/one/hf/step-60"
    told = ending.how_to_go_on(folder, ended("/my runs/one"))
    assert 'zoo.load("/my runs/one/hf/step-60")' in told
    assert "-m zoo chat '/my runs/one/hf/step-60'\n" in told
    assert "vllm serve '/my runs/one/hf/step-60'" in told
    begun = "--config.initialize_from_hf='/my runs/one/hf/step-60'"
    assert f"{begun} --config.directory='/my runs/one-2'" in told
    (line,) = (line for line in told.splitlines() if " -c " in line)
    program = shlex.split(line)[-1]
    assert '"/my runs/one/hf/step-60"' in program and 'print(ask("Once"' in program
    compile(program, "pasted", "exec")
    chat = ending.how_to_go_on("/one's", ended("/runs/7", "{{ messages }}"))
    assert (
        '[{"role": "user", "content": "Hello"}]'
        in shlex.split(chat.split(" -c ")[1].split("\n")[0])[0]
    )
    told = ending.how_to_export(folder)
    assert "--config.steps_per_hf_export=None writes /my runs/one/hf/step-60" in told


def test_lines_to_paste_of_a_run_in_a_bucket():
    folder = "gs://runs/one/hf/step-60"
    run = ended("/runs/one")._replace(directory=SimpleNamespace(address="gs://runs/one"))
    beside = ending.how_to_use_adapters(folder, with_adapters(8))
    for told in (ending.how_to_go_on(folder, run), beside):
        assert f" -m zoo chat {folder}\n" in told
        assert f'"{folder}")' in told
        assert "vllm serve" not in told and "from_pretrained" not in told
        assert "copy it to their machine" in told
    assert "--config.directory=gs://runs/one-2" in ending.how_to_go_on(folder, run)


def with_adapters(rank, *, base="meta-llama/Llama-3.2-1B", revision=None, config=None, **settings):
    """A run whose adapters have this rank, as far as its end looks at it."""
    blank = zoo.abstract(OF_LLAMA if config is None else config)
    given = {name: setting.default for name, setting in settings_of.ADAPTER.items()}
    given |= {"tokenizer": None} | settings
    return run_with(
        base=base,
        folder=SimpleNamespace(revision=revision, config=config or OF_LLAMA),
        adapting=SimpleNamespace(rank=rank, sites=sites(blank, Lora(8, 8.0))),
        blank=blank,
        directory=places.Disk(pathlib.Path("/runs/one-9")),
        records=Records(False, None, "a", (), by_name.nested(given)),
    )


def test_lines_to_paste_name_base_and_adapters():
    folder = "/my runs/one/hf/step-60"
    told = ending.how_to_use_adapters(folder, with_adapters(24))
    assert 'zoo.load("meta-llama/Llama-3.2-1B", adapter="/my runs/one/hf/step-60")' in told
    assert "--enable-lora --max-lora-rank 32 --lora-modules mine='/my runs/one/hf/step-60'" in told
    assert " -m zoo chat '/my runs/one/hf/step-60'\n" in told
    assert " -m zoo merge meta-llama/Llama-3.2-1B '/my runs/one/hf/step-60' FOLDER" in told
    assert "transformers.AutoModelForCausalLM.from_pretrained(" in told
    sees = {"model_type": "gemma3", "text_config": OF_LLAMA | {"model_type": "gemma3_text"}}
    run = with_adapters(24)
    run = run._replace(folder=SimpleNamespace(revision=None, config=sees))
    told = ending.how_to_use_adapters(folder, run)
    assert "transformers.AutoModelForImageTextToText.from_pretrained(" in told
    told = ending.how_to_use_adapters(folder, with_adapters(600))
    assert "(vLLM takes ranks up to 512, but these adapters have rank 600: merge them)" in told


def test_where_peft_loses_adapters_its_lines_are_left_out():
    shared = OF_LLAMA | dict(
        model_type="qwen2_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, norm_topk_prob=False, decoder_sparse_step=1,
        mlp_only_layers=[],
    )  # fmt: skip
    told = ending.how_to_use_adapters("/one", with_adapters(8, config=shared))
    assert "PeftModel" not in told and "vllm serve" in told
    assert "like model.layers.0.mlp.shared_expert.down_proj for those of experts" in told


def test_lines_to_paste_name_the_version_of_a_base():
    """As each program takes it: ours behind an @, others by a flag of their own."""
    run = with_adapters(8, base="owner/name@0a1b", revision="0a1b")
    told = ending.how_to_use_adapters("/one", run)
    assert 'zoo.load("owner/name@0a1b", adapter="/one")' in told
    assert 'from_pretrained("owner/name", revision="0a1b")' in told
    assert 'AutoTokenizer.from_pretrained("owner/name", revision="0a1b")' in told
    assert "vllm serve owner/name --revision 0a1b --enable-lora" in told
    assert "zoo merge owner/name@0a1b /one FOLDER" in told
    told = ending.how_to_use_adapters("/one", with_adapters(8, tokenizer="o/t"))
    assert 'AutoTokenizer.from_pretrained("o/t")' in told


def test_what_the_adapters_have_decided_is_unset_where_they_are_trained_on():
    run = with_adapters(8, **{"adapter.alpha": 16.0, "adapter.dora": True})
    told = ending.how_to_use_adapters("/one", run)
    flags = "--config.adapter.rank=None --config.adapter.alpha=None --config.adapter.dora=false"
    assert f"--config.adapter.path=/one {flags} --config.directory=/runs/one-10" in told


def test_a_line_to_go_on_is_the_command_with_other_settings(monkeypatch):
    words = "recipes/dpo.py --config=tiny.py --config.directory=a --config.beta 0.2 --config.seed 1"
    monkeypatch.setattr(command, "_started", [*words.split(), "--config.train_data=my pairs.jsonl"])
    monkeypatch.setattr(command, "python", lambda: "python")
    told = command.again({"directory": "a-2", "seed": "2", "initialize_from_hf": "a b"})
    assert told == (
        "python recipes/dpo.py --config=tiny.py --config.beta 0.2 "
        "'--config.train_data=my pairs.jsonl' "
        "--config.directory=a-2 --config.seed=2 --config.initialize_from_hf='a b'"
    )
    monkeypatch.setattr(command, "_started", [])  # in a notebook
    assert command.again({"directory": "b"}) == "--config.directory=b"


def test_adapters_of_weights_in_few_bits_are_merged_for_other_programs():
    told = ending.how_to_use_adapters("/one", with_adapters(8, frozen="nf4"))
    assert "these adapters were trained on nf4 weights" in told
    assert "peft" not in told.replace("PEFT", "")
    assert "vllm" not in told


@pytest.fixture(scope="module")
def words_apart(tmp_path_factory):
    """The embedded tokenizer with added tokens that are words: Gemma's line breaks, Qwen's <think>.

    And one that is none, though only its role says so.
    """
    folder = tmp_path_factory.mktemp("words")
    for name in ("config.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / "model" / name, folder)
    told = json.loads((TINY / "model" / "tokenizer.json").read_text())
    size = len(told["model"]["vocab"]) + len(told["added_tokens"])
    like = told["added_tokens"][0] | {"special": False}
    for i, text in enumerate(["\n", "\n\n", "<think>", "</think>", "<pad>"], start=size):
        told["added_tokens"].append(like | {"id": i, "content": text})
    (folder / "tokenizer.json").write_text(json.dumps(told))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<pad>"}))
    return zoo.load_tokenizer(folder)


def test_what_a_model_says_keeps_its_lines_and_its_thoughts(words_apart):
    """Wherever it is drawn, judged and shown; as transformers, with skip_special_tokens."""
    text = "<think>\nIt is far.\n</think>\n\nLima.\nYes."
    prompt = words_apart.chat([{"role": "user", "content": "First line.\nSecond line."}])
    ids = words_apart.encode(text + "<pad><|eot_id|>")[len(words_apart.own.first) :]
    assert words_apart.stop_ids == (1, 4)
    assert len(set(ids) & set(words_apart.special.values())) == 6
    assert samples.said_of(words_apart.own, prompt, ids, 99) == text
    assert harness._text(words_apart, ids) == text
    asked = prompts.Prompt(0, [], None, {}, tuple(prompt))
    line = answers._line(asked, [ids], words_apart)
    assert (line["answers"], line["finished"]) == ([text], [True])
    pieces = shown.cut(words_apart.own, prompt, ids)
    assert [piece.text for piece in pieces if piece.is_control] == ["<pad>", "<|eot_id|>"]
    assert samples.last_turns(words_apart.own, [prompt]) == ["First line.\nSecond line."]


def test_what_ends_an_answer_is_no_word_of_it(words_apart):
    """Whatever its files call it; and a line break that follows it ends nothing."""
    own = words_apart.own
    ends = tokenizer.stop_ids(own, "\n</think>\n")
    assert ends == (own.eos_id, own.special["</think>"])
    said = lambda own: tokenizer.said(own, [], own.encode("so\n</think>")[0])
    assert (said(own), said(tokenizer.ended_by(own, ends))) == ("so\n</think>", "so\n")

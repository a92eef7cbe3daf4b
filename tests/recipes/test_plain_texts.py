"""Plain texts during a run: nats a token and bits per byte, against other ways to them."""

import functools
import json
import math

from flax import nnx
import jax
import numpy as np
import pytest

from recipes import dpo, sft
from recipes.configs import tiny_sft
from recipes.data import texts
from recipes.training import checks, logps, plain_texts, policy, prepare, settings
from tests.conftest import TINY, records
import zoo

# Two bytes, three bytes and four bytes a character; one token; more than two windows.
SHORT = ["What is the capital of Peru? It is Lima.", "Ärger über 東京 🙂!", "a"]
LONG = " ".join(f"{word} is a thing, and {word} is of use." for word in ("hat", "cup") * 18)


def test_windows_score_every_token_once():
    ids = [0, *range(1, 12)]
    found = texts.cut(ids, 5, first=7)
    assert [(one.row, one.prompt.tolist(), one.answer.tolist()) for one in found] == [
        (7, [0], [1, 2, 3, 4]),
        (8, [4], [5, 6, 7, 8]),
        (9, [7, 8], [9, 10, 11]),  # filled up with what stands before
    ]
    assert all(one.scored.all() and one.scored.shape == one.answer.shape for one in found)
    (whole,) = texts.cut(ids, 12)
    assert (whole.prompt.tolist(), whole.answer.tolist()) == ([0], ids[1:])
    assert texts.cut([0], 5) == []


@pytest.fixture(scope="module")
def nats():
    """Of every text, by whole logits in float64: nothing packed."""
    model, words = zoo.load(TINY / "model"), zoo.load_tokenizer(TINY / "model")
    windows = {
        text: texts.cut([words.bos_id, *words.own.encode(text)[0]], 256) for text in (*SHORT, LONG)
    }
    every = [window for some in windows.values() for window in some]
    logits = model([[*window.prompt.tolist(), *window.answer.tolist()] for window in every])
    told = iter(np.asarray(logits, np.float64))
    found = {}
    for text, some in windows.items():
        found[text] = 0.0
        for window in some:
            count = len(window.answer)
            at = next(told)[len(window.prompt) - 1 :][:count]
            most = at.max(-1)
            norm = most + np.log(np.exp(at - most[:, None]).sum(-1))
            found[text] += float((norm - at[np.arange(count), window.answer]).sum())
    return found


def tokens_of(text):
    return len(zoo.load_tokenizer(TINY / "model").own.encode(text)[0])


def expected(nats, some):
    total, size = sum(nats[text] for text in some), len("".join(some).encode())
    return total / sum(map(tokens_of, some)), total / math.log(2) / size


def files(folder):
    rows = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in [*SHORT, ""])
    (folder / "short.jsonl").write_text(rows)
    (folder / "long.txt").write_bytes(LONG.encode())
    return {"short": str(folder / "short.jsonl"), "long": str(folder / "*.txt")}


@pytest.fixture
def config(tiny_config, tmp_path):
    tiny_config.num_train_steps = 1
    tiny_config.run_initial_eval = True
    tiny_config.max_eval_pairs = None
    tiny_config.validation = {}
    tiny_config.validation_texts = files(tmp_path)
    return tiny_config


def test_figures_are_those_of_whole_logits(config, nats, capfd):
    given = checks.checked(config, settings.table_of(settings.DPO))
    with prepare.prepared(given) as run, jax.set_mesh(run.computing.mesh):
        own = policy.of(run)
        weights = nnx.to_pure_dict(nnx.state(policy.loaded(run)))
        ask = functools.partial(logps.compiled(run.computing.mesh), own.graph, weights)
        found = {name: x for one in plain_texts.evaluate(run, ask) for name, x in one.items()}
    assert tokens_of(LONG) > 2 * 255  # three windows
    for name, some in (("short", SHORT), ("long", [LONG])):
        figures = [found[f"eval/{name}/{figure}"] for figure in ("loss", "bits_per_byte")]
        np.testing.assert_allclose(figures, expected(nats, some), rtol=2e-6)
    assert (
        f"short: 3 texts, {sum(map(tokens_of, SHORT))} tokens, 66 bytes\n" in capfd.readouterr().out
    )


def test_short_texts_are_as_transformers_has_them(nats):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY / "model").double()
    words = zoo.load_tokenizer(TINY / "model")
    for text in SHORT:
        ids = torch.tensor([[words.bos_id, *words.own.encode(text)[0]]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        assert nats[text] == pytest.approx(loss * (ids.shape[1] - 1), rel=2e-6)


@pytest.mark.full
def test_it_is_of_sft_too_and_of_some_texts(tiny_config, nats, tmp_path):
    config = tiny_sft.get_config()
    for name in ("directory", "compile_cache", "token_cache", "initialize_from_hf", "train_data"):
        config[name] = tiny_config[name]
    config.update(validation={}, num_train_steps=1, run_initial_eval=True, tensorboard=False)
    config.update(steps_per_hf_export=-1, sample_tokens=0, max_eval_pairs=2)
    config.validation_texts = {"short": files(tmp_path)["short"]}
    sft.train(config)
    before = records(config)[0]
    np.testing.assert_allclose(before["eval/short/loss"], expected(nats, SHORT[::2])[0], rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"words": "a"}\n', "a.jsonl:1: there is no text in `text`"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: there is no text"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl:1: half of a surrogate pair"),
        ("a.jsonl", b'{"text": ""}\n', "has no texts"),
        ("a.txt", b"\xff\xfea\x00", "a.txt: UTF-16"),
        ("a.txt", b"\xe4", "a.txt: not valid UTF-8"),
        ("a.txt", b"", "has no texts"),
    ],
)
def test_what_is_no_text_is_said_before_the_run(config, name, content, told, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / name).write_bytes(content)
    config.validation_texts = {"odd": str(folder / name)}
    with pytest.raises(ValueError, match=told):
        dpo.train(config)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"validation_texts": "wiki.txt"}, "write --config.validation_texts.wiki=wiki.txt"),
        ({"validation_texts": {"a": {"path": "b"}}}, "validation_texts.a=.* is not a path"),
        ({"validation_texts": {"a": "b"}, "validation": {"a": "c"}}, "the same name as a held-out"),
        ({"validation_texts": {"validation": "b"}, "validation_split_fraction": 0.1},
         "the same name as a held-out"),
    ],
)  # fmt: skip
def test_settings_of_texts_are_checked(config, other, told):
    with config.ignore_type():
        for name, value in other.items():
            config[name] = value
    with pytest.raises(ValueError, match=told):
        checks.checked(config, settings.table_of(settings.DPO))


@pytest.mark.full
def test_nothing_of_the_pairs_moves_beside_texts(config, tmp_path):
    config.run_initial_eval = False
    config.num_train_steps = 2
    dpo.train(config)
    with_texts = [one for one in records(config) if "train/dpo_loss" in one]
    config.validation_texts, config.directory = {}, str(tmp_path / "other")
    dpo.train(config)
    assert records(config) == with_texts

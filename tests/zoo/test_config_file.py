"""What is written beside the weights of a model that was changed in a notebook is of that model."""

import dataclasses
import json
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import TINY
from tests.long_forms import full_but
from tests.zoo import twins
import zoo

TOKENS = jnp.array([[5, 17, 300, 2, 9]])


@pytest.fixture
def model():
    return zoo.load(TINY / "model")


def changed(model, **fields):
    model.config = dataclasses.replace(model.config, **fields)
    return model


def fewer_layers(model):
    model.blocks = jax.tree.map(lambda x: x[:2], model.blocks)
    return changed(model, num_hidden_layers=2)


def more_words(model):
    model.embedding = model.embedding.replace(jnp.pad(model.embedding[...], ((0, 8), (0, 0))))
    return changed(model, vocab_size=model.config.vocab_size + 8)


def other_turns(model):
    ropes = dataclasses.replace(model.config.rope_parameters, rope_theta=5e5)
    return changed(model, rope_parameters=ropes)


def untied(model):
    model.head = nnx.clone(model.embedding)
    model.head[...] = 2 * model.head[...]
    return changed(model, tie_word_embeddings=False)


@pytest.mark.parametrize("change", [fewer_layers, more_words, other_turns, untied])
def test_a_model_that_was_changed_is_read_back_as_it_is(change, model, tmp_path):
    before = json.loads((TINY / "model" / "config.json").read_text())
    expected = change(model)(TOKENS)
    zoo.save(model, tmp_path / "changed", dtype=jnp.float32)
    again = zoo.load(tmp_path / "changed")
    assert again.config == model.config
    np.testing.assert_allclose(again(TOKENS), expected, atol=1e-5)
    written = json.loads((tmp_path / "changed" / "config.json").read_text())
    for key in ("architectures", "bos_token_id", "eos_token_id", "max_position_embeddings"):
        assert written[key] == before[key]
    assert (tmp_path / "changed" / "tokenizer.json").is_file()


def test_what_a_file_says_in_older_words_is_not_said_twice(tmp_path):
    """A rope_theta beside the new rope would be another model to whoever reads it."""
    shutil.copytree(TINY / "model", tmp_path / "old")
    said = json.loads((tmp_path / "old" / "config.json").read_text())
    said |= {"rope_theta": said.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    (tmp_path / "old" / "config.json").write_text(json.dumps(said))
    model = other_turns(zoo.load(tmp_path / "old"))
    zoo.save(model, tmp_path / "new")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written["rope_parameters"]["rope_theta"] == 5e5
    assert not {"rope_theta", "rope_scaling"} & written.keys()
    assert zoo.load(tmp_path / "new").config == model.config


def test_transformers_reads_what_was_changed(model, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    expected = other_turns(fewer_layers(model))(TOKENS)
    zoo.save(model, tmp_path / "changed", dtype=jnp.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "changed")
    assert theirs.dtype == torch.float32  # as it was written, and not as the source was
    found = theirs(torch.tensor(np.asarray(TOKENS))).logits.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_the_file_names_the_dtype_that_is_written(dtype, model, tmp_path):
    zoo.save(model, tmp_path / "model", dtype=dtype)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["dtype"] == np.dtype(dtype).name
    assert zoo.load(tmp_path / "model").config == model.config


def test_weights_that_do_not_fit_the_config_are_refused(model, tmp_path):
    model.value = nnx.Linear(128, 1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"value.bias is not a weight of a llama.*save it"):
        zoo.save(model, tmp_path / "model")
    del model.value
    model.config, blocks = dataclasses.replace(model.config, num_hidden_layers=3), model.blocks
    told = r"blocks.*\[4, 128.*by model.config it is \[3, 128.*dataclasses.replace"
    with pytest.raises(ValueError, match=told):
        zoo.save(model, tmp_path / "model")
    assert model.blocks is blocks and not (tmp_path / "model").exists()
    with pytest.raises(TypeError):
        zoo.save(tmp_path / "model", model)


@pytest.mark.parametrize(
    ("family", "field", "value", "part"),
    full_but(
        [
            ("gemma2", "attn_logit_softcapping", 5.0, "attention.softcap"),
            ("mistral", "sliding_window", 4, "attention.window"),
            ("qwen3_moe", "num_experts_per_tok", 1, "mlp.choice"),
        ],
        ("mistral", "sliding_window", 4, "attention.window"),
    ),
)
def test_what_a_part_took_from_the_config_goes_with_it(family, field, value, part, tmp_path):
    """Alone the Config moves nothing in memory, and would be another model in the file."""
    model = twins.untrained(family, next(iter(twins.TWINS[family])))
    model.config = dataclasses.replace(model.config, **{field: value})
    with pytest.raises(ValueError, match=rf"blocks\.{part} is .*, as the model was built"):
        zoo.save(model, tmp_path / "model")
    module, name = part.split(".")
    made = type(model)(model.config, nnx.Rngs(0), model.dtype)
    setattr(getattr(model.blocks, module), name, getattr(getattr(made.blocks, module), name))
    zoo.save(model, tmp_path / "model", dtype=jnp.float32)
    again = zoo.load(tmp_path / "model")
    np.testing.assert_allclose(again(twins.TOKENS), model(twins.TOKENS), atol=1e-5)


def test_new_weights_by_the_file_of_a_whole_are_a_model_of_text(tmp_path):
    """There is no vision tower to write, and whoever reads the file would draw one."""
    said = twins.untrained("gemma3_text", "plain").config.to_hf()
    whole = {"model_type": "gemma3", "text_config": said, "vision_config": {"x": 1}}
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text(json.dumps(whole))
    for i, config in enumerate((whole, tmp_path / "whole")):
        model = zoo.fresh(config)
        zoo.save(model, tmp_path / f"text{i}")
        written = json.loads((tmp_path / f"text{i}" / "config.json").read_text())
        assert written["model_type"] == "gemma3_text" and "text_config" not in written
        assert zoo.load(tmp_path / f"text{i}").config == model.config


def test_what_a_model_came_with_is_found_from_anywhere_and_missed_when_it_is_gone(
    tmp_path, monkeypatch
):
    shutil.copytree(TINY / "model", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    model = zoo.load("mine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    zoo.save(model, "saved")
    assert (tmp_path / "elsewhere" / "saved" / "tokenizer.json").is_file()
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="mine is gone, and with it the tokenizer"):
        zoo.save(model, "again")
    model.source = None
    zoo.save(model, "again")
    assert zoo.load("again").config == model.config

"""Reward models: the numbers that transformers gives, on its own folders."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy

from tests.long_forms import full_but
from tests.zoo import twins
import zoo
from zoo import __main__ as looking
from zoo import reward

TEXTS = [[5, 9, 80, 3], [7], list(range(3, 70)), [5, 9, 80]]
FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "qwen2", "mistral", "gemma", "phi3", "mixtral")


def written(family, folder, **said):
    """A folder of transformers' own reward model, with large weights, and the model."""
    torch = pytest.importorskip("torch")
    import transformers

    config = twins.config_of(family, next(iter(twins.TWINS[family])))
    for name, value in {"num_labels": 1, "pad_token_id": 0, **said}.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                fan_in = weight.shape[-2 if family == "gpt2" else -1]
                weight.copy_(0.5 * (32 / fan_in) ** 0.5 * torch.randn(weight.shape))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", full_but(FAMILIES, "qwen3", "gemma2"))
def test_rewards_are_those_of_transformers(family, tmp_path):
    model = written(family, tmp_path)
    import torch

    with torch.no_grad():
        theirs = [float(model(torch.tensor([text])).logits[0, 0]) for text in TEXTS]
    ours = reward.rewards(reward.load(tmp_path), TEXTS)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.std(theirs) > 0.1
    zoo.save(reward.load(tmp_path).model, tmp_path / "again", dtype=np.float32)
    assert reward.rewards(reward.load(tmp_path / "again"), TEXTS) == ours  # with its head
    with pytest.raises(ValueError, match="at least one token each"):
        reward.rewards(reward.load(tmp_path), [[]])
    assert reward.rewards(reward.load(tmp_path), []) == []


def test_what_is_no_reward_model_is_refused(tmp_path):
    written("llama", tmp_path / "three", num_labels=3)
    with pytest.raises(ValueError, match="has 3 labels: a reward model has one"):
        reward.load(tmp_path / "three")
    with pytest.raises(ValueError, match="is a LlamaForCausalLM: a reward model is a"):
        reward.load("recipes/tiny/model")
    written("llama", tmp_path / "none")
    tensors = safetensors.numpy.load_file(tmp_path / "none" / "model.safetensors")
    del tensors["score.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "none" / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no score\.weight"):
        reward.load(tmp_path / "none")
    said = json.loads((tmp_path / "three" / "config.json").read_text())
    del said["id2label"], said["label2id"]  # transformers' default is two
    (tmp_path / "three" / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="has 2 labels"):
        reward.load(tmp_path / "three")


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_is_no_model_of_language(tied, tmp_path):
    written("llama", tmp_path / "model", tie_word_embeddings=tied)
    told = "is a reward model, with a number for a text in place of logits: zoo.reward.load"
    for read in (zoo.load, zoo.check):
        with pytest.raises(ValueError, match=told):
            read(tmp_path / "model")
    assert "a reward model, with a number for a text" in looking.told(str(tmp_path / "model"))
    # New weights by its config.json are none either, and nothing trained stands beside them.
    zoo.save(zoo.fresh(tmp_path / "model"), tmp_path / "new")
    assert zoo.load(tmp_path / "new").config.tie_word_embeddings == tied
    said = json.loads((tmp_path / "new" / "config.json").read_text())
    assert said["architectures"] == ["LlamaForCausalLM"]


def test_a_reward_model_keeps_its_kind_and_its_head(tmp_path):
    written("llama", tmp_path / "model")
    one = reward.load(tmp_path / "model")
    before = reward.rewards(one, TEXTS)
    zoo.save(one.model, tmp_path / "text", dtype=np.float32, text_only=True)
    assert reward.rewards(reward.load(tmp_path / "text"), TEXTS) == before
    ropes = dataclasses.replace(one.model.config.rope_parameters, rope_theta=77.0)
    one.model.config = dataclasses.replace(one.model.config, rope_parameters=ropes)
    zoo.save(one.model, tmp_path / "changed", dtype=np.float32)
    again = reward.load(tmp_path / "changed")
    assert again.model.config == one.model.config
    assert reward.rewards(again, TEXTS) == reward.rewards(one, TEXTS) != before


def test_a_text_that_is_too_long_has_no_reward(tmp_path):
    """Its last positions would be another's."""
    written("gpt2", tmp_path)
    one = reward.load(tmp_path)
    most = one.model.config.longest_text
    assert len(reward.rewards(one, [[5] * most])) == 1
    with pytest.raises(ValueError, match=f"{most + 1} tokens: this gpt2 reads at most {most} here"):
        reward.rewards(one, [[5], [5] * (most + 1)])

"""Reward models: the numbers that transformers gives, on its own folders."""

import json

import numpy as np
import pytest
import safetensors.numpy

from tests.long_forms import full_but
from tests.zoo import twins
import zoo
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

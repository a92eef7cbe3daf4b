"""Checkpoints that see images: transformers' own, whose text is read, trained and written."""

import dataclasses
import functools
import json
import re
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from checkpoints_io import hf_export
from recipes.training import trained
from tests.long_forms import full_but
from tests.zoo import twins
from tests.zoo.test_peft import with_adapters
import zoo
from zoo import models, targets
from zoo.parts import text_half
from zoo.targets import Lora

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

QWEN_VISION = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, patch_size=4)
MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])
THREE = QWEN_VISION | dict(out_hidden_size=32, deepstack_visual_indexes=[0])
PIXTRAL = dict(
    model_type="pixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, image_size=16, patch_size=8,
)  # fmt: skip
# Kind -> what its config says, beside SIZES for its text.
WHOLES = {
    "gemma3": (twins.GEMMA3, dict(
        model_type="siglip_vision_model", hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
    ), "gemma3_text"),
    "gemma4": (twins.GEMMA4, dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, patch_size=4,
    ), "gemma4_text"),
    "gemma4_unified": (twins.UNIFIED, dict(
        patch_size=4, pooling_kernel_size=1, mm_embed_dim=16, mm_posemb_size=8,
        output_proj_dims=16,
    ), "gemma4_unified_text"),
    "lfm2_vl": (twins.LFM2, dict(
        model_type="siglip2_vision_model", hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, num_patches=4, patch_size=8,
    ), "lfm2"),
    "llama4": (twins.LLAMA4, dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8, vision_output_dim=16, projector_input_dim=16,
        projector_output_dim=16, pixel_shuffle_ratio=0.5,
    ), "llama4_text"),
    "qwen2_vl": (dict(rope_parameters=MROPE), dict(
        depth=1, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4,
    ), "qwen2"),
    "qwen2_5_vl": (dict(rope_parameters=MROPE), QWEN_VISION | dict(out_hidden_size=32), "qwen2"),
    "qwen3_vl": (dict(head_dim=8, rope_parameters=MROPE), THREE, "qwen3"),
    "qwen3_vl_moe": (
        twins.MOE | dict(head_dim=8, rope_parameters=MROPE, norm_topk_prob=True), THREE, "qwen3_moe"
    ),
    "qwen3_5": (twins.QWEN35, QWEN_VISION | dict(out_hidden_size=32), "qwen3_5_text"),
    "qwen3_5_moe": (
        twins.QWEN35 | twins.EXPERTS35, QWEN_VISION | dict(out_hidden_size=32), "qwen3_5_moe_text"
    ),
    "kimi_k25": (twins.DEEPSEEK | dict(first_k_dense_replace=1), dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        patch_size=4,
    ), "deepseek_v3"),
    "mistral3": (dict(model_type="mistral", head_dim=8), PIXTRAL, "mistral"),
    "mistral3 of mistral4": (
        twins.DEEPSEEK | twins.MISTRAL4 | dict(model_type="mistral4"), PIXTRAL, "mistral4"
    ),
    "mistral3 of ministral3": (
        twins.MINISTRAL3 | dict(model_type="ministral3"), PIXTRAL, "ministral3"
    ),
}  # fmt: skip


def test_every_whole_is_here():
    assert {name.split()[0] for name in WHOLES} == text_half.KINDS.keys()


@pytest.mark.parametrize("kind", text_half.KINDS)
def test_where_nothing_is_said_a_head_is_tied_as_transformers_ties_it(kind):
    config = transformers.CONFIG_MAPPING[kind]()
    own = getattr(config.text_config, "tie_word_embeddings", None)
    if own not in (None, config.tie_word_embeddings):  # then it hangs on what lies in the files
        pytest.skip("the whole and its text say different things")
    found = text_half.of({"model_type": kind, "text_config": {}})
    assert found["tie_word_embeddings"] == config.tie_word_embeddings


@pytest.mark.parametrize("kind", text_half.ASSUMED)
def test_what_nothing_is_said_of_is_as_in_transformers(kind):
    text = twins.SIZES | ({"head_dim": 8} if "3" in kind else {})
    text |= twins.MOE if "moe" in kind else {}
    said = {"model_type": kind, "text_config": text}
    theirs = transformers.CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(said))).to_dict()
    assert models.config_of(said) == models.config_of(theirs)
    text["rope_parameters"] = dict(rope_type="default", rope_theta=123.0)
    assert models.config_of(said).rope_parameters.rope_theta == 123.0


@functools.cache
def whole(name, folder):
    """Transformers' model, written to a folder as one of the hub's would be."""
    text, vision, _ = WHOLES[name]
    config = transformers.CONFIG_MAPPING[name.split()[0]](
        text_config=twins.SIZES | text, vision_config=vision
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=draw))
    model.save_pretrained(folder)
    if name == "kimi_k25":  # transformers writes what it does not read, and the hub has not
        as_on_hub = lambda n: n.replace(
            "language_model.model.blocks.", "language_model.model.layers."
        )
        hub = {as_on_hub(n): tensor for n, tensor in tensors(folder).items()}
        safetensors.numpy.save_file(hub, folder / "model.safetensors", {"format": "pt"})
    (folder / "preprocessor_config.json").write_text('{"patch_size": 4}')
    return model


def logits(model, name, tokens):
    """Of a whole; that of Llama 4 cannot be called in transformers 5.24, and its text can."""
    return twins.logits(model.language_model if name == "llama4" else model, tokens)


def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


SOME = full_but(WHOLES, "qwen3_vl_moe", "qwen3_5")


@pytest.mark.parametrize("name", SOME)
def test_the_text_of_a_whole(tmp_path, name):
    original = whole(name, tmp_path / "whole")
    tokens = twins.TOKENS[:, :24]
    expected = logits(original, name, tokens)
    model = zoo.load(tmp_path / "whole")
    np.testing.assert_allclose(model(tokens), expected, atol=1e-4)
    zoo.save(model, tmp_path / "text", dtype=jnp.float32, text_only=True)
    written = json.loads((tmp_path / "text/config.json").read_text())
    assert written["model_type"] == WHOLES[name][2]
    assert not written.keys() & {"vision_config", "text_config", "image_token_id"}
    assert "mrope" not in json.dumps(written)
    assert not (tmp_path / "text/preprocessor_config.json").exists()
    again, told = twins.class_of(WHOLES[name][2]).from_pretrained(
        tmp_path / "text", output_loading_info=True, attn_implementation="eager"
    )
    assert type(again).__name__ == written["architectures"][0]
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(twins.logits(again, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("name", SOME)
def test_what_is_not_trained_is_not_lost(tmp_path, name, monkeypatch):
    """The tower, bit for bit, and other text: what came as an image model is still one."""
    original = whole(name, tmp_path / "whole")
    before = tensors(tmp_path / "whole")
    file = tmp_path / "whole" / "config.json"
    said = json.loads(file.read_text())
    said["text_config"]["dtype"] = "float32"  # as transformers writes it of a narrow one
    file.write_text(json.dumps(said))
    model = zoo.load(tmp_path / "whole")
    model.norm.scale[...] = model.norm.scale[...] + 0.5
    zoo.save(model, tmp_path / "out", dtype=jnp.float32)
    after = tensors(tmp_path / "out")
    seen = {n for n in before if re.search("visual|vision|projector", n)}
    assert seen
    for one in seen:
        np.testing.assert_array_equal(after[one], before[one])
    for file in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    again, told = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert type(again) is type(original)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = twins.TOKENS[:, :24]
    np.testing.assert_allclose(logits(again, name, tokens), model(tokens), atol=1e-4)
    said = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    assert said["dtype"] == "float32"
    zoo.save(model, tmp_path / "narrow")
    said = json.loads((tmp_path / "narrow/config.json").read_text())["text_config"]
    assert said["dtype"] == "bfloat16"
    # And what is read is read again.
    np.testing.assert_array_equal(zoo.load(tmp_path / "out")(tokens), model(tokens))
    monkeypatch.setattr(hf_export, "SHARD_BYTES", 20_000)
    zoo.save(model, tmp_path / "parts", dtype=jnp.float32)
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in after.values())
    ropes = dataclasses.replace(model.config.rope_parameters, rope_theta=5e3)
    model.config = dataclasses.replace(model.config, rope_parameters=ropes)  # changed since
    with pytest.raises(ValueError, match="save only its text part, with text_only=True"):
        zoo.save(model, tmp_path / "other")
    zoo.save(model, tmp_path / "text", text_only=True)
    assert zoo.load(tmp_path / "text").config == model.config


@pytest.mark.parametrize("name", full_but(["qwen3_5", "qwen3_5_moe", "gemma3"], "qwen3_5"))
def test_a_text_that_transformers_took_from_a_whole(tmp_path, name):
    """It keeps the names of the whole beside the config.json of the text."""
    whole(name, tmp_path / "whole")
    taken = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    taken.save_pretrained(tmp_path / "text")
    model, tokens = zoo.load(tmp_path / "text"), twins.TOKENS[:, :24]
    np.testing.assert_allclose(model(tokens), twins.logits(taken, tokens), atol=1e-4)
    zoo.save(model, tmp_path / "out", dtype=jnp.float32)
    again, told = type(taken).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(twins.logits(again, tokens), twins.logits(taken, tokens), atol=1e-4)


@pytest.mark.parametrize("name", full_but(["gemma3", "qwen3_5"], "gemma3"))
def test_rewards_of_a_whole(tmp_path, name):
    """As TRL's RewardTrainer writes it: the tower lies beside the text and its score."""
    whole(name, tmp_path / "whole")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "whole", num_labels=1
    ).eval()
    theirs.save_pretrained(tmp_path / "rewards")
    text = [5, 9, 80, 3, 17]
    with torch.no_grad():
        expected = theirs(torch.tensor([text])).logits.item()
    found = zoo.reward.rewards(zoo.reward.load(tmp_path / "rewards"), [text])
    assert found == pytest.approx([expected], abs=1e-4)


def test_keys_that_no_layer_reads_are_carried(tmp_path):
    """Gemma 4 E2B and E4B as published: layers that look back have keys in the files, too."""
    shape = "inputs of each layer, shared keys"
    original, folder = twins.twin("gemma4_text", shape)
    before = tensors(folder)
    for layer in range(8, 12):
        for part in ("k_proj", "v_proj", "k_norm"):
            name = f"model.layers.{layer}.self_attn.{part}.weight"
            assert name not in before
            before[name] = np.full((16, 32), layer, np.float32)
    shutil.copytree(folder, tmp_path / "hub")
    safetensors.numpy.save_file(before, tmp_path / "hub/model.safetensors", {"format": "pt"})
    model = zoo.load(tmp_path / "hub")
    np.testing.assert_allclose(model(twins.TOKENS), twins.logits(original), atol=1e-4)
    zoo.save(model, tmp_path / "out", dtype=jnp.float32, text_only=True)
    after = tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor, before[name])
    other = before | {"model.layers.7.self_attn.x_proj.weight": np.ones(3, np.float32)}
    safetensors.numpy.save_file(other, tmp_path / "hub/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="x_proj"):
        zoo.load(tmp_path / "hub")


def test_weights_are_chosen_by_their_names_in_the_whole(tmp_path):
    """As unsloth and ms-swift write them, as the files do, and as the text alone has them."""
    whole("gemma3", tmp_path / "whole")
    model = zoo.load(tmp_path / "whole")
    found = lambda **how: [
        (site.path, sum(map(bool, site.ranks)))
        for site in targets.sites(model, Lora(4, 8.0, **how))
    ]
    expected = [("blocks.attention.q", 3), ("blocks.attention.v", 3)]
    for within in ("language_model", "model", r"model\.layers"):
        assert found(targets=(rf".*{within}.*\.(q|v)_proj",)) == expected
    one = ("language_model.model.layers.1.self_attn.q_proj",)
    assert found(targets=one) == found(targets=("layers.1.self_attn.q_proj",))
    assert found(exclude=(".*vision_tower.*",)) == found()
    assert len(found(exclude=(".*language_model.*q_proj",))) == len(found()) - 1
    with pytest.raises(ValueError, match="matches no weight of the model"):
        found(targets=(".*vision_tower.*q_proj",))
    ranks = {r".*language_model.layers.1.*q_proj": 2}
    of_path = {s.path: s.ranks for s in targets.sites(model, Lora(4, 8.0, rank_pattern=ranks))}
    assert of_path["blocks.attention.q"] == (4, 2, 4)
    layer = trained.matching(model, r".*language_model\.layers\.1\..*")
    assert layer == trained.matching(model, r"model\.layers\.1\..*") != {}


@pytest.mark.parametrize("name", full_but(["qwen3_5", "gemma3", "llama4", "qwen2_5_vl"], "gemma3"))
def test_adapters_are_those_of_the_whole(tmp_path, name):
    """PEFT puts them on the model that sees, under the text's names there."""
    peft = pytest.importorskip("peft")
    original = whole(name, tmp_path / "whole")
    adapters = Lora(4, 8.0, targets=("q_proj", "up_proj"))
    model = with_adapters(zoo.load(tmp_path / "whole"), adapters, scale=0.1)
    zoo.save_adapter(model, tmp_path / "ours")
    tokens = twins.TOKENS[:, :24]
    before = logits(original, name, tokens)
    theirs = peft.PeftModel.from_pretrained(original, str(tmp_path / "ours")).eval()
    found = logits(original, name, tokens)  # its modules are those of `theirs` now
    assert np.abs(found - before).max() > 1e-2
    np.testing.assert_allclose(found, model(tokens), atol=2e-4)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = zoo.load(tmp_path / "whole", adapter=tmp_path / "theirs")
    np.testing.assert_allclose(again(tokens), model(tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("deepseek_v3", "model.layers.3.eh_proj.weight"),
        ("qwen3_5_text", "mtp.fc.weight"),
        ("qwen3_next", "mtp.fc.weight"),
    ],
)
def test_heads_for_later_tokens_are_not_lost(tmp_path, family, name):
    _, folder = twins.twin(family, next(iter(twins.TWINS[family])))
    shutil.copytree(folder, tmp_path / "in")
    before = tensors(folder) | {name: np.float16([[1, 2], [3, 4]])}
    safetensors.numpy.save_file(before, tmp_path / "in" / "model.safetensors")
    model = zoo.load(tmp_path / "in")
    zoo.save(model, tmp_path / "out", dtype=jnp.float32)
    after = tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    for one in before:
        assert after[one].tobytes() == before[one].tobytes()
    zoo.save(model, tmp_path / "text", dtype=jnp.float32, text_only=True)
    assert before.keys() - tensors(tmp_path / "text").keys() == {name}


def test_a_layer_that_is_gone_is_not_taken_for_one_after_the_last(tmp_path):
    _, folder = twins.twin("deepseek_v3", next(iter(twins.TWINS["deepseek_v3"])))
    shutil.copytree(folder, tmp_path / "in")
    later = {"model.layers.3.eh_proj.weight": np.float16([[1, 2], [3, 4]])}
    safetensors.numpy.save_file(tensors(folder) | later, tmp_path / "in" / "model.safetensors")
    model = zoo.load(tmp_path / "in")
    kinds = model.config.mlp_layer_types[:2]
    model.config = dataclasses.replace(model.config, num_hidden_layers=2, mlp_layer_types=kinds)
    made = zoo.fresh(model.config)
    for kind in ("dense", "sparse"):
        cut = nnx.state(getattr(model.blocks, kind))
        like = nnx.state(getattr(made.blocks, kind))
        short = jax.tree.map(lambda x, y: x[: len(y)], cut, like)
        nnx.update(getattr(model.blocks, kind), short)
    zoo.save(model, tmp_path / "out", dtype=jnp.float32)
    numbers = {name.split(".")[2] for name in tensors(tmp_path / "out") if ".layers." in name}
    assert numbers == {"0", "1"}
    assert zoo.load(tmp_path / "out").config == model.config


def test_an_indexer_belongs_to_the_text(tmp_path):
    _, folder = twins.twin("glm_moe_dsa", "tied, odd, shared choices")
    shutil.copytree(folder, tmp_path / "in")
    before = tensors(folder)
    after_the_last = "model.layers.4.self_attn.indexer.wk.weight"
    more = before | {after_the_last: np.float16([[1, 2], [3, 4]])}
    safetensors.numpy.save_file(more, tmp_path / "in" / "model.safetensors")
    model = zoo.load(tmp_path / "in")
    zoo.save(model, tmp_path / "out", dtype=jnp.float32, text_only=True)
    after = tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    for name in before:
        assert after[name].tobytes() == before[name].tobytes()
    assert sum(".indexer." in name for name in after) == 2 * 5

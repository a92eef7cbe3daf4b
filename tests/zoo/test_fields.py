"""No field of a Config is dead, and every real config.json is read or refused by what it says."""

import dataclasses
import json
import typing

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from tests.long_forms import full_but
from tests.recipes import test_families
from tests.zoo import twins
import zoo
from zoo.parts import experts_beside, rope, text_half


def others(config, name, value):
    """Values that this field might have instead, in groups: one of each must move the logits."""
    if isinstance(value, bool):
        return [[not value]]
    if isinstance(value, rope.Rope):
        return changed_ropes(config, value)
    if isinstance(value, rope.TwoRopes):
        return [
            [dataclasses.replace(value, **{which: other}) for other in group]
            for which in ("full_attention", "sliding_attention")
            for group in changed_ropes(config, getattr(value, which))
        ]
    if name == "layer_types":
        swap = lambda kind: next(one for one in sorted(config.layers_may_be) if one != kind)
        return [[(swap(value[0]), *value[1:])], [(*value[:-1], swap(value[-1]))]]
    if name == "n_group":  # must divide the experts
        return [[value // 2]]
    if name == "mlp_layer_types":
        return [[({"dense": "sparse", "sparse": "dense"}[value[0]], *value[1:])]]
    if name == "hidden_act":
        return [[act for act in zoo.gpt_neox.ACTS if act != value]]
    if name == "no_rope_layers":
        return [[(not value[0], *value[1:])]]
    if isinstance(value, tuple) and isinstance(value[0], float):
        return [[(*value[:i], 2 * one, *value[i + 1 :])] for i, one in enumerate(value)]
    heads = "num_global_key_value_heads"
    if name in ("sliding_window", "num_experts_per_tok", "query_pre_attn_scalar", heads):
        return [[value - 1 if value and value > 1 else 2]]
    if isinstance(value, int):
        return [[value * 2]]
    if value is None:
        kinds = {field.name: field.type for field in dataclasses.fields(config)}
        return [[2 if int in typing.get_args(kinds[name]) else 2.0]]
    return [[value * 1.5 if value > 1e-3 else 0.1, value / 64]]


def changed_ropes(config, one):
    """Up and far down: on heads this small, rounding hides small steps of YaRN's bounds."""
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        if field.name == "rope_type":
            continue  # another kind needs other keys
        if field.name == "partial_rotary_factor":
            if config.model_type == "phi3" and one.rope_type == "default":
                yield [dataclasses.replace(one, partial_rotary_factor=0.5)]
            continue  # refused by the others, and by lists of factors
        if isinstance(value, bool):
            new = [not value]
        elif isinstance(value, tuple):
            new = [tuple(2 * v for v in value)]
        elif value is None:
            continue
        else:
            kind = type(getattr(rope.Rope(1.0), field.name) or value)
            new = [kind(value * 2), kind(value * 64), kind(max(value / 64, 1e-3))]
        yield [dataclasses.replace(one, **{field.name: v}) for v in new if v]


MORE = [("llama", "linear"), ("llama", "dynamic"), ("phi3", "long factors"),
        ("phi3", "short factors, partial"), ("gpt_oss", "odd"),
        ("gemma4_text", "inputs of each layer, shared keys")]  # fmt: skip
RICHEST = list(twins.RICHEST.items())
LIVE = full_but(RICHEST + MORE, RICHEST[0])


@pytest.mark.parametrize(("family", "shape"), LIVE)
def test_no_field_is_dead(family, shape):
    """Changing any field of the Config changes the logits, or the weights no longer fit."""
    tokens = jnp.asarray(twins.TOKENS[:1])
    model = twins.untrained(family, shape)
    params = nnx.state(model)
    before = logits(model, tokens)
    shapes = lambda state: {path: param.shape for path, param in nnx.to_flat_state(state)}
    for field in dataclasses.fields(model.config):
        name, value = field.name, getattr(model.config, field.name)
        for group in others(model.config, name, value):
            if is_unread(model.config, name, group[0]):
                continue
            moved = 0.0
            for new in group:
                config = dataclasses.replace(model.config, **{name: new})
                other = nnx.eval_shape(lambda config=config: type(model)(config, nnx.Rngs(0)))
                fits = shapes(nnx.state(other)) == shapes(params)
                if name != "tie_word_embeddings" and not fits:
                    moved = 1.0  # the weights would be refused as misshapen
                    break
                nnx.update(other, params)
                if name == "tie_word_embeddings" and not new:
                    other.head = nnx.Param(other.embedding[...] + 1.0, axes="V D")
                found = logits(other, tokens)
                moved = max(moved, float(jnp.abs(found - before).max()))
                if moved > 1e-3:
                    break
            assert moved > 1e-3, (name, group)


def logits(model, tokens):
    """Op by op: small programs that these models share, where one of its own takes a second."""
    with jax.disable_jit():
        return model(tokens)


def is_unread(config, name, new):
    """The written list: what has no effect in this very config, and why."""
    if name == "num_hidden_layers" and config.kinds:
        return True  # `layer_types` says it, and another number than of these is refused
    if name == "index_topk":
        return True  # what is longer is refused: see test_calls.py
    if config.model_type == "gemma4_text":
        no_experts = not config.enable_moe_block
        unread = {
            "num_global_key_value_heads": not config.attention_k_eq_v,
            "vocab_size_per_layer_input": not config.hidden_size_per_layer_input,
            "use_double_wide_mlp": not config.num_kv_shared_layers,
            **dict.fromkeys((*experts_beside.OF_EXPERTS, "enable_moe_block"), no_experts),
        }
        if name in unread:
            return unread[name]
    if name != "rope_parameters" or not isinstance(new, rope.Rope):
        return False
    if new.rope_type != "longrope":
        return False
    # It has two lists, and a text is on one side of the threshold.
    old = config.rope_parameters
    is_long = twins.TOKENS.shape[1] > old.original_max_position_embeddings
    return new.short_factor != old.short_factor if is_long else new.long_factor != old.long_factor


@pytest.mark.parametrize("family", twins.TWINS)
def test_a_config_written_is_the_config_read(family):
    for shape in twins.TWINS[family]:
        said = json.loads(twins.config_of(family, shape).to_json_string(use_diff=True))
        config = zoo.ARCHITECTURES[family].Config.from_hf(said)
        again = lambda config: type(config).from_hf(json.loads(json.dumps(config.to_hf())))
        assert again(config) == config
        one = getattr(config, "rope_parameters", None)
        if isinstance(one, rope.Rope) and one.rope_type == "default":
            whole = dataclasses.replace(one, partial_rotary_factor=1.0)
            turned = dataclasses.replace(config, rope_parameters=whole)
            assert again(turned) == turned


ODD = [None, "x", -1, 0, 1.5, True, False, [], [1], ["x"], {}, {"type": "yarn"}, 10**30, [None]]


@pytest.mark.parametrize(("family", "shape"), full_but(twins.SHAPES, *RICHEST))
def test_any_value_of_any_key_is_read_or_refused_in_a_sentence(family, shape):
    """A stranger's config.json never ends in another error than ours."""
    from_hf = zoo.ARCHITECTURES[family].Config.from_hf
    said = json.loads(twins.config_of(family, shape).to_json_string(use_diff=True))
    ropes = said.get("rope_parameters") or {}
    changed = [said | {key: odd} for key in said for odd in ODD]
    changed += [said | {"rope_parameters": ropes | {key: odd}} for key in ropes for odd in ODD]
    changed += [said | {key: odd} for key in MORE_KEYS for odd in ODD]
    refused = 0
    for hf in changed:
        try:
            from_hf(hf)
        except ValueError as error:
            refused += 1
            assert len(str(error)) > 20
    assert refused > len(changed) / 3


MORE_KEYS = [
    "rope_scaling", "rope_theta", "use_sliding_window", "max_window_layers", "sliding_window",
    "no_rope_layers", "no_rope_layer_interval", "layer_types", "n_inner", "text_config",
    "sliding_window_pattern", "quantization_config", "original_max_position_embeddings",
    "partial_rotary_factor", "max_position_embeddings", "head_dim",
]  # fmt: skip


# Parameters as published; None: refused, with the words that say why.
CONFIGS = {
    "2026/Qwen--Qwen3-0.6B.json": 596_049_920,
    "2026/Qwen--Qwen3-1.7B.json": 1_720_574_976,
    "2026/Qwen--Qwen3-235B-A22B-FP8.json": 235_093_634_560,
    "2026/Qwen--Qwen3-235B-A22B.json": 235_093_634_560,
    "2026/Qwen--Qwen3-30B-A3B-FP8.json": 30_532_122_624,
    "2026/Qwen--Qwen3-30B-A3B.json": 30_532_122_624,
    "2026/Qwen--Qwen3-32B-FP8-Static-PerTensor.json": "quantised .*'FP8'",
    "2026/Qwen--Qwen3-32B-FP8.json": 32_762_123_264,
    "2026/Qwen--Qwen3-32B.json": 32_762_123_264,
    "2026/Qwen--Qwen3-8B.json": 8_190_735_360,
    "2026/Qwen--Qwen3-Coder-480B-A35B-Instruct.json": 480_154_875_392,
    "2026/meta-llama--Meta-Llama-3.1-405B.json": 405_853_388_800,
    "2026/meta-llama--Meta-Llama-3.1-70B.json": 70_553_706_496,
    "2026/meta-llama--Meta-Llama-3.1-8B.json": 8_030_261_248,
    "2026/mistralai--Mixtral-8x22B-v0.1.json": 140_620_634_112,
    "2026/mistralai--Mixtral-8x7B-v0.1.json": 46_702_792_704,
    "2026/nvidia--Qwen3-235B-A22B-NVFP4.json": 235_093_634_560,  # another file calls it quantised
    "2026/openai--gpt-oss-120b.json": 116_829_156_672,
    "2026/openai--gpt-oss-20b.json": 20_914_757_184,
    "mlc/Mixtral-8x7B-v0.1.json": 46_702_792_704,
    "mlc/gemma2_27b.json": 27_227_128_320,
    "mlc/gemma2_2b.json": 2_614_341_888,
    "mlc/gemma2_9b.json": 9_241_705_984,
    "mlc/gemma3_1b_it.json": 999_885_952,
    "mlc/gemma_2b.json": 2_506_172_416,
    "mlc/llama2_13b.json": 13_015_864_320,
    "mlc/llama2_70b.json": 68_976_648_192,
    "mlc/llama2_7b.json": 6_738_415_616,
    "mlc/llama3_1_70b.json": 70_553_706_496,
    "mlc/llama3_1_8b.json": 8_030_261_248,
    "mlc/llama3_2_1b.json": 1_235_814_400,
    "mlc/llama3_2_3b.json": 3_212_749_824,
    "mlc/mistral_7b.json": "attention_sink_size",
    "mlc/mistral_7b_v03.json": 7_248_023_552,
    "mlc/olmo2_13b.json": 13_716_198_400,
    "mlc/olmo2_32b.json": 32_234_279_936,
    "mlc/olmo2_7b.json": 7_298_617_344,
    "mlc/phi-3.5-mini.json": 3_821_079_552,
    "mlc/phi-4-mini.json": 3_836_021_760,
    "mlc/qwen1.5_1.8b_chat.json": 1_525_663_744,  # this file ties what the original does not
    "mlc/qwen1.5_moe_a2.7b.json": 14_315_784_192,
    "mlc/qwen2.5_3b.json": 3_085_938_688,
    "mlc/qwen2_0_5b.json": 494_032_768,
    "mlc/qwen2_1_5b.json": 1_543_714_304,
    "mlc/qwen2_7b.json": 7_615_616_512,
    "mlc/qwen3_0.6b.json": 596_049_920,
    "mlc/qwen3_1.7b.json": 1_720_574_976,
    "mlc/smollm2_135m.json": 134_515_008,
    "mlc/smollm2_360m.json": 361_821_120,
    "mlc/smollm_135m.json": 134_515_008,
    "mlc/tinyllama_1b_chat_v1.0.json": 1_100_048_384,
    "neuronx/gemma3-27b-vision.json": 27_009_346_304,  # the text half
    "neuronx/llama2-7b.json": 6_738_415_616,
    "neuronx/llama3.1-8b.json": 8_030_261_248,
    "other/smollm3-3b-base.json": 3_075_098_624,
    "tensorrt-llm/phi-3-mini-4k-instruct.json": 3_821_079_552,
    "tt-metal/llama-3.2-1b-instruct.json": 1_235_814_400,
    "tt-metal/mistral-7b-instruct-v0.3.json": 7_248_023_552,
    "tt-metal/olmo-3.1-32b-instruct.json": 32_233_522_176,
    "tt-metal/phi-4.json": 14_659_507_200,
    "tt-metal/qwen2.5-7b-instruct.json": 7_615_616_512,
    "xfastertransformer/deepseek-r1.json": 671_026_419_200,
    "xfastertransformer/llama-3-70b.json": 70_553_706_496,
    "xfastertransformer/llama-3-8b.json": 8_030_261_248,
    "xfastertransformer/qwen1.5-0.5b.json": 463_987_712,
    "xfastertransformer/qwen2-7b.json": 7_615_616_512,
    "xfastertransformer/qwen3-0.6b.json": 596_049_920,
    "xfastertransformer/qwen3-1.7b.json": 1_720_574_976,
    "xfastertransformer/qwen3-235b.json": 235_093_634_560,
    "xfastertransformer/qwen3-30b.json": 30_532_122_624,
    "xfastertransformer/qwen3-8b.json": 8_190_735_360,
    "2026/nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4.json": 31_577_940_288,
    "2026/nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-FP8.json": 120_668_707_840,
    "2026/nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4.json": 120_668_707_840,
    "2026/nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16.json": 549_308_993_536,
    "2026/nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-FP8.json": 549_308_993_536,
    "2026/nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4.json": 549_308_993_536,
    "2026/nvidia--NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4.json": 31_577_940_288,
    "2026/nvidia--Nemotron-H-56B-Base-8K.json": 56_324_350_464,
    # The text halves of those that see images.
    "2026/LiquidAI--LFM2.5-VL-1.6B.json": 1_170_340_608,
    "2026/Qwen--Qwen2.5-VL-7B-Instruct.json": 7_615_616_512,
    "2026/Qwen--Qwen3-VL-235B-A22B-Instruct.json": 235_093_634_560,
    "2026/Qwen--Qwen3-VL-2B-Instruct.json": 1_720_574_976,
    "2026/Qwen--Qwen3-VL-32B-Instruct.json": 32_762_123_264,
    "2026/Qwen--Qwen3-VL-32B-Thinking.json": 32_762_123_264,
    "2026/Qwen--Qwen3-VL-4B-Instruct.json": 4_022_468_096,
    "2026/Qwen--Qwen3-VL-8B-Instruct.json": 8_190_735_360,
    "2026/Qwen--Qwen3.5-122B-A10B.json": 122_111_526_912,
    "2026/Qwen--Qwen3.5-27B.json": 26_895_998_464,
    "2026/Qwen--Qwen3.5-35B-A3B.json": 34_660_610_688,
    "2026/mistralai--Devstral-2-123B-Instruct.json": 125_025_988_608,
    "2026/excerpt--google--gemma-4-E2B.json": 4_628_569_379,
    "2026/excerpt--google--gemma-4-E4B.json": 7_463_013_418,
    "2026/deepseek-ai--DeepSeek-R1.json": 671_026_419_200,
    "2026/deepseek-ai--DeepSeek-V3.json": 671_026_419_200,
    "2026/nvidia--DeepSeek-V3.1-NVFP4.json": 671_026_419_200,  # another file calls it quantised
    "2026/meta-llama--Llama-4-Maverick-17B-128E-Instruct.json": 400_711_848_960,
    # Without their indexers, which take no part in texts that are read here.
    "2026/nvidia--DeepSeek-V3.2-NVFP4.json": 671_026_419_200,  # another file calls it quantised
    "2026/nvidia--GLM-5-NVFP4.json": 743_180_209_920,  # so here
    "2026/nvidia--GLM-5.1-NVFP4.json": "modelopt",
    "2026/nvidia--GLM-5.2-NVFP4.json": "modelopt",
    "2026/zai-org--GLM-5-FP8.json": 743_180_209_920,
    "2026/zai-org--GLM-5.1-FP8.json": 743_180_209_920,
    "2026/zai-org--GLM-5.1.json": 743_180_209_920,
    "2026/zai-org--GLM-5.2-FP8.json": 743_180_209_920,
    "2026/zai-org--GLM-5.2.json": 743_180_209_920,
    "2026/MiniMaxAI--MiniMax-M2.7.json": 228_689_764_864,
    "2026/moonshotai--Kimi-K2.5.json": "compressed-tensors",
    "2026/nvidia--Kimi-K2.5-NVFP4.json": "modelopt",
    "2026/nvidia--Kimi-K2.6-NVFP4.json": "modelopt",
    "2026/nvidia--Kimi-K2.7-Code-NVFP4.json": "modelopt",
    "2026/nvidia--MiniMax-M2.5-NVFP4.json": "modelopt",
    "2026/nvidia--MiniMax-M2.7-NVFP4.json": "modelopt",
    "2026/nvidia--Gemma-4-26B-A4B-NVFP4.json": "modelopt",
    "2026/nvidia--Gemma-4-31B-IT-NVFP4.json": "modelopt",
    "2026/nvidia--Qwen3.5-122B-A10B-NVFP4.json": "modelopt",
    "2026/nvidia--Qwen3.5-397B-A17B-NVFP4.json": "modelopt",
    "2026/nvidia--Qwen3.6-27B-NVFP4.json": "modelopt",
    "2026/nvidia--Qwen3.6-35B-A3B-NVFP4.json": "modelopt",
}


def test_every_real_config_is_known(shared):
    """Or of a family that the zoo has not, which is said."""
    folder = shared / "data" / "configs"
    read = {str(p.relative_to(folder)): json.loads(p.read_text()) for p in folder.rglob("*.json")}
    assert CONFIGS.keys() <= read.keys()
    for name in read.keys() - CONFIGS.keys():
        with pytest.raises(ValueError, match=r"config.json has model_type .*; the zoo has"):
            zoo.abstract(read[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_real_config_is_read_or_refused(shared, name):
    hf = json.loads((shared / "data" / "configs" / name).read_text())
    expected = CONFIGS[name]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            zoo.abstract(hf)
        return
    model = zoo.abstract(hf)
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == expected


def test_the_table_in_the_docs_is_of_these_families():
    """`python -m tests.zoo.support_table` wrote it; its bounds are those of the tests."""
    from tests.conftest import ROOT

    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and "`" in line][1:]
    kinds_of = lambda row: {kind.strip("`") for kind in row[1].split(", ")}
    every = zoo.ARCHITECTURES.keys() | text_half.KINDS.keys()
    told = "write it: python -m tests.zoo.support_table FAMILY"
    assert set().union(*map(kinds_of, rows)) == every, told
    for row in rows:
        assert int(row[3]) >= 3
        assert float(row[5]) <= 1e-3
        coarser = [
            test_families.COARSER[kind] for kind in kinds_of(row) & test_families.COARSER.keys()
        ]
        assert float(row[7]) <= max(coarser, default=1e-5)

"""Checkpoints as they are found: images besides, short names, MXFP4, quantised by others."""

import json
import shutil

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from checkpoints_io import mxfp4, quantised
from recipes.training import logps
from tests.conftest import TINY
from tests.zoo import twins
import zoo
from zoo import __main__ as looking
from zoo import models
from zoo.parts import experts, sharding


def saved(family, shape, folder):
    zoo.save(twins.untrained(family, shape), folder, dtype=jnp.float32)
    return safetensors.numpy.load_file(folder / "model.safetensors")


def rewrite(folder, tensors, **config):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | config))


def same(ours, theirs):
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (ours, theirs)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_gpt2_as_on_the_hub(tmp_path):
    """Names without `transformer.`, and causal masks among the weights."""
    tensors = saved("gpt2", "plain", tmp_path)
    model = zoo.load(tmp_path)
    short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    short["h.0.attn.bias"] = np.ones((1, 1, 96, 96), np.float32)
    short["h.0.attn.masked_bias"] = np.float32([-1e4])
    rewrite(tmp_path, short, n_ctx=96, task_specific_params={"text-generation": {}})
    same(zoo.load(tmp_path), model)


def test_pythia_as_on_the_hub(tmp_path):
    """Causal masks and frequencies among the weights, and its own words for the rope."""
    tensors = saved("gpt_neox", "plain", tmp_path)
    model = zoo.load(tmp_path)
    layer = "gpt_neox.layers.0.attention."
    tensors[f"{layer}bias"] = np.ones((1, 1, 64, 64), bool)
    tensors[f"{layer}masked_bias"] = np.full((), -1e4, np.float16)
    tensors[f"{layer}rotary_emb.inv_freq"] = np.ones(1, np.float16)
    rewrite(tmp_path, tensors, rope_parameters=None, rotary_emb_base=10000, rotary_pct=0.25)
    same(zoo.load(tmp_path), model)
    assert zoo.load(tmp_path).config == model.config


@pytest.mark.parametrize("lead", ["language_model.model.", "model.language_model."])
def test_the_text_half_of_a_gemma3(tmp_path, lead):
    tensors = saved("gemma3_text", "plain", tmp_path / "text")
    said = json.loads((tmp_path / "text" / "config.json").read_text())
    (tmp_path / "both").mkdir()
    both = {name.replace("model.", lead, 1): value for name, value in tensors.items()}
    both["vision_tower.vision_model.head.weight"] = np.ones((2, 2), np.float32)
    both["multi_modal_projector.mm_input_projection_weight"] = np.ones((2, 2), np.float32)
    safetensors.numpy.save_file(both, tmp_path / "both" / "model.safetensors")
    whole = {"model_type": "gemma3", "text_config": said, "vision_config": {}, "eos_token_id": [1]}
    (tmp_path / "both" / "config.json").write_text(json.dumps(whole))
    model = zoo.load(tmp_path / "both")
    same(model, zoo.load(tmp_path / "text"))
    zoo.save(model, tmp_path / "again", dtype=jnp.float32, text_only=True)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["model_type"] == "gemma3_text"
    assert written["eos_token_id"] == [1]
    assert written["architectures"] == ["Gemma3ForCausalLM"]
    same(zoo.load(tmp_path / "again"), model)
    zoo.save(model, tmp_path / "whole", dtype=jnp.float32)
    after = safetensors.numpy.load_file(tmp_path / "whole" / "model.safetensors")
    assert after.keys() == both.keys()
    for name in both:
        np.testing.assert_array_equal(after[name], both[name])


def packed(draw, shape):
    experts, columns, rows = shape
    blocks = draw.integers(0, 256, (experts, rows, columns // 32, 16)).astype(np.uint8)
    scales = draw.integers(120, 126, blocks.shape[:-1]).astype(np.uint8)
    return blocks, scales


def test_gpt_oss_stored_as_mxfp4(tmp_path):
    tensors = saved("gpt_oss", "plain", tmp_path)
    draw = np.random.default_rng(0)
    narrow = {}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "experts.down_proj"))]:
        blocks, scales = packed(draw, tensors[name].shape)
        narrow |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        # By hand: two numbers a byte, the lower half first, times a power of two.
        halves = np.stack([blocks % 16, blocks // 16], -1).reshape(*scales.shape, 32)
        numbers = mxfp4.VALUES[halves] * 2.0 ** (scales[..., None].astype(np.float64) - 127)
        wide = numbers.reshape(*scales.shape[:2], -1).transpose(0, 2, 1)
        tensors[name] = np.ascontiguousarray(wide, np.float32)
    rewrite(tmp_path, tensors)
    model = zoo.load(tmp_path)
    kept = {name: value for name, value in tensors.items() if f"{name}_blocks" not in narrow}
    quantised = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    rewrite(tmp_path, kept | narrow, quantization_config=quantised)
    found = zoo.load(tmp_path)
    same(found, model)
    zoo.save(found, tmp_path / "out", dtype=jnp.bfloat16)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    del narrow[next(name for name in narrow if name.endswith("_scales"))]
    rewrite(tmp_path, kept | narrow)
    with pytest.raises(ValueError, match="is not MXFP4: it needs"):
        zoo.load(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "modelopt", "mxfp4"])
def test_weights_quantised_by_others_are_refused_by_name(tmp_path, method):
    tensors = saved("qwen3", "plain", tmp_path)
    rewrite(tmp_path, tensors, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ValueError, match=f"quantised.*'{method}'.*qwen3"):
        zoo.load(tmp_path)


def test_a_checkpoint_says_what_it_is(tmp_path, capsys):
    saved("qwen3_moe", "plain", tmp_path)
    assert looking.main([str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "qwen3_moe, zoo/qwen3_moe.py" in told
    assert "experts 6" in told
    assert "supported" in told
    rewrite(tmp_path, {}, moe_capacity_factor=1.25)
    assert looking.main([str(tmp_path), str(tmp_path / "nowhere")]) == 1
    told = capsys.readouterr().err
    assert "does not implement {'moe_capacity_factor': 1.25}" in told
    assert "there is no model folder" in told


def test_a_gemma3_of_transformers_is_read(tmp_path):
    """With a real vision tower, by the names that transformers writes."""
    torch = pytest.importorskip("torch")
    import transformers

    text = twins.config_of("gemma3_text", "plain")
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    original = transformers.Gemma3ForConditionalGeneration(config).eval()
    original.save_pretrained(tmp_path)
    tokens = twins.TOKENS[:, :24]
    found = zoo.load(tmp_path)(jnp.asarray(tokens))
    np.testing.assert_allclose(found, twins.logits(original, tokens), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.layers.1.mlp.up_proj.weight", np.nan), ("model.norm.weight", -np.inf)],
)
def test_a_number_that_is_not_finite_is_named(tmp_path, small_model, name, value):
    """By folder and tensor."""
    zoo.save(small_model, tmp_path, dtype=jnp.float32)
    zoo.check_finite(zoo.load(tmp_path))
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors[name].flat[-1] = value
    rewrite(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"{tmp_path}: {name} holds .* not finite .*: 1\)"):
        zoo.check_finite(zoo.load(tmp_path))
    tensors["model.embed_tokens.weight"].flat[0] = value
    rewrite(tmp_path, tensors)
    with pytest.raises(ValueError, match="such numbers: 2"):
        zoo.check_finite(zoo.load(tmp_path))


@pytest.mark.parametrize(
    ("value", "dtype", "in_dtype"),
    [
        (np.nan, jnp.bfloat16, "bfloat16"),
        (-np.inf, jnp.float32, "float32"),
        (1e5, jnp.float16, "float16"),
    ],
)
def test_what_no_program_could_use_is_not_written(tmp_path, small_model, value, dtype, in_dtype):
    model = nnx.clone(small_model)
    model.norm.scale.set_value(model.norm.scale[...].at[3].set(value))
    with pytest.raises(ValueError, match=f"model.norm.weight holds .* not finite in {in_dtype} "):
        zoo.save(model, tmp_path / "model", dtype=dtype)
    assert not list(tmp_path.iterdir())
    if np.isfinite(value):
        zoo.save(model, tmp_path / "model", dtype=jnp.bfloat16)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_moe"])
def test_experts_of_a_layer_in_one_tensor(family, turned, tmp_path):
    """As the hub has Qwen 3.5: with names of a model that sees images, and what is not read."""
    text = f"{family}_text" if family == "qwen3_5_moe" else family
    folder = tmp_path / "apart"
    weights = saved(text, "plain", folder)
    shutil.copytree(folder, tmp_path / "packed")
    made = {name: w for name, w in weights.items() if ".experts." not in name}
    for layer in {name.split(".experts.")[0] for name in weights if ".experts." in name}:
        each = lambda which, layer=layer: np.stack(
            [weights[f"{layer}.experts.{i}.{which}_proj.weight"] for i in range(6)]
        )
        gate_up = np.concatenate([each("gate"), each("up")], axis=1)
        order = (0, 2, 1) if turned else (0, 1, 2)  # as the hub has Qwen 3 VL
        for name, whole in (("gate_up", gate_up), ("down", each("down"))):
            whole = np.ascontiguousarray(whole.transpose(order))
            made[f"{layer}.experts.{name}_proj"] = whole
    if text != family:
        made = {name.replace("model.", "model.language_model.", 1): w for name, w in made.items()}
        made |= {name: np.zeros(3, np.float32) for name in ("model.visual.a", "mtp.norm.weight")}
        config = json.loads((folder / "config.json").read_text())
        config = {"model_type": family, "text_config": config, "tie_word_embeddings": False}
        (tmp_path / "packed/config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(made, tmp_path / "packed/model.safetensors")
    same(zoo.load(folder), zoo.load(tmp_path / "packed"))


@pytest.mark.parametrize(
    ("family", "shape", "of_two", "of_one"),
    [
        ("llama4_text", "dense first", "feed_forward.experts.gate_up_proj",
         "feed_forward.experts.down_proj"),
        ("granitemoehybrid", "experts, groups, one key head",
         "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    ],
)  # fmt: skip
def test_experts_that_a_quantiser_took_apart(family, shape, of_two, of_one, tmp_path):
    """Matrix by matrix [out, into], each with a scale of its own, where transformers has one."""
    weights = saved(family, shape, tmp_path)
    expected = zoo.load(tmp_path)
    lead = of_two.split(".")[0]
    for name in [name for name in weights if name.endswith((of_two, of_one))]:
        whole, begin = weights.pop(name), name[: name.index(f".{lead}.")]
        kinds = ("gate", "up") if name.endswith(of_two) else ("down",)
        for expert, matrix in enumerate(whole):
            matrix = matrix.T if family == "llama4_text" else matrix
            for kind, part in zip(kinds, np.split(matrix, len(kinds)), strict=True):
                each = f"{begin}.{lead}.experts.{expert}.{kind}_proj.weight"
                weights[each] = np.ascontiguousarray(part)
                weights[f"{each}_scale"] = np.float32([1])
    told = dict(quant_method="compressed-tensors", format="float-quantized")
    wide = {n: w for n, w in weights.items() if not n.endswith("_scale")}
    rewrite(tmp_path, wide)
    same(zoo.load(tmp_path), expected)
    narrow = {n: w.astype(ml_dtypes.float8_e4m3fn) if f"{n}_scale" in weights else w
              for n, w in weights.items()}  # fmt: skip
    rewrite(tmp_path, narrow, quantization_config=told)
    rounded = {n: np.float32(w) for n, w in narrow.items() if not n.endswith("_scale")}
    found = zoo.load(tmp_path)
    rewrite(tmp_path, rounded, quantization_config=None)
    same(found, zoo.load(tmp_path))


def in_4_bits(narrow, wide):
    """Tensors of a file, as bitsandbytes names them."""
    found = {}
    for name, (codes, scales, steps, offset, table) in narrow.items():
        state = dict(
            quant_type="nf4", blocksize=64, dtype="float32", shape=wide[name].shape,
            nested_blocksize=256, nested_dtype="float32", nested_offset=float(offset),
        )  # fmt: skip
        found[name] = codes.reshape(-1, 1)
        beside = dict(absmax=scales, quant_map=quantised.NF4, nested_absmax=steps,
                      nested_quant_map=table)  # fmt: skip
        found |= {f"{name}.{key}": value for key, value in beside.items()}
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        found[f"{name}.quant_state.bitsandbytes__nf4"] = text
    return found


def test_gpt_oss_in_bitsandbytes_4_bits(tmp_path, caplog):
    """Its router and experts by other names, each expert's gates and ups by turns, as unsloth's."""
    weights = saved("gpt_oss", "plain", tmp_path)
    expected, made = zoo.load(tmp_path), {}
    for name, value in weights.items():
        lead, _, end = name.rpartition(".")
        if ".mlp.router." in name:
            made[f"{lead}.linear.{end}"] = value
        elif ".mlp.experts." in name:
            which, kind = (end[:-5], "bias") if end.endswith("_bias") else (end, "weight")
            for expert, one in enumerate(value):
                one = np.ascontiguousarray(one if kind == "bias" else one.T)
                made[f"{lead}.{which}s.{expert}.{kind}"] = one
        else:
            made[name] = value
    assert made["model.layers.0.mlp.experts.gate_up_projs.5.weight"].shape == (64, 32)
    rewrite(tmp_path, made)
    same(zoo.load(tmp_path), expected)
    zoo.save(zoo.load(tmp_path), tmp_path / "out", dtype=jnp.float32)
    out = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert out.keys() == weights.keys()
    name = "model.layers.1.mlp.experts.gate_up_projs.3.weight"
    narrow, told = {}, dict(quant_method="bitsandbytes", load_in_4bit=True)
    for one in [one for one in made if "_projs." in one and one.endswith("weight")]:
        narrow[one] = quantised.quantised(made[one], "nf4")
    rewrite(tmp_path, made | in_4_bits(narrow, made), quantization_config=told)
    held = zoo.load(tmp_path, frozen="nf4").blocks.mlp.gate_up.get_value().narrow
    for ours, theirs in zip(held, narrow[name], strict=True):
        np.testing.assert_array_equal(np.asarray(ours)[1, 3], theirs)
    assert "experts" not in caplog.text
    rewrite(tmp_path, made, quantization_config=None)
    del made["model.layers.1.mlp.experts.down_projs.3.weight"]
    rewrite(tmp_path, made)
    with pytest.raises(ValueError, match=r"lack model\.layers\.1\.mlp\.experts\.down_proj"):
        zoo.load(tmp_path)


@pytest.mark.parametrize("shape", [(10**9, 0, 0), (5, 40, 32), (6, 40, 31), (6, 39, 32), (6, 40)])
def test_a_tensor_of_experts_that_fits_no_model_is_not_looped_over(shape, tmp_path):
    """Of a model with 6 experts, 32 wide; a header may name as many as it likes."""
    weights = saved("qwen3_moe", "plain", tmp_path)
    weights["model.layers.0.mlp.experts.gate_up_proj"] = np.broadcast_to(np.float32(0), shape)
    del weights["model.layers.0.mlp.experts.0.gate_proj.weight"]
    rewrite(tmp_path, {name: np.array(w) for name, w in weights.items()})
    with pytest.raises(ValueError, match=r"lack model\.layers\.0\.mlp\.experts\.0\.gate_proj"):
        zoo.load(tmp_path)


@pytest.mark.full
def test_a_number_that_is_not_finite_is_named_in_its_expert(tmp_path):
    tensors, name = saved("qwen3_moe", "plain", tmp_path), "mlp.experts.4.down_proj.weight"
    tensors[f"model.layers.2.{name}"].flat[-1] = np.nan
    rewrite(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf": model.layers.2.{name} holds"):
        zoo.check_finite(zoo.load(tmp_path))


def test_what_chooses_experts_is_never_narrowed(tmp_path):
    """Rounded to bfloat16 it would choose other ones; in files it stays in float32."""
    model = twins.untrained("deepseek_v3", "groups, yarn")
    zoo.save(model, tmp_path / "model")
    model = zoo.load(tmp_path / "model", dtype=jnp.bfloat16)
    names = models.never_narrowed(model)
    chosen = "blocks.sparse.mlp.chosen"
    assert names == {f"{chosen}.correction", f"{chosen}.router"}
    weights = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model)), sep=".")
    for name, weight in weights.items():
        assert weight.dtype == (jnp.float32 if name in names else jnp.bfloat16), name
    for name in ("correction", "router"):
        held = weights[f"{chosen}.{name}"]
        assert (held != held.astype(jnp.bfloat16)).any()
        some = zoo.folders.read(model, {f"{chosen}.{name}": None}, jnp.bfloat16)
        np.testing.assert_array_equal(some["blocks"]["sparse"]["mlp"]["chosen"][name], held)
        cast = logps.cast_for_compute(nnx.to_pure_dict(nnx.state(model)), model)
        np.testing.assert_array_equal(cast["blocks"]["sparse"]["mlp"]["chosen"][name], held)
        router = nnx.Param(held[0], axes="D E")
    x = jax.random.normal(jax.random.key(0), (1, 3, len(held[0])), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(held[0], np.float64)
    off = lambda wide: np.abs(experts.logits(x, router, wide=wide) - exact).max()
    assert off(True) < 1e-5 < 1e-3 < off(False)  # where it is wide its products are
    fresh = nnx.eval_shape(lambda: zoo.fresh(model.config, dtype=jnp.bfloat16))
    assert fresh.blocks.sparse.mlp.chosen.correction.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float31", jnp.int8, jnp.float8_e4m3fn])
def test_weights_that_could_not_hold_fractions_are_refused(tmp_path, small_model, dtype):
    told = "the zoo computes in float32, bfloat16 and float16"
    zoo.save(small_model, tmp_path / "model")
    with pytest.raises(ValueError, match=told):
        zoo.save(small_model, tmp_path / "other", dtype=dtype)
    for make in (zoo.load, zoo.fresh):
        with pytest.raises(ValueError, match=f"^dtype=.*{told}"):
            make(tmp_path / "model", dtype=dtype)
    with pytest.raises(ValueError, match=f"^compute_dtype=.*{told}"):
        zoo.load(tmp_path / "model", compute_dtype=dtype)


def test_what_weights_cannot_be_split_over_is_refused(small_model):
    """A mesh of other axes would leave all of them on each device, without a word."""
    config = small_model.config
    told = r"zoo.sharding.mesh_of\(data=1, fsdp=-1, tensor=1\) makes one"
    explicit = jax.sharding.AxisType.Explicit
    for mesh in (
        jax.sharding.AbstractMesh((1, 8), ("data", "model")),
        jax.sharding.AbstractMesh((8,), ("fsdp",), axis_types=(explicit,)),
        4,
    ):
        with pytest.raises(ValueError, match=told):
            sharding.refuse_mesh(mesh)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(explicit,))):
        for asked in (
            small_model,
            lambda ids: zoo.generate.generate(small_model, [ids], max_new_tokens=2),
        ):
            with pytest.raises(ValueError, match=told):
                asked([5, 6])
    mesh = zoo.sharding.mesh_of(1, -1, 1)
    sharding.refuse_mesh(mesh)
    assert zoo.abstract(config, mesh=mesh).config == config


def test_a_config_may_be_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    said = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    assert models.config_of(said) == models.config_of(said.to_dict())
    with pytest.raises(ValueError, match=r"3 is no Config, nor what a config.json holds"):
        models.config_of(3)


def test_a_kind_that_only_its_own_code_knew_is_written_as_the_one_it_is(tmp_path):
    """The code of Kimi K2 is not copied, and transformers has no such kind of its own."""
    said = json.loads(twins.config_of("deepseek_v3", "plain").to_json_string())
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    model = zoo.fresh(said | {"model_type": "kimi_k2", "auto_map": code})
    zoo.save(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], "auto_map" in written) == ("deepseek_v3", False)
    assert zoo.load(tmp_path / "out").config == model.config


def test_a_backend_of_attention_that_there_is_not_is_named():
    model = twins.untrained("llama", "plain")
    model.remat = "ful"
    with pytest.raises(ValueError, match="remat='ful' is none of full, attention"):
        model([[1, 2]])
    model.remat = "full"
    model.attention = "flash"
    with pytest.raises(ValueError, match="attention='flash' is none of dense, blocks"):
        model([[1, 2]])


def test_no_model_is_made_of_the_base_alone(small_model):
    with pytest.raises(TypeError, match=r"zoo.fresh\(config\) makes one"):
        zoo.Model(small_model.config, nnx.Rngs(0))


def test_what_would_fail_at_the_end_of_a_save_is_refused_at_its_beginning(tmp_path, small_model):
    with pytest.raises(ValueError, match=r"stop_ids are ids in a list, like \[2\], and not \[-1\]"):
        zoo.save(small_model, tmp_path / "model", stop_ids=[-1])
    with pytest.raises(ValueError, match="stop_ids: 97 is beyond the model's 97 ids"):
        zoo.save(small_model, tmp_path / "model", stop_ids=[2, 97])
    with pytest.raises(ValueError, match="the chat template cannot be read: unexpected"):
        zoo.save(small_model, tmp_path / "model", chat_template="{{ broken")
    assert not (tmp_path / "model").exists()
    zoo.save(small_model, tmp_path / "model", stop_ids=np.array([2, 3]))
    said = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert said["eos_token_id"][-2:] == [2, 3]
    with pytest.raises(ValueError, match=r"which would be lost: zoo.load.folder, frozen='nf4'"):
        zoo.narrowed(small_model, "nf4")


def test_new_weights_have_nothing_of_a_folder_beside_them(tmp_path):
    """Its config.json and tokenizer were asked for, and no weight that lies there."""
    weights = saved("deepseek_v3", next(iter(twins.TWINS["deepseek_v3"])), tmp_path / "in")
    later = {"model.layers.3.eh_proj.weight": np.float16([[1, 2], [3, 4]])}
    rewrite(tmp_path / "in", weights | later)
    zoo.save(zoo.fresh(tmp_path / "in"), tmp_path / "out")
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    said = {**zoo.load(TINY / "model").config.to_hf(), "dtype": jnp.bfloat16}
    zoo.save(zoo.fresh(said), tmp_path / "of a dict")

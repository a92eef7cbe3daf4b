"""Numbers of few bits: those of bitsandbytes to the last bit, and 8 bits as they lie on the hub."""

import json
import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from checkpoints_io import quantised
from tests.checkpoints_io import make_cases
from tests.zoo import twins
import zoo
from zoo.parts.quantised import Quantised

KEPT = pathlib.Path(__file__).parent / "kept"
BESIDE = ".quant_state.bitsandbytes__nf4"


def wide(narrow, shape, dtype=jnp.float32):
    """The matrix, as the scan over layers computes it."""
    held = jax.tree.map(lambda x: jnp.asarray(x)[None], narrow)
    turned = jax.jit(lambda x: jax.lax.scan(lambda _, one: (None, one.astype(dtype)), None, x)[1])
    return np.asarray(turned(Quantised(held, "F D", shape, "D", "F"))[0])


@pytest.mark.parametrize("name", make_cases.CASES)
def test_nf4_is_that_of_bitsandbytes_to_the_last_bit(name):
    kept = np.load(KEPT / "nf4.npz")
    shape, nested = make_cases.CASES[name]
    ours = quantised.quantised(make_cases.numbers(name), "nf4", nested=nested)
    np.testing.assert_array_equal(ours.codes.reshape(-1), kept[f"{name}.codes"])
    np.testing.assert_array_equal(ours.scales, kept[f"{name}.scales"])
    if nested:
        np.testing.assert_array_equal(ours.table, kept["table"])
        # torch adds up in an order of its own, which is another on other machines.
        np.testing.assert_array_max_ulp(ours.offset, kept[f"{name}.offset"], 1)
        np.testing.assert_allclose(ours.steps, kept[f"{name}.steps"], rtol=1e-6)
        ours = ours._replace(steps=kept[f"{name}.steps"], offset=kept[f"{name}.offset"])
    np.testing.assert_array_equal(wide(ours, shape)[:8], kept[f"{name}.back"])
    said = quantised.shapes("nf4", *shape)
    for array, like in zip(ours if nested else ours[:1], said, strict=False):
        assert (array.shape, array.dtype) == like


@pytest.mark.parametrize("shape", [(300, 192), (64, 65), (5, 3), (1024, 640)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_beside_bitsandbytes_itself(shape, dtype):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    matrix = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    theirs = torch.from_numpy(matrix.astype(np.float32)).to(getattr(torch, dtype))
    codes, state = functional.quantize_4bit(
        theirs, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    ours = quantised.quantised(matrix.astype(np.float32), "nf4")
    np.testing.assert_array_equal(ours.codes.reshape(-1), codes.reshape(-1))
    # Where torch's sum, in its own order, is another by one bit, so is a scale in thousands.
    off = ours.scales.astype(int) - state.absmax.numpy()
    assert np.abs(off).max() <= 1
    assert np.count_nonzero(off) <= (ours.offset != np.float32(state.offset)) * 1e-3 * off.size + 1
    ours = ours._replace(
        scales=state.absmax.numpy(),
        offset=np.float32(state.offset),
        steps=state.state2.absmax.numpy(),
    )
    back = functional.dequantize_4bit(codes, state).float().numpy()
    np.testing.assert_array_equal(wide(ours, shape, dtype).astype(np.float32), back)


def test_rows_and_blocks_of_zeros():
    matrix = np.zeros((4, 128), np.float32)
    matrix[2] = 3
    for kind in quantised.KINDS:
        back = wide(quantised.quantised(matrix, kind), matrix.shape)
        np.testing.assert_allclose(back, matrix, atol=1e-6)


def test_int8_is_off_by_half_a_step_at_most():
    matrix = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float32)
    narrow = quantised.quantised(matrix, "int8")
    assert np.abs(narrow.codes).max(-1).min() == 127
    off = np.abs(wide(narrow, matrix.shape) - matrix)
    assert (off <= narrow.scales[:, None] * 0.5001).all()


def test_a_checkpoint_of_bitsandbytes_has_its_logits():
    """Written by transformers; its logits are those of the model that it dequantised itself."""
    logits = np.load(KEPT / "nf4" / "logits.npy")
    tokens = jnp.arange(24) % 31
    of_arrays, as_it_is = zoo.load(KEPT / "nf4"), zoo.load(KEPT / "nf4", frozen="nf4")
    for model in (of_arrays, as_it_is):
        off = np.abs(np.asarray(model(tokens)) - logits).max()
        assert off < 1e-5 * np.abs(logits).max()
    # Its codes as they are, and none that is computed again.
    tensors = safetensors.numpy.load_file(KEPT / "nf4" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    down = as_it_is.blocks.mlp.down.get_value().narrow
    np.testing.assert_array_equal(down.codes[1].reshape(-1), tensors[name].reshape(-1))
    np.testing.assert_array_equal(down.scales[1], tensors[f"{name}.absmax"])
    np.testing.assert_array_equal(down.steps[1], tensors[f"{name}.nested_absmax"])
    said = json.loads(bytes(tensors[name + BESIDE]))
    assert float(down.offset[1]) == np.float32(said["nested_offset"])


def test_what_a_folder_holds_as_it_was_is_not_rounded_without_a_word(folder, caplog):
    """As unsloth's dynamic folders: in some layers a matrix is left in 16 bits."""
    assert zoo.load(folder, frozen="nf4") and not caplog.text
    wide = zoo.load(folder).blocks.mlp.down[...][1].T

    def edit(tensors):
        for name in [name for name in tensors if name.startswith(NAME)]:
            del tensors[name]
        tensors[NAME] = np.asarray(wide, np.float32)

    rewrite(folder, edit)
    assert zoo.load(folder) and not caplog.text
    zoo.load(folder, frozen="nf4")
    assert f"{NAME}: the folder holds these unquantised and others in 4 bits" in caplog.text


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(KEPT / "nf4", tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, edit, **told):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | told))


NAME = "model.layers.1.mlp.down_proj.weight"
STATE = NAME + BESIDE


def said(**values):
    def edit(tensors):
        state = json.loads(bytes(tensors[STATE])) | values
        tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return edit


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda t: t.pop(NAME), r"a matrix \(64, 128\) needs 4096 bytes"),
        (lambda t: t.pop(f"{NAME}.absmax"), rf"it needs {NAME}.absmax, U8 \[128\]"),
        (lambda t: t.update({f"{NAME}.quant_map": np.ones(8, np.float32)}), r"quant_map, F32"),
        (lambda t: t.update({STATE: np.zeros(9, np.uint8)}), "quant_state cannot be read"),
        (lambda t: t.update({STATE: np.zeros(9000, np.uint8)}), "quant_state is not text"),
        (said(shape=[64, 2**40]), "its quant_state says shape"),
        (said(shape=[64, 192]), r"a matrix \(64, 192\) needs 6144 bytes"),
        (said(shape=[128, 64]), r"down_proj.weight is \(128, 64\) where config.json needs"),
        (said(blocksize=0), "and blocksize 0"),
        (said(blocksize=100), "it needs .*absmax"),
        (said(nested_blocksize=64), "in blocks of 64, not of 256"),
    ],
)
def test_what_does_not_belong_together_is_refused(folder, edit, told):
    rewrite(folder, edit)
    with pytest.raises(ValueError, match=told):
        zoo.load(folder)


def in_eight_bits(tensors, kind, scale_of, end):
    """Every matrix of the layers in 8 bits, and what each then stands for."""
    stand_for = {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        matrix = tensors[name]
        scale = scale_of(matrix)
        rows, columns = (-(-n // m) for n, m in zip(matrix.shape, scale.shape, strict=True))
        each = scale.repeat(rows, 0)[: len(matrix)].repeat(columns, 1)[:, : matrix.shape[1]]
        top = 127 if kind == np.int8 else 448
        own = matrix / each
        own *= top / np.abs(own).max()
        codes = (np.rint(own) if kind == np.int8 else own).astype(kind)
        tensors |= {name: codes, f"{name}{end}": scale}
        stand_for[name] = codes.astype(np.float32) * each
    return stand_for


def write(folder, tensors, **told):
    """As safetensors has it: its own writer knows no 8-bit floats of numpy."""
    kinds = {"float32": "F32", "int8": "I8", "float8_e4m3fn": "F8_E4M3"}
    header, data = {}, b""
    for name, value in tensors.items():
        bits = np.ascontiguousarray(value).tobytes()
        at = [len(data), len(data) + len(bits)]
        dtype = kinds[value.dtype.name]
        header[name] = dict(dtype=dtype, shape=value.shape, data_offsets=at)
        data += bits
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": told}))


CT = dict(quant_method="compressed-tensors")
FP8 = ml_dtypes.float8_e4m3fn
BY_BLOCK = dict(group_0=dict(weights=dict(strategy="block", block_structure=[24, 32])))
draw = lambda shape: np.random.default_rng(3).random(shape)


@pytest.mark.parametrize(
    ("kind", "scale_of", "told"),
    [
        (np.int8, lambda w: draw((len(w), 1)), CT | dict(format="int-quantized")),
        (np.int8, lambda w: draw((len(w), 4)), CT | dict(format="naive-quantized")),
        (FP8, lambda w: draw((1, 1)), CT | dict(format="float-quantized")),
        (FP8, lambda w: draw((1, 1)), dict(quant_method="fp8")),
        (FP8, lambda w: draw((-(-len(w) // 24), w.shape[1] // 32)),
         dict(quant_method="fp8", weight_block_size=[24, 32])),
        (FP8, lambda w: draw((-(-len(w) // 24), w.shape[1] // 32)),
         CT | dict(format="float-quantized", config_groups=BY_BLOCK)),
    ],
)  # fmt: skip
def test_eight_bits_with_scales(folder, kind, scale_of, told):
    zoo.save(zoo.load(folder), folder.parent / "wide", dtype=jnp.float32)
    tensors = safetensors.numpy.load_file(folder.parent / "wide" / "model.safetensors")
    end = "_scale_inv" if "weight_block_size" in told else "_scale"
    floats = lambda w: np.float32(scale_of(w) + 0.5)
    if not told.keys() & {"weight_block_size", "config_groups"}:
        stand_for = in_eight_bits(tensors, kind, floats, end)
    else:
        stand_for = {}
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            matrix, scale = tensors[name], floats(tensors[name])
            each = scale.repeat(24, 0)[: len(matrix)].repeat(32, 1)
            codes = (matrix / each * 100).astype(kind)
            tensors |= {name: codes, f"{name}{end}": scale}
            stand_for[name] = codes.astype(np.float32) * each
    # What scales activations, and keys and values that are kept, has no say in the weights.
    beside = ("mlp.up_proj.activation_scale", "mlp.up_proj.input_scale", "self_attn.k_scale",
              "self_attn.k_proj.k_scale", "self_attn.attn.v_scale",
              "mlp.up_proj.input_zero_point")  # fmt: skip
    tensors |= {f"model.layers.0.{name}": np.ones(1, np.float32) for name in beside}
    write(folder, tensors, **told)
    zoo.save(zoo.load(folder), folder.parent / "out", dtype=jnp.float32)
    found = safetensors.numpy.load_file(folder.parent / "out" / "model.safetensors")
    for name, value in stand_for.items():
        np.testing.assert_array_equal(found[name], value)
    assert "quantization_config" not in json.loads(
        (folder.parent / "out" / "config.json").read_text()
    )
    narrow = zoo.load(folder, frozen="int8").blocks.mlp.up.get_value()
    name = "model.layers.1.mlp.up_proj.weight"
    assert narrow.kind == "int8"
    if kind == np.int8 and tensors[f"{name}{end}"].shape[1] == 1:
        # Its codes as they are; others, with several scales in a row, are quantised again.
        np.testing.assert_array_equal(narrow.narrow.codes[1], tensors[name])
        held = np.float32(narrow.narrow.codes[1]) * np.asarray(narrow.narrow.scales)[1][:, None]
        np.testing.assert_array_equal(held, stand_for[name])

    name = "model.layers.0.mlp.up_proj.weight"
    write(folder, tensors | {f"{name}{end}": np.ones((5, 1), np.float32)}, **told)
    with pytest.raises(ValueError, match="there should be one scale, one for each row or group"):
        zoo.load(folder)
    write(folder, tensors | {name: np.ones((128, 64), np.float32)}, **told)
    with pytest.raises(ValueError, match=rf"{name} has .* beside it and is F32 \[128, 64\]"):
        zoo.load(folder)


def test_scales_of_a_cache_beside_wide_weights(folder):
    """ModelOpt writes them, and nothing of them in config.json."""
    zoo.save(zoo.load(folder), folder.parent / "wide", dtype=jnp.float32)
    tensors = safetensors.numpy.load_file(folder.parent / "wide" / "model.safetensors")
    beside = ("k_proj.k_scale", "v_proj.v_scale", "qkv_proj.k_scale", "k_scale")
    write(folder, tensors | {f"model.layers.0.self_attn.{n}": np.ones(1, np.float32)
                             for n in beside})  # fmt: skip
    zoo.load(folder)
    write(folder, tensors | {"model.layers.0.mlp.up_proj.input_scale": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match=r"hold model\.layers\.0\.mlp\.up_proj\.input_scale"):
        zoo.load(folder)


def halves_of(tensor, block):
    """One scale for each expert's gate, and one for its up; or more along its rows."""
    rows, columns = tensor.shape[1] // 2, block or tensor.shape[2]
    return (len(tensor), 2, tensor.shape[2] // columns), (rows, columns)


@pytest.mark.parametrize(
    ("family", "shape_of", "told"),
    [
        ("qwen3_moe", lambda w: ((len(w),), w.shape[1:]), dict(weight_block_size=None)),
        ("mistral4", lambda w: ((len(w), 1, 1), w.shape[1:]), dict(weight_block_size=None)),
        ("qwen3_moe", lambda w: halves_of(w, None), dict(weight_block_size=None)),
        ("mistral4", lambda w: halves_of(w, 4), dict(weight_block_size=[128, 4])),
        ("qwen3_moe", lambda w: ((len(w), w.shape[1] // 4, w.shape[2] // 2), (4, 2)),
         dict(weight_block_size=[4, 2])),
    ],
)  # fmt: skip
def test_eight_bits_of_all_experts_in_one_tensor(family, shape_of, told, tmp_path):
    """As Mistral Small 4 lies on the hub: a scale beside a tensor that is called no weight."""
    model = twins.untrained(family, next(iter(twins.TWINS[family])))
    zoo.save(model, tmp_path / "wide", dtype=jnp.float32)
    tensors = safetensors.numpy.load_file(tmp_path / "wide" / "model.safetensors")
    if not any(name.endswith(".gate_up_proj") for name in tensors):
        tensors = in_one_tensor(tensors)
    stand_for, codes = dict(tensors), dict(tensors)
    for name in [name for name in tensors if "experts." in name and tensors[name].ndim == 3]:
        shape, block = shape_of(tensors[name])
        scale = np.float32(draw(shape) + 0.5)
        wide = scale.reshape(len(scale), *(*shape[1:], 1, 1)[:2])
        wide = wide.repeat(block[0], 1).repeat(block[1], 2)
        own = (tensors[name] / wide * 100).astype(FP8)
        codes |= {name: own, f"{name}_scale_inv": scale}
        codes[f"{name}_activation_scale"] = np.ones(len(scale), np.float32)
        stand_for[name] = own.astype(np.float32) * wide
    assert len(codes) > len(tensors)
    shutil.copytree(tmp_path / "wide", tmp_path / "odd")
    for odd in ([0, 4], [4], "128", [4, 2.0], [-1, 2], [7, 3]):
        if told["weight_block_size"] is not None:
            write(tmp_path / "odd", codes, quant_method="fp8", weight_block_size=odd)
            with pytest.raises(ValueError, match="there should be one scale, one for each row"):
                zoo.load(tmp_path / "odd")
    found = []
    for some, quantised_as in ((codes, dict(quant_method="fp8", **told)), (stand_for, None)):
        shutil.copytree(tmp_path / "wide", tmp_path / f"{len(found)}")
        write(tmp_path / f"{len(found)}", some, **(quantised_as or {}))
        found.append(zoo.load(tmp_path / f"{len(found)}"))
    few, wide = (jax.tree.leaves(nnx.to_pure_dict(nnx.state(one))) for one in found)
    for one, other in zip(few, wide, strict=True):
        np.testing.assert_array_equal(one, other)


def in_one_tensor(tensors):
    """The experts of each layer as transformers 5 keeps them."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(3):
        at = f"model.layers.{layer}.mlp.experts"
        of = lambda part, at=at: np.stack([tensors[f"{at}.{i}.{part}.weight"] for i in range(6)])
        found[f"{at}.gate_up_proj"] = np.concatenate([of("gate_proj"), of("up_proj")], 1)
        found[f"{at}.down_proj"] = of("down_proj")
    return found


def test_a_part_of_a_matrix_is_a_part_of_its_numbers(folder):
    """As several devices read it."""
    from checkpoints_io import hf_weights

    with hf_weights._tensors(folder, hf_weights.Plan({}, {}, {})) as tensors:
        matrix = tensors[NAME]
        whole = matrix[slice(0, 64), slice(0, 128)]
        part = matrix[slice(13, 40), slice(7, 50)]
    np.testing.assert_array_equal(part, whole[13:40, 7:50])


def test_few_bits_are_asked_for_by_name(folder):
    with pytest.raises(ValueError, match="frozen='int4' is none of int8, nf4"):
        zoo.load(folder, frozen="int4")

"""PEFT folders: what is in them, what is refused, and that PEFT gives the logits that we give."""

import copy
import json
import shutil
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests.conftest import TINY
from tests.long_forms import full_but
from tests.zoo import twins
from tests.zoo.test_adapters import filled, parted
import zoo
from zoo import __main__ as looking
from zoo import chat
from zoo.parts import adapted
from zoo.targets import Lora, linear


def with_adapters(model, lora, scale=0.1):
    """A model with numbers in all of its adapters."""
    trained, frozen = parted(model, lora)
    whole = adapted.joined(filled(trained, frozen, scale), frozen)
    made = nnx.merge(nnx.graphdef(model), nnx.State(whole))
    made.source = model.source
    return made


@pytest.fixture(scope="module")
def base():
    return zoo.load(TINY / "model")


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """A folder of adapters of the tiny model, of two ranks."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    lora = Lora(4, 8.0, targets=("q_proj", "down_proj"), rank_pattern={"down_proj": 2}, layers=(0,))
    zoo.save_adapter(with_adapters(base, lora), folder, base="tiny/model", revision="abc")
    return folder


def test_a_folder_to_the_letter(base, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    q, down = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    assert config.pop("r") in (2, 4)
    assert config.pop("lora_alpha") == 8
    assert config.pop("rank_pattern") in ({"q_proj": 4}, {"down_proj": 2})
    assert config == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_dropout": 0.0, "use_rslora": False,
        "use_dora": False, "target_modules": sorted([q, down]), "alpha_pattern": {},
        "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "inference_mode": True,
        "init_lora_weights": True, "base_model_name_or_path": "tiny/model", "revision": "abc",
    }  # fmt: skip
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    sizes = base.config.sizes
    D, F, heads = sizes["D"], sizes["F"], sizes["N"] * sizes["H"]
    assert {name: value.shape for name, value in tensors.items()} == {
        f"base_model.model.{q}.lora_A.weight": (4, D),
        f"base_model.model.{q}.lora_B.weight": (heads, 4),
        f"base_model.model.{down}.lora_A.weight": (2, F),
        f"base_model.model.{down}.lora_B.weight": (D, 2),
    }
    assert all(value.dtype == np.float32 for value in tensors.values())


def test_a_folder_that_is_read_is_written_again_bit_for_bit(base, folder, tmp_path):
    again = zoo.load(TINY / "model", adapter=folder)
    zoo.save_adapter(again, tmp_path / "again")
    one, other = (safetensors.numpy.load_file(f / "adapter_model.safetensors")
                  for f in (folder, tmp_path / "again"))  # fmt: skip
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_merged_weights_are_the_base_and_its_adapters(folder, tmp_path):
    model = zoo.load(TINY / "model", adapter=folder)
    zoo.save(model, tmp_path / "merged", dtype=np.float32)
    merged = zoo.load(tmp_path / "merged")
    tokens = np.random.default_rng(0).integers(3, 90, (2, 20))
    ours = np.asarray(model(tokens))
    np.testing.assert_allclose(merged(tokens), ours, atol=3e-6 * np.abs(ours).max())
    assert np.abs(ours - np.asarray(zoo.load(TINY / "model")(tokens))).max() > 0.1


def test_what_is_merged_is_not_written_over(folder, tmp_path):
    shutil.copytree(TINY / "model", tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    for name, given in (("BASE", tmp_path / "base"), ("ADAPTER", folder)):
        again = f"{given.parent}/./{given.name}"
        with pytest.raises(ValueError, match=f"is {name}, which would be lost"):
            looking.merge(str(tmp_path / "base"), str(folder), again)
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


def test_adapters_may_bring_their_own_words(base, folder, tmp_path):
    """Tokenizer and template, as TRL and axolotl write them: for talking, and in what is merged."""
    zoo.save_adapter(
        zoo.load(TINY / "model", adapter=folder), tmp_path / "a", base=str(TINY / "model"),
        tokenizer=TINY / "model", chat_template="{{ messages[0].content }}!",
    )  # fmt: skip
    _, words = chat.loaded(str(tmp_path / "a"), None, None, talks=True)
    assert words.chat_text([{"role": "user", "content": "Hello"}]) == "Hello!"
    told = looking.merge(str(TINY / "model"), str(tmp_path / "a"), str(tmp_path / "merged"))
    assert "(with their tokenizer) merged into it" in told
    assert zoo.load_tokenizer(tmp_path / "merged").chat_template == words.chat_template
    told = looking.merge(str(TINY / "model"), str(folder), str(tmp_path / "plain"))
    assert "tokenizer" not in told
    own = zoo.load_tokenizer(TINY / "model").chat_template
    assert zoo.load_tokenizer(tmp_path / "plain").chat_template == own


def test_adapters_of_others_are_said_to_be_for_other_weights(folder, tmp_path, caplog):
    """Nothing but a name tells, where no fingerprint was written."""
    shutil.copytree(folder, tmp_path / "a")
    (tmp_path / "a" / "trained_on.json").unlink()
    file = tmp_path / "a" / "adapter_config.json"
    said = json.loads(file.read_text())
    for named, told in (("someone/Model", False), ("unsloth/model-bnb-4bit", True)):
        file.write_text(json.dumps(said | {"base_model_name_or_path": named}))
        caplog.clear()
        zoo.load(TINY / "model", adapter=tmp_path / "a")
        assert ("whether the weights are the same is not known" in caplog.text) == told


def test_a_model_with_adapters_generates(base, folder):
    """Greedy text of the adapted model is that of the merged one."""
    from zoo import generate

    model = zoo.load(TINY / "model", adapter=folder)
    merged = nnx.merge(
        nnx.graphdef(model),
        nnx.State(jax.tree.map(
            lambda w: w.astype(jnp.float32) if adapted.is_adapted(w) else w,
            nnx.to_pure_dict(nnx.state(model)), is_leaf=adapted.is_adapted,
        )),
    )  # fmt: skip
    ask = lambda one: generate.generate(one, [[5, 9, 33]], max_new_tokens=12)[0]
    np.testing.assert_array_equal(ask(model), ask(merged))


def changed(folder, to, **values):
    """A copy of a folder, with other values in its adapter_config.json."""
    to.mkdir()
    (to / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | values))
    return to


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(peft_type="IA3"), "peft_type 'IA3', but only LORA is read"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save, which is whole weights"),
        (dict(trainable_token_indices=[3]), "trainable_token_indices"),
        (dict(bias="all"), "bias='all'"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(init_lora_weights="pissa_niter_4"), "'pissa_niter_4', which changes the base too"),
        (dict(init_lora_weights="olora"), "changes the base too"),
        (dict(init_lora_weights="corda"), "changes the base too"),
        (dict(layer_replication=[[0, 1]]), "layer_replication"),
        (dict(r="eight"), "r='eight'"),
        (dict(rank_pattern={}, r=3), r"the lora_A is \[\d, \d+\], where .*\(rank 3\) have \[3,"),
    ],
)
def test_what_is_no_lora_of_this_model_is_refused(folder, tmp_path, values, words):
    with pytest.raises(ValueError, match=words):
        zoo.load(TINY / "model", adapter=changed(folder, tmp_path / "a", **values))


def test_files_that_are_not_there(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        zoo.load(TINY / "model", adapter=TINY / "model")
    other = changed(folder, tmp_path / "a")
    (other / "adapter_model.safetensors").rename(other / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle, which is never opened"):
        zoo.load(TINY / "model", adapter=other)


def renamed(folder, to, change):
    changed(folder, to)
    path = to / "adapter_model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)
    return to


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {n.replace("q_proj", "c_attn"): x for n, x in t.items()}, "has no place in"),
        (lambda t: {n.replace("layers.0", "layers.99"): x for n, x in t.items()}, "has no place"),
        (lambda t: t | {"base_model.model.lm_head.weight": np.zeros((2, 2), "f4")}, "has no place"),
        (lambda t: {n: x for n, x in t.items() if "lora_B" not in n}, "the lora_B is missing"),
        (lambda t: {n: x[..., :-1] if "lora_A" in n else x for n, x in t.items()}, "the lora_A is"),
        (lambda t: {n: x[:, :-1] if "lora_B" in n else x for n, x in t.items()}, "the lora_B is"),
        (
            lambda t: {n: np.ones((), np.float32) if "lora_A" in n else x for n, x in t.items()},
            r"the lora_A is \[\]|missing",
        ),
        (
            lambda t: (
                t
                | {
                    n.replace("lora_A.weight", "lora_magnitude_vector"): x[0]
                    for n, x in t.items()
                    if "lora_A" in n
                }
            ),
            "the lora_magnitude_vector is .* have none",
        ),
        (lambda t: {n: x * np.float32("nan") for n, x in t.items()}, "is not finite"),
        (lambda t: {}, "holds no adapters"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        zoo.load(TINY / "model", adapter=renamed(folder, tmp_path / "a", change))


def test_adapters_of_other_weights_are_refused(folder, tmp_path, base):
    """The fingerprint of the weights they were trained on is kept with them."""
    other = nnx.clone(base)
    norm = other.norm.scale
    norm.set_value(norm[...] * 2)
    other.source = base.source
    zoo.save(other, tmp_path / "other", dtype=np.float32)
    with pytest.raises(ValueError, match="were trained on other weights than those of"):
        zoo.load(tmp_path / "other", adapter=folder)
    # Those of other programs do not say what they were trained on.
    unmarked = changed(folder, tmp_path / "a")
    assert not (unmarked / "trained_on.json").exists()
    zoo.load(tmp_path / "other", adapter=unmarked)


def test_adapters_of_the_same_weights_in_another_dtype_are_not_refused(folder):
    """What was trained beside float32 is used beside bfloat16, and known there too."""
    narrow = zoo.load(TINY / "model", adapter=folder, dtype=jnp.bfloat16)
    assert narrow.embedding.get_value().dtype == jnp.bfloat16
    known = json.loads((folder / "trained_on.json").read_text())
    assert set(known["fingerprints"]) == {"float32", "bfloat16"}


@pytest.mark.parametrize(
    "said",
    [dict(fingerprints={"evil": "x"}), dict(fingerprints=[]), dict(frozen="int2"),
     dict(fingerprints={"float32": 1})],
    ids=str,
)  # fmt: skip
def test_a_file_of_our_own_that_says_something_else(folder, tmp_path, said):
    other = changed(folder, tmp_path / "a")
    (other / "trained_on.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="does not name the weights"):
        zoo.load(TINY / "model", adapter=other)


def test_a_folder_of_adapters_takes_the_place_of_no_model(base, folder, tmp_path):
    """Nor a model that of adapters: what is there would be gone."""
    zoo.save(base, tmp_path / "model")
    model = zoo.load(TINY / "model", adapter=folder)
    with pytest.raises(FileExistsError, match="something other than adapters"):
        zoo.save_adapter(model, tmp_path / "model")
    zoo.save_adapter(model, tmp_path / "adapters")
    zoo.save_adapter(model, tmp_path / "adapters")
    with pytest.raises(FileExistsError, match="something other than a model"):
        zoo.save(base, tmp_path / "adapters")


def test_a_rank_that_all_of_an_end_have_is_said_once(tmp_path):
    """Or a reader compares each of many thousands of experts with as many patterns."""
    model = twins.untrained("qwen3_moe", "plain")
    lora = Lora(4, 8.0, rank_pattern={r".*\.experts\..*\.down_proj": 2, r".*layers.1.*q_proj": 3})
    model = with_adapters(model, lora)
    zoo.save_adapter(model, tmp_path / "a", base="x")
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert said["rank_pattern"] == {"down_proj": 2, "model.layers.1.self_attn.q_proj": 3}
    assert said["alpha_pattern"] == {}
    zoo.save(twins.untrained("qwen3_moe", "plain"), tmp_path / "base", dtype=np.float32)
    again = zoo.load(tmp_path / "base", adapter=tmp_path / "a")
    ours, theirs = (nnx.to_pure_dict(nnx.state(one)) for one in (again, model))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_alphas_are_those_that_were_given(base, tmp_path):
    zoo.save_adapter(with_adapters(base, Lora(6, 8.0)), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (6, 8.0, {})


@pytest.mark.full
def test_dora_of_some_layers_is_the_same_model_when_it_is_read_again(base, tmp_path):
    """The others are as frozen ones are: what is not written has no part in the model."""
    model = with_adapters(base, Lora(4, 8.0, layers=(0, 2), dora=True), scale=0.05)
    zoo.save_adapter(model, tmp_path / "a")
    again = zoo.load(TINY / "model", adapter=tmp_path / "a")
    tokens = np.random.default_rng(0).integers(3, 90, (2, 20))
    np.testing.assert_array_equal(again(tokens), model(tokens))
    zoo.save(model, tmp_path / "merged", dtype=np.float32)
    merged, ours = np.asarray(zoo.load(tmp_path / "merged")(tokens)), np.asarray(model(tokens))
    np.testing.assert_allclose(merged, ours, atol=3e-6 * np.abs(ours).max())
    assert np.abs(ours - np.asarray(base(tokens))).max() > 0.1


def test_a_model_without_adapters_has_no_such_folder(base, tmp_path):
    with pytest.raises(ValueError, match="the model has no adapters"):
        zoo.save_adapter(base, tmp_path / "a")


# Against PEFT itself, where it is installed

FAMILIES = full_but(twins.TWINS, "llama")
BOUND = 3e-6
# Of these PEFT 0.21 takes the names of a shared expert, or of a layer without experts, for those of
# experts, and loses them.
SHARED = (
    "qwen2_moe", "qwen3_5_moe_text", "qwen3_next", "deepseek_v2", "deepseek_v3", "deepseek_v32",
    "glm_moe_dsa", "glm4_moe", "glm4_moe_lite",
)  # fmt: skip
# Whose experts have a tensor for all in transformers, and PEFT does not know it.
UNKNOWN = ("lfm2_moe", "nemotron_h")


@pytest.fixture(scope="module")
def live():
    """Torch and PEFT."""
    torch = pytest.importorskip("torch")
    return types.SimpleNamespace(torch=torch, peft=pytest.importorskip("peft"))


def logits_of(live, model, tokens):
    with live.torch.no_grad():
        return model(input_ids=live.torch.tensor(tokens)).logits.double().numpy()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_our_folders_and_we_read_its(live, family, dora, tmp_path):
    shape = next(iter(twins.TWINS[family]))
    original, path = twins.twin(family, shape)
    model = zoo.load(path)
    experts = any("E" in param.axes.split() for param, _ in linear(model).values())
    apart = experts and (dora or family in (*SHARED, *UNKNOWN))
    some = r".*(_attn\..*|conv\.(in|out)_proj|mixer\.((in|[qkvo])_proj|shared_experts\..*))"
    targets = (some,) if apart else ("all-linear",)
    model = with_adapters(model, Lora(4, 8.0, targets=targets, dora=dora), scale=0.04)
    zoo.save_adapter(model, tmp_path / "ours")
    theirs = live.peft.PeftModel.from_pretrained(copy.deepcopy(original), str(tmp_path / "ours"))
    tokens = np.random.default_rng(0).integers(3, 90, (8, 12))
    ours = np.asarray(model(tokens), np.float64)
    # In float64 PEFT gives the truth; how far it is off in float32 is a yardstick. Both by the norm
    # of all logits: which single one is off the most is chance.
    narrow = logits_of(live, theirs, tokens)
    exact = logits_of(live, theirs.double(), tokens)
    off = lambda logits: np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    # A recurrence rounds in other places than transformers' does.
    by = 6 if model.config.kinds else 3
    bound = max(BOUND, by * off(narrow))
    assert off(logits_of(live, original.double(), tokens)) > 500 * bound
    original.float()
    assert off(ours) <= bound
    zoo.save(model, tmp_path / "merged", dtype=np.float32)
    merged = np.asarray(zoo.load(tmp_path / "merged")(tokens))
    assert off(merged) <= bound
    # And back: PEFT's own folder of the same.
    theirs.float().save_pretrained(str(tmp_path / "theirs"))
    again = zoo.load(path, adapter=tmp_path / "theirs")
    assert off(np.asarray(again(tokens))) <= bound


OF_EXPERTS = ["qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "glm4_moe", "deepseek_v3", "lfm2_moe"]
ROUTERS = {"mixtral": ["gate"]}


@pytest.mark.parametrize("family", full_but([*OF_EXPERTS, *ROUTERS], "glm4_moe", "mixtral"))
def test_adapters_that_peft_puts_on_experts_and_routers_are_read(live, family, tmp_path):
    """Of all experts of a layer in one tensor, wherever a family has them in its layers."""
    original, path = twins.twin(family, next(iter(twins.TWINS[family])))
    kind = "feed_forward" if family == "lfm2_moe" else "mlp"
    said = live.peft.LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=ROUTERS.get(family, ["q_proj"]),
        target_parameters=[f"{kind}.experts.gate_up_proj", f"{kind}.experts.down_proj"],
    )  # fmt: skip
    theirs = live.peft.get_peft_model(copy.deepcopy(original), said).eval()
    draw = live.torch.Generator().manual_seed(3)
    with live.torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * live.torch.randn(weight.shape, generator=draw))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    tokens = np.random.default_rng(0).integers(3, 90, (4, 12))
    ours = np.asarray(zoo.load(path, adapter=tmp_path / "theirs")(tokens), np.float64)
    exact, before = (logits_of(live, one, tokens) for one in (theirs, original))
    off = lambda logits: np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert off(ours) <= 1e-5
    assert off(before) > 0.02


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("lm_head", "and lm_head takes no adapters here"),
        ("model.embed_tokens", "and embed_tokens takes no adapters here"),
        ("model.visual.blocks.0.attn.qkv", "of what sees or hears"),
        ("model.layers.0.self_attn.x_proj", "which has no place in .*: is it the adapter of"),
    ],
)
def test_adapters_of_what_takes_none_are_refused_by_what_that_is(folder, tmp_path, module, told):
    shutil.copytree(folder, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = f"base_model.model.{module}.lora_A.weight"
    safetensors.numpy.save_file(tensors | {name: np.ones((4, 8), np.float32)}, file)
    with pytest.raises(ValueError, match=told):
        zoo.load(TINY / "model", adapter=tmp_path / "a")

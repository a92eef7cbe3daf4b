"""How much of a layer's work is kept for the backward pass: what fits the memory that is left."""

from flax import nnx
import jax.numpy as jnp
import pytest

from recipes.data.packed.packing import Shape
from recipes.training import activations, plan
from recipes.training.activations import Remat
from tests.conftest import small_config
from tests.zoo import alternating
import zoo

GIB = 2**30
# Llama 3.1 8B.
CONFIG = dict(
    model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=128256,
    rms_norm_eps=1e-5, rope_theta=5e5, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip
SHAPE = Shape(4, 4096, 64, 2, 1, 1)  # 16,384 positions


def model_of(**other):
    model = zoo.abstract({**CONFIG, **other}, jnp.bfloat16, jnp.bfloat16)
    model.attention = "blocks"
    return model


def chosen(memory, held=16 * GIB, shape=SHAPE, model=None):
    return activations.remat(model or model_of(), {}, shape, held, memory and float(memory))


def layer_bytes(model, rows, T, trained=None):
    return activations.layer_bytes(model, trained or {}, rows, T)


def test_what_fits_is_kept():
    """What comes out of attention, with a sum for each head, and q, k, v, o, gate and up."""
    attention = 16384 * (32 * 128 * 2 + 32 * 4)
    products = 16384 * 2 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336)
    assert chosen(None) == Remat("full")  # not known
    assert chosen(28 * GIB) == Remat("full")
    assert chosen(34 * GIB) == Remat("attention", None, 32 * attention)
    most = chosen(120 * GIB)
    assert most == Remat("products", None, 32 * (attention + products))
    some = chosen(60 * GIB)
    assert some == Remat("products", 21, 32 * attention + 21 * products)


def test_rows_are_counted_as_they_are():
    """Of any length, on each device; a row that devices share is theirs by parts."""
    whole = chosen(120 * GIB).kept
    odd = SHAPE._replace(rows=1, row_length=3968)
    assert chosen(120 * GIB, shape=odd).kept == whole * 3968 // 16384
    eight = SHAPE._replace(rows=16, shards=8)
    assert chosen(120 * GIB, shape=eight).kept == whole // 2
    shared = SHAPE._replace(row_length=2 * 4096, context=2)
    assert chosen(120 * GIB, shape=shared).kept == whole


def test_what_enters_every_layer_and_what_one_makes_is_always_needed():
    """More than its products: norms, gates, turned keys; logits of 256 tokens are beside."""
    each, twice = (layer_bytes(model_of(), 1, n) for n in (1024, 2048))
    logits = 256 * 128256 * 4
    of_one = each.needed - 32 * 1024 * 4096 * 2 - logits
    assert 2 * each.kept[""]["products"] < of_one < 4 * each.kept[""]["products"]
    assert twice.needed - logits == 2 * (each.needed - logits)


def test_weights_that_are_trained_are_copied_and_have_gradients():
    """Of one layer, and of the larger of embedding and head: in float32, and in bfloat16."""
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    frozen = layer_bytes(model_of(), 1, 1024).needed
    trained = nnx.to_pure_dict(nnx.state(zoo.abstract(CONFIG, jnp.float32)))
    found = layer_bytes(model_of(), 1, 1024, trained).needed
    assert found - frozen == (layer + 128256 * 4096) * (2 + 4)
    masters = zoo.abstract(CONFIG, jnp.float32, jnp.bfloat16)
    masters.attention = "blocks"
    assert layer_bytes(masters, 1, 1024).needed == frozen  # the copies are not counted twice
    some = {"blocks": {"attention": trained["blocks"]["attention"]}}
    found = layer_bytes(model_of(), 1, 1024, some).needed
    assert found - frozen == (2 * 4096 * 4096 + 2 * 4096 * 1024) * (2 + 4)


def test_micro_batches_are_as_long_as_fits():
    most = lambda memory: activations.most_positions(model_of(), {}, 16 * GIB, memory, "gpu")
    assert [most(x * 1e9) for x in (18, 19.5, 24, 40)] == [512, 2048, 8192, 16384]
    assert activations.most_positions(model_of(), {}, 0, None, "cpu") == 4096


def test_devices_along_tensor_share_heads_and_not_the_width(monkeypatch):
    alone = layer_bytes(model_of(), 1, 1024).kept[""]
    monkeypatch.setattr(activations, "_mesh_of", lambda model: {"tensor": 8})
    shared = layer_bytes(model_of(), 1, 1024).kept[""]
    assert shared["attention"] == alone["attention"] // 8
    # All but what attention adds to the residual stream.
    products = shared["products"] - shared["attention"]
    assert products == 1024 * 2 * (4096 + 2 * 1024 + 2 * 14336) // 8 + 1024 * 2 * 4096


def test_a_pattern_keeps_the_same_in_all_its_layers(monkeypatch):
    """And each kind counts for itself."""
    monkeypatch.setitem(zoo.ARCHITECTURES, "alternating", alternating)
    config = alternating.config_of("d" + "ssf" * 4)
    model = nnx.eval_shape(lambda: alternating.Model(config, nnx.Rngs(0)))
    model.attention = "blocks"
    shape = Shape(1, 1024, 16, 2, 1, 1)
    each = layer_bytes(model, 1, 1024)
    d, s, _, f = (each.kept[kind] for kind in config.kinds[:4])
    last = 2 * (2 * s["products"] + f["products"])
    rest = d["attention"] + 2 * (2 * s["attention"] + f["attention"])
    room = (each.needed + rest + last) / 0.9
    assert chosen(room + 2, 0, shape, model) == Remat("products", 6, rest + last)
    assert chosen(room - 2, 0, shape, model).layers == 3


def test_experts_in_a_loop_keep_nothing():
    config = dict(
        model_type="qwen3_moe", hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=8, num_experts_per_tok=2, vocab_size=97, rms_norm_eps=1e-5, rope_theta=1e4,
        max_position_embeddings=512, tie_word_embeddings=False, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], hidden_act="silu", attention_bias=False,
    )  # fmt: skip
    model = zoo.abstract(config, jnp.bfloat16, jnp.bfloat16)
    model.attention = "blocks"
    kept = chosen(1e9, 0, Shape(1, 1024, 16, 2, 1, 1), model)
    attention = 4 * (16 * 2 + 4)
    # q, k, v, o, and the router's; a loop over experts, as here, keeps nothing.
    products = 2 * (64 + 32 + 32 + 64) + 4 * 8
    assert kept == Remat("products", None, 1024 * 2 * (attention + products))


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        (Remat("full"), "full: layers are recomputed in the backward pass"),
        (Remat("attention"), "attention of all layers kept for the backward pass"),
        (
            Remat("products", 1, 3 * GIB),
            "products of 1 of 3 layers kept for the backward pass (about 3 GiB per device); "
            "attention kept for the others",
        ),
    ],
)
def test_it_is_said(kept, told):
    assert plan.remat_told(kept, zoo.abstract(small_config().to_hf())) == told

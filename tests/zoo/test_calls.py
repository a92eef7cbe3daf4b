"""What a user tries first: lists, rows of any lengths, states, weights drawn anew; wrong calls."""

import ast
import dataclasses
import json
import pathlib
import pickle
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recipes.training import compiling
from tests.conftest import TINY, small_config
from tests.long_forms import full_but
from tests.zoo import twins
import zoo
from zoo import models
from zoo.parts import rope, spans

A, B = [5, 6, 7, 8, 9], [10, 11, 12]
PADDED = np.array([A, [*B, -100, 10**6]])


def test_lists_arrays_one_text_and_rows_are_the_same(small_model):
    expected = small_model(jnp.array([A]))
    assert expected.shape == (1, 5, 97)
    for tokens in ([A], np.array([A]), (tuple(A),), np.array([A], np.uint8), [np.array(A)]):
        np.testing.assert_array_equal(small_model(tokens), expected)
    for tokens in (A, tuple(A), np.array(A), jnp.array(A), range(5, 10)):
        np.testing.assert_array_equal(small_model(tokens), expected[0])
    in_jit = jax.jit(lambda model, tokens: model(tokens))(small_model, jnp.array(A))
    np.testing.assert_allclose(in_jit, expected[0], atol=1e-5)


def test_whole_numbers_of_any_kind_are_ids(small_model):
    """Of another order of bytes; and without a sign beside others, of which numpy makes floats."""
    np.testing.assert_array_equal(small_model(np.array(A, ">i4")), small_model(A))
    found = small_model([np.array(A, np.uint64), np.array(B)])
    np.testing.assert_array_equal(found, small_model([A, B]))
    found = small_model(np.array([A, [*B, 0, 0]]), np.array([5, 3], ">i8"))
    np.testing.assert_array_equal(found, small_model([A, B]))
    with pytest.raises(ValueError, match="token id 4611686018427387904 is beyond"):
        small_model(np.array([2**64 - 1], np.uint64))


def test_rows_of_different_lengths(small_model):
    found = small_model([A, B])
    assert found.shape == (2, 5, 97)
    np.testing.assert_allclose(found[0], small_model(A), atol=1e-5)
    np.testing.assert_allclose(found[1, :3], small_model(B), atol=1e-5)
    assert not found[1, 3:].any()  # nothing stands there
    for lengths in ([5, 3], np.array([5, 3]), jnp.array([5, 3])):
        np.testing.assert_array_equal(small_model(PADDED, lengths), found)
    run = jax.jit(lambda model, tokens, lengths: model(tokens, lengths))
    np.testing.assert_allclose(run(small_model, PADDED, jnp.array([5, 3])), found, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "shape"),
    full_but(
        [
            ("phi3", "long factors"),
            ("llama", "dynamic"),
            ("gemma3_text", "plain"),
            ("mixtral", "plain"),
            ("qwen3_5_text", "plain"),
        ],
        ("qwen3_5_text", "plain"),
    ),
)
def test_a_text_in_rows_is_the_text_alone(family, shape):
    """Also where the turn depends on a text's length: one is beyond the threshold, one is not."""
    model, long, short = twins.untrained(family, shape), twins.TOKENS[0], twins.TOKENS[1, :9]
    found = model([long.tolist(), short.tolist()])
    np.testing.assert_allclose(found[0], model(long), atol=1e-4)
    np.testing.assert_allclose(found[1, :9], model(short), atol=1e-4)
    assert not found[1, 9:].any()


def test_hidden_needs_no_spans(small_model):
    tokens = jnp.array([A])
    expected = small_model.hidden(tokens, spans.causal(1, 5))
    found = small_model.hidden(A)
    np.testing.assert_allclose(found, expected[0], atol=1e-5)
    np.testing.assert_array_equal(small_model.hidden(tokens)[0], found)
    np.testing.assert_allclose(small_model.unembed(expected)[0], small_model(A), atol=1e-5)
    np.testing.assert_allclose(small_model.unembed(found), small_model(A), atol=1e-5)
    found = small_model.hidden([A, B])
    np.testing.assert_allclose(found[1, :3], small_model.hidden(B), atol=1e-5)
    assert not found[1, 3:].any()
    with pytest.raises(ValueError, match=r"`where` has the lengths: hidden\(ids, spans.causal"):
        small_model.hidden(tokens, spans.causal(1, 5), lengths=[3])


def test_a_call_is_compiled_once_for_a_shape(small_model):
    """And sees what has changed since: weights, and how the model is put together."""
    first, doubled = small_model(A), 2 * small_model.head[...]
    with compiling.heard() as compiled:
        small_model(A[::-1])
        small_model.head.set_value(doubled)
        found = small_model(A)
    assert compiled.seconds() == 0
    np.testing.assert_allclose(found, 2 * first, rtol=1e-6)
    other = rope.Rope(rope_theta=5.0)
    small_model.config = dataclasses.replace(small_model.config, rope_parameters=other)
    assert np.abs(small_model(A) - found).max() > 1e-2


def test_states_after_every_block(small_model):
    found = small_model.hidden_states([A, B])
    assert found.shape == (4, 2, 5, 32)
    np.testing.assert_array_equal(found[0, 0], small_model.embedding[...][jnp.array(A)])
    np.testing.assert_allclose(found[-1], small_model.hidden([A, B]), atol=1e-5)
    np.testing.assert_allclose(found[:, 1, :3], small_model.hidden_states(B), atol=1e-5)
    assert not found[:, 1, 3:].any()


@pytest.mark.parametrize("family", full_but(twins.TWINS, "gpt_oss"))
def test_the_states_are_those_of_transformers(family):
    torch = pytest.importorskip("torch")
    original, folder = twins.twin(family, next(iter(twins.TWINS[family])))
    with torch.no_grad():
        theirs = original(torch.tensor(twins.TOKENS), output_hidden_states=True, use_cache=False)
    found = zoo.load(folder).hidden_states(twins.TOKENS)
    assert len(theirs.hidden_states) == len(found)
    for one, other in zip(found, theirs.hidden_states, strict=True):
        error = np.abs(one - other.numpy()).max()
        assert error <= 1e-4 * max(1.0, np.abs(other.numpy()).max())


WRONG = {
    "a text": ("hello", None, "is text: encode it"),
    "a list of texts": (["hello", "you"], None, "is text: encode it"),
    "floats": ([1.5, 2.0], None, "are integers|integers, and these are float64"),
    "an array of floats": (jnp.ones((2, 3)), None, "integers, and these are float32"),
    "truths": ([True, False], None, "integers, and these are bool"),
    "three axes": (np.ones((2, 3, 4), int), None, r"not of the shape \[2, 3, 4\]"),
    "nothing": ([], None, r"not of the shape \[0\]"),
    "an empty row": ([A, []], None, r"row 1 is not a text of one token or more: \[\]"),
    "a row of rows": ([A, [A]], None, "row 1 is not a text"),
    "a large id": ([1, 97], None, "token id 97 is beyond the model's 97 ids"),
    "a negative id": ([[1, -1]], None, "token id -1 is below 0"),
    "an id beyond 32 bits": (np.array([[1, 2**32 + 5]]), [2], "token id 4294967301 is beyond"),
    "a large id in a short row": ([A, [97]], None, "token id 97 is beyond"),
    "lengths of lists": ([A, B], [5, 3], "leave `lengths` out"),
    "too few lengths": (PADDED, [5], r"2 integers, one for each row, .* shape \[1\]"),
    "lengths that are no integers": (PADDED, [5.0, 3.0], "2 integers, .* float64"),
    "a long length": (PADDED, [6, 3], "row 0 has 5 tokens, so 1 to 5, not 6"),
    "no length": (PADDED, [5, 0], "row 1 has 5 tokens, so 1 to 5, not 0"),
    "padding without lengths": (
        PADDED,
        None,
        "-100 is below 0: rows that are padded need `lengths`",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_is_answered_by_a_sentence(small_model, case):
    tokens, lengths, told = WRONG[case]
    for asked in (small_model, small_model.hidden, small_model.hidden_states):
        with pytest.raises(ValueError, match=told):
            asked(tokens, lengths=lengths)


@pytest.mark.parametrize(
    ("family", "shape"), full_but(twins.SHAPES, *twins.RICHEST.items(), ("gpt_neox", "plain"))
)
def test_a_model_can_be_pickled(family, shape):
    """For other processes, and copies by other libraries."""
    graph = nnx.graphdef(zoo.abstract(twins.config_of(family, shape).to_dict()))
    assert pickle.loads(pickle.dumps(graph)) == graph


def test_a_model_that_was_pickled_says_the_same(small_model):
    again = pickle.loads(pickle.dumps(small_model))
    np.testing.assert_array_equal(again(A), small_model(A))


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("llama", r"has 1 blocks, and by model.config 3: change"),
        ("qwen3_5_text", r"has 1 blocks that are linear_attention, and by model.config 3"),
    ],
)
def test_blocks_that_are_fewer_than_the_config_says(family, told):
    """And not the last one again."""
    model = twins.untrained(family, "plain")
    first = lambda block: jax.tree.map(lambda x: x[:1], block)
    if family == "llama":
        graph, state = nnx.split(model.blocks)
        model.blocks = nnx.merge(graph, first(state))
    else:
        graph, state = nnx.split(model.blocks["linear_attention"])
        model.blocks["linear_attention"] = nnx.merge(graph, first(state))
    for asked in (model, model.hidden_states, lambda x: model(jnp.array([x]))):
        with pytest.raises(ValueError, match=told):
            asked(A)
    with pytest.raises(ValueError, match=told):
        zoo.generate.generate(model, [A], max_new_tokens=2)


@pytest.mark.parametrize("family", ["gpt2", "glm_moe_dsa"])
def test_a_text_that_is_too_long(family):
    """For learned positions; for attention that would choose among its tokens."""
    model = twins.untrained(family, "plain")
    most = model.config.longest_text
    assert most == {"gpt2": 96, "glm_moe_dsa": 128}[family]
    assert jax.eval_shape(model, np.ones(most, np.int32)).shape[0] == most
    with pytest.raises(ValueError, match=f"{most + 1} tokens: this {family} reads at most {most}"):
        model(np.ones(most + 1, int))


def test_a_model_with_weights_drawn_anew(tmp_path):
    config = small_config()
    model = zoo.fresh(config, seed=3)
    same = zoo.llama.Model(config, nnx.Rngs(3))
    for one, other in zip(weights(model), weights(same), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-7)
    assert not np.array_equal(zoo.fresh(config, seed=4).embedding, model.embedding)
    np.testing.assert_array_equal(zoo.fresh(config.to_hf(), seed=3).embedding, model.embedding)
    np.testing.assert_allclose(model(A), same(A), atol=1e-5)
    narrow = zoo.fresh(config, dtype=jnp.bfloat16, compute_dtype=jnp.float32)
    assert narrow.embedding[...].dtype == jnp.bfloat16
    assert narrow.hidden(A).dtype == jnp.float32


@pytest.mark.parametrize("seed", [2**32, -1])
def test_a_seed_is_a_number_of_32_bits(small_model, seed):
    """Another one would be the same as a smaller one."""
    for ask in (
        lambda: zoo.fresh(small_model.config, seed=seed),
        lambda: zoo.generate.generate(small_model, [A], max_new_tokens=1, seed=seed),
        lambda: zoo.lora.with_adapters(small_model, rank=2, seed=seed),
    ):
        with pytest.raises(ValueError, match=r"^seed=.*whole numbers from 0 to 2\*\*32 - 1"):
            ask()


def test_what_is_no_seed_is_refused():
    """Where no annotation is checked: in a notebook."""
    for seed in (None, "a", 1.5, jax.random.key(0)):
        with pytest.raises(ValueError, match=r"(?s)^seed=.*whole numbers from 0 to 2\*\*32 - 1"):
            models.refuse_seed(seed)
    models.refuse_seed(np.int64(3))


def test_a_folder_with_weights_drawn_anew_keeps_its_tokenizer(tmp_path):
    model = zoo.fresh(TINY / "model")
    zoo.save(model, tmp_path / "out")
    again = zoo.load(tmp_path / "out")
    np.testing.assert_array_equal(again.embedding, jnp.bfloat16(model.embedding[...]))
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (TINY / "model" / name).read_bytes()
    with pytest.raises(ValueError, match="model_type 'bert'"):
        zoo.fresh({"model_type": "bert"})


def test_what_a_config_json_says_besides_is_written_again(tmp_path):
    said = small_config().to_hf() | {"max_position_embeddings": 96, "pad_token_id": 2}
    said["dtype"] = "float32"
    zoo.save(zoo.fresh(said), tmp_path, dtype=jnp.float32)
    assert json.loads((tmp_path / "config.json").read_text()) == said
    nobody = zoo.fresh(said | {"architectures": None})  # as transformers writes a bare config
    zoo.save(nobody, tmp_path / "again", dtype=jnp.float32)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == said


def weights(model):
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))


def test_from_hf_leaves_the_config_json_as_it_was():
    """A Folder's is read once, and read by many."""
    import copy
    import json

    for family, shapes in twins.TWINS.items():
        for shape in shapes:
            said = json.loads(twins.config_of(family, shape).to_json_string(use_diff=True))
            before = copy.deepcopy(said)
            zoo.turns_alike_to(said)
            assert said == before


def started(code):
    command, root = [sys.executable, "-c", code], TINY.parent.parent
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return told.stdout.split()


KINDS = """
import numpy as np, zoo
model = zoo.load("recipes/tiny/model")
generate, with_adapters = zoo.generate.generate, zoo.lora.with_adapters
for ask in (
    lambda: model({"input_ids": [[1]]}), lambda: model(x for x in [1, 2]),
    lambda: generate(model, {"input_ids": [[1]]}, max_new_tokens=1),
    lambda: generate(model, (x for x in [[1]]), max_new_tokens=1),
    lambda: generate("a/path", [[1]], max_new_tokens=1), lambda: with_adapters("a/path", rank=2),
    lambda: zoo.reward.rewards("a/path", [[1]]), lambda: zoo.save("a/path", "out"),
    lambda: with_adapters(model, rank=2, targets=None),
):
    try:
        ask()
    except ValueError as error:
        print("_".join(str(error).split()))
with_adapters(model, rank=np.int64(2), alpha=np.float32(3))
"""


def test_what_is_of_another_kind_is_answered_by_a_sentence():
    """Where no annotation is checked: in a notebook."""
    asks = ['give_its_["input_ids"]', "give_list()_of_it"]
    gives = ["zoo.load(path)_gives_one"] * 2
    gives += ["zoo.reward.load(path)_gives_one", "zoo.load(path)_gives_one", "like_['q_proj']"]
    told = started(KINDS)
    assert len(told) == 9
    for line, end in zip(told, [*asks, *asks, *gives], strict=True):
        assert line.endswith(end), line


def test_import_zoo_imports_neither_jax_nor_flax():
    heavy = "{'jax', 'flax', 'numpy', 'huggingface_hub'} & sys.modules.keys()"
    code = (
        f"import sys, zoo\ndir(zoo), zoo.__all__\nprint(sorted({heavy}))\n"
        "zoo.llama\nprint('jax' in sys.modules)"
    )
    assert started(code) == ["[]", "True"]
    code = (
        "import sys\nfrom zoo.__main__ import main\nmain(['--help'])\nmain(['./nowhere'])\n"
        f"print(sorted({heavy}))"
    )
    assert started(code)[-1] == "[]"


def test_dir_shows_what_is_meant_for_users():
    """And each name is known to type checkers, and has a home."""
    assert dir(zoo) == sorted(zoo.__all__) == sorted({*zoo.HOMES, "generate", "lora", "reward"})
    tree = ast.parse(pathlib.Path(zoo.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    known = {alias.name for node in block.body for alias in node.names}
    assert known == set(zoo.__all__)
    for name in zoo.__all__:
        assert getattr(zoo, name).__doc__


def test_files_of_the_zoo_are_names_of_it():
    from zoo import llama

    assert zoo.llama.Model is llama.Model
    assert zoo.ARCHITECTURES["llama"] is llama
    assert not hasattr(zoo, "nothing")
    with pytest.raises(AttributeError, match=r"the zoo has no 'nothing': dir\(zoo\) names"):
        zoo.nothing  # noqa: B018


def test_a_library_that_is_missing_is_named(monkeypatch):
    """And not called a name that the zoo lacks."""

    def missing(_):
        raise ModuleNotFoundError("No module named 'jax'", name="jax")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="jax"):
        zoo.other  # noqa: B018

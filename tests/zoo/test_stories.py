"""A real, trained Llama: its own text, its own numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import zoo
from zoo import generate


@pytest.fixture(scope="module")
def stories():
    from tests.conftest import SHARED

    folder = SHARED / "data" / "weights" / "stories260K"
    if not folder.is_dir():
        pytest.skip("the folder of shared facts is not here")
    return zoo.load(folder / "hf"), json.loads((folder / "golden.json").read_text()), folder / "hf"


def test_greedy_text_is_the_golden_one(stories):
    model, golden, folder = stories
    (ids,) = generate.generate(model, [golden["prompt_ids"]], max_new_tokens=200)
    assert golden["prompt_ids"] + ids == golden["greedy_ids_201"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == golden["text"].strip()


def test_rows_of_different_lengths_do_not_touch_each_other(stories):
    model, golden, _ = stories
    ids = golden["greedy_ids_201"]
    together = generate.generate(model, [ids[:1], ids[:30], ids[:9]], max_new_tokens=20)
    assert together == [ids[1:21], ids[30:50], ids[9:29]]


def test_generation_stops_with_the_stop_id(stories):
    model, golden, _ = stories
    ids = golden["greedy_ids_201"]
    (found,) = generate.generate(model, [ids[:5]], max_new_tokens=50, stop_ids=[426])
    assert found == ids[5 : ids.index(426) + 1]


def test_ids_beyond_the_embedding_are_refused(stories):
    with pytest.raises(ValueError, match="512"):
        generate.generate(stories[0], [[1, 512]], max_new_tokens=1)


def test_golden_numbers(stories):
    """Worked out once in float64, without any library."""
    model, golden, _ = stories
    first = np.asarray(model(jnp.asarray([[1]])))[0, 0, :8]
    np.testing.assert_allclose(first, golden["logits_bos_first8"], atol=1e-4)
    ids = jnp.asarray([golden["scored_ids"]])
    logps = jax.nn.log_softmax(model(ids[:, :-1]))
    logps = np.asarray(jnp.take_along_axis(logps, ids[:, 1:, None], -1))[0, :, 0]
    np.testing.assert_allclose(logps, golden["scored_logprobs"], atol=1e-4)
    assert logps.sum() == pytest.approx(golden["scored_sum"], abs=1e-4)

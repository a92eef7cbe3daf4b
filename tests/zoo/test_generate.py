"""Drawing tokens, keeping keys, and what is refused."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import small_config
from tests.long_forms import full_but
from tests.zoo import twins
import zoo
from zoo import generate
from zoo.parts import token_rows
from zoo.sampling import GREEDY, Sampling, by_probability, drawn, likeliest, way

LOGITS = jnp.log(jnp.array([[0.05, 0.5, 0.3, 0.15]]))


def seen(sampling, how=drawn, times=400):
    keys = jax.random.split(jax.random.key(0), times)
    sampling = jax.tree.map(jnp.asarray, sampling)
    ids = jax.vmap(lambda key: how(LOGITS, sampling, key)[0])(keys)
    return np.bincount(np.asarray(ids), minlength=4) / times


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.05, 0.5, 0.3, 0.15]),
        (Sampling(1.0, top_k=2), [0, 5 / 8, 3 / 8, 0]),
        (Sampling(1.0, top_p=0.79), [0, 5 / 8, 3 / 8, 0]),  # 0.5 + 0.3 is enough
        (Sampling(1.0, top_p=0.81), [0, 0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95]),
        (Sampling(1.0, min_p=0.5), [0, 5 / 8, 3 / 8, 0]),  # 0.15 is less than half of 0.5
        (Sampling(1.0, top_p=1e-6), [0, 1, 0, 0]),
        (Sampling(0.5), np.array([0.05**2, 0.25, 0.09, 0.15**2]) / 0.365),
        (Sampling(1.0, top_k=1, min_p=1.0), [0, 1, 0, 0]),
        (Sampling(1.0, top_k=3, top_p=0.7), [0, 5 / 8, 3 / 8, 0]),  # of 0.95: 0.53 + 0.32
        (Sampling(1.0, top_k=2, top_p=0.6), [0, 1, 0, 0]),  # of 0.8: 0.625
        (Sampling(1e-40), [0, 1, 0, 0]),
        (Sampling(1e-40, top_k=2), [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_by_what_remains(sampling, expected):
    found = seen(sampling)
    np.testing.assert_allclose(found, expected, atol=0.07)
    assert not found[np.asarray(expected) == 0].any()


def test_more_than_all_tokens_is_all_of_them(model):
    """Beyond what 32 bits hold, too."""
    found = [
        generate.generate(model, [[1]], max_new_tokens=8, sampling=Sampling(1.0, top_k=k))
        for k in (97, 2**31, 2**32 + 1)
    ]
    assert found[0] == found[1] == found[2]


def test_numbers_of_64_bits_change_nothing(model):
    found = generate.generate(model, [[5, 6, 7], [8]], max_new_tokens=4)
    with jax.enable_x64(True):
        assert generate.generate(model, [[5, 6, 7], [8]], max_new_tokens=4) == found


def test_what_needs_no_order_sorts_nothing():
    assert [way(GREEDY), way(Sampling(0.7))] == [likeliest, by_probability]
    for filtered in (dict(top_k=5), dict(top_p=0.9), dict(min_p=0.1)):
        assert way(Sampling(0.7, **filtered)) is drawn
    cold = np.array([0.05**2, 0.25, 0.09, 0.15**2]) / 0.365
    for temperature, expected in ((1.0, [0.05, 0.5, 0.3, 0.15]), (0.5, cold)):
        found = seen(Sampling(temperature), by_probability)
        np.testing.assert_allclose(found, expected, atol=0.07)
    assert likeliest(LOGITS, GREEDY, jax.random.key(0)).tolist() == [1]


@pytest.fixture(scope="module")
def model():
    return twins.untrained("gemma3_text", "plain")


def test_a_seed_is_a_text(model):
    write = lambda seed: generate.generate(
        model, [[5, 6, 7]], max_new_tokens=24, sampling=Sampling(1.5), seed=seed
    )
    assert write(0) == write(0) != write(1)
    for seed in (-1, 2**32):  # which would be others'
        with pytest.raises(ValueError, match="seeds are whole numbers from 0 to"):
            write(seed)


@pytest.mark.parametrize(
    "family", full_but(("gemma3_text", "qwen3_5_text", "deepseek_v3", "nemotron_h"), "gemma3_text")
)
def test_a_prompt_that_is_there_several_times_is_read_once(family, monkeypatch):
    """As each alone; what is drawn after it differs from row to row."""
    model = twins.untrained(family, next(iter(twins.TWINS[family])))
    prompts, how = [[8], [8], [5, 6, 7], [8], [5, 6, 7]], dict(max_new_tokens=8)
    alone = [generate.generate(model, [one], **how)[0] for one in prompts]
    read, rows = generate._read, []
    monkeypatch.setattr(generate, "_read", lambda *a: rows.append(len(a[3])) or read(*a))
    assert generate.generate(model, prompts, **how) == alone
    drawn = generate.generate(model, [[5, 6, 7]] * 4, **how, sampling=Sampling(1.5))
    assert rows == [2, 1]
    assert len({*map(tuple, drawn)}) == 4


def test_answers_to_one_prompt_share_what_is_kept_of_it(model, monkeypatch):
    """Three times two and once four: by twos, so the last prompt is there twice."""
    grow, kept = generate._continue, []

    def told(*arguments):
        kept.append([{x.shape[1] for x in jax.tree.leaves(arguments[i])} for i in (4, 5)])
        return grow(*arguments)

    monkeypatch.setattr(generate, "_continue", told)
    prompts = [[8], [9], [5, 6], [8], [9], [5, 6], [7], [7], [7], [7]]
    texts = generate.generate(model, prompts, max_new_tokens=6)
    assert kept == [[{10}, {5}]]
    assert texts[:3] == texts[3:6] and texts[6] == texts[9]
    for row in (0, 1, 2, 6):
        assert texts[row] == generate.generate(model, prompts[row : row + 1], max_new_tokens=6)[0]


def test_no_length_compiles_afresh(model):
    """Within a power of two of room, prompts of any length run the same two programs."""
    write = lambda length, more: generate.generate(model, [[3] * length, [4]], max_new_tokens=more)
    write(5, 40)
    before = generate._read._cache_size(), generate._continue._cache_size()
    for length, more in ((3, 50), (40, 20), (1, 1), (9, 0)):
        texts = write(length, more)
        assert [len(text) for text in texts] == [more, more]
    assert (generate._read._cache_size(), generate._continue._cache_size()) == before


def test_many_short_prompts_are_not_padded_far(model, monkeypatch):
    assert [generate.room_for(length) for length in (1, 16, 64, 65)] == [64, 64, 64, 128]
    assert [generate.room_for(length, 20) for length in (1, 16, 64)] == [1, 64, 64]
    assert [generate.room_for(length, 32) for length in (1, 8, 16, 17, 32, 33, 64, 65)] == [
        1, 8, 16, 32, 32, 64, 64, 128
    ]  # fmt: skip
    prompts = [[5 + i % 7, 9 + i // 7][: 1 + i % 2] for i in range(40)]
    read, shapes = generate._read, []

    def told(graph, room, state, tokens, lengths):
        shapes.append(tokens.shape)
        return read(graph, room, state, tokens, lengths)

    monkeypatch.setattr(generate, "_read", told)
    together = generate.generate(model, prompts, max_new_tokens=5)
    assert together[:2] == [generate.generate(model, [p], max_new_tokens=5)[0] for p in prompts[:2]]
    assert shapes == [(27, 2), (1, 64), (1, 64)]


@pytest.mark.parametrize("sampling", [generate.GREEDY, Sampling(1.5)], ids=["greedy", "drawn"])
def test_a_stream_is_the_same_text_a_few_tokens_at_a_time(model, sampling):
    prompts, how = [[5, 6, 7], [8]], dict(max_new_tokens=11, sampling=sampling, seed=3)
    whole = generate.generate(model, prompts, **how)
    stop = whole[0][4]
    how["stop_ids"] = [stop]
    whole = generate.generate(model, prompts, **how)
    pieces = list(generate.stream(model, prompts, **how, at_once=4))
    assert [[one for piece in pieces for one in piece[row]] for row in (0, 1)] == whole
    assert [len(piece[1]) for piece in pieces[:2]] == [4, 4]


@pytest.mark.parametrize(
    "how", [dict(top_k=4, top_p=0.7), dict(top_k=5, min_p=0.2), dict(top_p=0.8, min_p=0.1)]
)
def test_what_remains_is_what_transformers_leaves(how):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits = np.random.default_rng(3).standard_normal((1, 12)).astype(np.float32)
    sampling = jax.tree.map(jnp.asarray, Sampling(0.8, **how))
    keys = jax.random.split(jax.random.key(0), 4000)
    found = jax.vmap(lambda key: drawn(jnp.asarray(logits), sampling, key)[0])(keys)
    kinds = {"top_k": "TopK", "top_p": "TopP", "min_p": "MinP"}
    left = torch.tensor(logits) / 0.8
    for name, value in how.items():
        left = getattr(transformers, f"{kinds[name]}LogitsWarper")(value)(None, left)
    wanted = torch.softmax(left, -1)[0].numpy()
    np.testing.assert_allclose(np.bincount(found, minlength=12) / 4000, wanted, atol=0.03)


def test_a_row_stops_alone(model):
    free = generate.generate(model, [[5, 6, 7], [8]], max_new_tokens=20)
    stop = free[0][4]
    found = generate.generate(model, [[5, 6, 7], [8]], max_new_tokens=20, stop_ids=[stop])
    for text, whole in zip(found, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 20
        assert text == whole[:end]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (dict(prompts=[[]]), "at least one token each"),
        (dict(prompts=[]), "there is no prompt"),
        (dict(prompts=np.array([[1.5]])), "ids, so integers, and these are float64"),
        (dict(max_new_tokens=-3), "max_new_tokens=-3 .* at least 0"),
        (dict(prompts=[[97]]), "token id 97 is beyond the model's 97 ids"),
        (dict(prompts=[[-1]]), "token id -1 is below 0: .* labels"),
        (dict(sampling=Sampling(-1.0)), "temperature"),
        (dict(sampling=Sampling("0.7")), "all are numbers"),
        (dict(sampling=Sampling(1.0, top_k=2.5)), "top_k a whole one"),
        (dict(sampling=Sampling(1.0, top_p=0.0)), "top_p"),
        (dict(sampling=Sampling(0.0, top_k=5)), "likeliest token is taken anyway"),
    ],
)
def test_what_means_nothing_is_refused(model, arguments, told):
    with pytest.raises(ValueError, match=told):
        generate.generate(model, **(dict(prompts=[[1]], max_new_tokens=2) | arguments))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("3", 1, ()), "max_new_tokens='3' is no whole number"),
        ((3.0, 1, ()), "max_new_tokens=3.0 is no whole number"),
        ((3, 1, 4), r"in a list, like \[2\], and not 4"),
        ((3, 1, None), "stop_ids are ids in a list"),
        ((3, 1, ["<end>"]), "stop_ids are ids in a list"),
        ((3, 1, {1.5}), "stop_ids are ids in a list"),
        ((3, 1, [2**40]), "stop_ids are ids in a list"),
        ((3, 1, np.array([1.5])), "stop_ids are ids in a list"),
        ((3, 1, np.array([[1]])), "stop_ids are ids in a list"),
    ],
)
def test_what_is_of_another_kind_is_refused(given, told):
    """Where no annotation is checked: in a notebook."""
    with pytest.raises(ValueError, match=told):
        generate._checked(*given)


def test_no_token_at_a_time_is_refused_and_none_at_all_is_nothing(model):
    with pytest.raises(ValueError, match=r"at_once=0 is no .* at least 1"):
        next(generate.stream(model, [[1]], max_new_tokens=2, at_once=0))
    assert generate.generate(model, [[1]], max_new_tokens=0) == [[]]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("Hello", "'Hello' is text: encode it with the tokenizer"),
        (["Hello"], "is text: encode it with the tokenizer"),
        ([1, 15, 7], r"prompts are lists of ids.*: write \[ids\]"),
        (np.array([1, 15, 7]), r"these are the ids of one: write \[ids\]"),
        ([[[1, 15]], [[7]]], "these are lists of such lists"),
        (np.ones((1, 2, 3), int), "these are lists of such lists"),
    ],
)
def test_what_is_not_several_texts_is_refused(given, told):
    with pytest.raises(ValueError, match=told):
        token_rows.check_several(given, "prompts")
    token_rows.check_several([[1], np.array([2, 3])], "prompts")


def test_prompts_and_stop_ids_are_lists_or_arrays(model):
    lists = generate.generate(model, [[5, 6, 7], [8]], max_new_tokens=4)
    for stops in (lists[0][1:2], {lists[0][1]}, np.array(lists[0][1:2]), jnp.array(lists[0][1:2])):
        found = generate.generate(model, [[5, 6, 7]], max_new_tokens=4, stop_ids=stops)
        assert found == [lists[0][: lists[0].index(lists[0][1]) + 1]]
    for array in (np.array, jnp.array):
        given = [array([5, 6, 7]), array([8])]
        assert generate.generate(model, given, max_new_tokens=4) == lists
    assert generate.generate(model, jnp.array([[5, 6, 7]]), max_new_tokens=4) == lists[:1]
    for padded in (np.array([[5, 6, 7], [8, -100, 10**6]]), [[5, 6, 7], [8, 0, 0]]):
        found = generate.generate(model, padded, lengths=[3, 1], max_new_tokens=4)
        assert found == lists


@pytest.mark.parametrize(
    ("prompts", "lengths", "told"),
    [
        ([[5, 6, 7], [8]], [3, 1], "array of ids"),
        (np.array([[5, 6], [8, 0]]), [2], "lengths are 2 integers"),
        (np.array([[5, 6], [8, 0]]), [2, 0], "row 1 has 2 tokens, so 1 to 2, not 0"),
        (np.array([[5, 6], [8, -1]]), None, "rows that are padded need `lengths`"),
    ],
)
def test_lengths_are_those_of_the_rows(model, prompts, lengths, told):
    with pytest.raises(ValueError, match=told):
        generate.generate(model, prompts, lengths=lengths, max_new_tokens=4)


def test_ids_out_of_range_are_refused_before_the_model_runs(model):
    with pytest.raises(ValueError, match="token id 200 is beyond"):
        model(jnp.array([[1, 200]]))


def test_a_text_may_not_outgrow_the_model():
    model = twins.untrained("gpt2", "plain")
    assert generate.most_new_tokens(model, 90) == 6
    assert len(generate.generate(model, [[3] * 90], max_new_tokens=6)[0]) == 6
    with pytest.raises(ValueError, match=r"90 tokens cannot grow by 7.*reads 6 more"):
        generate.generate(model, [[3] * 90], max_new_tokens=7)


@pytest.mark.parametrize("family", full_but(("gemma3_text", "qwen3_5_text"), "gemma3_text"))
def test_a_long_text_is_read_again_where_its_room_ends(family, monkeypatch):
    model = twins.untrained(family, "plain")
    write = lambda: generate.generate(model, [[5, 6, 7], [8]], max_new_tokens=11)
    whole, reads = write(), []
    monkeypatch.setattr(generate, "ROOM", 4)
    read = generate._read
    monkeypatch.setattr(generate, "_read", lambda *given: reads.append(given) or read(*given))
    assert write() == whole
    assert len(reads) == 3


def test_a_text_that_outgrows_what_the_model_was_made_for_is_warned_of():
    model = zoo.fresh(small_config().to_hf() | {"max_position_embeddings": 32})
    with warnings.catch_warnings(action="error"):
        generate.generate(model, [[3] * 28], max_new_tokens=4)
    with pytest.warns(UserWarning, match="longer than the 32 tokens that .* made for") as told:
        generate.generate(model, [[3] * 28, [3]], max_new_tokens=12)
    assert len(told) == 1


@pytest.mark.full
def test_a_text_that_turns_otherwise_is_read_again():
    """Past longrope's threshold, 16, every next token is that of the whole text, read afresh."""
    model = twins.untrained("phi3", "long factors")
    prompts = [[5, 6, 7] * 4 + [5], [8] * 14, [9] * 17]
    found = generate.generate(model, prompts, max_new_tokens=6)
    for prompt, text in zip(prompts, found, strict=True):
        whole = jnp.asarray([prompt + text])
        for end in range(len(prompt), whole.shape[1]):
            assert int(model(whole[:, :end])[0, -1].argmax()) == int(whole[0, end])

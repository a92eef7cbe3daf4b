"""A zoo model with lm-evaluation-harness's three kinds of request, packed as in training.

Continuations of one context share it (`recipes/data/packed/streams.py`), several contexts share a
row, and only the tokens of continuations meet the vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import itertools
from typing import Any

from flax import nnx
import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree
import numpy as np

from checkpoints_io.errors import BadInput
from recipes import terminal
from recipes.data.ids.examples import Answer, AnswerIds, Example, ListIds
from recipes.data.packed import batches, shapes
from recipes.data.packed.batches import Place
from recipes.data.packed.packing import Packed
from recipes.training import activations, logps, plan
import zoo
from zoo.parts import sharding
from zoo.text.chat_tokenizer import ChatTokenizer
from zoo.text.tokenizer import said

LONGEST = 2048  # tokens, for a model that does not give its limit: the harness's own default
TOGETHER = 256  # contexts that are packed at a time
AT_ONCE = 4  # tokens that are generated between two checks for a stop sequence
MOST = 2**16  # tokens in all rows that are generated at a time


def model_of(
    model: zoo.Model, tokenizer: ChatTokenizer, between: Callable[[], None] = lambda: None
) -> object:
    """The model as an instance of one of the harness's own model classes.

    The harness must be installed: see `tasks.found`. `between` is called before each batch.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.models import utils
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    longest = zoo.longest_text(model) or LONGEST

    class OfTheZoo(TemplateLM):
        """The methods that the harness calls; they encode and cut tokens as its `hf` model does."""

        eot_token_id = tokenizer.eos_id
        prefix_token_id = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        tokenizer_name = str(tokenizer.source).replace("/", "__")
        max_length = longest

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: object
        ) -> list[int]:
            if add_special_tokens is False:
                return tokenizer.own.encode(string)[0]
            return tokenizer.encode(string)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            text = tokenizer.chat_text(chat_history, add_generation_prompt=add_generation_prompt)
            if add_generation_prompt:
                return text
            begun = chat_history[-1]["content"].strip()  # the answer continues these words
            return text[: text.rindex(begun) + len(begun)]

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return tokenizer.chat_template if chat_template else None

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[object, list[int], list[int]]], **_: object
        ) -> list[tuple[float, bool]]:
            found = scored(
                model, [(before, after) for _, before, after in requests], longest, between
            )
            for request, answer in zip(requests, found, strict=True):
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            windows = [
                [
                    make_disjoint_window(window)
                    for window in get_rolling_token_windows(
                        self.tok_encode(request.args[0]), self.prefix_token_id, longest, 1
                    )
                ]
                for request in requests
            ]
            every = scored(model, [*itertools.chain(*windows)], longest, between)
            logps_ = iter([logp for logp, _ in every])
            return [sum(itertools.islice(logps_, len(some))) for some in windows]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            eos = None if tokenizer.eos_id is None else tokenizer.decode([tokenizer.eos_id])
            found: dict[int, str] = {}
            by_how: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                by_how.setdefault(repr(request.args[1]), []).append(i)
            for numbers in by_how.values():
                how = utils.normalize_gen_kwargs(requests[numbers[0]].args[1], 256)
                until = utils.handle_stop_sequences(how.pop("until", None), eos=eos)
                contexts = [self.tok_encode(requests[i].args[0]) for i in numbers]
                texts = continued(model, tokenizer, contexts, dict(how), until, longest, between)
                for i, text in zip(numbers, texts, strict=True):
                    found[i] = utils.postprocess_generated_text(text, until, None)
            return [found[i] for i in range(len(requests))]

    return OfTheZoo()


def scored(
    model: zoo.Model,
    asked: Sequence[tuple[Sequence[int], Sequence[int]]],
    longest: int,
    between: Callable[[], None] = lambda: None,
) -> list[tuple[float, bool]]:
    """Log p of each continuation given its context, and whether greedy decoding gives it.

    A context that is too long loses its beginning.
    """
    cut, numbers = [], {}
    for i, (before, after) in enumerate(asked):
        if len(after) > longest:
            raise BadInput(
                f"a continuation has {len(after)} tokens, but the model is limited to {longest}"
            )
        kept = tuple(before[max(0, len(before) + len(after) - longest - 1) :])
        numbers.setdefault(kept, []).append(i)
        cut.append(tuple(after))
    # Long ones first, so that the time left is overestimated rather than underestimated.
    order = sorted(numbers, key=lambda kept: -len(kept))
    examples, of = [], []
    for kept in order:
        each = [*dict.fromkeys(cut[i] for i in numbers[kept])]
        for first in range(0, len(each), 2):
            several = each[first : first + 2]  # two share a context in a stream
            examples.append(_example(len(examples), kept, several))
            of.append([[i for i in numbers[kept] if cut[i] == one] for one in several])
    answers: list[tuple[float, bool]] = [(0.0, True)] * len(asked)
    sums, hits = _of_examples(model, examples, between)
    for row, groups in enumerate(of):
        for column, group in enumerate(groups):
            for i in group:
                is_greedy = round(float(hits[row, column])) == len(cut[i])
                answers[i] = float(sums[row, column]), is_greedy
    return answers


def _example(row: int, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> Example:
    array = lambda ids: np.array(ids, np.int32)
    each = [Answer(array(ids), np.ones(len(ids), bool)) for ids in continuations]
    if len(each) == 1:
        return AnswerIds(row, array(context), *each[0])
    return ListIds(row, array(context), tuple(each), tuple(range(len(each))))


def _of_examples(
    model: zoo.Model, examples: Sequence[Example], between: Callable[[], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [examples, A], and how many of the tokens are the likeliest ones."""
    graph, weights = nnx.split(model)
    params, mesh = nnx.to_pure_dict(weights), sharding.mesh_under(model.embedding[...])
    alike = zoo.turns_alike_to(model.config.to_hf())
    with jax.set_mesh(mesh):
        shape = shapes.choose(
            examples, per_update=min(TOGETHER, len(examples)), shards=sharding.data_shards(mesh),
            most=activations.most_positions(
                model, {}, plan.held(params), *activations.device_here()
            ),
            alike=alike, context=mesh.shape["context"],
        )  # fmt: skip
        place = Place(shape, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        sums, hits = [], []
        every = -(-len(examples) // shape.examples)
        for update in terminal.bar(batches.in_order(examples, place), total=every, unit="batch"):
            total = np.zeros((2, shape.examples, shape.answers), np.float32)
            for batch in update.micro_batches:
                between()
                found = _scores(graph, params, batches.put(batch, place))
                total += np.stack([np.asarray(found.logps), np.asarray(found.is_best)])
            sums.append(total[0, : len(update.source_rows)])
            hits.append(total[1, : len(update.source_rows)])
    return np.concatenate(sums), np.concatenate(hits)


@functools.partial(jax.jit, static_argnums=0)
def _scores(graph: nnx.GraphDef, params: PyTree, batch: Packed) -> logps.Scores:
    return logps.answer_scores(nnx.merge(graph, nnx.State(params)), batch)


def continued(
    model: zoo.Model,
    tokenizer: ChatTokenizer,
    contexts: Sequence[list[int]],
    how: Mapping[str, Any],
    until: Sequence[str],
    longest: int,
    between: Callable[[], None] = lambda: None,
) -> list[str]:
    """A continuation of each context, up to a stop token or to a text of `until`, perhaps in it."""
    most = how["max_gen_toks"]
    if most >= longest:
        raise BadInput(f"a task asks for {most} tokens, but the model is limited to {longest}")
    sampling = zoo.generate.GREEDY
    if how.get("do_sample") and how.get("temperature"):
        sampling = zoo.generate.Sampling(
            how["temperature"], top_k=how.get("top_k") or 0, top_p=how.get("top_p") or 1.0
        )
    cut = [ids[-(longest - most) :] for ids in contexts]
    order = sorted(range(len(cut)), key=lambda i: len(cut[i]))
    texts: dict[int, str] = {}
    for some in _batches(order, [len(ids) + most for ids in cut]):
        prompts = [cut[i] for i in some]
        ids: list[list[int]] = [[] for _ in some]
        told = [""] * len(some)
        stream = zoo.generate.stream(
            model, prompts, max_new_tokens=most, stop_ids=tokenizer.stop_ids, sampling=sampling,
            at_once=AT_ONCE,
        )  # fmt: skip
        for added in stream:
            between()
            for own, new in zip(ids, added, strict=True):
                own += new
            told = [_text(tokenizer, own) for own in ids]
            ends = [
                own[-1] in tokenizer.stop_ids or any(stop and stop in text for stop in until)
                for own, text in zip(ids, told, strict=True)
            ]
            if all(ends):
                break
        texts |= zip(some, told, strict=True)
    return [texts[i] for i in range(len(cut))]


def _text(tokenizer: ChatTokenizer, ids: Sequence[int]) -> str:
    return said(tokenizer.own, [], ids)


def _batches(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Batches in the given order whose rows have room for at most MOST tokens together."""
    some: list[int] = []
    for i in order:
        if some and (len(some) + 1) * lengths[i] > MOST:
            yield some
            some = []
        some.append(i)
    if some:
        yield some

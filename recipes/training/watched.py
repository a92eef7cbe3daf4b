"""Answers of policy and reference to a few prompts during training, with token log-ratios.

Each answer is an object of samples.jsonl, with the log-ratio of each of its tokens: how much more
likely the policy finds it than the reference does, in nats.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
import numpy as np

from recipes.data import shown
from recipes.data.ids.examples import Example
from recipes.training import logps, samples
from recipes.training.run import Run
import zoo
from zoo import generate
from zoo.generate import GREEDY, Sampling
from zoo.text.tokenizer import Tokenizer

Sample = dict[str, Any]  # as it stands in samples.jsonl
Ids = list[list[int]]  # an answer to each prompt; empty: there is none
GIVEN = "wanted", "unwanted"  # what `samples.given` calls the answers of the data


class SamplePrompt(NamedTuple):
    """A prompt to be answered."""

    where: dict[str, str | int]  # the held-out set, and the row
    ids: list[int]
    text: str
    given: dict[str, list[int]]  # answers that the data has


class ReferenceSamples(NamedTuple):
    """The answers of a fixed reference, and how likely it finds answers that do not change."""

    answers: dict[float, Ids]  # by temperature
    logps: dict[tuple[float, str], list[Float[np.ndarray, " A"]]]  # by temperature and name


def prompts_of(run: Run) -> list[SamplePrompt]:
    """The prompts to answer: the user's own, or held-out, or training ones, evenly spread."""
    count, own = run.watching.count, run.watching.prompts
    if own is not None:
        found = [
            SamplePrompt({"row": one.row}, one.ids, "", {}) for one in samples.spread(own, count)
        ]
    else:
        each = {
            tuple(one.prompt.tolist()): ({"set": part.name, "row": one.row}, one)
            for part in (run.held_out or run.parts)
            for one in part.examples
        }
        found = [
            SamplePrompt(where, one.prompt.tolist(), "", _given(one, run.sample_tokens))
            for where, one in samples.spread([*each.values()], count)
        ]
    turns = samples.last_turns(run.tokenizer, [one.ids for one in found], wide=None)
    return [one._replace(text=turn) for one, turn in zip(found, turns, strict=True)]


def _given(example: Example, most: int) -> dict[str, list[int]]:
    """The answers of the data, cut as those of the models are."""
    return {name: one.ids.tolist()[:most] for name, one in samples.given(example).items()}


def reference_samples(model: zoo.Model, run: Run) -> ReferenceSamples | None:
    """The samples of a fixed reference; None if no samples are taken."""
    if run.watching.every is None:
        return None
    prompts = prompts_of(run)
    answers = _answers(model, prompts, run, step=0)
    fixed = {
        (temperature, name): _logps(model, prompts, texts)
        for temperature, those in answers.items()
        for name, texts in _texts(prompts, {"reference": those}, temperature).items()
    }
    return ReferenceSamples(answers, fixed)


def taken(
    policy: zoo.Model,
    reference: zoo.Model | None,
    theirs: ReferenceSamples | None,
    run: Run,
    step: int,
) -> list[Sample]:
    """The samples of a step: of every prompt, at each temperature.

    `theirs` is what is known of a reference that stays as it is; of one in memory all is known.
    """
    prompts = prompts_of(run)
    if theirs is None and reference is not None:
        theirs = reference_samples(reference, run)
    found: list[Sample] = []
    for temperature, ours in _answers(policy, prompts, run, step).items():
        both = {"policy": ours} | ({"reference": theirs.answers[temperature]} if theirs else {})
        texts, ratios = _texts(prompts, both, temperature), {}
        for name, ids in texts.items():
            known = theirs.logps.get((temperature, name)) if theirs else None
            if known is None and reference is not None:
                known = _logps(reference, prompts, ids)
            if known is not None:
                mine = _logps(policy, prompts, ids)
                ratios[name] = [a - b for a, b in zip(mine, known, strict=True)]
        for i, prompt in enumerate(prompts):
            own = {name: ids[i] for name, ids in texts.items() if ids[i]}
            of_each = {name: ratios[name][i] for name in own if name in ratios}
            found.append(_sample(prompt, own, of_each, temperature, run, step))
    return found


def excerpt(some: Sequence[Sample], step: int, total: int) -> str:
    """The first sample, for the terminal."""
    first = some[0]
    names = ("prompt", "reference", "policy")
    lines = [samples.block(name, first[name]) for name in names if first[name] is not None]
    return "\n".join([f"{f'step {step}/{total}':<14} one of {len(some)} samples", *lines])


def _answers(
    model: zoo.Model, prompts: list[SamplePrompt], run: Run, step: int
) -> dict[float, Ids]:
    """Answers by temperature, with another seed for each step."""
    ids, most = [one.ids for one in prompts], run.sample_tokens
    room = generate.most_new_tokens(model, max(map(len, ids)))
    most = most if room is None else min(most, room)
    seed = int(np.random.SeedSequence([run.seed, step]).generate_state(1)[0] >> 1)
    drawn = [Sampling(temperature=t) for t in [run.watching.temperature] if t is not None]
    return {
        sampling.temperature: [
            answer
            for some in _at_once(ids, most)
            for answer in generate.generate(
                model, [ids[i] for i in some], max_new_tokens=most, stop_ids=run.stop_ids,
                sampling=sampling, seed=seed,
            )
        ]
        for sampling in (GREEDY, *drawn)
    }  # fmt: skip


def _logps(model: zoo.Model, prompts: list[SamplePrompt], answers: Ids) -> list[np.ndarray]:
    ids = [one.ids for one in prompts]
    most = max(map(len, answers))
    return [
        found
        for some in _at_once(ids, most)
        for found in logps.of_texts(model, [ids[i] for i in some], [answers[i] for i in some])
    ]


def _at_once(prompts: Ids, most: int) -> Iterator[range]:
    """Which of the prompts may be answered together."""
    count = max(1, samples.ROOM // (most + max(map(len, prompts))))
    yield from (range(i, min(i + count, len(prompts))) for i in range(0, len(prompts), count))


def _texts(
    prompts: list[SamplePrompt], answers: dict[str, Ids], temperature: float
) -> dict[str, Ids]:
    """All answers to be looked at, by name; those of the data stand beside the greedy ones."""
    names = [n for n in GIVEN if any(n in one.given for one in prompts)] if not temperature else []
    return answers | {name: [one.given.get(name, []) for one in prompts] for name in names}


def _sample(
    prompt: SamplePrompt,
    answers: dict[str, list[int]],
    ratios: dict[str, np.ndarray],
    temperature: float,
    run: Run,
    step: int,
) -> Sample:
    texts = dict.fromkeys(("policy", "reference")) | {
        name: samples.said_of(run.tokenizer, prompt.ids, ids, run.sample_tokens)
        for name, ids in answers.items()
    }
    of_tokens = {
        name: _pieces(run.tokenizer, prompt.ids, answers[name], each)
        for name, each in ratios.items()
    }
    return {
        "step": step, **prompt.where, "prompt": prompt.text, "temperature": temperature, **texts,
        "policy_tokens": len(answers["policy"]), "ended": answers["policy"][-1] in run.stop_ids,
        "log_ratios": of_tokens,
    }  # fmt: skip


def _pieces(
    own: Tokenizer, before: list[int], ids: list[int], ratios: np.ndarray
) -> list[tuple[str, float]]:
    """Texts of tokens, or of several that are whole characters only together, with their ratios."""
    found, at = [], 0
    for piece in shown.cut(own, before, ids):
        ratio = float(ratios[at : at + len(piece.ids)].sum(dtype=np.float64))
        at += len(piece.ids)
        found.append(("" if piece.is_control else piece.text, round(ratio, 4)))
    return found

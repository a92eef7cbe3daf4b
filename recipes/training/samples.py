"""Greedy answers to held-out prompts, by the reference and by the policy, side by side."""

from collections.abc import Sequence
import difflib
import itertools
from typing import NamedTuple

from recipes.data.chats import messages
from recipes.data.ids.pair_ids import Example
from recipes.training.run import Run
import zoo
from zoo import generate
from zoo.text import tokenizer
from zoo.text.tokenizer import Tokenizer

ASKED = 64  # held-out prompts that are answered, at most
SHOWN = 3  # of them are printed
ROOM = 16384  # tokens of the prompts with their answers, at most: their keys and values are kept
WIDE = 400  # characters of a prompt, at most


class Answers(NamedTuple):
    """The answers to held-out prompts, as token ids."""

    examples: Sequence[Example]
    most: int  # tokens of an answer
    texts: dict[str, list[list[int]]]  # before, unless the reference has left memory, and after


def answered(
    run: Run, trained: zoo.Model, reference: zoo.Model | None, most: int
) -> Answers | None:
    """Generates up to `most` tokens with reference and policy; None: there are no prompts."""
    every = [pair for held_out in run.held_out for pair in held_out.pairs]
    pairs = spread([*{tuple(pair.prompt.tolist()): pair for pair in every}.values()], most)
    prompts = [pair.prompt.tolist() for pair in pairs]
    room = generate.most_new_tokens(trained, max(map(len, prompts), default=0))
    most = most if room is None else min(most, room)
    if not prompts or not most:
        return None
    texts = {
        name: generate.generate(model, prompts, max_new_tokens=most, stop_ids=run.stop_ids)
        for name, model in (("before", reference), ("after", trained))
        if model
    }
    return Answers(pairs, most, texts)


def spread(pairs: list[Example], most: int) -> list[Example]:
    """As many of them as may be answered at once, evenly spread."""
    count = min(ASKED, len(pairs))
    while True:
        some = [pairs[i * len(pairs) // count] for i in range(count)]
        if count <= 1 or count * (most + max(len(pair.prompt) for pair in some)) <= ROOM:
            return some
        count //= 2


def is_wanted(answer: Sequence[int], pair: Example, most: int) -> bool:
    """Is a greedy answer more similar to the chosen than to the rejected answer?

    By difflib's ratio over token ids: the share of tokens in common, in order. Only the first
    `most` tokens of each answer count. A tie is no.
    """

    def alike(other: Sequence[int]) -> float:
        return difflib.SequenceMatcher(None, answer, other[:most], autojunk=False).ratio()

    chosen, rejected = (ids.tolist() for ids, _ in pair.answers)
    return alike(chosen) > alike(rejected)


def wanted_share(answers: Answers, name: str) -> float | None:
    """The share in the wanted manner, by `is_wanted`; None: there are no such answers."""
    texts = answers.texts.get(name)
    if texts is None:
        return None
    wanted = map(is_wanted, texts, answers.examples, itertools.repeat(answers.most))
    return sum(wanted) / len(texts)


def side_by_side(own: Tokenizer, answers: Answers) -> str:
    """A few prompts, each with what was wanted, what was not (of a pair), and what was answered.

    Those whose answer has changed, if there are any.
    """
    turns, lines = last_turns(own, [pair.prompt.tolist() for pair in answers.examples]), []
    every = range(len(answers.examples))
    if "before" in answers.texts:
        changed = [i for i in every if answers.texts["before"][i] != answers.texts["after"][i]]
        lines = ["", f"of {len(every)} greedy answers to held-out prompts {len(changed)} changed:"]
        every = changed or every
    for i in every[:: -(-len(every) // SHOWN)]:
        pair = answers.examples[i]
        names = ("wanted", "unwanted")
        ids = {name: kept.tolist() for name, (kept, _) in zip(names, pair.answers, strict=False)}
        ids |= {name: texts[i] for name, texts in answers.texts.items()}
        lines += ["", _block("prompt", turns[i])]
        lines += [_block(name, _text(own, pair, some, answers.most)) for name, some in ids.items()]
    return "\n".join(lines)


def last_turns(own: Tokenizer, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The last text between special tokens of each prompt, without what all of them have there.

    That is the last turn, without the template's words.
    """
    special = set(own.special.values())
    pieces = [itertools.groupby(prompt, special.__contains__) for prompt in prompts]
    turns = [[own.decode(ids).strip() for is_token, ids in few if not is_token] for few in pieces]
    in_all = set.intersection(*map(set, turns))
    last: list[str] = []
    for few in turns:
        own_turns = [turn for turn in few if turn not in in_all]
        last.append(own_turns[-1] if own_turns else max(few, key=len, default=""))
    if len(last) > 1 and len({turn.partition("\n")[0] for turn in last}) == 1:  # their role
        last = [turn.partition("\n")[2] or turn for turn in last]
    return [turn if len(turn) <= WIDE else f"…{turn[-WIDE:]}" for turn in last]


def _text(own: Tokenizer, pair: Example, ids: Sequence[int], most: int) -> str:
    """Without special tokens; `…` where it continues."""
    special = set(own.special.values())
    words = [token for token in ids[:most] if token not in special]
    goes_on = len(ids) > most or (len(ids) == most and ids[-1] not in special)
    return tokenizer.text_after(own, pair.prompt, words).strip() + "…" * goes_on


def _block(name: str, text: str) -> str:
    """A name and a text, whose further lines are aligned with the first."""
    return f"{name:<10}" + messages.visible(text).replace("\n", "\n" + " " * 10)

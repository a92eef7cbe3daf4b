"""A prompt and its answers, as messages or as plain text, which is what any row becomes."""

from collections.abc import Iterable
from typing import NamedTuple

from recipes.data.chats import conversation, messages
from recipes.data.chats.messages import Turns


class Worth(NamedTuple):
    """The weight and margin that the data gives a pair in the loss."""

    weight: float = 1.0  # its loss is multiplied by it
    margin: float = 0.0  # by how much the chosen reward must exceed the rejected one, in nats


class Pair(NamedTuple):
    """Two answers to one prompt, of which `chosen` was preferred; or `chosen` is the only one.

    A list has more answers, from the best to the worst. All of them are lists of messages, to be
    rendered by a chat template, or all are plain text.
    """

    prompt: Turns | str
    chosen: Turns | str
    rejected: Turns | str | None
    tools: list | None = None  # tools, in the form that the template gets

    template_kwargs: dict[str, object] = {}  # noqa: RUF012, never changed
    ratings: tuple[float, ...] | None = None  # of each answer; a single one's is 1: wanted, 0: not
    prefill: str = ""  # the end of the prompt, with which all answers begin
    more: tuple[Turns | str, ...] = ()  # for a list: the answers no better than `rejected`
    ranks: tuple[int, ...] | None = None  # for a list: of each, 0 the best; equal ones are no pair
    notes: tuple[str, ...] = ()  # on its ranks; `examples.NOTES` says what they mean
    worth: Worth = Worth()

    @property
    def answers(self) -> tuple[Turns | str, ...]:
        """The chosen answer, the rejected one and the others of a list, or the only one."""
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected, *self.more)

    @property
    def conversations(self) -> list[Turns]:
        """Each answer after the prompt, as a conversation; none for plain text."""
        if isinstance(self.prompt, str):
            return []
        return [self.prompt + turns for turns in self.answers if not isinstance(turns, str)]

    @property
    def asked(self) -> str:
        """Everything in a pair that the assistant did not say."""
        if isinstance(self.prompt, str) or isinstance(self.chosen, str):
            return str(self.prompt)
        said = [*self.prompt, *self.chosen]
        return "\n".join(m["content"] for m in said if m["role"] != "assistant")

    @property
    def has_empty_turn(self) -> bool:
        """Whether a turn, or a plain answer, is empty."""
        if isinstance(self.prompt, str):
            return any(isinstance(answer, str) and not answer.strip() for answer in self.answers)
        turns = (turn for part in (self.prompt, *self.answers) for turn in part)
        return any(not isinstance(turn, str) and messages.is_blank(turn) for turn in turns)

    @property
    def wants_nothing(self) -> bool:
        """Whether the wanted answer is empty."""
        if self.rejected is None and self.ratings == (0,):  # a single, unwanted answer
            return False
        if isinstance(self.chosen, str):
            return not self.chosen.strip()
        return all(map(messages.is_blank, self.chosen))

    @property
    def shares_no_user_turn(self) -> bool:
        """Whether the two conversations differ before anything was asked."""
        if isinstance(self.prompt, str):
            return False
        return all(turn["role"] != "user" for turn in self.prompt)

    @property
    def has_quiet_turn(self) -> bool:
        """Whether a turn after the prompt is marked not to be trained."""
        return any(messages.QUIET in turn for turns in self.answers for turn in turns)

    @property
    def asks_twice(self) -> bool:
        """Whether two user turns follow each other in one of the conversations."""
        return any(map(conversation.asks_twice, self.conversations))

    @property
    def texts(self) -> Iterable[str]:
        """All texts in the pair."""
        for part in (self.prompt, *self.answers):
            if isinstance(part, str):
                yield part
            else:
                yield from (message["content"] for message in part)

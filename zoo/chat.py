"""Chat with a model at the terminal.

  python -m zoo chat FOLDER
  python -m zoo chat FOLDER --against OTHER

FOLDER and OTHER are model folders, adapter folders, or hub ids of either. With two models, both
answers are shown side by side, and each model continues its own conversation. An answer ends where
the chat template ends a turn. In the conversation

  /system TEXT   starts over with this system prompt (without TEXT: with none)
  /reset         starts over
  Ctrl-C         stops an answer; Ctrl-D, or the end of the input, ends the conversation

Lines may come from a pipe, one question each; only the answers go to stdout.

  --temperature=0.7  sampling temperature; 0, the default, always takes the likeliest token
  --top_p=0.9        samples from the likeliest tokens whose probabilities add up to this
  --seed=1           seed of the sampling; 0 by default
  --tokens=256       most tokens of an answer; 512 by default
  --base=FOLDER      base weights of the adapters, if not where the adapter folder says
  --dtype=bfloat16   dtype of the weights; by default float32 on CPUs, bfloat16 elsewhere
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import itertools
import shutil
import sys
from typing import TYPE_CHECKING, NamedTuple
import unicodedata

from checkpoints_io import hf_folder, peft_folder
from checkpoints_io.errors import BadInput, NotFound, UserError
from checkpoints_io.unseen import visible
import zoo
from zoo.text import tokenizer
from zoo.text.chat_tokenizer import ChatTokenizer

if TYPE_CHECKING:
    import jax

Messages = list[dict[str, str]]
BETWEEN = " │ "  # the column separator between answers


class Options(NamedTuple):
    """The flags of the command line."""

    against: str | None = None
    base: str | None = None
    dtype: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    tokens: int = 512


class Voice(NamedTuple):
    """One model of the conversation, with its tokenizer."""

    name: str
    model: zoo.Model
    words: ChatTokenizer


def chat(folder: str, options: Options) -> int:
    """Holds a conversation over stdin and stdout; returns 1 if a line could not be answered.

    Raises:
      FileNotFoundError, ValueError: a model or its tokenizer cannot be read.
    """
    zoo.sampling.check(_sampling(options))  # before models are read
    names = [folder, *([options.against] if options.against else [])]
    for name in names:
        print(f"reading {name}", file=sys.stderr)
    voices = [opened(name, options) for name in names]
    print("/system TEXT, /reset; Ctrl-D ends it", file=sys.stderr)
    lines = _typed() if sys.stdin.isatty() else (line.rstrip("\n") for line in sys.stdin)
    return talk(lines, voices, options)


def opened(path_or_id: str, options: Options) -> Voice:
    """Loads a model, or adapters together with their base model, for a conversation.

    Raises:
      FileNotFoundError, ValueError: there is no such model, or it has no chat template.
    """
    model, words = loaded(path_or_id, options.base, options.dtype, talks=True)
    return Voice(path_or_id, model, words)


def loaded(
    path_or_id: str, base: str | None, dtype: str | None, mesh: "jax.sharding.Mesh | None" = None,
    *, talks: bool = False,
) -> tuple[zoo.Model, ChatTokenizer]:  # fmt: skip
    """Loads a model and its tokenizer; a folder of adapters brings the base model that it names.

    `base` overrides where that base model is. The dtype defaults to float32 on CPUs and bfloat16
    elsewhere. Without a mesh everything is on the first device.

    Raises:
      FileNotFoundError, ValueError: one of them cannot be read; or `talks` is set and the tokenizer
        has no chat template, which is reported before any weights are read.
    """
    folder = hf_folder.find(path_or_id, files=[*hf_folder.CONFIG_FILES, peft_folder.CONFIG])
    whole, adapter = path_or_id, None
    if (folder / peft_folder.CONFIG).is_file():
        whole, adapter = base or peft_folder.base_of(folder), path_or_id
    elif base is not None:
        raise BadInput(f"--base={base} has no effect: {path_or_id} holds no adapters; leave it out")
    else:
        hf_folder.read_config(folder)  # a folder without a model fails here, not at its tokenizer
    own = adapter and peft_folder.has_tokenizer(hf_folder.find(adapter, files=peft_folder.FILES))
    try:
        words = zoo.load_tokenizer(adapter if own else whole)
        if talks and words.chat_template is None:
            raise BadInput(
                f"the tokenizer of {path_or_id} has no chat template, so there is no way to talk "
                "with the model: use a model that was made for conversations"
            )
        return zoo.load(whole, dtype=dtype_here(dtype), mesh=mesh, adapter=adapter), words
    except NotFound as error:
        if adapter is None or base:
            raise
        raise NotFound(
            f"{path_or_id} holds adapters, and names the weights under them: {error}; say where "
            "they are with --base=FOLDER"
        ) from error


def dtype_here(dtype: str | None) -> str:
    """The dtype for inference: the one given, or the default of these devices."""
    import jax

    return dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def _sampling(options: Options) -> "zoo.sampling.Sampling":
    return zoo.sampling.Sampling(options.temperature, top_p=options.top_p)


def talk(lines: Iterable[str], voices: Sequence[Voice], options: Options) -> int:
    """Answers the input line by line; returns 1 if a line could not be answered."""
    system: Messages = []
    said: list[Messages] = [[] for _ in voices]
    failed = 0
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if not word:
            continue
        if word in ("/reset", "/system"):
            if word == "/system":
                system = [{"role": "system", "content": rest.strip()}] if rest.strip() else []
            said = [[] for _ in voices]
            print("a new conversation", file=sys.stderr)
            continue
        if word.startswith("/"):
            print(f"error: there is no {word}: /system TEXT, /reset", file=sys.stderr)
            failed = 1
            continue
        question = {"role": "user", "content": line.strip()}
        try:
            texts = _answered(voices, [system + one + [question] for one in said], options)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 1
            continue
        for one, text in zip(said, texts, strict=True):
            one += [question, {"role": "assistant", "content": text}]
    return failed


def _answered(
    voices: Sequence[Voice], conversations: Sequence[Messages], options: Options
) -> list[str]:
    """Prints and returns the models' answers: one as it is generated, several side by side."""
    texts = [""] * len(voices)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C keeps the answer so far
        for i, (voice, messages) in enumerate(zip(voices, conversations, strict=True)):
            for piece in answer(voice, messages, options):
                texts[i] += piece
                if len(voices) == 1:
                    print(visible(piece), end="", flush=True)
    if len(voices) == 1:
        print(flush=True)
    else:
        width = shutil.get_terminal_size().columns
        names = [voice.name for voice in voices]
        print(side_by_side(names, list(map(visible, texts)), width), flush=True)
    return texts


def answer(voice: Voice, messages: Messages, options: Options) -> Iterator[str]:
    """Yields the model's next turn in pieces of whole characters, without the stop token.

    Raises:
      ValueError: the template refuses the messages, or the model has no room for an answer.
    """
    prompt, ids, text, shown = voice.words.chat(messages), [], "", ""
    room = zoo.generate.most_new_tokens(voice.model, len(prompt))
    if room == 0:
        raise BadInput(f"the conversation has {len(prompt)} tokens, and no more fit: /reset")
    added = zoo.generate.stream(
        voice.model,
        [prompt],
        max_new_tokens=options.tokens if room is None else min(options.tokens, room),
        stop_ids=voice.words.stop_ids,
        sampling=_sampling(options),
        seed=options.seed,
    )
    for (new,) in added:
        ids += [token for token in new if token not in voice.words.stop_ids]
        text = tokenizer.text_after(voice.words.own, prompt, ids)
        whole = text.rstrip("�")  # a partial character, which the next token completes
        if whole.startswith(shown) and len(whole) > len(shown):
            yield whole[len(shown) :]
            shown = whole
    if text.startswith(shown) and len(text) > len(shown):
        yield text[len(shown) :]


def side_by_side(names: Sequence[str], texts: Sequence[str], width: int) -> str:
    """Lays the texts out in columns of equal width, each under its name."""
    each = max(8, (width - len(BETWEEN) * (len(names) - 1)) // len(names))
    columns = [
        [*_wrapped(name, each), "─" * each, *_wrapped(text, each)]
        for name, text in zip(names, texts, strict=True)
    ]
    rows = itertools.zip_longest(*columns, fillvalue="")
    padded = ([cell + " " * (each - _wide(cell)) for cell in row] for row in rows)
    return "\n".join(BETWEEN.join(row).rstrip() for row in padded)


def _wrapped(text: str, width: int) -> list[str]:
    """Wraps a text into lines of at most this width, at spaces where there are any."""
    lines = []
    for line in text.expandtabs(4).split("\n"):
        while _wide(line) > width:
            fits = next(i for i in range(len(line), 0, -1) if _wide(line[:i]) <= width)
            at = line.rfind(" ", 1, fits + 1)
            lines.append(line[: at if at > 0 else fits].rstrip())
            line = line[at if at > 0 else fits :].lstrip()
        lines.append(line)
    return lines


def _wide(text: str) -> int:
    """The number of terminal columns that a text takes."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def _typed() -> Iterator[str]:
    """Yields lines from the keyboard, with readline's editing and history where available."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  importing it is what enables it in `input`
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return


def read(args: Sequence[str]) -> tuple[str, Options]:
    """Parses a command line into the folder and the flags.

    Raises:
      ValueError: a flag or its value is wrong; the message is for the user.
    """
    kinds = {name: type(value) for name, value in Options._field_defaults.items()}
    found, folders, left = {}, [], list(args)
    while left:
        flag, is_given, text = left.pop(0).partition("=")
        if not flag.startswith("-"):
            folders.append(flag + is_given + text)
            continue
        name = flag.lstrip("-")
        if name not in kinds:
            raise BadInput(f"there is no flag {flag}: --{', --'.join(kinds)}")
        if not is_given and not left:
            raise BadInput(f"{flag} needs a value: {flag}=…")
        text = text if is_given else left.pop(0)
        kind = kinds[name] if kinds[name] in (int, float) else str
        try:
            found[name] = kind(text)
        except ValueError as error:
            raise BadInput(f"{flag}={text!r} is not a number") from error
    options = Options(**found)
    if len(folders) != 1:
        raise BadInput("give python -m zoo chat FOLDER")
    if options.dtype not in (None, "float32", "bfloat16"):
        raise BadInput(f"--dtype={options.dtype} is neither float32 nor bfloat16")
    if options.tokens < 1:
        raise BadInput(f"--tokens={options.tokens} must be above 0")
    return folders[0], options

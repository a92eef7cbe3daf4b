"""Describes a checkpoint and says whether the zoo can read it; merges adapters; starts a chat.

  python -m zoo meta-llama/Llama-3.2-1B
  python -m zoo ./my-model
  python -m zoo merge BASE ADAPTER FOLDER [bfloat16|float32]
  python -m zoo chat FOLDER [--against OTHER]

The first two read config.json and, for a local folder, the headers of the weights; for a hub id
nothing else is downloaded. `merge` merges the PEFT folder ADAPTER into the weights of BASE, in
bfloat16 unless float32 is given, and reports the rounding error. `chat` starts a chat with a model:
see `python -m zoo chat --help`.
"""

from collections import Counter
import math
import pathlib
import signal
import sys

from checkpoints_io import compiled
from checkpoints_io.errors import BadInput
import zoo


def told(path_or_id: str) -> str:
    """Describes a folder or hub id in a few lines: family, sizes, parameters, bytes.

    Raises:
      FileNotFoundError, ValueError, PermissionError: the zoo cannot read it.
    """
    from checkpoints_io import hf_folder

    if (pathlib.Path(path_or_id).expanduser() / hf_folder.ADAPTERS).is_file():
        return told_of_adapters(path_or_id)
    folder = hf_folder.look_up(path_or_id)

    from flax import nnx  # late: not needed if there is no such folder

    from checkpoints_io import hf_weights
    from zoo.parts import text_half

    model = zoo.abstract(folder.config)
    is_here = pathlib.Path(path_or_id).expanduser().is_dir()
    is_reward = text_half.scores(folder.config)
    if is_here and not is_reward:
        zoo.check(folder)
    params = nnx.to_flat_state(nnx.state(model))
    count = sum(math.prod(param.shape) for _, param in params)
    held = Counter()
    for dtype, numbers in hf_weights.stored(folder.path) if is_here else ():
        held[dtype] += numbers
    names = {"L": "layers", "D": "width", "F": "MLP width", "N": "heads", "K": "key heads",
             "H": "head width", "V": "vocabulary", "E": "experts"}  # fmt: skip
    sizes = {names[k]: v for k, v in model.config.sizes.items() if k in names}
    lines = [
        f"{path_or_id}: {folder.config['model_type']}, zoo/{model.config.model_type}.py",
        "sizes       " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()),
        f"parameters  {count:,}"
        + (", embedding and head are tied" if model.config.tie_word_embeddings else ""),
        "stored      "
        + (", ".join(f"{n:,} {dtype}" for dtype, n in sorted(held.items())) or "not looked at"),
        f"memory      {_size(4 * count)} in float32, {_size(2 * count)} in bfloat16",
    ]
    if longest := zoo.longest_text(folder.config):
        lines.append(f"made for    texts of {longest:,} tokens")
    reads = "zoo.load and recipes/dpo.py can read it"
    if is_reward:
        reads = "a reward model, with a number for a text: zoo.reward.load can read it"
    return "\n".join([*lines, f"supported: {reads}"])


def told_of_adapters(folder: str) -> str:
    """Describes a folder of adapters: their ranks, their modules and their base model.

    Raises:
      FileNotFoundError, ValueError: the zoo cannot read it.
    """
    from checkpoints_io import peft_folder

    with peft_folder.opened(pathlib.Path(folder).expanduser()) as found:
        said, tensors = found.said, found.tensors
        count = sum(math.prod(one.get_shape()) for one in tensors.values())
    modules = Counter(name.partition(".lora_")[0].rpartition(".")[2] for name in tensors)
    kind = "DoRA" if said.use_dora else "LoRA"
    scale = "alpha / sqrt(rank)" if said.use_rslora else "alpha / rank"
    return "\n".join([
        f"{folder}: adapters, {kind} of rank {said.r} and alpha {said.lora_alpha:g}, {scale}",
        f"modules     {', '.join(modules)}",
        f"parameters  {count:,}",
        f"beside      {said.base_model_name_or_path or 'weights that are not named'}",
        "supported: zoo.load(BASE, adapter=FOLDER), --config.adapter.path, and python -m zoo merge",
    ])  # fmt: skip


def merge(base: str, adapter: str, folder: str, dtype: str = "bfloat16") -> str:
    """Merges a PEFT folder into its base and writes the model; returns a sentence about it.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: as in `zoo.load` and `zoo.save`.
    """
    if dtype not in ("bfloat16", "float32"):
        raise BadInput(f"merged weights are written in bfloat16 or float32, not {dtype!r}")
    for name, given in (("BASE", base), ("ADAPTER", adapter)):
        if _at(given) == _at(folder):
            raise BadInput(f"{folder} is {name}, which would be lost: give another FOLDER")
    from checkpoints_io import hf_folder, peft_folder
    from zoo import adapters

    model = zoo.load(base, adapter=adapter)
    lost = adapters.lost_in(model, dtype)
    beside = hf_folder.find(adapter, files=peft_folder.FILES)
    own = peft_folder.has_tokenizer(beside)
    zoo.save(model, folder, dtype=dtype, tokenizer=beside if own else None)
    words = " (with their tokenizer)" if own else ""
    told = f"{folder} holds {base} with {adapter}{words} merged into it"
    return f"{told}: {adapters.lost_told(lost, dtype)}"


def chat(args: list[str]) -> int:
    """Holds a conversation with one model or two; returns the exit status."""
    from zoo import chat as talking

    if set(args) & {"-h", "--help", "-help"}:
        print((talking.__doc__ or "").strip())
        return 0
    try:
        given = talking.read(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    compiled.keep_here()
    try:
        return talking.chat(*given)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _at(path: str) -> pathlib.Path:
    return pathlib.Path(path).expanduser().resolve()


def _size(bytes_: int) -> str:
    return f"{bytes_ / 2**30:.2f} GiB" if bytes_ >= 2**30 else f"{bytes_ / 2**20:.1f} MiB"


def main(args: list[str]) -> int:
    """Runs the command, or describes each folder or hub id; returns 1 if one cannot be read."""
    if args[:1] == ["chat"]:
        return chat(args[1:])
    if set(args) & {"-h", "--help", "-help"}:
        print(__doc__.strip())
        return 0
    if not args or (odd := [arg for arg in args if arg.startswith("-")]):
        wrong = f"there is no flag {odd[0]}: " if args else ""
        print(f"error: {wrong}give folders or hub ids, python -m zoo PATH-OR-ID", file=sys.stderr)
        return 2
    if args[0] == "merge":
        if not 4 <= len(args) <= 5:
            print("error: give python -m zoo merge BASE ADAPTER FOLDER", file=sys.stderr)
            return 2
        try:
            print(merge(*args[1:]))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0
    failed = 0
    for path_or_id in args:
        try:
            text = told(path_or_id)
        except (OSError, ValueError) as error:
            print(f"error: {path_or_id}: not supported: {error}", file=sys.stderr)
            failed = 1
        else:
            print(text)
    return failed


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it silently
    sys.exit(main(sys.argv[1:]))

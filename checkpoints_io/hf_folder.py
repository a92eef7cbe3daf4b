"""Hugging Face model folders: finding them here or on the hub, and all but their weights."""

from collections.abc import Sequence
import concurrent.futures
import dataclasses
import fnmatch
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil

from checkpoints_io.errors import BadInput, NoAccess, NotFound

# What a model needs; weights in other formats, images and code are left on the hub.
TOKENIZER_FILES = ["*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
FILES = [*TOKENIZER_FILES, "*.safetensors"]
# Files that say how weights are quantised where config.json does not: ModelOpt's, and those of the
# first GPTQ and AWQ checkpoints.
QUANTISED_FILES = ["hf_quant_config.json", "quantize_config.json", "quant_config.json"]
CONFIG_FILES = ["config.json", *QUANTISED_FILES]
TEMPLATES = "additional_chat_templates"  # the only subfolder of a checkpoint that is fetched
# The same weights in the formats of other programs, in subfolders or not; a glob cannot exclude
# every subfolder but one in any other way.
ELSEWHERE = ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*"]

# Such files have a few kilobytes. A file of nothing but brackets takes 23 times its size parsed.
MOST_JSON = 16 << 20
MOST_VALUES = 500_000

# Copied into an export from its source, byte for byte except for an `auto_map`.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    f"{TEMPLATES}/*.jinja",
    "*.tiktoken",
    "tiktoken.model",  # Kimi's
    "tekken.json",  # Mistral's: not read here, but by vLLM's `--tokenizer-mode mistral`
)
CARD = "README.md"
ADAPTERS = "adapter_config.json"  # what a PEFT folder has in place of config.json
# The processors that turn images and sounds into tokens.
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@dataclasses.dataclass(frozen=True)
class Folder:
    """A model folder, found once, and what its config.json said then.

    A model holds its Folder and is an argument of jitted functions, so a Folder is hashable. It
    can be used as a path.
    """

    path: pathlib.Path
    config: dict[str, object] = dataclasses.field(hash=False)  # as `read_config` returns it
    revision: str | None = None  # the commit, of a model that was asked for by its hub id
    # Where the other files are still to be fetched from (a hub id or URL), or checked (a folder of
    # the hub's cache).
    rest: str | None = None

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


def look_up(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Folder:
    """Finds a model folder by path, hub id (`owner/name[@revision]`) or URL, or returns a Folder.

    From the hub or a bucket only config.json is fetched: `fetched` gets the rest.

    Raises:
      ValueError, FileNotFoundError, PermissionError: as `find` and `read_config`.
    """
    if isinstance(path_or_id, Folder):
        return path_or_id
    name = os.fspath(path_or_id)
    is_here = pathlib.Path(name).expanduser().is_dir()
    if revision and (is_here or "://" in name):
        raise BadInput(f"{name} is a folder, which has no revision={revision!r}: leave it out")
    if revision and "@" in name:
        raise BadInput(f"{name} names a revision, and so does revision={revision!r}: give one")
    path = find(name, revision, CONFIG_FILES)
    commit = revision_of(path.resolve())
    pinned = None if is_here else commit or revision
    path = path.absolute()  # a notebook may change directory before it reads more of it
    return Folder(path, read_config(path), pinned, rest=name if commit or not is_here else None)


def fetched(folder: Folder, files: Sequence[str] = FILES) -> Folder:
    """The folder with all of `files`, at the same revision as its config.json.

    Raises:
      ValueError, FileNotFoundError, PermissionError: as `find`.
    """
    if folder.rest is None:
        return folder
    path = find(folder.rest, folder.revision, files)
    return dataclasses.replace(folder, path=path, rest=None if files == FILES else folder.rest)


def find(
    path_or_id: str, revision: str | None = None, files: Sequence[str] = FILES
) -> pathlib.Path:
    """The local folder of a model, given as a path, `owner/name[@revision]` on the hub, or a URL.

    From a bucket (`gs://…`) or a hub repository only `files` are fetched.

    Raises:
      ValueError: a link in it leads out, or one of `files` is no longer what the hub sent.
      FileNotFoundError: there is no such folder, and no such repository can be reached.
      PermissionError: the repository needs a token that has been granted access.
    """
    folder = pathlib.Path(path_or_id).expanduser()
    if folder.is_dir():
        return _closed(folder, files)
    if "://" in path_or_id:
        from checkpoints_io import bucket_models  # imports fsspec, which takes a while

        return _closed(bucket_models.brought(path_or_id, files, ELSEWHERE), files)
    path_or_id, _, at = path_or_id.partition("@")
    revision = revision or at or None
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path_or_id):
        raise NotFound(
            f"there is no model folder {path_or_id!r} (and it is not a hub id, which looks like "
            "'owner/name')"
        )
    return _closed(_downloaded(path_or_id, revision, files), files)


def _downloaded(path_or_id: str, revision: str | None, files: Sequence[str]) -> pathlib.Path:
    import huggingface_hub  # takes half a second, which a local folder need not wait for
    from huggingface_hub import errors

    try:
        path = huggingface_hub.snapshot_download(
            path_or_id,
            revision=revision,
            allow_patterns=list(files),
            ignore_patterns=ELSEWHERE,
        )
    except errors.GatedRepoError as error:
        raise NoAccess(
            f"{path_or_id!r} is gated: accept its licence on its hub page, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotFound(
            f"there is no folder {path_or_id!r} here and no such repository on the hub; if it is "
            "private, log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFound(f"{path_or_id!r} has no revision {revision!r}") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise NotFound(
            f"there is no folder {path_or_id!r} here, and the hub could not be reached to fetch it "
            f"({type(error).__name__}): check the network, or download it elsewhere and give the "
            "folder"
        ) from error
    return pathlib.Path(path)


def revision_of(folder: pathlib.Path) -> str | None:
    """The commit of a folder that `find` fetched from the hub."""
    return folder.name if folder.parent.name == "snapshots" else None


def _closed(folder: pathlib.Path, files: Sequence[str]) -> pathlib.Path:
    """The folder, once its files are known to be in it or in its own part of the hub's cache.

    Folders are untrusted: a chat template may be a link to one of the user's own files.
    """
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if revision_of(home) else None
    fetched: list[tuple[pathlib.Path, int]] = []
    for path in folder.iterdir():
        target = path.resolve()
        if not path.is_symlink() or path.is_dir() or target.is_relative_to(home):
            continue
        if target.parent != blobs:
            raise BadInput(
                f"{path} is a link that leads out of its folder: put the file itself there"
            )
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in files):
            fetched.append((target, target.stat().st_mtime_ns))
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the GIL
        list(pool.map(lambda blob: _recheck(*blob), fetched))
    return folder


@functools.cache
def _recheck(blob: pathlib.Path, _changed: int) -> None:
    """Checks a cached file against its name: its SHA-256 or, for a small file, its git hash.

    Raises:
      ValueError: the file has changed.
    """
    with blob.open("rb") as file:
        if re.fullmatch(r"[0-9a-f]{64}", blob.name):
            found = hashlib.file_digest(file, "sha256").hexdigest()
        elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
            digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
            while content := file.read(1 << 20):
                digest.update(content)
            found = digest.hexdigest()
        else:
            return
    if found != blob.name:
        raise BadInput(f"{blob} is not what the hub sent: delete it, so that it is fetched again")


def read_config(folder: pathlib.Path) -> dict[str, object]:
    """The `config.json` of a model folder.

    What another file says about quantised weights is added under that file's name.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        beside = ""
        if (folder / ADAPTERS).is_file():
            beside = (
                ". It holds adapters: zoo.load(BASE, adapter=FOLDER) and --config.adapter.path add "
                "them to their base, and `python -m zoo merge` merges them into it"
            )
        elif exports := sorted((folder / "hf").glob("step-*"), key=lambda x: x.stat().st_mtime):
            beside = f". It is a run's directory, whose newest model is {exports[-1]}"
        raise NotFound(f"{folder} is not a model folder: it has no config.json{beside}")
    config = read_json(path)
    if config.get("quantization_config"):
        return config
    for name in QUANTISED_FILES:
        if (folder / name).is_file():
            told = read_json(folder / name)
            if isinstance(own := told.get("quantization"), dict):
                told = own.get("quant_algo")  # null where only the KV cache is narrow
            config |= {name: told} if told else {}
    return config


def read_json(path: pathlib.Path, most: int = MOST_JSON) -> dict[str, object]:
    """Reads a file of at most `most` bytes that holds one JSON object.

    Raises:
      ValueError: it is larger, or holds something else.
    """
    if (size := path.stat().st_size) > most:
        raise BadInput(f"{path} has {size >> 20} MiB, but at most {most >> 20} are read")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not valid JSON: {error}") from error
    if sum(map(text.count, ",[{")) > MOST_VALUES:
        raise BadInput(f"{path} holds more than {MOST_VALUES} values, the most that are read")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} should hold a JSON object, not {type(value).__name__}")
    return value


def read_if_there(path: pathlib.Path) -> dict[str, object]:
    """Reads a file as `read_json` does; an empty object if there is no such file."""
    return read_json(path) if path.is_file() else {}


def copy(names: Sequence[str], source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies the files of a folder whose names are among `names` or match them as patterns."""
    for name in names:
        for path in source.glob(name):
            to = folder / path.relative_to(source)
            to.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, to)


def write_tokenizer(
    folder: pathlib.Path, tokenizer: pathlib.Path | None, chat_template: str | None
) -> None:
    """Writes a tokenizer's files, copied from a folder, and a chat template given as text."""
    if tokenizer is not None:
        copy(COMPANIONS, tokenizer, folder)
    named = folder / "tokenizer_config.json"
    if named.is_file() and "auto_map" in (told := read_json(named)):
        # Untrusted code is not copied, and the export must not point its users to it.
        told.pop("auto_map")
        named.write_text(json.dumps(told, indent=2) + "\n")
    if chat_template:
        (folder / "chat_template.jinja").write_text(chat_template, "utf-8")


def write_companions(
    folder: pathlib.Path,
    config: dict[str, object],
    source: Folder | None,
    tokenizer: pathlib.Path | None,
    stop_ids: Sequence[int] = (),
    chat_template: str | None = None,
    card: str | None = None,
) -> None:
    """Writes everything in a model folder but the weights; `card` is its README.md.

    config.json holds `config`, byte for byte where that equals the source's. Tokenizer and chat
    template are copied from the folder `tokenizer`; `chat_template` replaces the template.
    `stop_ids` are added to the end-of-text ids of generation_config.json: without the template's
    end of turn a served model never stops.
    """
    own = source.path / "config.json" if source else None
    if own and own.is_file() and read_json(own) == config:
        shutil.copyfile(own, folder / "config.json")
    else:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(folder, tokenizer, chat_template)
    if card:
        (folder / CARD).write_text(card, "utf-8")
    generation = read_if_there(source.path / "generation_config.json") if source else {}
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    known = ends if isinstance(ends, list) else [ends] if ends is not None else []
    merged = [*known, *(i for i in stop_ids if i not in known)]
    if merged:
        generation["eos_token_id"] = merged[0] if len(merged) == 1 else merged
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")

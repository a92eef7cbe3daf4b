"""A Hugging Face model folder: found here or on the hub, and all of it but the weights."""

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
TEMPLATES = "additional_chat_templates"  # the one folder of a checkpoint's that is wanted
# The same weights again, as other programs want them, in folders or not; a pattern that leaves one
# folder cannot be said otherwise.
ELSEWHERE = ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*"]

# Such files have a few kilobytes. Parsed, one of nothing but brackets takes 23 times its size.
MOST_JSON = 16 << 20
MOST_VALUES = 500_000

# Copied from the source of an export, byte for byte, but for an `auto_map`.
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
    "tekken.json",  # Mistral's, which is not read here, and vLLM's `--tokenizer-mode mistral` reads
)
CARD = "README.md"
ADAPTERS = "adapter_config.json"  # what a folder of PEFT has in place of config.json
# What makes tokens of images and sounds.
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@dataclasses.dataclass(frozen=True)
class Folder:
    """A model folder, found once, and what its config.json said then.

    A model keeps its own, and is an argument of jitted functions: so a Folder can be hashed. It is
    a path to those who ask for no more.
    """

    path: pathlib.Path
    config: dict[str, object] = dataclasses.field(hash=False)  # as `read_config` gives it
    revision: str | None = None  # the commit, of a model that was asked for by its hub id
    # What all but config.json is still to be fetched from, or checked in: a hub id or URL, or a
    # folder of the hub's cache.
    rest: str | None = None

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


def look_up(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Folder:
    """A model folder by its path, hub id, `owner/name[@revision]`, or URL; a Folder is what it is.

    Of the hub's or a bucket's files only config.json is fetched: `fetched` gives the rest.

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
    path = path.absolute()  # a notebook may go elsewhere before it asks for more of it
    return Folder(path, read_config(path), pinned, rest=name if commit or not is_here else None)


def fetched(folder: Folder, files: Sequence[str] = FILES) -> Folder:
    """The folder with all of `files`, of the same revision as its config.json.

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
    """The local folder of a model; what is not a folder here is a hub id, `owner/name[@revision]`.

    Or a folder in a bucket, `gs://…`. Of that, and of a hub repository, only `files` are fetched.

    Raises:
      ValueError: a link in it leads out, or one of `files` is no longer what the hub sent.
      FileNotFoundError: there is no such folder, nor such a repository within reach.
      PermissionError: the repository needs a token that has been granted access.
    """
    folder = pathlib.Path(path_or_id).expanduser()
    if folder.is_dir():
        return _closed(folder, files)
    if "://" in path_or_id:
        from checkpoints_io import bucket_models  # with fsspec, which takes a while

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
    import huggingface_hub  # half a second, which a folder that is here need not wait for
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
    """The commit of a folder that `find` took from the hub."""
    return folder.name if folder.parent.name == "snapshots" else None


def _closed(folder: pathlib.Path, files: Sequence[str]) -> pathlib.Path:
    """A folder whose files are in it, or in the part of the hub's cache that is its repository's.

    A folder comes from a stranger: what it calls a template may be a link to a file of yours.
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
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        list(pool.map(lambda blob: _recheck(*blob), fetched))
    return folder


@functools.cache
def _recheck(blob: pathlib.Path, _changed: int) -> None:
    """The hub's cache names a file by its SHA-256, or, a small one, by what git calls it.

    Raises:
      ValueError: it has become another.
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
        raise BadInput(f"{blob} is not what the hub sent: delete it, and it is fetched again")


def read_config(folder: pathlib.Path) -> dict[str, object]:
    """The `config.json` of a model folder.

    What another file says of quantised weights is added under the name of that file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        beside = ""
        if (folder / ADAPTERS).is_file():
            beside = (
                ". It holds adapters: zoo.load(BASE, adapter=FOLDER) and --config.adapter.path put "
                "them beside their base, and `python -m zoo merge` into it"
            )
        elif exports := sorted((folder / "hf").glob("step-*"), key=lambda x: x.stat().st_mtime):
            beside = f". It is the directory of a run, whose newest model is {exports[-1]}"
        raise NotFound(f"{folder} is not a model folder: it has no config.json{beside}")
    config = read_json(path)
    if config.get("quantization_config"):
        return config
    for name in QUANTISED_FILES:
        if (folder / name).is_file():
            told = read_json(folder / name)
            if isinstance(own := told.get("quantization"), dict):
                told = own.get("quant_algo")  # null where only the cache of keys is narrow
            config |= {name: told} if told else {}
    return config


def read_json(path: pathlib.Path, most: int = MOST_JSON) -> dict[str, object]:
    """A file that holds one JSON object, in at most so many bytes.

    Raises:
      ValueError: it holds something else.
    """
    if (size := path.stat().st_size) > most:
        raise BadInput(f"{path} has {size >> 20} MiB, and at most {most >> 20} are read")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not valid JSON: {error}") from error
    if sum(map(text.count, ",[{")) > MOST_VALUES:
        raise BadInput(f"{path} holds more than {MOST_VALUES} values, and at most those are read")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} should hold a JSON object, not {type(value).__name__}")
    return value


def read_if_there(path: pathlib.Path) -> dict[str, object]:
    """As `read_json`; nothing if there is no such file."""
    return read_json(path) if path.is_file() else {}


def copy(names: Sequence[str], source: pathlib.Path, folder: pathlib.Path) -> None:
    """The files of a folder that have these names, or match them."""
    for name in names:
        for path in source.glob(name):
            to = folder / path.relative_to(source)
            to.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, to)


def write_tokenizer(
    folder: pathlib.Path, tokenizer: pathlib.Path | None, chat_template: str | None
) -> None:
    """The files of a tokenizer and its template, of another folder or as a text."""
    if tokenizer is not None:
        copy(COMPANIONS, tokenizer, folder)
    named = folder / "tokenizer_config.json"
    if named.is_file() and "auto_map" in (told := read_json(named)):
        # The code of a stranger is not copied, and the one who loads this is not led to it.
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
    """Everything of a model folder but the weights; `card` is its README.md.

    config.json holds `config`; where that is the source's, byte for byte. Tokenizer and
    chat template are copied from the folder `tokenizer`; `chat_template` replaces the template.
    `stop_ids` join the end-of-text ids of generation_config.json: without the template's end of
    turn a served model never stops.
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

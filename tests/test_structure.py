"""The house: who may import whom, no name in the way of a library, every shown command parses."""

import ast
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from recipes.training import by_name, checks, overrides, settings
from tests.conftest import OF_SOME_RUNS, ROOT
from zoo import ARCHITECTURES

PACKAGES = ("zoo", "checkpoints_io", "recipes")
# Modules that reach for files, what they have that reaches for none, and methods that do so.
OF_FILES = {"fcntl", "fsspec", "glob", "mmap", "os", "pathlib", "shutil", "tempfile"}
OF_PROCESSES = {
    "_exit", "close", "cpu_count", "dup2", "fstat", "getpid", "getppid", "pipe", "read",
    "sched_getaffinity", "set_blocking", "set_inheritable", "setdefault",
}  # fmt: skip
METHODS = {
    "chmod", "expanduser", "glob", "is_dir", "is_file", "iterdir", "load_file", "memmap",
    "memory_map", "mkdir", "open", "read_bytes", "read_text", "rename", "resolve", "rglob", "rmdir",
    "rmtree", "save_file", "savez", "stat", "symlink_to", "tofile", "touch", "unlink",
    "write_bytes", "write_text",
}  # fmt: skip
# What reads inputs, or writes no file of a run, a cache or an export, and with what.
INPUTS = {
    "recipes/data/__main__.py": {"Path", "is_dir", "write_text"},  # the page
    "recipes/data/ids/encode_rows.py": {"Path"},  # a tokenizer's folder
    "recipes/data/ids/parallel.py": {  # files that a tokenizer's ids depend on, and our code
        "Path", "expanduser", "glob", "is_file", "read_bytes",
    },
    "recipes/data/rows/formats.py": {  # a file that is fetched
        "Path", "TemporaryDirectory", "copyfileobj", "open",
    },
    "recipes/data/rows/sources.py": {  # data, here and elsewhere
        "abspath", "basename", "commonpath", "dirname", "escape", "exists", "expanduser",
        "filesystem", "glob", "isfile", "join", "open", "url_to_fs",
    },
    "recipes/data/run_data.py": {"Path"},  # a tokenizer's folder
    "recipes/pipelines/steps.py": {"isfile"},  # the steps, and what their flags name
    "recipes/pages/template.py": {"Path"},  # templates of pages
    "recipes/peers/listing.py": {"Path", "read_text", "write_text"},  # the docs
    "recipes/peers/llama_factory.py": {"Path", "is_file", "read_text"},  # what data is called there
    "recipes/peers/trl.py": {"Path", "is_dir", "is_file", "glob"},  # a data set in a folder
    "recipes/translate.py": {"Path", "is_dir", "is_file", "read_text", "write_text"},
    "recipes/training/command.py": {"which"},  # the python of a line to paste
    "recipes/training/listing.py": {"Path", "read_text", "write_text"},  # the docs
    "recipes/training/overrides.py": {"Path", "is_file"},  # the config file
    "recipes/terminal.py": {"open"},  # /dev/null
    "recipes/tiny/__init__.py": {"dirname", "exists", "join"},  # where it is
    "recipes/tiny/make_model.py": {  # the model that is shipped
        "Path", "TemporaryDirectory", "copytree", "mkdir", "read_text", "write_text",
    },
    "recipes/tiny/make_pairs.py": {"Path", "write_text"},  # the pairs that are shipped
    "zoo/__main__.py": {  # a model, or adapters? which of them is it?
        "Path", "expanduser", "is_dir", "is_file", "resolve",
    },
    "zoo/chat.py": {"get_terminal_size", "is_file"},  # is it a model, or adapters?
    "zoo/folders.py": {"fspath", "is_dir"},  # the folder of a tokenizer, or of adapters
    "zoo/peft_export.py": {"Path", "fspath"},  # the folder of adapters, and of a tokenizer
    "zoo/text/byte_files.py": {"is_file", "open", "read_bytes", "stat"},  # a tokenizer's files
    "zoo/text/chat_tokenizer.py": {"fspath"},  # the folder of a tokenizer
    "zoo/text/confined.py": {"Path", "TemporaryFile", "getcwd", "join", "pread"},  # pipes
    "zoo/text/tokenizer.py": {"glob", "Path", "expanduser", "is_file", "read_text", "stat"},
    "zoo/text/tokenizer_files.py": {"glob", "is_file", "read_text"},
    "zoo/text/worker.py": {"dup", "fdopen", "open", "pwrite"},  # its pipes
}  # fmt: skip
MAY_IMPORT = {
    "checkpoints_io": {"checkpoints_io"},
    "zoo": {"zoo"},
    "recipes": {"zoo", "checkpoints_io", "recipes"},
}


def imported(path, inside_functions=True):
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree)) if inside_functions else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def names_from_zoo(path):
    """What `from zoo import …` brings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "zoo":
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        allowed = MAY_IMPORT[package]
        if package == "zoo":  # whose sentences are errors of the one kind, and few bits as in files
            ours = [n for n in imported(path) if n.startswith("checkpoints_io")]
            if set(ours) <= {"checkpoints_io.errors", "checkpoints_io.quantised"}:
                allowed = allowed | {"checkpoints_io"}
        if path.parent == ROOT / "zoo" / "text":  # reads files, and needs no jax
            allowed = allowed | {"checkpoints_io"}
        architectures = {pathlib.Path(module.__file__) for module in ARCHITECTURES.values()}
        if path.name in ("quantised.py", "hf_config.py"):  # how few bits lie in files
            allowed = allowed | {"checkpoints_io"}
        if path.parent == ROOT / "zoo" and path not in architectures:  # models as they are in files
            allowed = allowed | {"checkpoints_io"}
        names = {name.split(".")[0] for name in imported(path)} & set(PACKAGES)
        assert names <= allowed, path


# Within recipes: which rooms a room may import, beside itself. Programs import whatever they need.
ROOMS = {
    "recipes.data.rows": set(),
    "recipes.data.chats": {"recipes.data.rows"},
    "recipes.data.ids": {"recipes.data.rows", "recipes.data.chats"},
    "recipes.data.packed": {"recipes.data.ids"},
    "recipes.data": {"recipes.data"},
    "recipes.training": {"recipes.data"},
    "recipes.preference": {"recipes.data", "recipes.training"},
    "recipes.pages": {"recipes.data"},
    "recipes.pipelines": {"recipes.data", "recipes.training"},
    "recipes.own_pairs": {"recipes.data", "recipes.training"},
    "recipes.peers": {"recipes.training"},
}
# What any room may import: how a line gets to the person at the terminal.
ANYWHERE = {"recipes.terminal"}


def room_of(module):
    return max(
        (room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len, default=None
    )


def modules_of(path):
    """The modules of recipes that a file imports, each by its whole name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "recipes")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("recipes"):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                is_module = ROOT.joinpath(*name.split(".")).with_suffix(".py").is_file()
                yield name if is_module else node.module


def test_rooms_of_recipes_point_one_way():
    for path in (ROOT / "recipes").rglob("*.py"):
        own = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if own is None or path.name == "__main__.py":  # a program
            continue
        for module in set(modules_of(path)) - ANYWHERE:
            allowed = {own, *ROOMS[own]}
            assert any(f"{module}.".startswith(f"{room}.") for room in allowed), (path, module)


def files_touched(source):
    """The calls that reach for files, by their last word, and imports that would hide such a call.

    Names in annotations are none: a function may be given a path.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OF_FILES:
            yield f"from {node.module}"
        elif isinstance(node, ast.Import):
            yield from (f"as {a.asname}" for a in node.names if a.asname and a.name in OF_FILES)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "open":
                yield "open"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, root = node.func.attr, node.func
            while isinstance(root, ast.Attribute):
                root = root.value
            of_files = isinstance(root, ast.Name) and root.id in OF_FILES
            if name in METHODS or (of_files and name not in OF_PROCESSES):
                yield name


@pytest.mark.parametrize(
    ("source", "touched"),
    [
        ("shutil.rmtree(run.directory.address)", ["rmtree"]),
        ("open(f'{run.directory}/metrics.jsonl', 'a')", ["open"]),
        ("os.path.getsize(place.address)", ["getsize"]),
        ("pathlib.Path(run.directory.address).parent", ["Path"]),
        ("run.folder.parent.joinpath('hf').iterdir()", ["iterdir"]),
        ("from pathlib import Path", ["from pathlib"]),
        ("import os as system", ["as system"]),
        ("safetensors.numpy.save_file(arrays, name)", ["save_file"]),
        ("def of(folder: pathlib.Path) -> int: ...", []),
        ("directory.write_whole('settings.json', told); os.getpid()", []),
    ],
)
def test_what_reaches_for_files_is_seen(source, touched):
    assert list(files_touched(source)) == touched


def test_files_of_a_run_are_reached_by_the_verbs_of_its_place_alone():
    """checkpoints_io/places.py has them; elsewhere only inputs are opened, each named above."""
    seen = {}
    for package in ("recipes", "zoo"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            seen[name] = set(files_touched(path.read_text()))
            others = seen[name] - INPUTS.get(name, set())
            assert not others, (
                f"{name}: {others}: a verb of checkpoints_io/places.py, or one of INPUTS here?"
            )
    assert {name: seen.get(name) for name in INPUTS} == INPUTS  # none that is not needed


def test_processes_speak_to_each_other_in_one_file():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if path != ROOT / "checkpoints_io" / "processes.py":
                assert "multihost_utils" not in path.read_text(), path


def reached(module, seen):
    """The modules of ours that are imported with this one, but for the packages around them."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if module in seen or not path.is_file():
        return
    seen[module] = path
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [node.module] if node.module not in PACKAGES else []
        else:
            continue
        for name in names:
            reached(name, seen)


def test_a_worker_starts_fast():
    """What runs in one imports neither jax nor what reads tables, fetches files or draws bars."""
    seen = {}
    for module in ("recipes.data.ids.encode_rows", "zoo.text.worker", "zoo.text.chat_tokenizer"):
        reached(module, seen)
    assert {
        "zoo.text.template",
        "recipes.data.ids.pair_ids",
        "recipes.data.ids.examples",
        "checkpoints_io.hf_folder",
    } <= seen.keys()
    heavy = {"jax", "flax", "pyarrow", "pandas", "datasets", "fsspec", "absl", "tqdm",
             "ml_collections", "huggingface_hub", "jaxtyping"}  # fmt: skip
    for module, path in seen.items():
        assert not heavy & {name.split(".")[0] for name in imported(path, False)}, module


def test_sentences_for_the_user_are_errors_of_one_kind():
    """Python's own kinds are for bugs, and for the system's words with the number of an error."""
    kinds = "ValueError|OSError|FileNotFoundError|FileExistsError|PermissionError|RuntimeError"
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert not re.findall(rf"raise ({kinds})\((?!number, )", path.read_text()), path


def test_an_architecture_imports_no_other_and_needs_little():
    files = [p for p in (ROOT / "zoo").glob("*.py") if not p.name.startswith("__")]
    files += (ROOT / "zoo" / "parts").glob("*.py")
    kinds = {module.__name__ for module in ARCHITECTURES.values()}
    for path in files:
        if path.name != "models.py":  # whose table they are
            assert not kinds & {*imported(path), *(f"zoo.{name}" for name in names_from_zoo(path))}
        roots = {name.split(".")[0] for name in imported(path)}
        known = {"checkpoints_io", "flax", "jax", "jaxtyping", "numpy", "zoo"}
        if path.name == "attention_kernels.py":
            known.add("absl")  # whose flags tokamax reads
        if path.name in ("peft.py", "peft_export.py", "peft_experts.py", "quantised.py"):
            known.add("einops")  # turns what is in files
        assert roots - set(sys.stdlib_module_names) <= known
    for path in (ROOT / "zoo").rglob("*.py"):
        assert len(path.read_text().splitlines()) < 300, path
    code = "import zoo, sys; print(sorted({'torch', 'transformers', 'orbax'} & sys.modules.keys()))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() in ("[]", "['orbax']")  # flax itself imports orbax


def test_no_module_stands_in_the_way_of_a_library():
    """`python recipes/dpo.py` puts recipes/ first on the path."""
    for path in (ROOT / "recipes").iterdir():
        name = path.stem
        if path.suffix == ".py" or (path / "__init__.py").exists():
            assert name not in sys.stdlib_module_names, path
            spec = importlib.util.find_spec(name)
            assert spec is None or ROOT in pathlib.Path(spec.origin or ROOT / "x").parents, path


def test_no_words_that_say_nothing():
    names = {path.stem for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert not names & {"utils", "util", "common", "base", "helpers", "core", "misc"}


def shown_commands():
    """Lines that start a program of ours, in the docs and in docstrings."""
    paths = [ROOT / "README.md", ROOT / "BUILD.md", *(ROOT / "docs").glob("*.md")]
    paths += [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    for path in paths:
        for line in path.read_text().replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                found = re.search(r"\bpython (recipes/\S+\.py .*--\S+|recipes/\S+\.py)(.*)", part)
                if found:
                    yield path.relative_to(ROOT), (found[1] + found[2]).partition("`")[0].strip()


COMMANDS = sorted({(str(path), command) for path, command in shown_commands()})


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_every_shown_command_parses(path, command):
    program, *arguments = shlex.split(command, comments=True)
    assert (ROOT / program).is_file()
    recipes = {"dpo": settings.DPO, "sft": settings.SFT, "score": settings.SCORE}
    groups = recipes.get(program.removeprefix("recipes/").removesuffix(".py"))
    if groups is None or "--help" in arguments:
        return
    arguments = [a.replace("--config=recipes", f"--config={ROOT}/recipes") for a in arguments]
    config, others = overrides.read(["dpo.py", *arguments], settings.table_of(groups))
    assert others == ["dpo.py"]
    assert config.learning_rate > 0


def test_the_readmes_python_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "runs" / "my-llama" / "model.safetensors").is_file()


def test_there_are_commands_to_parse():
    assert len([c for _, c in COMMANDS if c.startswith("recipes/dpo.py")]) >= 4


def test_every_config_of_pairs_states_the_same_settings():
    """All of the table but adapters; and every config is one that a recipe takes."""
    known = {}
    for path in (ROOT / "recipes" / "configs").glob("[!_]*.py"):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config()
        if "8b" in path.stem or "1b" in path.stem or "70b" in path.stem:
            assert config.directory is None  # it is asked for
            config.directory = "runs"
        if path.stem.endswith("_sft"):
            checks.checked(config, settings.table_of(settings.SFT))
            assert config.name == path.stem
            continue
        checks.checked(config, settings.table_of(settings.DPO))
        assert set(by_name.left_out(config, settings.ALL)) <= OF_SOME_RUNS
        own = ("validation.", *OF_SOME_RUNS)
        known[path.stem] = {name for name, _ in by_name.flat(config) if not name.startswith(own)}
        assert config.name == path.stem
    first, *rest = known.values()
    assert rest
    assert all(names == first for names in rest)


def test_it_is_cited_by_its_version():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = dict(
        re.findall(r"^([a-z-]+): (\S.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    )
    assert (cited["version"], cited["license"]) == (told["version"], told["license"])


def test_links_between_the_docs_lead_somewhere():
    """To files that are there, and to headings in them."""
    anchors = lambda text: {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in link:
                continue
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), (page.name, link)
            assert not heading or heading in anchors(target.read_text()), (page.name, link)


def test_the_default_tests_need_no_network_word():
    """The two lines of the README are there, and .ci/run calls the second."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if "-m venv" in line]
    assert len(lines) == 2
    assert "recipes/dpo.py --config=recipes/configs/tiny.py" in lines[0]
    assert "pytest" in lines[1]
    assert "README.md" in (ROOT / ".ci" / "run").read_text()

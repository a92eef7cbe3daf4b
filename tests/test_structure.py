"""The house: who may import whom, no name in the way of a library, every shown command parses."""

import ast
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from recipes import overrides
from tests.conftest import ROOT
from zoo import ARCHITECTURES

PACKAGES = ("zoo", "checkpoints_io", "recipes")
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
        if package == "zoo":  # whose sentences are errors of the one kind
            ours = [n for n in imported(path) if n.startswith("checkpoints_io")]
            if set(ours) == {"checkpoints_io.errors"}:
                allowed = allowed | {"checkpoints_io"}
        if path.parent == ROOT / "zoo" / "text":  # reads files, and needs no jax
            allowed = allowed | {"checkpoints_io"}
        if path in (ROOT / "zoo" / "__init__.py", ROOT / "zoo" / "__main__.py"):
            at_once = {n for n in imported(path, False) if n.startswith("checkpoints_io")}
            assert at_once <= {"checkpoints_io.errors"}
            allowed = allowed | {"checkpoints_io"}
        names = {name.split(".")[0] for name in imported(path)} & set(PACKAGES)
        assert names <= allowed, path


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
    for module in ("recipes.data.tokenise", "zoo.text.worker", "zoo.text.chat_tokenizer"):
        reached(module, seen)
    assert {"zoo.text.template", "recipes.data.tokens", "checkpoints_io.hf_folder"} <= seen.keys()
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
    kinds = {module.__name__ for module in ARCHITECTURES.values()}
    for path in files:
        assert not kinds & {*imported(path), *(f"zoo.{name}" for name in names_from_zoo(path))}
        roots = {name.split(".")[0] for name in imported(path)}
        known = {"checkpoints_io", "flax", "jax", "jaxtyping", "numpy", "zoo"}
        if path.name == "attention_kernels.py":
            known.add("absl")  # whose flags tokamax reads
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
                    yield path.relative_to(ROOT), (found[1] + found[2]).strip("` ")


COMMANDS = sorted({(str(path), command) for path, command in shown_commands()})


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_every_shown_command_parses(path, command):
    program, *arguments = shlex.split(command, comments=True)
    assert (ROOT / program).is_file()
    if program != "recipes/dpo.py":
        return
    arguments = [a.replace("--config=recipes", f"--config={ROOT}/recipes") for a in arguments]
    config, others = overrides.read(["dpo.py", *arguments])
    assert others == ["dpo.py"]
    assert config.beta > 0


def test_the_readmes_python_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "runs" / "my-llama" / "model.safetensors").is_file()


def test_there_are_commands_to_parse():
    assert len([c for _, c in COMMANDS if c.startswith("recipes/dpo.py")]) >= 4


def test_every_config_states_the_same_settings():
    from recipes import settings

    known = {}
    for path in (ROOT / "recipes" / "configs").glob("[!_]*.py"):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config()
        known[path.stem] = {name for name, _ in settings.flat(config)
                            if not name.startswith("validation.")}  # fmt: skip
        assert config.name == path.stem
    first, *rest = known.values()
    assert rest
    assert all(names == first for names in rest)


def test_the_default_tests_need_no_network_word():
    """The two lines of the README are there, and .ci/run calls the second."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if "-m venv" in line]
    assert len(lines) == 2
    assert "recipes/dpo.py --config=recipes/configs/tiny.py" in lines[0]
    assert "pytest" in lines[1]
    assert "README.md" in (ROOT / ".ci" / "run").read_text()

"""The versions of locks/: all that pyproject.toml asks for, within its bounds, alike in all."""

import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

from tests.conftest import ROOT

EXTRAS = {"cpu": "dev", "cuda": "cuda", "tpu": "tpu"}


def locked(name):
    lines = (ROOT / "locks" / f"{name}.txt").read_text().splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {
        canonicalize_name(name): version.split(";")[0].strip() for name, version in found.items()
    }


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_is_within_the_bounds(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = locked(name)
    for text in [*project["dependencies"], *project["optional-dependencies"][EXTRAS[name]]]:
        asked = Requirement(text)
        assert asked.specifier.contains(versions[canonicalize_name(asked.name)]), text
    tested = locked("cpu")
    assert {one: tested[one] for one in versions if one in tested}.items() <= versions.items()

"""A bucket in memory, for what needs no server."""

import fsspec
import pytest

from checkpoints_io import lease


@pytest.fixture
def bucket(monkeypatch):
    """The objects of an empty one, by their names; its leases run out soon."""
    monkeypatch.setattr(lease, "RENEWED", 0.1)
    monkeypatch.setattr(lease, "RUNS_OUT", 0.5)
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(type(memory), "store", {})
    monkeypatch.setattr(type(memory), "pseudo_dirs", [""])
    return memory.store

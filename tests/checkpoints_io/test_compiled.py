"""Where compiled programs are kept."""

import jax
import pytest

from checkpoints_io import compiled
from checkpoints_io.errors import BadInput


@pytest.fixture
def given(monkeypatch):
    """What jax was told."""
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    return told


def test_on_a_disk_all_are_kept_and_in_a_bucket_slow_ones(given, tmp_path):
    compiled.keep(str(tmp_path))
    assert given == {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    given.clear()
    compiled.keep("memory://runs/compiled")
    assert given == {"jax_compilation_cache_dir": "memory://runs/compiled"}
    with pytest.raises(BadInput, match=r"compile_cache=nowhere://a/b: nowhere:// is not a known"):
        compiled.keep("nowhere://a/b", "--config.compile_cache")


def test_a_program_without_a_setting_keeps_to_what_the_environment_says(given, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    compiled.keep_here()
    assert given == {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    compiled.keep_here()
    assert given["jax_compilation_cache_dir"].endswith("/.cache/nnx-zoo/compiled")

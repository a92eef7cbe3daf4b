"""XLA's compilation cache: compiled programs are kept from one start to the next."""

import os

DEFAULT = "~/.cache/nnx-zoo/compiled"


def keep(name: str = DEFAULT, flag: str = "") -> None:
    """Caches what is compiled from here on in the place `name`, which `flag` gave.

    Raises:
      ValueError: there is no such kind of place.
    """
    import jax  # late, so that wrong flags are reported without waiting for it

    from checkpoints_io import places

    place = places.at(name, flag)
    jax.config.update("jax_compilation_cache_dir", place.address)
    if isinstance(place, places.Disk):  # from a bucket, a quick compilation would only be slower
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def keep_here() -> None:
    """Caches in the default place, for programs without a setting, unless JAX's variable is set."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        keep()

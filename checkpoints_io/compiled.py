"""Programs that XLA has compiled, kept from one start to the next."""

import os

DEFAULT = "~/.cache/nnx-zoo/compiled"


def keep(name: str = DEFAULT, flag: str = "") -> None:
    """What is compiled from here on is kept there, and taken from there; `flag` gave the place.

    Raises:
      ValueError: there is no such kind of place.
    """
    import jax  # late, so that wrong flags are answered before it

    from checkpoints_io import places

    place = places.at(name, flag)
    jax.config.update("jax_compilation_cache_dir", place.address)
    if isinstance(place, places.Disk):  # a bucket is asked for nothing that is quick to do
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def keep_here() -> None:
    """The same for programs without a setting for it, unless the environment says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        keep()

"""Wrappers around the attention kernels of other libraries, each on one device."""

import functools
import importlib
import math
import types

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_lib
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from checkpoints_io.errors import BadInput
from zoo.parts import remat, spans

Query = Float[Array, "B T N H"]
Key = Float[Array, "B S K H"]
Bound = Int[Array, "B T"]
Looking = spans.Window | None

# Lanes of a TPU's vector unit, the tile of the splash kernels, and the numbers of a mask of theirs,
# of 4 bytes each, that are there at a time.
LANES, TILE, MASK = 128, 512, 2**28


def tokamax(
    q: Query, k: Key, v: Key, first: Bound, last: Bound,
    window: Looking, sinks: None, *, scale: float, softcap: float | None,
    kernel: str | None = None,
) -> Query:  # fmt: skip
    """Tokamax, which takes the key ranges directly and skips tiles that no query sees.

    A window is passed as a T x S mask. `kernel` is one of Tokamax's names, by default the fastest
    that the GPU can run.

    Raises:
      ValueError: tokamax is not installed.
    """
    # The public function takes a bool mask [B, N, T, S]; the classes beneath it take the ranges.
    api = _imported("tokamax._src.ops.attention.api")
    base = _imported("tokamax._src.ops.attention.base")
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # or tokamax would parse a notebook's arguments
    inside = None
    if window is not None:
        inside = spans.seen(first, last, jnp.arange(k.shape[1]), window)[:, None]
    ranges = base.Mask(inside, k_start=first[:, None], k_end=last[:, None])
    how = dict(mask=ranges, logits_scale=scale, logits_soft_cap=softcap)
    names = [kernel] if kernel else ["mosaic_gpu", "triton"]
    refused = []
    for name in names:
        try:
            return api.IMPLEMENTATIONS[name](q, k, v, **how)
        except (NotImplementedError, KeyError, TypeError, AttributeError) as error:
            # The last two: it calls what newer jax has removed.
            refused.append(f"{name}: {str(error)[:200]}")
    raise BadInput(f"tokamax has no kernel for this ({'; '.join(refused)}): use attention=blocks")


def _imported(module: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInput(
            "attention=tokamax needs tokamax: pip install 'nnx-zoo[tokamax]', or use "
            "attention=blocks"
        ) from error


def tokamax_chunked(
    q: Query, k: Key, v: Key, first: Bound, last: Bound,
    window: Looking, sinks: None, *, scale: float, softcap: float | None,
) -> Query:  # fmt: skip
    """Tokamax's plain-XLA kernel, which stands in for the others in tests on CPUs."""
    how = dict(scale=scale, softcap=softcap, kernel="xla_chunked")
    return tokamax(q, k, v, first, last, window, sinks, **how)


def splash(
    q: Query, k: Key, v: Key, first: Bound, last: Bound,
    window: Looking, sinks: None, *, scale: float, softcap: float | None,
    interpret: bool = False,
) -> Query:  # fmt: skip
    """JAX's splash kernel for TPUs, with a dynamic mask: visible tiles are computed per row."""
    (T, N, H), (S, K) = q.shape[1:], k.shape[1:3]
    room = lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, -H % LANES)])
    q, k, v = room(q * jnp.asarray(scale, q.dtype)), room(k), room(v)
    tile = math.gcd(T, TILE)
    sizes = splash_lib.BlockSizes(
        block_q=tile, block_kv=tile, block_kv_compute=tile,
        block_q_dkv=tile, block_kv_dkv=tile, block_kv_dkv_compute=tile,
        block_q_dq=tile, block_kv_dq=tile,
    )  # fmt: skip

    def gathered(some: tuple, row: tuple) -> Array:
        """The outputs of some queries over the keys of their row."""
        (q, first, last, queries), (k, v, keys) = some, row
        looking = None if window is None else spans.Window(window.width, queries, keys)
        kernel = splash_lib.make_splash_mqa(
            # One mask for all heads: a mask per head would be N / K times as large.
            spans.seen(first, last, jnp.arange(S), looking)[None],
            block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret,
            attn_logits_soft_cap=softcap, residual_checkpoint_name=remat.ATTENTION,
        )  # fmt: skip
        # A flag that names a scope: a traced value inside jit cannot be a condition.
        for info in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
            setattr(kernel, info, getattr(kernel, info)._replace(is_dynamic_mask=None))
        by_head = q.reshape(len(q), K, N // K, -1).transpose(1, 2, 0, 3)
        out: PyTree = jax.vmap(kernel)(by_head, k.transpose(1, 0, 2), v.transpose(1, 0, 2))
        return out.transpose(2, 0, 1, 3).reshape(len(q), N, -1)

    count = _parts(T, S, tile)
    cut = lambda x: x.reshape(count, -1, *x.shape[1:])

    def of_row(q: Array, k: Array, v: Array, first: Array, last: Array, *places: Array) -> Array:
        queries, keys = places or (None, None)
        whole = q, first, last, queries
        if count == 1:
            return gathered(whole, (k, v, keys))
        # Gradients of keys are added up in float32, as within the kernel.
        wide = k.astype(jnp.float32), v.astype(jnp.float32)

        # The masks of all parts are not kept for the backward pass.
        @functools.partial(jax.checkpoint, policy=remat.POLICIES["attention"], prevent_cse=False)
        def part(some: tuple) -> Array:
            return gathered(some, (*(x.astype(k.dtype) for x in wide), keys))

        return jax.lax.map(part, jax.tree.map(cut, whole)).reshape(T, N, -1)

    places = () if window is None else (window.queries, window.keys)
    rows = [of_row(*parts) for parts in zip(q, k, v, first, last, *places, strict=True)]
    return jnp.stack(rows)[..., :H].astype(q.dtype)


def _parts(T: int, S: int, tile: int) -> int:
    """The number of parts, of whole tiles, that a row's queries and their mask are split into."""
    tiles = T // tile
    few = (count for count in range(1, tiles) if tiles % count == 0 and T // count * S <= MASK)
    return next(few, tiles)


def cudnn(
    q: Query, k: Key, v: Key, first: Bound, last: Bound,
    window: Looking, sinks: None, *, scale: float, softcap: None,
) -> Query:  # fmt: skip
    """NVIDIA's cuDNN kernel, which needs the ranges as a T x S mask: for rows that are not long."""
    seen = spans.seen(first, last, jnp.arange(k.shape[1]), window)
    return jax.nn.dot_product_attention(
        q, k, v, mask=seen[:, None], scale=scale, implementation="cudnn"
    )

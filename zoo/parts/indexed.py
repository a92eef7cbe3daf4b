"""Sparse attention with an indexer, for texts so short that it selects every key.

The indexer scores all keys of a query, and attention sees the best `index_topk` of them. In a text
of at most `index_topk` tokens these are all the keys: attention is dense, and the indexer, which
takes no gradient, has no effect. It is therefore not computed here; longer texts are refused, and
an export carries over its weights from the source folder.

Source: https://arxiv.org/abs/2512.02556, Eq. 1 and 2.
"""

from collections.abc import Mapping

from checkpoints_io.errors import BadInput

# How the indexer scores, and which layers reuse an earlier selection: irrelevant if all are kept.
IGNORED = frozenset({
    "index_head_dim", "index_n_heads", "index_share_for_mtp_iteration", "index_skip_topk_offset",
    "index_topk_freq", "index_topk_pattern", "indexer_rope_interleave", "indexer_types",
})  # fmt: skip
LAYERS = {"indexed_attention", "deepseek_sparse_attention"}
# Its weights belong to the text, so every export has them, except those of layers past the last.
HF_KEPT = (r"^model\.layers\.(?!{L}\.)\d+\.self_attn\.indexer\.",)


def read(hf: Mapping[str, object]) -> dict[str, object]:
    """Drops `layer_types` from a config.json, which transformers uses for its kind of KV cache.

    Raises:
      ValueError: a layer is of another kind.
    """
    rest = dict(hf)
    kinds: object = rest.pop("layer_types", None) or []
    if odd := set(map(str, kinds if isinstance(kinds, list) else [kinds])) - LAYERS:
        raise BadInput(f"config.json: layer_types may be {sorted(LAYERS)}, not {odd}")
    return rest

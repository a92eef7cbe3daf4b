"""Sparse attention by an indexer, where it chooses every key: texts of at most `index_topk` tokens.

The indexer scores all keys of a query and attention sees the best `index_topk` of them. Of a text
that has no more, these are all of it: attention is dense, and the indexer, which takes no gradient,
changes nothing. So it is not computed here; longer texts are refused, and an export carries its
weights from the folder that the model came from.

Source: https://arxiv.org/abs/2512.02556, Eq. 1 and 2.
"""

from collections.abc import Mapping
from typing import Any

from checkpoints_io.errors import BadInput

# How it scores, and which layers take the choice of one before: of no account where all are chosen.
IGNORED = frozenset({
    "index_head_dim", "index_n_heads", "index_share_for_mtp_iteration", "index_skip_topk_offset",
    "index_topk_freq", "index_topk_pattern", "indexer_rope_interleave", "indexer_types",
})  # fmt: skip
LAYERS = {"indexed_attention", "deepseek_sparse_attention"}
# Its weights are of the text, and so in every export; those of a layer after the last are not.
HF_KEPT = (r"^model\.layers\.(?!{L}\.)\d+\.self_attn\.indexer\.",)


def read(hf: Mapping[str, object]) -> dict[str, object]:
    """A config.json without `layer_types`, by which transformers names how it keeps keys.

    Raises:
      ValueError: a layer is of another kind.
    """
    rest = dict(hf)
    kinds: Any = rest.pop("layer_types", None) or []
    if odd := set(map(str, kinds if isinstance(kinds, list) else [kinds])) - LAYERS:
        raise BadInput(f"config.json: layer_types may be {sorted(LAYERS)}, not {odd}")
    return rest

"""Grouped low-rank products, one folder an op: `api.py` (one public function), `reference.py`, one file a form.

Arguments are arrays; the adapter's scale is folded into B; `idx [T, K]` int32 padded with E, no expert twice in a
token, `gates` float32.
T tokens, D width, F FFN width, E experts, K active experts, R rank.
"""

from kernels_pallas.grouped_lora.api import grouped_expand, grouped_lora, grouped_shrink
from kernels_pallas.moe_ffn.api import moe_ffn
from kernels_pallas.rank_gated.api import rank_gated
from kernels_pallas.routed_ffn.api import routed_ffn
from kernels_pallas.select import low_rank_op

__all__ = ["grouped_expand", "grouped_lora", "grouped_shrink", "low_rank_op", "moe_ffn", "rank_gated", "routed_ffn"]

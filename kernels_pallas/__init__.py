"""Grouped low-rank products, one folder an op: `api.py` (one public function), `reference.py`, one file a form.

Arguments are arrays; the adapter's scale is folded into B; `idx [T, K]` int32 padded with E, `gates` float32.
T tokens, D width, F FFN width, E experts, K active experts, R rank.
"""

from kernels_pallas.rank_gated.api import rank_gated
from kernels_pallas.routed_ffn.api import routed_ffn

__all__ = ["rank_gated", "routed_ffn"]

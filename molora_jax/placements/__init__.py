"""Where do experts act? `projection`: in every listed projection. `ffn`: each expert is the whole feed-forward block.

A rule's sites say which: `sites="ffn"` is placed by `ffn`, projections by `projection`. Others are named by the rule
(`NAMED`): `chain`, several passes through one pool of experts beside the feed-forward block.
"""

from molora_jax.placements import chain, ffn, projection

PLACEMENTS = {"projection": projection, "ffn": ffn, "chain": chain}
NAMED = {"chain": chain.Chain}

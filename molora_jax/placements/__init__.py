"""Where do experts act? `projection`: in every listed projection. `ffn`: each expert is the whole feed-forward block.

A rule's sites say which: `sites="ffn"` is placed by `ffn`, projections by `projection`.
"""

from molora_jax.placements import ffn, projection

PLACEMENTS = {"projection": projection, "ffn": ffn}

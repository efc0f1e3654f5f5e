"""Where do experts act? `projection`: in every listed projection. `ffn`: each expert is the whole feed-forward block.

A rule's sites say which: `sites="ffn"` is placed by `ffn`, projections by `projection`. Others are named by the rule
(`NAMED` in their file): `chain`, several passes through one pool of experts beside the feed-forward block;
`base_experts`, LoRA on the experts that the base itself routes to; `block`, an expert at each place of the block, of
one kind or another, weighted by one router.
"""

from molora_jax.placements.base import Placement
from molora_jax.placements.base_experts import BaseExperts
from molora_jax.placements.block import Block
from molora_jax.placements.chain import Chain
from molora_jax.placements.ffn import FFN
from molora_jax.placements.projection import Projection

PLACEMENTS = {"projection": Projection, "ffn": FFN, "chain": Chain, "base_experts": BaseExperts, "block": Block}
UNNAMED = tuple(member() for member in PLACEMENTS.values() if not member.NAMED)


def of(rule) -> Placement:
    """The placement of a rule: the one that it names, or the one of its sites."""
    if rule.placement is not None:
        return rule.placement
    return next(member for member in UNNAMED if set(rule.sites) <= set(member.SITES))

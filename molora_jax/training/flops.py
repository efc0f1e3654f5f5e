"""Model FLOPs of a training step, counted from shapes: what a perfect machine would have to do, recomputation left out.

A frozen kernel costs 2 FLOPs a number and token forward, and 2 backward for its input: its own gradient, the third 2 of
full training, is never formed. A trained leaf costs 6. Scores and their sum cost 12 S D_a a token and layer forward and
backward (PaLM's convention, arXiv 2204.02311, appendix B: the whole square, though half of it is masked). Experts count
as many as a token uses at most.
"""

import math

from flax.traverse_util import flatten_dict

from molora_jax.core import trees


def per_token(model, adapters: dict, modules: dict, frozen: tuple[str, ...], seq_len: int) -> float:
    """FLOPs of a token in a row of `seq_len`, forward and backward.

    Args:
      model: compiled. adapters, modules: trees (shapes will do). frozen: patterns of leaves that do not train.
    """
    backbone, shapes = model.config, model.config.shapes()
    trained = flatten_dict(modules.get("base", {}), sep="/")
    total = 0.0
    for path, leaf in shapes.items():
        if len(leaf.shape) - leaf.stacked < 2 or path == "embed":  # a table is read, not multiplied
            continue
        size = math.prod(leaf.shape)
        if leaf.stacked > 1:  # experts of the base: a token uses some
            size *= backbone.active / backbone.experts
        total += (6 if path in trained else 4) * size
    if "head" not in shapes and backbone.CAUSAL:  # tied: the table is the head as well
        total += (6 if "embed" in trained else 4) * math.prod(shapes["embed"].shape)
    width = backbone.dims("o")[0] if "o" in backbone.sites else 0
    total += 12 * seq_len * width * backbone.layers
    used = {
        (rule.name, segment.name): min(1.0, rule.router.k_max(count) / count) if rule.router and count else 1.0
        for segment in model.segments
        for rule, count in zip(model.rules, segment.counts, strict=True)
    }
    for cost, part in zip((6, 4), trees.split(adapters, frozen), strict=True):
        for path, leaf in flatten_dict(part, sep="/").items():
            total += cost * math.prod(leaf.shape) * used.get(tuple(path.split("/")[:2]), 1.0)
    return total

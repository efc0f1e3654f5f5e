"""How alike a layer's experts are (MoLA, arXiv 2402.08562, section 4): mean over expert pairs of ||X_i - X_j||_F.

Per matrix, as in the paper: the factors A and B of each projection on their own, not their product, which would hide a
rotation. A small value says that a layer has more experts than it uses. E experts.
"""

import itertools

import numpy as np

from molora_jax.core.rules import layers_named


def expert_redundancy(adapters: dict) -> dict[str, dict[int, dict[str, float]]]:
    """The distance of experts by layer and matrix; 0 where all experts are equal, absent where there is only one.

    Args:
      adapters: the tree `rule/segment/site/leaf [layers, E, ...]` of a run.

    Returns:
      `{rule: {layer: {"site/leaf": distance}}}`; smaller is more redundant.
    """
    out: dict = {}
    for rule, segments in adapters.items():
        for segment, sites in segments.items():
            if segment == "shared":
                continue
            own = layers_named(segment)
            for site, leaves in sites.items():
                for leaf in ("A", "B") if site != "router" else ():
                    for i, experts in enumerate(np.asarray(leaves.get(leaf, ()), np.float64)):
                        if len(experts) > 1:
                            layer = out.setdefault(rule, {}).setdefault(own[i], {})
                            layer[f"{site}/{leaf}"] = mean_distance(experts)
    return out


def mean_distance(experts: np.ndarray) -> float:
    """`experts [E, ...]`: mean Frobenius norm of the difference over the E (E - 1) / 2 pairs."""
    pairs = itertools.combinations(range(len(experts)), 2)
    return float(np.mean([np.linalg.norm(experts[i] - experts[j]) for i, j in pairs]))

"""The mean of runs: of every leaf on its own, or of the weight changes.

    factors   A = sum_j w_j A_j,  B = sum_j w_j B_j          (so B A holds cross terms B_i A_j)
    product   B A = the best rank-R form of sum_j w_j s_j B_j A_j          (truncated SVD)

w_j = 1/n by default. `factors` takes any method, routed ones too: routers, their state, heads and trained copies of
base leaves are averaged leaf by leaf (a model soup, arXiv 2203.05482), which is meant for runs of one start.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from molora_jax import config as config_lib
from molora_jax.core import factorise
from molora_jax.surgery import base as contract
from molora_jax.surgery.base import Result, Surgery, weights_of

FREE = ("dropout", "init")  # of an adapter: what two runs may differ in and still have leaves that mean the same


@dataclasses.dataclass(frozen=True)
class Average(Surgery):
    """`rank` of the product's form: 0 is the parents' own. `weights`: "" for 1/n, or a number a run by commas."""

    of: Literal["factors", "product"] = "factors"
    rank: int = 0
    weights: str = ""

    PARENTS: ClassVar[tuple] = (2, None)
    LIMITS: ClassVar[dict] = {"rank": (0, None)}

    def check(self, parents):
        weights_of(self.weights, len(parents), 1 / len(parents))
        if self.of == "product":
            contract.same_sites(parents, ranks=True)
        else:
            _same_methods(parents)

    def apply(self, parents):
        w = weights_of(self.weights, len(parents), 1 / len(parents))
        if self.of == "factors":
            items = {name: _mean(parents, name, w) for name in ("adapters", "router_state", "modules")}
            views = (contract.View(items[name]) for name in ("adapters", "router_state"))
            leaves, state = views
            return Result(parents[0].config, leaves, state=state, modules=items["modules"])
        ranks = contract.merged_ranks(parents, self.rank)
        config, leaves = contract.plain_config(parents, ranks), {}
        for at, pairs in contract.sites(parents):
            leaves |= contract.pair(at, *factorise.truncated(*contract.stacked(pairs, w), ranks[at[0]]))
        return Result(config, leaves)


def _same_methods(parents):
    """Raises InputError where the leaves of two runs do not mean the same."""
    first = parents[0]
    rules = [_rules(parent.config) for parent in parents]
    for parent, own in zip(parents, rules, strict=True):
        if own != rules[0]:
            a, b = (flatten_dict(one, sep=".") for one in (rules[0], own))
            name = next(k for k in [*a, *b] if a.get(k) != b.get(k))
            raise parent.refuse(
                f"with {name} = {b.get(name)!r}, where {first.name} has {a.get(name)!r}",
                "the same rules on all runs (dropout and init aside)",
                "Take runs of one config; of=product takes different scales, lora_lego different ranks.",
            )
        for item in ("adapters", "router_state", "modules"):
            a, b = (flatten_dict(one.opened.items.get(item, {}), sep="/") for one in (first, parent))
            for path in [*a, *(p for p in b if p not in a)]:
                shapes = [None if path not in one else one[path].shape for one in (a, b)]
                if shapes[0] != shapes[1]:
                    raise parent.refuse(
                        f"with {item}/{path} {shapes[1] and list(shapes[1])}, where {first.name} has "
                        f"{shapes[0] and list(shapes[0])}", "the same leaves in the same shapes",
                    )  # fmt: skip
                if not np.issubdtype(a[path].dtype, np.floating) and not np.array_equal(a[path], b[path]):
                    raise parent.refuse(
                        f"whose table {item}/{path} is another than {first.name}'s", "the same tables",
                        "Average runs of one seed, or with of=product.",
                    )  # fmt: skip


def _rules(config) -> dict:
    rules = config_lib.to_dict(config.method)["rules"]
    for rule in rules.values():
        rule["adapter"] = {k: v for k, v in rule["adapter"].items() if k not in FREE}
        rule["load"] = []
    return rules


def _mean(parents, item, w) -> dict:
    """Leaf by leaf in float64; tables of integers are the first run's."""
    trees = [flatten_dict(parent.opened.items.get(item, {}), sep="/") for parent in parents]
    out = {}
    for path, leaf in trees[0].items():
        out[path] = leaf
        if np.issubdtype(leaf.dtype, np.floating):
            total = sum(wj * tree[path].astype(np.float64) for wj, tree in zip(w, trees, strict=True))
            out[path] = total.astype(leaf.dtype)
    return unflatten_dict(out, sep="/")

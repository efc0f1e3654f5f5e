"""Three tasks at once on one small decoder: HydraLoRA, AdaMoLE, LD-MoLE, GOAT and CoMoL beside what they are told from.

A row is (adapter, experts, router, losses, learning rate). No rate is tuned; the three of GOAT are the specification's.
"""

import numpy as np

from configs import common
from experiments.routed import small

TOP2, DENSE = dict(name="softmax_topk", k=2), dict(name="softmax_topk", k=0)
FOUR, TWO = dict(rank=4, alpha=8.0), dict(rank=2, alpha=32.0)
BALANCE, UNBALANCED = (dict(balance=common.balance(weight=weight, reduce="sum")) for weight in (1e-3, 0.0))
EXCESS = lambda weight: dict(balance=common.balance(weight=weight, reduce="sum", normalise="tokens"))  # noqa: E731
GEN = dict(name="sparsegen", hidden=32)
GOAT = dict(name="goat", rho=10.0)
CORES = dict(name="comol", rank=8, alpha=16.0)


def row(adapter, experts=1, router=None, losses=None, rate=4e-3):
    return adapter, experts, router, losses or {}, rate


ROWS = {
    "LoRA, R = 8": row(dict(rank=8, alpha=16.0)),
    "LoRA, R = 16": row(dict(rank=16, alpha=32.0)),
    "hydralora: 3 LoRAs of R = 4, dense": row(FOUR, 3, DENSE),
    "hydralora: one A, 3 B, R = 8": row(dict(name="lora_shared_a", rank=8, alpha=16.0), 3, DENSE),
    "adamole: 8 of R = 4, dense": row(FOUR, 8, DENSE),
    "adamole: 8 of R = 4, top 2": row(FOUR, 8, TOP2),
    "adamole: fixed threshold 1/E": row(FOUR, 8, dict(name="controlled_threshold", kp=0.0, ki=0.0)),
    "adamole: learned threshold, c = 0": row(FOUR, 8, dict(name="learned_threshold"), EXCESS(0.0)),
    "adamole: learned threshold, c = 1e-3": row(FOUR, 8, dict(name="learned_threshold"), EXCESS(1e-3)),
    "ld_mole: lambda = 0": row(FOUR, 8, GEN | dict(learned=False)),
    "ld_mole: learned lambda": row(FOUR, 8, GEN, dict(sparsity=dict(weight=0.0))),
    "ld_mole: learned, sparsity 0.1": row(FOUR, 8, GEN, dict(sparsity=dict(weight=0.1))),
    "ld_mole: learned, sparsity 1": row(FOUR, 8, GEN, dict(sparsity=dict(weight=1.0))),
    "ld_mole: biases of 0, sparsity 1": row(FOUR, 8, GEN | dict(bias=0.0), dict(sparsity=dict(weight=1.0))),
    "comol: one A, 4 B, R = 8": row(dict(name="lora_shared_a", rank=8, alpha=16.0), 4, DENSE),
    "comol: 4 cores": row(CORES, 4, dict(name="core_space")),
    "comol: 16 cores": row(CORES, 16, dict(name="core_space")),
    "comol: 4 cores, router on x": row(CORES, 4, DENSE),
    "comol: 16 cores, router on x": row(CORES, 16, DENSE),
    "comol: 4 cores from the identity": row(CORES | dict(cores="identity", noise=0.02), 4, dict(name="core_space")),
    "goat: zero start, 8 of R = 2": row(TWO, 8, TOP2, BALANCE, 1e-3),
    "goat: all from the top (PiSSA)": row(TWO | dict(init="pissa"), 8, TOP2, BALANCE, 1e-3),
    "goat": row(TWO | dict(init=GOAT), 8, TOP2, BALANCE, 1e-3),
    "goat without balance": row(TWO | dict(init=GOAT), 8, TOP2, UNBALANCED, 1e-3),
}
for _rate in (3e-4, 1e-3, 3e-3):
    ROWS[f"goat, the theory's scale, rate {_rate:g}"] = row(
        TWO | dict(name="lora_aligned", init=GOAT), 8, TOP2, BALANCE, _rate
    )


def run(workdir, steps, found, keep):
    source = None
    for number, (name, (adapter, experts, router, losses, rate)) in enumerate(ROWS.items()):
        if name in found:
            continue
        source = source or small.base(workdir)
        made = small.config_of(source, small.NEW, steps, rate=rate)
        made.method.rules = small.rules(
            experts=str(experts), router=router, adapter=common.adapter(**{"name": "lora", "dropout": 0.0} | adapter)
        )
        made.losses = losses
        here = workdir / f"{number:02d}"
        done = small.trained(made, here)
        curve = small.losses(here)
        trains = ("A", "B", "core", "W", "w_tau", "b_tau", "W1", "b1", "W2", "b2")
        keep(name, {
            "NLL": small.scored(done)[0], "first loss": round(curve[0], 4),
            "loss of steps 11-30": round(float(np.mean(curve[10:30])), 4),
            "trained": sum(v.size for leaf in trains for v in small.leaves(done, leaf)),
            **small.routed(here, "active_experts", "entropy", "load_max_over_mean"), **_shapes(done, name),
        })  # fmt: skip
    _one_family_each(workdir, steps, found, keep)


def _shapes(done, name) -> dict:
    """How far experts are apart, and where thresholds went."""
    out = {}
    if name.startswith("hydralora: one A"):
        out["cosine of two B's"] = round(np.mean([small.cosine(B) for B in small.leaves(done, "B")]), 4)
    if "cores" in name:
        out["cosine of two cores"] = round(np.mean([small.cosine(M) for M in small.leaves(done, "core")]), 4)
    if "learned threshold" in name:
        out["bias of tau"] = round(float(np.mean(np.concatenate([b.ravel() for b in small.leaves(done, "b_tau")]))), 5)
    return out


def _one_family_each(workdir, steps, found, keep):
    """HydraLoRA's observation: LoRAs of other tasks, from one start, differ in B and hardly in A."""
    name = "hydralora: a LoRA a family, from one start"
    if name in found:
        return
    source, runs = small.base(workdir), []
    for task in small.NEW.split(","):
        made = small.config_of(source, task, steps)
        made.method.rules = small.rules(adapter=common.adapter(rank=8, alpha=16.0, dropout=0.0))
        runs.append(small.trained(made, workdir / f"family-{task}"))
    both = {}
    for leaf in ("A", "B"):
        each = [np.concatenate(parts, axis=1) for parts in zip(*(small.leaves(r, leaf) for r in runs), strict=True)]
        both[f"cosine of two {leaf}'s"] = round(np.mean([small.cosine(X) for X in each]), 4)
    keep(name, both)

"""RandLoRA: a change of full rank from frozen random products and trained diagonals (Albert et al. 2025, 2502.00987).

    python -m launch.train --config=configs/randlora.py --workdir=runs/randlora

The claim: with LoRA's parameters and memory the update has full rank, which pays where LoRA saturates. A smaller
`rank` trains MORE: N (d + R) parameters a projection, d its smaller width, N = ceil(d / R). Scale 20 and rate 1e-4 are
peft's and the paper's; a rate of 1e-3 diverges at that scale (`adapter.normalise=True` divides by sqrt N).

A step costs what dense products of width d cost, more than LoRA's. With experts (`experts="4"` and a router) all of
them share the bases; each has diagonals of its own. A routed feed-forward block is `sites="gate,up,down"` here.
"""

from configs import common


def get_config():
    config = common.get_config()
    adapter = common.adapter("randlora", rank=32, alpha=640.0)
    config.method.rules = dict(all=common.rule(f"{common.ATTENTION},{common.FFN}", adapter=adapter))
    config.optim.learning_rate = 1e-4
    return config

"""AdaLoRA: ranks go where they matter, from a mean of 12 to 8 (Zhang et al. 2023, arXiv 2303.10512).

    python -m launch.train --config=configs/adalora.py --workdir=runs/adalora

Triplets of all layers, sites and experts are ranked together by a smoothed |p dp|; those of the lowest score have
lam = 0. The schedule is a fraction of `train.steps`. As peft's defaults but for the fractions, which there are steps;
the paper's claim is a better use of one parameter budget than equal ranks make.
"""

from configs import common


def get_config():
    config = common.get_config()
    adapter = dict(name="adalora", rank=12, alpha=32.0, dropout=0.0, init="kaiming")
    config.method.rules = dict(all=common.rule(f"{common.ATTENTION},{common.FFN}", adapter=adapter))
    config.losses = dict(orthogonal=dict(weight=0.5))
    config.optim = dict(
        config.optim, name="adalora", learning_rate=1e-3, target=8, initial_fraction=0.1, final_fraction=0.3, every=1,
        beta1=0.85, beta2=0.85,
    )  # fmt: skip
    return config

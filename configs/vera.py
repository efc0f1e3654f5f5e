"""VeRA: one frozen random pair A, B for all layers, scaled by trained vectors (Kopiczko et al. 2023, arXiv 2310.11454).

    python -m launch.train --config=configs/vera.py --workdir=runs/vera

The claim: what LoRA reaches, with a tenth of its trained parameters, D_out + R a projection. It wants a learning rate
about ten times LoRA's. The rules table at the start of a run says what memory the frozen pair takes.

With experts (`experts="4"` and a router) all of them share A and B; each has vectors d and b of its own.
"""

from configs import common


def get_config():
    config = common.get_config()
    adapter = dict(name="vera", rank=256, dropout=0.05, d_initial=0.1, seed=0)
    config.method.rules = dict(all=common.rule(f"{common.ATTENTION},{common.FFN}", adapter=adapter))
    config.optim.learning_rate = 4e-3
    return config

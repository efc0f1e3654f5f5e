"""NOLA: LoRA whose factors are mixtures of frozen random matrices (Koohpayegani et al. 2023, arXiv 2310.02556).

    python -m launch.train --config=configs/nola.py --workdir=runs/nola

The claim: fewer parameters than LoRA of rank 1, as many as one likes whatever rank and widths are, without loss. 128
coefficients a factor here; the paper has 256 to 1024. The matrices are made from a seed inside the step and never
stored, so the price is time: k R D_in + l R D_out random numbers a projection, forward and backward. It wants a
learning rate of 5e-3 to 1e-2; `optim.weight_decay` stays 0.

With experts (`experts="4"` and a router) all of a projection share the bases, made once for all of them; each has
coefficients of its own.
"""

from configs import common


def get_config():
    config = common.get_config()
    adapter = common.adapter("nola", rank=8, alpha=8.0, dropout=0.0, bases_A=128, bases_B=128)
    config.method.rules = dict(all=common.rule(f"{common.ATTENTION},{common.FFN}", adapter=adapter))
    config.optim.learning_rate = 5e-3
    return config

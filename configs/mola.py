"""MoLA: a mixture per projection, more experts in higher layers (arXiv 2402.08562).

    python -m launch.train --config=configs/mola.py --workdir=runs/mola

`experts="2|4|6|8"` is the inverted triangle in four groups of depth. The balance loss joins the sites of a layer and is
summed over layers, as in the paper's code (1 a layer at uniform routing).
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        all=common.rule(
            f"{common.ATTENTION},{common.FFN}",
            experts="2|4|6|8",
            adapter=common.adapter(rank=8, alpha=16.0),
            router=dict(name="softmax_topk", k=2, share="site", init="kaiming"),
        )
    )
    config.losses = dict(balance=common.balance(weight=1e-3, over="layer", reduce="sum"))
    return config

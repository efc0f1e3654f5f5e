"""GOAT: top-2 experts that start at their own segments of the kernel's SVD (arXiv 2502.16894).

    python -m launch.train --config=configs/goat.py --workdir=runs/goat

The claim: experts that start in different parts of the spectrum, and a scale that aligns gradients, bring a mixture
near full fine-tuning. Rank is an expert's, 2 of the paper's total of 16; the scale is alpha / rank = 16, as in its
scripts, which have no theory scale. That is `adapter.name=lora_aligned` (with a rate tuned for it); the smallest
triplets of each segment are `adapter.init.segments=goat_mini`.

At the start the function is the base's in expectation over routers, not for each token.
"""

from configs import common


def get_config():
    config = common.get_config()
    start = dict(name="goat", rho=10.0, segments="goat", residual=1.0)
    config.method.rules = dict(
        all=common.rule(
            f"{common.ATTENTION},{common.FFN}",
            experts="8",
            adapter=common.adapter(rank=2, alpha=32.0, init=start),
            router=dict(name="softmax_topk", k=2, renormalise=True, share="site", init="kaiming"),
        )
    )
    config.losses = dict(balance=common.balance(weight=1e-3, reduce="sum", normalise="tokens"))
    return config

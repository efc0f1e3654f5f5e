"""DynMoLE: all experts where a projection's router is uncertain, top-p elsewhere, an entropy loss (arXiv 2504.00661).

    python -m launch.train --config=configs/dynmole.py --workdir=runs/dynmole

The claim: routing by Tsallis entropy, with the entropy as a loss, beats fixed top-k experts (MoLA) at equal rank.
Values of the reference code. Not as there: padding is left out of the entropy loss too; `counts="hard"` is the usual
count-based balance loss, which a third party reports for the paper.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.12, one CPU core): mean loss of the
first five steps 5.56, of the last five 3.37.

Measured with `python -m experiments.leaderboard --budget=40x512 --methods=dynmole` and the settings of its README
(equal active rank, one CPU core, mean of seeds 0 and 1): mean loss of the first five of 40 steps 5.63, of the last
five 2.79.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        ffn=common.rule(
            common.FFN,
            experts="6",
            adapter=common.adapter(rank=24, alpha=48.0),
            router=dict(
                name="entropy_hybrid", k=2, p=0.75, threshold=0.9, kind="tsallis", q=1.1, eps=1e-5, share="site",
                init="kaiming",
            ),
        )
    )  # fmt: skip
    config.losses = dict(
        balance=common.balance(weight=1e-3, over="all", normalise="tokens", counts="soft", accumulate="exact"),
        entropy=dict(weight=1e-2, kind="tsallis", q=1.1, eps=1e-5, accumulate="exact"),
    )
    return config

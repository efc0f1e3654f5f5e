"""LoRAMoE: a dense mixture on the FFN projections, and a loss that keeps world knowledge apart (arXiv 2312.09979).

    python -m launch.train --config=configs/loramoe.py --workdir=runs/loramoe

The claim: with two groups of experts, one for world knowledge (`world`, here the tasks of facts), long fine-tuning on
tasks forgets less. Values of the paper (delta = beta = 0.1, six experts of rank 4); the reference's script switches the
loss off (`--config.losses.localized_balance.weight=0`) and has eight. Not as there: padding is not counted, and one
dropout mask serves all experts.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.12, one CPU core): mean loss of the
first five steps 5.98, of the last five 3.58.

Measured with `python -m experiments.leaderboard --budget=40x512 --methods=loramoe` and the settings of its README
(equal active rank, one CPU core, mean of seeds 0 and 1): mean loss of the first five of 40 steps 5.26, of the last
five 2.50.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        ffn=common.rule(
            common.FFN,
            experts="6",
            adapter=common.adapter(rank=4, alpha=32.0),
            router=dict(name="softmax_topk", k=0, share="site", init="kaiming"),
        )
    )
    config.losses = dict(
        localized_balance=dict(
            weight=0.1, delta=0.1, world="factbook", variant="code", invert_type=False, per_token=False,
            accumulate="exact",
        )
    )  # fmt: skip
    return config

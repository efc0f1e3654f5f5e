"""SMoRA: one LoRA of rank 64 whose every rank is an expert, 8 of them active (arXiv 2501.15103).

    python -m launch.train --config=configs/smora.py --workdir=runs/smora

The claim: the finer the experts, the better, at equal total and active rank (`experts="64"`, rank 1, k=8 here; blocks
of 4 are `experts="16"`, rank 4, k=2). The scale is the paper's alpha over the active rank, 16 / 8: alpha = 2 at rank 1
(divide the paper's alpha by k). No loss: a load bias in the router's state balances. As in the code, the bias is part
of the gate and the router reads the dropped input (`bias_in_gate`, `input_dropout`); not as there, padding is not
counted, counts are of the whole step, and the loss is on answers only.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.12, one CPU core): mean loss of the
first five steps 5.57, of the last five 3.34.

Measured with `python -m experiments.leaderboard --budget=40x512 --methods=smora` and the settings of its README
(equal active rank, one CPU core, mean of seeds 0 and 1): mean loss of the first five of 40 steps 4.79, of the last
five 2.20.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        all=common.rule(
            f"{common.ATTENTION},{common.FFN}",
            experts="64",
            adapter=common.adapter(rank=1, alpha=2.0),
            router=dict(
                name="sigmoid_topk", k=8, bias_rate=1e-5, bias_in_gate=True, input_dropout=True, share="site",
                init="kaiming",
            ),
        )
    )  # fmt: skip
    return config

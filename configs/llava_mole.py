"""LLaVA-MoLE: one expert a token, chosen once a block for gate, up and down, and not gated (arXiv 2401.16160).

    python -m launch.train --config=configs/llava_mole.py --workdir=runs/llava_mole

The claim: sparse experts end the conflict between data sets of different domains at the cost of plain LoRA. Text
domains here; images come with the vision side. The language-model loss gives the router no gradient: the balance loss
alone trains it, per example over all layers together and without the factor E (uniform 1/E, collapse 1), so do not
expect strong specialisation. `dense=True` is the reference's dense path (every expert, by its probability, in all three
projections); `gated=True` adds the factor that the paper leaves out.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.12, one CPU core): mean loss of the
first five steps 5.35, of the last five 3.12.

Measured with `python -m experiments.leaderboard --budget=40x512 --methods=llava_mole` and the settings of its README
(equal active rank, one CPU core, mean of seeds 0 and 1): mean loss of the first five of 40 steps 4.80, of the last
five 2.26.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        attn=common.rule(common.ATTENTION, adapter=common.adapter(rank=32, alpha=64.0)),
        ffn=common.rule(
            common.FFN,
            experts="3",
            adapter=common.adapter(rank=32, alpha=64.0),
            router=dict(name="top1", share="ffn", init="kaiming", dense=False, gated=False),
        ),
    )
    config.losses = dict(
        balance=common.balance(weight=1e-2, over="all", per_example=True, times_experts=False, accumulate="exact")
    )
    return config

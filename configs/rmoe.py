"""RMoE: the router of a layer knows the routing of the layers before, through a GRU over depth (arXiv 2408.06793).

    python -m launch.train --config=configs/rmoe.py --workdir=runs/rmoe

The claim: a router that is recurrent over layers beats independent routers, by its gradient through the layers
(`mode="detach"` and `mode="np"` are the ablations). The paper trains whole models from scratch; here the experts are
LoRA on a frozen FFN, as in mixlora, and only the router differs: top 2 of 8, gates not renormalised (the paper's text;
its Hugging Face code does: `renormalise=True`). To freeze the router:
`--config.schedule.s00.freeze='*/router/*,*/gru_*'`.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.12, one CPU core): mean loss of the
first five steps 5.58, of the last five 3.42.

Measured with `python -m experiments.leaderboard --budget=40x512 --methods=rmoe` and the settings of its README
(equal active rank, one CPU core, mean of seeds 0 and 1): mean loss of the first five of 40 steps 4.92, of the last
five 2.40.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        attn=common.rule(common.ATTENTION, adapter=common.adapter()),
        ffn=common.rule(
            "ffn",
            experts="8",
            adapter=common.adapter(),
            router=dict(
                name="recurrent", k=2, hidden=128, mode="full", renormalise=False, share="ffn", init="kaiming"
            ),
        ),
    )  # fmt: skip
    config.losses = dict(balance=common.balance(weight=1e-2, accumulate="exact"))
    return config

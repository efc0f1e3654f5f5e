"""Chain of Experts: two passes through one pool of LoRA experts, each with a router of its own (arXiv 2506.18945).

    python -m launch.train --config=configs/coe.py --workdir=runs/coe

The claim: at equal compute, two passes of top K beat one pass of top 2 K, because the second pass routes on what the
first one wrote. Here top 1 of 8 in two passes, softmax gates as they are, one balance term a pass and layer; the
mixture of equal compute is `--config.method.rules.ffn.placement.iterations=1 --config.method.rules.ffn.router.k=2`.

`nonlinearity="none"` because the paper's chain is that: its experts are nonlinear themselves, a LoRA expert is B A, so
that two passes compose linear maps, chosen by gates that are not linear. A nonlinearity in the bottleneck (`silu`) is
advisable for that reason; it is an option, since with it an expert is no LoRA, C = 1 is no longer the plain mixture,
and the numbers below are without it. The released code adds the normed state and drops the residual stream h; here no
option does: beside a frozen base it would drop the base's own output, and silent experts would change the model.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.12, one CPU core): mean loss of the
first five steps 5.73, of the last five 5.28.

Measured with `python -m experiments.leaderboard --budget=40x512 --methods=coe` and the settings of its README
(equal active rank, one CPU core, mean of seeds 0 and 1): mean loss of the first five of 40 steps 5.70, of the last
five 3.04.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        ffn=common.rule(
            "ffn",
            experts="8",
            adapter=common.adapter(),
            router=dict(name="softmax_topk", k=1, share="site", renormalise=False, init="kaiming"),
            placement=dict(name="chain", iterations=2, gating="independent", residual="inner", nonlinearity="none"),
        )
    )
    config.losses = dict(
        balance=common.balance(weight=1e-3, over="site", reduce="sum", per_example=True, accumulate="exact")
    )
    return config

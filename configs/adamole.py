"""AdaMoLE: a second, tiny network says how probable an expert must be for a token to use it (arXiv 2405.00361).

    python -m launch.train --config=configs/adamole.py --workdir=runs/adamole

The claim: with a threshold that each token learns, in place of a fixed number of experts, the same experts do more.
Values of the reference's config: eight experts of rank 4 at q, k, v and o, alpha 16 over the rank of one expert (the
scale is 4), the largest threshold 1/8 (`ceiling=1.0`, in units of 1/E), the balance loss on p - tau, summed over all
routers, weight 1e-3. `balance_on="probs"` is the usual balance loss. Not as there: padding is neither routed nor in the
loss, evaluation has a loss of its own and not the last one of training, one dropout mask serves all experts, and the
loss is on answers only.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.10, two CPU cores): mean
language-model loss of the first five steps 5.36, of the last five 3.49; at the last step 6.7 to 8 of a token's 8
experts are active, by router.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        attn=common.rule(
            common.ATTENTION,
            experts="8",
            adapter=common.adapter(rank=4, alpha=16.0),
            router=dict(name="learned_threshold", ceiling=1.0, balance_on="excess", share="site", init="kaiming"),
        )
    )
    config.losses = dict(balance=common.balance(weight=1e-3, over="site", reduce="sum", normalise="tokens"))
    return config

"""LD-MoLE: a sparse projection of the logits in place of top-k, its sparsity predicted per token (arXiv 2509.25684).

    python -m launch.train --config=configs/ld_mole.py --workdir=runs/ld_mole

The claim: a learned number of experts for each token and layer beats fixed top-k and ReLU routing, and one MLP for all
layers beats one a layer. Values of the reference code for a base of this size: E=8, R=8, no weight decay (0.1 of all
parameters there, which moves the MLP's biases). The code has the sparsity loss and leaves it off; here its weight is
0.1 (`losses.sparsity.weight=0` is the code's run). `router.bias=0.0` lets lambda tell tokens apart from the start,
`router.learned=False --config.method.rules.all.router.fixed=0.0` is sparsemax.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (CPU): mean language-model loss of the first
five steps 5.33, of the last five 3.31. Nearly all of the eight experts are active all the while (2.4 in the last
layer's `down`, 4.5 to 8 elsewhere, most 6 to 8): 30 steps do not move lambda.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        all=common.rule(
            f"{common.ATTENTION},{common.FFN}",
            experts="8",
            adapter=common.adapter(rank=8, alpha=16.0, dropout=0.1),
            router=dict(
                name="sparsegen", hidden=128, eps=1e-2, bias=-2.5, learned=True, fixed=0.0, input_dropout=True,
                share="site", init="kaiming",
            ),
        )
    )  # fmt: skip
    config.losses = dict(balance=common.balance(weight=1.0), sparsity=dict(weight=0.1, k=2))
    return config

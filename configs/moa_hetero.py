"""MoA: adapters of different kinds in a block as experts, each weighted by one router a block (arXiv 2506.05928).

    python -m launch.train --config=configs/moa_hetero.py --workdir=runs/moa_hetero

The claim: kinds that do different things (LoRA at five projections, a prompt, an adapter parallel to the FFN) beat a
mixture of equal LoRAs, at fewer parameters; leaving out for each token what its router gives little weight to loses
little. The router is a SwiGLU network on what enters the block, before the attention norm; its sigmoids are not
normalised, for the kinds are no alternatives. Sizes of the paper's own code: rank 8 at scale 1, 10 prompt tokens, width
16. Sparse, where the paper leaves the prompt out:

    --config.method.rules.all.router.mode=sparse "--config.method.rules.all.adapters=('lora', 'parallel')"

There the threshold stands in a comparison alone, as in the code, and never learns; `router.sparse_weight=shifted`
trains it. `router.pool=instance` weights a whole example by its mean: training then sees what it predicts, and in
decoding the prompt decides. The code's rate is 7.5e-4 with weight decay 0.02; here the mixture's.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.10, two crowded CPU cores): mean loss of
the first five steps 5.37, of the last five 3.66. On synthetic tasks at equal parameters it was as good as LoRA, the
kinds' plain sum and its sparse forms, and no better (experiments/moa_hetero).
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        all=common.rule(
            f"{common.ATTENTION},down",
            adapter=common.adapter(rank=8, alpha=8.0, dropout=0.0),
            adapters=("lora", "prompt", "parallel"),
            router=dict(
                name="sigmoid_threshold", f="swiglu", expand=4, mode="soft", tau_max=0.5, threshold="token",
                sparse_weight="masked", pool="token", share="site", init="kaiming",
            ),
            placement=dict(name="block", router_input="raw", length=10, width=16, form="dense"),
        )
    )  # fmt: skip
    config.optim.update(b2=0.95, weight_decay=0.02)
    return config

"""CoMoL: one LoRA pair whose experts are small cores between A and B, mixed per token (arXiv 2603.00573).

    python -m launch.train --config=configs/comol.py --workdir=runs/comol

The claim: what a mixture of LoRA experts can adapt to at about LoRA's number of parameters (E R^2 + E R more a
projection). Values of the paper: R=16, alpha=R, E=8, a constant rate after 200 steps of warm-up (10 here, for short
runs). Not as there: no dropout on cores; the loss is on answers only. Its ablation without core routing is
`router.name=softmax_topk` with `router.k=0`; `adapter.cores=identity` starts near plain LoRA.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (CPU): mean loss of the first five steps 5.39,
of the last five 4.70.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        all=common.rule(
            f"{common.ATTENTION},down",
            experts="8",
            adapter=common.adapter("comol", rank=16, alpha=16.0, dropout=0.1, cores="kaiming", noise=0.02),
            router=dict(name="core_space", k=0, share="site", init="kaiming"),
        )
    )
    config.optim.update(learning_rate=1e-4, decay="constant")
    return config

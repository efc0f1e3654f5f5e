"""LoRA-GA: LoRA whose factors start at singular vectors of the first full-fine-tuning gradient (Wang et al. 2024).

    python -m launch.train --config=configs/lora_ga.py --workdir=runs/lora_ga

arXiv 2407.05000. The paper claims full fine-tuning's quality and two to four times LoRA's speed of convergence. Before
the first step the base's gradient is taken over `adapter.init.batches` training batches (at most the run's steps),
`adapter.init.layers` layers a pass; the base is not altered. The scale is alpha / sqrt(R), of the adapter `rslora`.

Measured on a decoder of width 64 (experiments/starts, two seeds): held-out NLL after 100 steps 2.417, 2.341, LoRA
2.441, 2.409; LoRA's of step 300 is reached at step 280 and 260.
"""

from configs import common


def get_config():
    config = common.get_config()
    start = dict(
        name="lora_ga", gamma=16.0, direction="ArB2r", scaling="stable", variant="paper", norm_clip=False, batches=8,
        svd="exact",
    )  # fmt: skip
    config.method.rules = dict(
        all=common.rule(
            f"{common.ATTENTION},{common.FFN}",
            adapter=common.adapter("rslora", rank=8, alpha=16.0, dropout=0.0, init=start),
        )
    )
    return config

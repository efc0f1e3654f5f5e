"""LoRA-XS: a trained 16 x 16 core between frozen singular vectors of the kernel (Balazy et al. 2024, 2405.17604).

    python -m launch.train --config=configs/lora_xs.py --workdir=runs/lora_xs

The paper claims LoRA's quality with 256 trained numbers a matrix, whatever its widths. `adapter.init` may be another
start with a core: `orthonormal` (random outer factors), `lora_sb` (configs/lora_sb.py). With several experts they share
the outer factors, and each has a core:

    --config.method.rules.all.experts=4 --config.method.rules.all.router.name=softmax_topk \\
    --config.method.rules.all.router.k=2

Measured on a decoder of width 64 (experiments/starts, two seeds, 300 steps): held-out NLL 2.311, 2.302; random outer
factors 2.348, 2.361; LoRA of rank 4, with 2.3 times the parameters, 2.235, 2.231.
"""

from configs import common


def get_config():
    config = common.get_config()
    start = dict(name="lora_xs", deviation=1e-5, svd="exact")
    config.method.rules = dict(
        all=common.rule(
            f"{common.ATTENTION},{common.FFN}", adapter=common.adapter("lora_xs", alpha=16.0, dropout=0.0, init=start)
        )
    )
    config.optim.update(learning_rate=4e-3, weight_decay=0.0)
    return config

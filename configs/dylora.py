"""DyLoRA: every step trains a rank drawn at random, so that one run serves all of them (Valipour et al., 2210.07558).

    python -m launch.train --config=configs/dylora.py --workdir=runs/dylora
    python -m launch.surgery --config=configs/truncate.py --workdir=runs/dylora_4 \\
        --config.surgery.inputs=runs/dylora --config.surgery.rank=4
    python -m launch.evaluate --workdir=runs/dylora_4

The paper's claim: at rank 1 within a few points of the largest rank, where LoRA, cut off, collapses; no search over
ranks. `--config.method.rules.all.adapter.update=frozen` trains the drawn component alone.
"""

from configs import common


def get_config():
    config = common.get_config()
    adapter = common.adapter("dylora", dropout=0.0, lowest=1, ratio=1.0, update="all")
    config.method.rules = dict(all=common.rule(f"{common.ATTENTION},{common.FFN}", adapter=adapter))
    return config

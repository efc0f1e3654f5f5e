"""The first components of every pair, as a run of its own: a rank of a run of nested ranks (DyLoRA, 2210.07558).

    python -m launch.surgery --config=configs/truncate.py --workdir=runs/rank_4 --config.surgery.inputs=runs/dylora \\
        --config.surgery.rank=4
"""

from configs import common


def get_config():
    return common.surgery("truncate", rank=4)

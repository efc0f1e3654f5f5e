"""The base with a run's static adapters in its kernels, as a Hugging Face folder OUT/base.

python -m launch.surgery --config=configs/merge_into_base.py --workdir=runs/merged --config.surgery.inputs=runs/a
"""

from configs import common


def get_config():
    return common.surgery("merge_into_base")

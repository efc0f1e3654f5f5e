"""Task arithmetic: the weighted sum of runs' weight changes (Ilharco et al. 2022, arXiv 2212.04089).

python -m launch.surgery --config=configs/task_arithmetic.py --workdir=runs/merged --config.surgery.inputs=runs/a,runs/b
"""

from configs import common


def get_config():
    return common.surgery("task_arithmetic")

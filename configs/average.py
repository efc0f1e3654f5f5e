"""The mean of runs, leaf by leaf; of=product: of their weight changes (model soups, arXiv 2203.05482).

python -m launch.surgery --config=configs/average.py --workdir=runs/merged --config.surgery.inputs=runs/a,runs/b
"""

from configs import common


def get_config():
    return common.surgery("average")

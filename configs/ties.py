"""TIES merging: trim, elect a sign, average those that agree (Yadav et al. 2023, arXiv 2306.01708).

python -m launch.surgery --config=configs/ties.py --workdir=runs/merged --config.surgery.inputs=runs/a,runs/b
"""

from configs import common


def get_config():
    return common.surgery("ties")

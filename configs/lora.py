"""Plain LoRA on all seven projections: one expert, no router (Hu et al. 2021, arXiv 2106.09685).

python -m launch.train --config=configs/lora.py --workdir=runs/lora
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(all=common.rule(f"{common.ATTENTION},{common.FFN}", adapter=common.adapter()))
    return config

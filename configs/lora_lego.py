"""LoRA-LEGO: LoRAs as rank-1 units, clustered and put together again (Zhao et al. 2024, arXiv 2409.16167).

python -m launch.surgery --config=configs/lora_lego.py --workdir=runs/merged --config.surgery.inputs=runs/a,runs/b
"""

from configs import common


def get_config():
    return common.surgery("lora_lego")

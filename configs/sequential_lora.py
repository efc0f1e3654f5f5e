"""Sequential LoRA: one adapter, one task after the other, nothing to remember them by: what is forgotten.

    python -m launch.train --config=configs/sequential_lora.py --workdir=runs/sequential_lora

The lower bound of continual learning. `--config.regime.replay=50` keeps 50 rows of every earlier task and draws them a
quarter of the time. The end of the run writes `report/continual.json` and a picture.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(all=common.rule(f"{common.ATTENTION},{common.FFN}", adapter=common.adapter()))
    config.data.update(tasks="sentiment,topic,emoji")
    config.optim.update(decay="constant", warmup=0)
    config.regime = dict(name="continual")
    config.train.update(steps=150, save_every=25)
    return config

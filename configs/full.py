"""Full fine-tuning: every leaf of the base trains, no rules. What adapters are compared with.

python -m launch.train --config=configs/full.py --workdir=runs/full

`method.train_base=norms` (or `embed`, `head`) trains some leaves alone: BitFit's kin, and for `launch.bench` what the
frozen base costs forward and backward. A trained leaf is a float32 copy beside the base's own.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict()
    config.method.train_base = "all"
    config.optim.learning_rate = 2e-5
    return config

"""ALLoRA: no scale, no dropout; the gradient of an output row falls with its norm (Huang & Balestriero, 2410.09692).

    python -m launch.train --config=configs/allora.py --workdir=runs/allora

The paper's claim: short runs move away from B = 0 faster, and no row runs away. The first rate is eta times
`optim.learning_rate` (under SGD); try `--config.method.rules.all.adapter.eta_squared` at 1, 2 and 4. Its ablations are
`--config.method.rules.all.adapter.form=outputs` (ALLoRA-OD) and `forward` (ASF-LoRA, which cannot be merged).
"""

from configs import common


def get_config():
    config = common.get_config()
    adapter = dict(name="allora", rank=16, dropout=0.0, init="kaiming", eta_squared=2.0, form="rows")
    config.method.rules = dict(all=common.rule(f"{common.ATTENTION},{common.FFN}", adapter=adapter))
    config.optim.learning_rate = 1e-4
    return config

"""Dynamic MoE: the shortest prefix of experts whose probabilities pass p, and an entropy loss (arXiv 2403.07652).

    python -m launch.train --config=configs/dynamic_moe.py --workdir=runs/dynamic_moe

Gates are the kept probabilities, not renormalised; the frozen FFN keeps the rest, so an untrained adapter changes
nothing.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        attn=common.rule(common.ATTENTION, adapter=common.adapter()),
        ffn=common.rule("ffn", experts="8", adapter=common.adapter(), router=dict(name="top_p", p=0.4, share="ffn")),
    )
    config.losses = dict(
        balance=common.balance(weight=1e-2, over="layer", normalise="tokens"),
        entropy=dict(weight=1e-4),
    )
    return config

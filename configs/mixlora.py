"""MixLoRA: whole-FFN experts that share one frozen FFN, plain LoRA on attention (arXiv 2404.15159).

    python -m launch.train --config=configs/mixlora.py --workdir=runs/mixlora

Top 2 of 8, gates renormalised, balance loss pooled over all layers as published (K at uniform routing).
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        attn=common.rule(common.ATTENTION, adapter=common.adapter()),
        ffn=common.rule(
            "ffn", experts="8", adapter=common.adapter(), router=dict(name="softmax_topk", k=2, share="ffn")
        ),
    )
    config.losses = dict(balance=common.balance(over="all", normalise="tokens"))
    return config

"""LoRA on a base that routes already (Mixtral, OLMoE, Qwen-MoE): a pair an expert of its own, a mixture on attention.

    python -m launch.train --config=configs/moe_lora.py --workdir=runs/moe_lora --config.base.source=dir:OLMOE

`factors`: `own` is a LoRA a base expert, `one` the same for all, `shared_outer` shares A on gate and up and B on down.
`base_router="trained"` trains a copy of the base's router, which the balance loss then reads. The default base is
random, for dry runs: name a folder or a model of the hub.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.base.source = "random:tiny-moe"
    config.method.rules = dict(
        attn=common.rule(
            common.ATTENTION, experts="4", adapter=common.adapter(rank=8, alpha=16.0),
            router=dict(name="softmax_topk", k=2, share="attn"),
        ),
        moe=common.rule(
            "ffn", adapter=common.adapter(rank=8, alpha=16.0), placement=dict(name="base_experts", factors="own"),
            base_router="frozen",
        ),
    )  # fmt: skip
    config.losses = dict(balance=common.balance())
    return config

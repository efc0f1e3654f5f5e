"""HydraLoRA: one A and several B's in each FFN projection, mixed per token by a dense softmax (arXiv 2404.19245).

    python -m launch.train --config=configs/hydralora.py --workdir=runs/hydralora

The claim: on mixed data one shared A and N B's learn more than one LoRA of as many parameters and than N whole LoRAs,
without a task label. Values of the reference's script: rank 4, four B's, alpha 32 (the scale is 8, so a comparison
with a LoRA of alpha = 2 R is not matched in scale). No top-k, no renormalisation, no balance loss. The router reads the
input without dropout and starts at random: at zero all B's would stay equal for ever. Not as there: one dropout mask
serves all B's (the code draws one for each), padding is not routed, and the loss is on answers only.

The paper takes N from a clustering of the corpus; it is a number here, `--config.method.rules.ffn.experts=3`.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.10, two CPU cores): mean loss of the
first five steps 5.32, of the last five 3.29.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        ffn=common.rule(
            common.FFN,
            experts="4",
            adapter=common.adapter("lora_shared_a", rank=4, alpha=32.0),
            router=dict(name="softmax_topk", k=0, share="site", init="kaiming"),
        )
    )
    return config

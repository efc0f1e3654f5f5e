"""DeepSeekMoE: many small routed LoRA experts and a few that are always on (arXiv 2401.06066).

    python -m launch.train --config=configs/deepseek_moe.py --workdir=runs/deepseek_moe

The claim: at equal parameters, total and active, experts cut into m parts and K_s of them taken out of the routing
specialise better than whole ones. Here 8 experts of rank 16 with 2 active are cut by m = 4 into 32 of rank 4 with 8
active: 4 shared ones, which are one LoRA of rank 16 without a gate, and the top 4 of 28. One scale for all (alpha is
twice the rank), so that m does not change it. One router a layer reads the normed input of the feed-forward block.

Softmax over the routed experts first, gates never renormalised (`renormalise=True` is Mixtral's). The two losses are
those of the 145B model, added up over layers as in the formula; its 16B sibling has 0.001 and none between devices.
The code balances by sequence: `--config.losses.balance.per_example=True`. Without loss, by a load bias (arXiv
2408.15664): `--config.method.rules.routed.router.bias_rate=1e-3` and both weights 0. The larger models leave the first
layer dense: `--config.method.rules.routed.layers=1-29` (and `shared`).

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.10, one CPU core): mean `lm_loss` of the
first five steps 5.32, of the last five 3.28 (`loss` has the 30 layers' balance in it: 6.92 and 4.87).
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        shared=common.rule(common.FFN, adapter=common.adapter(rank=16, alpha=32.0)),
        routed=common.rule(
            common.FFN,
            experts="28",
            adapter=common.adapter(rank=4, alpha=8.0),
            router=dict(
                name="biased_topk", k=4, score="softmax", renormalise=False, bias_rate=0.0, share="ffn", init="kaiming",
            ),
        ),
    )  # fmt: skip
    config.losses = dict(
        balance=common.balance(weight=3e-3, reduce="sum", accumulate="exact"),
        device_balance=dict(weight=0.05, groups=4, reduce="sum", accumulate="exact"),
    )
    return config

"""MoS: LoRA whose factors are assembled from pools of vector shards that all layers share (arXiv 2410.00938).

    python -m launch.train --config=configs/mos.py --workdir=runs/mos

The claim: with the parameters of LoRA of rank e = 8, active rank 16 (or 32) and four ways to tell layers apart (each
takes a subset of the pool, A and B apart, in shards, some rows its own) do what plain LoRA needs rank 64 for. The index
tables are drawn once and saved with the pools. The paper's public scripts do not say how many private rows and shards:
1 and 2 here, which divides every width of the shipped bases.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.12, one CPU core): mean loss of the
first five steps 5.61, of the last five 3.58, with 2,442,240 trained parameters.

Measured with `python -m experiments.leaderboard --budget=40x512 --methods=mos` and the settings of its README
(equal active rank, one CPU core, mean of seeds 0 and 1): mean loss of the first five of 40 steps 5.19, of the last
five 2.50.

`optim.weight_decay` acts on a pool as a whole, shards that no table names included: it stays 0, as in the paper. The
paper's code saves a LoRA for each layer; here `to_lora` of `molora_jax/adapters/mos.py` makes one, which no command
uses yet.
"""

from configs import common


def get_config():
    config = common.get_config()
    mos = common.adapter("mos", rank=16, alpha=16.0, dropout=0.1, budget=8, private=1, shards=2, dissociate=True)
    config.method.rules = dict(all=common.rule(f"{common.ATTENTION},{common.FFN}", adapter=mos))
    config.optim.update(decay="linear")
    return config

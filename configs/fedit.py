"""FedIT: LoRA by clients that never share their rows; both factors are averaged (Zhang et al. 2023, arXiv 2305.05644).

    python -m launch.train --config=configs/fedit.py --workdir=runs/fedit

Three clients with the classes of `sentiment` skewed, 20 rounds of 5 local steps. The mean of the factors is not the
mean of the products: mean(B) mean(A) != mean(B A). `configs/ffa_lora.py` is the method that mends it.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.base.source = "pkg:all-minilm-l6-v2"
    config.objective = dict(name="classify", pooling="mean")
    config.method.rules = dict(all=common.rule("q,v", adapter=common.adapter(rank=8, alpha=8.0, dropout=0.0)))
    config.data.update(tasks="sentiment", seq_len=64)
    config.optim.update(name="sgd", learning_rate=0.5, decay="constant", warmup=0)
    config.regime = dict(name="federated", clients=3, local_steps=5, split="skew", skew=0.85)
    config.train.update(steps=300, batch_size=16, clip=0.0, eval_every=75, save_every=75)
    config.eval.update(num_items=256, num_generated=0)
    return config

"""The quickstart: MixLoRA on SmolLM2-135M and the nine tasks, small enough for two cores and ten minutes.

./launch/quickstart.sh
"""

from configs import mixlora


def get_config():
    config = mixlora.get_config()
    config.train.update(steps=48, batch_size=6, save_every=24, log_every=1, remat="dots")
    config.optim.update(learning_rate=1e-3, warmup=4)
    return config

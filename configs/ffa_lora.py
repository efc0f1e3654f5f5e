"""FFA-LoRA: federated LoRA with A frozen at a start that all clients share (Sun, Li, Li, Ding; ICLR 2024).

    python -m launch.train --config=configs/ffa_lora.py --workdir=runs/ffa_lora

B and the head alone train, are averaged and sent: mean(B_k) A_0 = mean(B_k A_0), half of LoRA's traffic for square
matrices, and noise on B stays linear. As shipped the clients' steps are DP-SGD at (epsilon 6, delta 1e-5) of one
example; `--config.regime.dp_clip=0.0 --config.regime.dp_epsilon=0.0` trains without. With SGD, alpha needs no tuning:
(alpha, rate) and (c alpha, rate / c^2) are the same run.

With several experts A is frozen too, one each or, with the adapter `lora_shared_a`, one for all of a layer:

    --config.method.rules.all.experts=4 --config.method.rules.all.router.name=softmax_topk \\
    --config.method.rules.all.router.k=2 --config.method.rules.all.adapter.name=lora_shared_a

The average is exact for each expert's B A. Routers train and are averaged as well; gates differ between clients within
a round, so for the mixture it is exact only where they stay: `--config.schedule.s00.freeze="*/A,*/router/*"`.
"""

from configs import fedit


def get_config():
    config = fedit.get_config()
    config.schedule.s00.freeze = "*/A"
    config.regime.update(dp_clip=2.0, dp_epsilon=6.0, dp_delta=1e-5)
    return config

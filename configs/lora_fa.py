"""LoRA-FA: LoRA whose A stays at its random start, on all seven projections (Zhang et al. 2023, arXiv 2308.03303).

    python -m launch.train --config=configs/lora_fa.py --workdir=runs/lora_fa

The claim: fine-tuning as good as LoRA's with the activations of rank R kept for the backward pass, not those of width
D_in, and fewer trained parameters. `--config.method.rules.all.adapter.precondition=True` is the gradient of peft's
LoRA-FA optimizer; with `--config.optim.eps=1e-6 --config.train.clip=0.0` the step is peft's too.

With experts (`experts="4"` and a router) each has an A of its own.
"""

from configs import common


def get_config():
    config = common.get_config()
    adapter = common.adapter("lora_fa", precondition=False)
    config.method.rules = dict(all=common.rule(f"{common.ATTENTION},{common.FFN}", adapter=adapter))
    return config

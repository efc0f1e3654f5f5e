"""LoRA-Pro: LoRA whose factors step so that s B A follows the weight's own gradient (Wang et al. 2024, 2407.18242).

    python -m launch.train --config=configs/lora_pro.py --workdir=runs/lora_pro

The paper's claim: nearer to full fine-tuning at LoRA's inference cost. `--config.optim.form=efficient` has
LoRA's memory; as shipped (`full`) the moments are as large as the adapted weights, times the experts of a routed rule.
The paper's rate of 2e-5 is that of full fine-tuning: a step moves an entry of a weight by about the rate.
"""

from configs import common


def get_config():
    config = common.get_config()
    sites = f"{common.ATTENTION},{common.FFN}"
    config.method.rules = dict(all=common.rule(sites, adapter=common.adapter(dropout=0.0)))
    config.optim = dict(config.optim, name="lora_pro", learning_rate=2e-5, form="full", ridge=1e-6)
    return config

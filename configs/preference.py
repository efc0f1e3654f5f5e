"""Preferences: DPO of a LoRA on SmolLM2 against the base without adapters (Rafailov et al. 2023, arXiv 2305.18290).

    python -m launch.train --config=configs/preference.py --workdir=runs/preference
    python -m launch.evaluate --workdir=runs/preference

The pairs are made from the shipped task `morph`: chosen is the task's answer, rejected another form of the same word.
Measured, these two commands: held-out accuracy of 64 pairs 50 % -> 90.6 % (81.0 to 95.6). With
`data.tasks=morph,sentiment` (rejected: the other class) and 16 steps of 4 pairs, 40 pairs a task: morph 50 % -> 70 %
(55 to 82), sentiment, which 24 pairs do not teach, 50 % -> 48 % (33 to 63).

A reward head in place of DPO: `--config.objective.form=reward --config.objective.reference=none`. Pairs of your own:
rows of prompt, chosen, rejected.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.objective = dict(name="preference", form="dpo", beta=0.1, reference="base")
    config.method.rules = dict(all=common.rule(f"{common.ATTENTION},{common.FFN}", adapter=common.adapter()))
    config.data.update(tasks="morph", seq_len=64)
    config.optim.update(learning_rate=5e-4, warmup=2)
    config.train.update(steps=40, batch_size=8, eval_every=0, save_every=20, log_every=1)
    config.eval.update(num_items=64, num_generated=0)
    return config

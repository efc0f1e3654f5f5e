"""MoRA (MoRAM): tasks in sequence, eight rank-1 experts for each, which choose themselves (arXiv 2506.21035).

    python -m launch.train --config=configs/mora_cl.py --workdir=runs/mora_cl

The claim: old tasks' experts stay as they are and answer by themselves to old tasks' inputs, so that far less is
forgotten than by one adapter trained on (`configs/sequential_lora.py`), with no router that could forget. Values of the
LLM code: 8 experts a task and 8 active ones, tau 0.03, delta 0.2 (`prune`; 1.01 is the base alone, -1 prunes nothing).
`experts` is the bank of all tasks together, allocated from the start; more tasks want more (`experts="64"` for eight).

The scale is 1 for all experts, old and new, as in the vision code; the LLM code multiplies the new B by alpha / r and
the old ones by nothing, so that a task's experts change as they are frozen (here the scale is part of what is learnt).
The norm of s grows with the bank, so `prune` takes more away after every task, as published. Each task's end is
measured before the next one's experts open; a step saved at that border has them open, which is no identity although
their B is 0. `report/continual.json` has the accuracies, backward transfer and forgetting.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4 --config.eval.num_items=8` (jax 0.10, one CPU
core): loss of the first and last of seven or eight steps a task: 5.93 and 2.59, 5.89 and 4.66, 6.07 and 5.98, 3.95 and
3.53; backward transfer +0.5 points. Against one LoRA, over four tasks that are learnt: `experiments/mora_cl`.
"""

from configs import common

TASKS = "sentiment,topic,emoji,morph"


def get_config():
    config = common.get_config()
    config.method.rules = dict(
        all=common.rule(
            f"{common.ATTENTION},{common.FFN}",
            experts="32",
            adapter=common.adapter(rank=1, alpha=1.0),
            router=dict(
                name="self_activated", k=8, temperature=0.03, prune=0.2, per_task=8, score="keys", share="site"
            ),
        )
    )
    config.data.update(tasks=TASKS)
    config.optim.update(learning_rate=5e-4, decay="constant", warmup=0)
    config.regime = dict(name="continual")
    config.train.update(steps=200, save_every=25)
    return config

"""MeteoRA: many finished adapters in one model; every projection has a gate that learns the task (arXiv 2405.13053).

    python -m launch.train --config=configs/meteora.py --workdir=runs/meteora

The claim: with the adapters of 28 tasks in every linear layer and one small gate each, taught the known task of every
token, one model is as good as each adapter at its own task, and changes adapters by itself inside one answer.

Adapters are runs of yours on the same base, one a task in the order of `data.tasks`, of any rank up to 8 and any scale:

    from configs import meteora

    def get_config():
        return meteora.get_config(load=("runs/code", "runs/math"), tasks="code,math")

Then the gates alone train, adapters and base frozen, as the paper says; the published script trains both
(`adapters="trained"`). Without runs the experts start fresh: stage s00 trains the adapter of each of nine tasks apart,
s01 freezes them and trains the gates (`--config.schedule.s01.freeze=`: both).

`k=1` is the paper's other form. For several tasks in one prompt it raises the temperature in use: 15, 20, 30 for 3, 5,
10 tasks (`--config.method.rules.all.router.temperature=15` of launch.generate). Not as there: the loss of the language
model is on answers alone, that of the gates on all tokens, as there.

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.10, one CPU core): mean loss of the
language model over the first five steps 5.24, the last five of the adapters' stage 3.22; the gates' first five 3.70,
last five 3.51. The gates' own loss does not fall in fifteen steps, of which ten are warm-up (12.1, then 12.3): from
N(0, 1) it wants thousands. With `--config.method.rules.all.router.init=normal` as well: 2.23, then 2.19. In 100 steps
at ten times the rate the gates tell the task: `experiments/meteora`.
"""

from configs import common


def stage(**fields):
    return dict(steps=0, tasks="", freeze="", set=dict(), route="") | fields


def get_config(load=(), tasks=common.TASKS, adapters="frozen"):
    """`load`: workdirs of runs with plain adapters, that of tasks[0], tasks[1], ... `tasks`: entries of data.tasks."""
    config = common.get_config()
    config.data.tasks = tasks
    config.method.rules = dict(
        all=common.rule(
            f"{common.ATTENTION},{common.FFN}",
            experts=str(len(load) or 9),
            load=tuple(load),
            loaded=adapters,
            adapter=common.adapter(rank=8, alpha=16.0, dropout=0.1),
            router=dict(name="labelled_topk", k=2, temperature=1.0, init="unit", share="site"),
        )
    )
    config.losses = dict(task_label=dict(weight=50.0, tasks=""))
    config.optim.update(learning_rate=5e-4, weight_decay=0.01)
    config.train.clip = 0.3
    if not load:
        config.optim.restart = True  # each stage has a schedule of its own
        config.schedule = dict(s00=stage(route="task", freeze="*/router/*"), s01=stage(freeze="*/A,*/B"))
    return config

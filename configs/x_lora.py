"""X-LoRA: LoRA experts trained apart and frozen, mixed by one head that reads the frozen base (arXiv 2402.07148).

    python -m launch.train --config=configs/x_lora.py --workdir=runs/x_lora

The claim: a small head on the base's last hidden state mixes finished adapters token by token and layer by layer, so
that a model has the skills of all of them at once. Stage s00 sends each task to an expert of its own (nine tasks, nine
experts), s01 freezes the experts and trains the head; each takes half of the steps. Every step of s01 and of generation
runs the base once more, without experts.

With experts from other runs there is one stage, of the head, in a config of your own:

    from configs import x_lora

    def get_config():
        return x_lora.get_config(load=("runs/code", "runs/math"))

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.12, one CPU core): mean loss of the
first five steps 5.62, of the last five 4.64, over both stages.

Measured with `python -m experiments.leaderboard --budget=40x512 --methods=x_lora` and the settings of its README
(equal active rank, one CPU core, mean of seeds 0 and 1): mean loss of the first five of 40 steps 5.68, of the last
five 3.15.
"""

from configs import common


def stage(**fields):
    return dict(steps=0, tasks="", freeze="", set=dict(), route="") | fields


def get_config(load=()):
    """`load`: workdirs of runs with plain adapters of rank at most 16, in place of stage s00."""
    config = common.get_config()
    config.method.rules = dict(
        mix=common.rule(
            "q,k,v,o,gate",
            experts=str(len(load) or 9),
            load=tuple(load),
            adapter=common.adapter(rank=16, alpha=16.0),
            router=dict(name="x_lora", share="site", mix="softmax", top_k=0, temperature=1.0, depth=1, gain=1.0),
        )
    )
    if not load:
        config.schedule = dict(s00=stage(route="task", freeze="*/router/*"), s01=stage(freeze="*/A,*/B"))
    return config

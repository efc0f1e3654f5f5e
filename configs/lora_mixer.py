"""LoRA-Mixer: LoRA experts inside the projections of attention, routed by task first and softly then (2507.00029).

    python -m launch.train --config=configs/lora_mixer.py --workdir=runs/lora_mixer

The claim: experts on the projections that feed attention (or a state-space block), learnt one a task, become one model
by a router that little data teaches, if its loss asks for even load and for tokens that are sure of their expert. Stage
s00 sends each task to an expert of its own (nine tasks, nine experts); s01 trains the router on all experts at once and
lets the experts move a little (`preservation`); each takes half of the steps. In use the three strongest experts are
mixed (`k`; `hard="never"` mixes all, as in training: the gap is worth a look).

There is no code of the authors, and the numbers of the losses, the rank and the rate are ours. As printed the loss
rewards uncertain tokens: `entropy_sign=1` is what the text asks for, `-1` is as printed. One router serves the
projections of a layer (`share="site"` is one each).

The second paradigm has frozen experts, and trains the router alone: finished runs of plain adapters, in a config of
your own; without `load` the experts start fresh in s00. (`--config.schedule.s01.freeze="*/A,*/B"` freezes those.)

    from configs import lora_mixer

    def get_config():
        return lora_mixer.get_config(load=("runs/code", "runs/math"))

On a base of state-space blocks the same rule stands at other sites:

    python -m launch.train --config=configs/lora_mixer.py --workdir=runs/lora_mixer_ssm --config.base.source=dir:MAMBA
        --config.method.rules.mix.sites=in_proj,out_proj

As it stands, with `--config.train.steps=30 --config.train.batch_size=4` (jax 0.10, two CPU cores): mean language-model
loss of the first five steps 5.36, of the last five of stage s00 4.43; of the first five of s01 4.47, of its last five
3.87. `python -m experiments.lora_mixer` tries the claim on a small decoder.
"""

from configs import common


def stage(**fields):
    return dict(steps=0, tasks="", freeze="", set=dict(), route="") | fields


def get_config(load=(), sites=common.ATTENTION):
    """`load`: workdirs of runs with plain adapters of rank at most 8, in place of stage s00."""
    config = common.get_config()
    config.method.rules = dict(
        mix=common.rule(
            sites,
            experts=str(len(load) or 9),
            load=tuple(load),
            adapter=common.adapter(rank=8, alpha=16.0),
            router=dict(name="soft_topk", k=min(3, len(load) or 9), renormalise=True, hard="eval", share="attn"),
        )
    )
    config.losses = dict(specialisation=dict(weight=1e-2, lam=0.1, entropy_sign=1, assigned="tokens"))
    if not load:
        config.losses.preservation = dict(weight=1e-2, experts="")
        config.schedule = dict(s00=stage(route="task", freeze="*/router/*"), s01=stage())
    return config

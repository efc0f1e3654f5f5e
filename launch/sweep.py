"""Trains a run for each setting of a grid and each seed, and says which setting is best. The same command goes on.

python -m launch.sweep --config=configs/mola.py --out=runs/sweep --seeds=3 --grid="optim.learning_rate=1e-4,2e-4"
    [--config.train.steps=N ...]

A grid is FIELD=VALUE,VALUE;FIELD=VALUE,... of any field of the config (a comma inside a value is written \\\\,): all
combinations. Settings are ranked by the lowest held-out NLL of each run. Exit status 1 where a run failed.
"""

import sys

from launch import flags
from molora_jax import config as schema
from molora_jax.config import several
from molora_jax.config.fields import wrong
from molora_jax.config.members import is_member, options
from molora_jax.errors import InputError

FLAGS = [
    ("--out", dict(required=True, metavar="DIR", help="holds the runs, a folder each, and what they come to")),
    (
        "--grid",
        dict(metavar="LISTS", default="", help="FIELD=VALUE,VALUE;FIELD=VALUE,... : a setting each combination"),
    ),
    ("--seeds", dict(type=int, default=1, metavar="N", help="runs of each setting: config.seed, config.seed + 1, ...")),
    ("--together", dict(type=int, default=8, metavar="N", help="most runs of one step (default: 8); 1: one by one")),
]


def run(argv):
    config, args = flags.parse(__doc__, FLAGS, argv)
    for name in ("seeds", "together"):
        if getattr(args, name) < 1:
            raise wrong(f"--{name}", getattr(args, name), ">= 1")
    from molora_jax.comparing import sweep as sweeps

    note = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    settings, members = members_of(config, args.grid, args.seeds, note=note)
    sweep = sweeps.Sweep(members, settings, args.out, together=args.together, note=note)
    sweep.check()
    if any(sweep.stand(member).state in (sweeps.BEGUN, sweeps.NONE) for member in members):
        from molora_jax import runtime

        runtime.configure()
    signal = sweep.perform()
    found, pictures = sweep.finish()
    print(sweeps.text_table(found))
    for path in (*pictures, sweep.out / sweeps.FILE):
        print(path)
    if signal is not None:
        note(f"stopped by signal {signal}: the same command goes on from there")
        return 128 + signal
    failed = [run for one in found["settings"] for run in one["runs"] if run["state"] != sweeps.DONE]
    for run in failed:
        note(f"failed: {run['workdir']}: {run['error']}")
    return 1 if failed else 0


def members_of(config, grid: str, seeds: int, *, note):
    """`(settings, members)`: `{name: {field: value}}`, and a run of each setting and seed, validated."""
    from molora_jax.comparing.sweep import Member

    fields = several.lists(grid, where="--grid", check=None) if grid.strip() else []
    if "seed" in dict(fields):
        raise wrong(
            "--grid, seed", "a field of --seeds", "other fields", "Write --seeds=N for N seeds of each setting."
        )
    named = several.product(fields, where="--grid") if fields else {"config": []}
    settings, members, told = {}, [], set()
    say = lambda text: None if text in told else (told.add(text), note(text))  # noqa: E731
    for name, changes in named.items():
        settings[name] = dict(changes)
        for seed in range(config.seed, config.seed + seeds):
            try:
                one = flags.override(_switched(config, changes, say), [*changes, ("seed", str(seed))])
                _evaluated(one, say)
                schema.validate(one)
            except InputError as error:
                if name == "config":
                    raise
                raise error.inside(f"--grid, {name}") from None
            folder = f"seed={seed}" if name == "config" else f"{name}_seed={seed}"
            members.append(Member(folder, name, seed, one))
    return settings, members


def _switched(config, changes, note):
    """A copy without the options that a member named by the setting does not know (`k`, where a router is `top_p`)."""
    config = config.copy_and_resolve_references()
    for path, value in changes:
        *keys, last = path.removeprefix("config.").split(".")
        axis = flags.AXES.get(keys[-1]) if last == "name" and keys else None
        group = config
        for key in keys:
            group = group.get(key) if hasattr(group, "get") else None
        if axis is None or not is_member(axis, value) or not hasattr(group, "keys"):
            continue
        foreign = [key for key in group if key != "name" and key not in options(axis, value)]
        with config.unlocked():
            for key in foreign:
                del group[key]
        if foreign:
            note(f"{path}={value}: without {', '.join(foreign)} of the config, which {value} does not know")
    return config


def _evaluated(config, note):
    """A run without an evaluation up to its end has one there: settings are ranked by it."""
    train = config.train
    last = min(train.stop_after or train.steps, train.steps)
    if train.get("epochs", 0.0):
        if not train.eval_every:
            fix = "Set train.eval_every to the steps between two evaluations."
            raise wrong(
                "train.eval_every", 0, "above 0 with train.epochs: settings are ranked by the held-out NLL", fix
            )
    elif not 0 < train.eval_every <= last:
        if train.eval_every:
            note(f"train.eval_every={train.eval_every} is beyond the last step: evaluated at step {last}")
        with config.unlocked():
            train.eval_every = last


if __name__ == "__main__":
    flags.main(run)

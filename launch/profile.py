"""Where the time of a training step goes, by stage.

python -m launch.profile --config=configs/mixlora.py [--config.X=V] [--batch=4 --seq=128 --dtype=float32 --threads=1]
    [--steps=3] [--no_update]

The step of `launch.bench` (real base weights, every sequence full), traced. A traced operation is an instruction of the
compiled program, whose name carries the `named_scope`s it came from; it counts for the innermost of STAGES, less the
time of the operations inside it. `backward` holds what the stack computes again, too. What the compiler fuses counts
for the fusion's last operation. On an accelerator the device's own times are taken; on a GPU without CUDA graphs, whose
kernels have no instruction in a trace. On a CPU every event costs time, most of all in loops: the last line has the
step's time without the trace beside it.
"""

import collections
import pathlib
import re
import tempfile
import time

from launch import flags
from launch.bench import FLAGS, check
from molora_jax.text import columns

STAGES = {
    "route": "scores, top-k, the sums of losses and statistics",
    "dispatch": "sorting slots by expert, sending tokens",
    "shrink": "x A, rank-R activations",
    "expand": "z B, summed over a token's experts",
    "experts": "routed FFN: expand, activation, mix, shrink in one pass",
    "combine": "bringing tokens back",
    "gather": "bringing experts to the tokens",
    "dropout": "masks of the adapters' inputs",
    "base": "frozen projections",
    "attention": "scores, norm, rotation, cache",
    "ffn": "norm, residual, activation outside experts",
    "loss": "logits and cross-entropy",
    "optimizer": "norm, update",
    "other": "the loop over layers: slices of weights and of kept activations, zeroed buffers",
}
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*op_name=\"([^\"]*)\"", re.M)


def run(argv):
    own = [flag for flag in FLAGS if flag[0] not in ("--against", "--devices", "--generate", "--json")]
    config, args = flags.parse(__doc__, own, argv)
    check(args)
    if config.train.exact:
        raise flags.wrong("train.exact", True, "false: its step is several programs", "Profile the ordinary step.")
    from molora_jax import runtime

    runtime.configure()
    import jax

    from kernels_pallas import timing
    from kernels_pallas.platform import may_accelerate
    from launch import bench_side
    from molora_jax import config as config_lib

    timing.pin(args.threads)
    if may_accelerate():  # a GPU's trace names the graph that a kernel is part of, not the kernel's instruction
        timing.xla_flags("--xla_gpu_enable_command_buffer=")
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)  # else the names may be an older program's
    work, _ = bench_side.start(config_lib.to_dict(config), vars(args) | {"generate": False})
    names = dict(INSTRUCTION.findall(work.text()))

    def measure():
        began = time.monotonic()
        for _ in range(args.steps):
            work()
        return 1e3 * (time.monotonic() - began) / args.steps

    with tempfile.TemporaryDirectory() as folder:
        times = [measure()]
        with jax.profiler.trace(folder):
            times.append(measure())
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        spent = by_stage(jax.profiler.ProfileData.from_file(str(path)), names)
    print(table(spent, args.steps))
    print("wall ms a step: {:.0f}, traced {:.0f}".format(*times))


def by_stage(profile, names) -> dict:
    """`{(stage, backward): nanoseconds}` over the whole trace."""
    planes = [p for p in profile.planes if p.name.startswith("/device:")]
    planes = planes or [p for p in profile.planes if p.name.startswith("/host:CPU")]
    spent = collections.Counter()
    for line in (line for plane in planes for line in plane.lines):
        for op, own in own_times((e.start_ns, e.duration_ns, op) for e in line.events if (op := op_of(e))):
            path = names.get(op, "")
            stage = next((part for part in re.split(r"[/()]", path)[-2::-1] if part in STAGES), "other")
            spent[stage, "transpose(" in path or "rematted" in path] += own
    return spent


def op_of(event) -> str | None:
    return next((str(value) for key, value in event.stats if key == "hlo_op"), None)


def own_times(events):
    """`(name, time less that of the events inside)` of `(start, duration, name)` on one line of a trace.

    Of an event that ends after the one around it (a GPU's kernels overlap), only the common part is taken off.
    """
    open_ = []  # [end, name, own time]
    for start, duration, name in sorted(events, key=lambda e: (e[0], -e[1])):
        while open_ and open_[-1][0] <= start:
            yield open_.pop()[1:]
        if open_:
            open_[-1][2] -= min(start + duration, open_[-1][0]) - start
        open_.append([start + duration, name, duration])
    yield from (entry[1:] for entry in open_)


def table(spent, steps) -> str:
    total = sum(spent.values())
    rows = [("stage", "forward ms", "backward ms", "share", "what")]
    stages = sorted({stage for stage, _ in spent}, key=lambda s: -spent[s, False] - spent[s, True])
    for stage in stages:
        ahead, back = spent[stage, False], spent[stage, True]
        fraction = f"{(ahead + back) / total:.1%}"
        rows.append((stage, f"{ahead / steps / 1e6:.1f}", f"{back / steps / 1e6:.1f}", fraction, STAGES[stage]))
    rows.append(("a step", *(f"{sum(spent[s, b] for s in stages) / steps / 1e6:.1f}" for b in (False, True)), "", ""))
    return "\n".join(columns(rows))


if __name__ == "__main__":
    flags.main(run)

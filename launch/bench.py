"""Measures a training step (or decoding) of a config, alone or paired against another.

python -m launch.bench --config=configs/mixlora.py [--against=configs/lora.py] [--config.X=V] [--against.X=V]
    [--tree=DIR] [--batch=4 --seq=128 --dtype=float32 --threads=1 --devices=1 --steps=5]
    [--runs=2] [--no_update] [--generate] [--json]

Real base weights, every sequence full, a loss at every position. Each side is a child process of its own, pinned to
the asked number of processors; after a warm-up their steps alternate, so a drift of the machine meets both. CPU seconds
are those of the child process; the ratio is of CPU seconds, pair by pair. Where the step runs on an accelerator, the
child only feeds it: it keeps all processors, and the ratio and the tokens are of wall seconds (`machine` names the
clock). With `--generate` a step is the greedy decoding of 32 tokens after a prompt of 32, batch 1, and figures are a
token. With `--tree=DIR` the second side is the code of another checkout, by default on the same config: what a change
costs. With `--runs=N` side a takes a step of N runs together and side b N steps of one run, one after the other: the
ratio is what sharing a step saves.
"""

import json
import os
import statistics
import subprocess
import sys
import time

from launch import flags
from molora_jax import runtime
from molora_jax.config import shipped
from molora_jax.text import columns

FLAGS = [
    ("--against", dict(metavar="NAME|FILE.py", help="a second config, stepped in turn with the first")),
    ("--tree", dict(metavar="DIR", help="a checkout whose code the second side runs")),
    ("--batch", dict(type=int, default=4, help="rows a step")),
    ("--seq", dict(type=int, default=128, help="tokens a row")),
    ("--dtype", dict(choices=("float32", "bfloat16"), default="float32")),
    ("--threads", dict(type=int, default=1, help="processors of each child, on a CPU")),
    ("--devices", dict(type=int, default=1, help="devices of each child, over mesh.data; on a CPU they are forced")),
    ("--steps", dict(type=int, default=5, help="measured steps of each side")),
    ("--runs", dict(type=int, default=1, help="a step of so many runs, against as many steps of one")),
    ("--no_update", dict(action="store_true", help="leave the optimizer out")),
    ("--generate", dict(action="store_true", help="measure decoding instead")),
    ("--json", dict(action="store_true", help="one JSON on stdout instead of a table")),
]
NEW_TOKENS = 32
SIDE = "from molora_jax.config import shipped; shipped.put_up('launch'); from launch import {0}; {0}.main()"


def run(argv):
    # both sides stand on the same base unless the second says otherwise
    own = [a.replace("--against.", "--config.", 1) for a in argv if a.startswith("--against.")]
    said = {a.partition("=")[0] for a in own}
    against = [*(a for a in argv if a.startswith("--config.base.") and a.partition("=")[0] not in said), *own]
    config, args = flags.parse(__doc__, FLAGS, [a for a in argv if not a.startswith("--against.")])
    check(args)
    sides = {"a": config}
    if args.against:
        sides["b"], _ = flags.parse(__doc__, FLAGS, [f"--config={args.against}", *against])
    elif args.tree and not own or args.runs > 1:
        sides["b"] = config
    elif any(a.startswith("--against.") for a in argv):
        raise flags.wrong("--against", "overrides alone", "a config to change", "Give --against=FILE.py too.")
    result = measure(sides, args)
    print(json.dumps(result) if args.json else table(result, args))


def check(args):
    tree = getattr(args, "tree", None)
    if tree and not os.path.isfile(os.path.join(tree, "launch", "bench_side.py")):
        raise flags.wrong("--tree", f"{tree} (no launch/bench_side.py in it)", "a checkout of molora_jax")
    processors = len(os.sched_getaffinity(0))
    devices, generate = getattr(args, "devices", 1), getattr(args, "generate", False)  # not flags of launch.profile
    numbers = {name: getattr(args, name) for name in ("batch", "seq", "steps", "threads")} | {"devices": devices}
    numbers["runs"] = runs = getattr(args, "runs", 1)
    for name, value in numbers.items():
        if value < 1:
            raise flags.wrong(f"--{name}", value, ">= 1")
    if args.threads > processors:
        raise flags.wrong("--threads", args.threads, f"<= {processors}, the processors that this process may use")
    if args.batch % devices:
        raise flags.wrong("--batch", args.batch, f"a multiple of --devices={devices}")
    if devices > 1 and generate:
        raise flags.wrong("--devices", devices, "1 with --generate", "Drop a flag.")
    others = [name for name in ("against", "tree", "no_update", "generate") if runs > 1 and getattr(args, name)]
    if others:
        raise flags.wrong(f"--{others[0]}", "with --runs", "one of the two", "--runs has both of its sides already.")
    if generate and args.no_update:
        raise flags.wrong("--no_update", "with --generate", "a training step", "Decoding has no update: drop a flag.")


def measure(sides, args) -> dict:
    from molora_jax import config as config_lib

    made = {}
    for name, config in sides.items():
        tree = getattr(args, "tree", None) if name == "b" else None
        made[name] = (config_lib.to_dict(config), vars(args) | {"together": name == "a"}, tree)
    return summary(*in_turn(made, args.steps), args)


def in_turn(made: dict, steps: int):
    """`(rows, started, ends)` of sides that step in turn; `made`: what `Child` gets, by name."""
    children = {}
    try:
        for name, given in made.items():
            children[name] = Child(*given)
        for child in children.values():  # one after the other: a compile beside a step would disturb both
            child.ask("start")
        rows = [{name: child.ask("step") for name, child in children.items()} for _ in range(steps)]
        ends = {name: child.ask("end") for name, child in children.items()}
    finally:
        for child in children.values():
            child.close()
    return rows, {name: child.started for name, child in children.items()}, ends


def summary(rows, started, ends, args) -> dict:
    """The result, from the seconds of every round and what each side said at its start and its end."""
    runs = getattr(args, "runs", 1)
    tokens, clock = 1 if args.generate else runs * args.batch * args.seq, started["a"]["clock"]
    result = {}
    for name in started:
        result[name] = {
            "cpu_seconds": spread([row[name]["cpu"] for row in rows]),
            "wall_seconds": spread([row[name]["wall"] for row in rows]),
            "tokens_per_cpu_second": tokens / min(row[name][clock] for row in rows),  # of `clock`
            "peak_rss_mb": ends[name]["peak_rss_mb"],
            "peak_device_mb": ends[name]["peak_device_mb"],  # None on a CPU
            "compile_seconds": started[name]["compile"],
            "first_step_seconds": started[name]["first"],  # from the start of the process
            "trainable": started[name]["trainable"],
        }
    if "b" in started:
        result["ratio"] = spread([row["a"][clock] / row["b"][clock] for row in rows])
    result["machine"] = machine(args) | {"device": started["a"]["device"], "clock": clock}
    return result


def spread(values) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine(args) -> dict:
    import importlib.metadata
    import platform

    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processor": model, "threads": args.threads, "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"), "batch": args.batch, "seq": args.seq, "dtype": args.dtype,
    }  # fmt: skip


def table(result, args) -> str:
    unit = "a token" if args.generate else "a step"
    clock, other = ("CPU", "wall") if result["machine"]["clock"] == "cpu" else ("wall", "CPU")
    digits = 3 if clock == "CPU" else 4
    rows = [(f"{clock} s {unit} (median, min, max)", f"{other} s", f"tokens/{clock} s", "peak MB", "device MB",
             "compile s", "trainable")]  # fmt: skip
    for name in ("a", "b"):
        if name in result:
            r = result[name]
            three = ", ".join(f"{r[f'{clock.lower()}_seconds'][k]:.{digits}f}" for k in ("median", "min", "max"))
            device = r["peak_device_mb"]
            rows.append((f"{name}: {three}", f"{r[f'{other.lower()}_seconds']['median']:.{digits}f}",
                         f"{r['tokens_per_cpu_second']:.1f}", f"{r['peak_rss_mb']:.0f}",
                         "-" if device is None else f"{device:.0f}", f"{r['compile_seconds']:.1f}",
                         f"{r['trainable']:,}"))  # fmt: skip
    lines = columns(rows)
    runs = getattr(args, "runs", 1)
    if runs > 1:
        lines.append(f"a: a step of {runs} runs together; b: a step of each of {runs} runs, one after the other")
    if "ratio" in result:
        lines.append("ratio a/b: {median:.3f} ({min:.3f} to {max:.3f})".format(**result["ratio"]))
    return "\n".join([*lines, ", ".join(f"{k} {v}" for k, v in result["machine"].items())])


class Child:
    """One side: a process that answers `start`, `step` and `end` with a line of JSON each."""

    def __init__(self, config: dict, args: dict, tree: str | None = None, side: str = "bench_side", keep=False):
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}  # two sides share an accelerator
        if args.get("devices", 1) > 1:
            force = f"--xla_force_host_platform_device_count={args['devices']}"
            environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {force}"
        if tree:
            environment["PYTHONPATH"] = tree
        if keep:  # of a side that does not know `runtime.keep_memory`
            environment["GLIBC_TUNABLES"] = runtime.KEEP
        module = ("-c", SIDE.format(side)) if shipped.installed() and not tree else ("-m", f"launch.{side}")
        self.process = subprocess.Popen(
            [sys.executable, *module],
            env=environment,
            text=True,
            cwd=tree,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.started = {}
        self._send({"config": config, "args": args, "born": time.time()})

    def _send(self, message):
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._dead()

    def ask(self, what: str) -> dict:
        self._send(what)
        line = self.process.stdout.readline()
        if not line:
            self._dead()
        answer = json.loads(line)
        if "error" in answer:
            raise flags.InputError(**answer["error"])
        if what == "start":
            self.started = answer
        return answer

    def _dead(self):
        raise SystemExit(f"the measured process ended with status {self.process.wait()} (its message is above)")

    def close(self):
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    flags.main(run)

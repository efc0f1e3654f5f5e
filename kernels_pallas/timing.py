"""How the ops' `bench` modules measure: one thread, process CPU seconds, the alternatives in turn, pair by pair.

Wall seconds on a shared machine say more about its other users. Every alternative is compiled first; then rounds run
each of them once, so that a drift meets all, and a ratio is taken within a round. The floor is the roofline:
`max(FLOPs / P, bytes / BW)` with P and BW measured on this device (CPU) or from `select.DEVICES`; BW is that of memory,
so small arrays that stay in a cache may beat it.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import select
from kernels_pallas.platform import platform_of


def arguments(doc: str, shapes: dict, default: list[str]):
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=list(shapes), help="a named shape; may be repeated")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15, help="rounds in which every alternative runs once")
    parser.add_argument("--json", action="store_true", help="one JSON on stdout instead of a table")
    args = parser.parse_args()
    args.shapes = args.shape or default
    return args


def one_thread() -> None:
    """Before the backend starts: one processor, and freed memory kept (fresh pages would be timed as work)."""
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:
        return
    for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 28)):  # mmap threshold, trim threshold, top pad
        mallopt(option, value)


def seconds() -> float:
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def measure(functions: dict, args: tuple, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round by name; the functions are jitted."""
    compiled = {name: jax.jit(function).lower(*args).compile() for name, function in functions.items()}
    for run in compiled.values():
        jax.block_until_ready(run(*args))
    out = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, run in compiled.items():
            jax.block_until_ready(run(*args))  # its own caches and pages, not those of the one before
            start = seconds()
            jax.block_until_ready(run(*args))
            out[name].append(seconds() - start)
    return out


def roofline() -> select.Device:
    """P and BW of this device: measured on a CPU, nominal figures elsewhere."""
    if platform_of() != "cpu":
        kind = jax.local_devices()[0].device_kind.lower()
        return next((chip for key, chip in select.DEVICES.items() if key in kind), select.UNKNOWN)
    x, y = jnp.ones((1024, 1024)), jnp.ones(1 << 25)
    product = min(measure({"p": lambda a: a @ a}, (x,), 10)["p"])
    stream = min(measure({"s": lambda a: a + 1.0}, (y,), 10)["s"])
    return select.Device(2 * 1024**3 / product, 2 * y.size * 4 / stream)


def report(name: str, shape: dict, times: dict, chosen: tuple[str, str], flops: float, moved: float, chip) -> dict:
    """One shape's row: every alternative's seconds, its ratio to the chosen one pair by pair, its share of the roof."""
    floor = max(flops / chip.flops_per_second, moved / chip.bytes_per_second)
    forms = {}
    for form, each in times.items():
        ratios = [a / b for a, b in zip(each, times[chosen[0]], strict=True)]
        forms[form] = {
            "seconds": {"min": min(each), "median": statistics.median(each)},
            "over_chosen": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
            "share_of_roofline": floor / min(each),
        }
    return {"name": name, "shape": shape, "chosen": chosen[0], "why": chosen[1], "floor_seconds": floor, "forms": forms}


def finish(rows: list[dict], args, chip) -> None:
    machine = {
        "device": jax.local_devices()[0].device_kind,
        "processor": _processor(),
        "jax": jax.__version__,
        "flops_per_second": chip.flops_per_second,
        "bytes_per_second": chip.bytes_per_second,
        "dtype": args.dtype,
        "clock": "process CPU seconds, one thread" if jax.default_backend() == "cpu" else "wall seconds",
    }
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows}))
        return
    print(" ".join(f"{key}={value}" for key, value in machine.items()))
    for row in rows:
        print(f"\n{row['name']} {row['shape']}\n  {row['chosen']}: {row['why']}")
        print(f"  floor        {row['floor_seconds'] * 1e3:8.2f} ms")
        for form, r in row["forms"].items():
            ratio, share = r["over_chosen"], r["share_of_roofline"]
            print(
                f"  {form:12s} {r['seconds']['min'] * 1e3:8.2f} ms   x {ratio['median']:.2f}"
                f" ({ratio['min']:.2f} to {ratio['max']:.2f})   {share:.0%} of the roofline"
            )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def decision(T: int, E: int, K: int):
    """`idx [T, K]` of K different experts a token, uniform; `gates [T, K]`."""
    rng = np.random.default_rng(0)
    idx = np.sort(np.argsort(rng.random((T, E)), axis=1)[:, :K], axis=1).astype(np.int32)
    return jnp.asarray(idx), jnp.asarray(rng.random((T, K)), jnp.float32)


def normal(*shape, dtype=jnp.float32, scale=1.0):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape) * scale, dtype)


def with_gradients(function, wide: int):
    """Value and the gradients of the first `wide` arguments, for a cotangent of ones."""

    def both(*args):
        value, pull = jax.vjp(lambda *some: function(*some, *args[wide:]), *args[:wide])
        return value, pull(jax.tree.map(jnp.ones_like, value))

    return both

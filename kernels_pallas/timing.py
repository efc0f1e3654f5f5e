"""How the ops' `bench` modules measure: one thread, process CPU seconds, the alternatives in turn, pair by pair.

Wall seconds on a shared machine say more about its other users. On an accelerator they are the clock: of several runs
that follow one another without a wait, for a step does not wait for each of its products either. Every alternative is
compiled first, and left out where its arrays do not fit the device; then rounds run each of them once, so that a drift
meets all, and a ratio is taken within a round. The floor is the roofline: `max(FLOPs / P, bytes / BW)` with P and BW
measured on this device; BW is that of memory, so small arrays that stay in a cache may beat it.
"""

import argparse
import concurrent.futures
import ctypes
import json
import os
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import select
from kernels_pallas.platform import may_accelerate

ROWS = ("--rows", dict(type=int, action="append", default=[], help="also `tiled` with so many rows a tile; repeatable"))
RUNS = 10  # one after the other on an accelerator, so that the host's part of a call hides behind the one before


def begin(doc: str, shapes: dict, cpu: list[str], *more):
    """The parsed command line, after the backend has started; `args.shapes` by name, with the tokens asked for.

    `cpu` are the names to take on a CPU where none is asked for; an accelerator takes all. `more`: flags of one bench.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=list(shapes), help="a named shape; may be repeated")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15, help="rounds in which every alternative runs once")
    parser.add_argument("--json", action="store_true", help="one JSON on stdout instead of a table")
    parser.add_argument("--tokens", type=int, help="T of every shape, in place of its own")
    for name, options in more:
        parser.add_argument(name, **options)
    args = parser.parse_args()
    one_thread()
    names = args.shape or (cpu if jax.default_backend() == "cpu" else list(shapes))
    own = {} if args.tokens is None else {"T": args.tokens}
    args.shapes = {name: shapes[name] | own for name in names}
    return args


def one_thread() -> None:
    """Before the backend starts: one processor, and freed memory kept (fresh pages would be timed as work)."""
    pin(1)
    xla_flags("intra_op_parallelism_threads=1")
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:
        return
    for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 28)):  # mmap threshold, trim threshold, top pad
        mallopt(option, value)


def pin(num_processors: int) -> None:
    """Before the backend starts, which makes its threads for the processors that it sees: so many for this process.

    All of them where there may be an accelerator. They only feed it, but its programs are compiled on them, which takes
    long on one.
    """
    if not may_accelerate():
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_processors])
    if num_processors == 1:
        xla_flags("--xla_cpu_multi_thread_eigen=false")


def xla_flags(more: str) -> None:
    """Before the backend starts, which reads them."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {more}"


def seconds() -> float:
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def memory_bytes() -> int:
    """What one program may hold: the device's memory, the machine's on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def compiled(name: str, function, args: tuple):
    """The program, or None (said on stderr) where its arrays are more than the device holds."""
    try:
        program = jax.jit(function).lower(*args).compile()
        parts = program.memory_analysis()
        size = parts.argument_size_in_bytes + parts.output_size_in_bytes + parts.temp_size_in_bytes
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        program, size = None, float("inf")
    if size <= memory_bytes():
        return program
    print(f"{name} is left out: {size / 2**30:.0f} GiB of {memory_bytes() / 2**30:.0f}", file=sys.stderr, flush=True)
    return None


def measure(functions: dict, args: tuple, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round by name; the functions are jitted. Those that do not fit are missing."""
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = pool.map(lambda form: compiled(*form, args), functions.items())
    programs = {name: program for name, program in zip(functions, made, strict=True) if program is not None}
    runs = {}
    for name, run in programs.items():
        jax.block_until_ready(run(*args))
        start = seconds()
        jax.block_until_ready(run(*args))
        runs[name] = 1 if jax.default_backend() == "cpu" else max(1, min(RUNS, int(0.05 / (seconds() - start))))
    out = {name: [] for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            jax.block_until_ready(run(*args))  # its own caches and pages, not those of the one before
            start = seconds()
            for _ in range(runs[name]):
                result = run(*args)
            jax.block_until_ready(result)
            out[name].append((seconds() - start) / runs[name])
    return out


def roofline(dtype=jnp.float32) -> select.Device:
    """P, of products of that dtype, and BW of this device, measured."""
    side, length = (1024, 1 << 25) if jax.default_backend() == "cpu" else (8192, 1 << 29)
    x, y = normal(side, side, dtype=dtype), jnp.ones(length)
    product = min(measure({"p": lambda a: a @ a}, (x,), 10)["p"])
    stream = min(measure({"s": lambda a: a + 1.0}, (y,), 10)["s"])
    return select.Device(2 * side**3 / product, 2 * y.size * 4 / stream)


def report(name: str, shape: dict, times: dict, chosen: tuple[str, str], flops: float, moved: float, chip) -> dict:
    """One shape's row: every alternative's seconds, its ratio to the chosen one pair by pair, the roof's fraction."""
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
            ratio, fraction = r["over_chosen"], r["share_of_roofline"]
            print(
                f"  {form:12s} {r['seconds']['min'] * 1e3:8.2f} ms   x {ratio['median']:.2f}"
                f" ({ratio['min']:.2f} to {ratio['max']:.2f})   {fraction:.0%} of the roofline"
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

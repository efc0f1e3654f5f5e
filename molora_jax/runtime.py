"""Process-wide settings of the launchers: quiet logs, a persistent compilation cache, several processes."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sys

from molora_jax import cluster
from molora_jax.errors import InputError

# For the C library's allocator: memory that is freed stays with the process, in pages of 2 MB, and one heap holds it.
KEEP = (
    "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=274877906944"
)
_kept = False  # whether this process keeps memory
GONE = re.compile(r"gloo|connection (closed|reset)|heartbeat|unhealthy|coordination service", re.IGNORECASE)


def version() -> str:
    """Of this package, as it is installed."""
    try:
        return importlib.metadata.version("molora_jax")
    except importlib.metadata.PackageNotFoundError:  # a folder on the path
        return "not installed"


def keep_memory() -> None:
    """Starts this process once more, so that it keeps the memory of a step for the next one.

    XLA on a CPU asks for the activations of a step anew each time. The C library gives so large a piece back to the
    system at once, which then hands it out page by page and set to zero: 0.57 of 2.55 s of a step of SmolLM2
    (docs/performance.md). The library reads such settings at the start of a process alone, hence the second one: the
    same process to its parent, 0.3 s later.

    Nothing happens where an accelerator does the work, on other systems, once jax is loaded (tests, notebooks: set
    `GLIBC_TUNABLES` before you start them), where the user has set `GLIBC_TUNABLES`, or with `MOLORA_KEEP_MEMORY=0`.
    """
    global _kept
    if os.environ.get("MOLORA_KEEP_MEMORY") == "kept":  # the second process: its children decide for themselves
        _kept = True
        del os.environ["MOLORA_KEEP_MEMORY"], os.environ["GLIBC_TUNABLES"]
        return
    wanted = os.environ.get("MOLORA_KEEP_MEMORY") != "0" and "GLIBC_TUNABLES" not in os.environ
    if not wanted or "jax" in sys.modules or not _is_glibc() or _has_accelerator():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    settings = {"MOLORA_KEEP_MEMORY": "kept", "GLIBC_TUNABLES": KEEP}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **settings})


def release_memory() -> None:
    """Gives back what `keep_memory` keeps, between two programs: the next one may fit into none of the pieces."""
    if _kept:
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    return "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})


def _has_accelerator() -> bool:
    """As `kernels_pallas.platform.may_accelerate`, before jax is loaded."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None


def environment() -> None:
    """Before jax is imported. What the user set stays."""
    cache = pathlib.Path(os.environ.get("MOLORA_CACHE") or "~/.cache/molora_jax").expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def configure(*, several: bool = False) -> None:
    """Before jax is used.

    Args:
      several: whether the command runs as several processes; the others are refused where the environment has some.

    Raises:
      InputError: variables of a cluster that do not fit each other, peers that do not answer.
    """
    environment()
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)
    found = cluster.find(os.environ)
    if found is not None and not several and (found.processes or 1) > 1:
        raise InputError(
            "processes", got=f"{found.processes} ({found.kind})", expected="one: only training runs as several",
            fix="Start this command once (--mesh splits the model over the devices of its host).",
        )  # fmt: skip
    if several:
        join(found)


def join(found: cluster.Cluster | None) -> None:
    """Joins the processes of a cluster; nothing for a process by itself.

    Raises:
      InputError: the others do not answer.
    """
    if found is None:
        return
    import jax

    arguments = {}
    if found.coordinator is not None:
        arguments = dict(
            coordinator_address=found.coordinator, num_processes=found.processes, process_id=found.process,
            local_device_ids=found.devices, cluster_detection_method="deactivate",
        )  # fmt: skip
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        at = "" if found.coordinator is None else f" at {found.coordinator}"
        raise InputError(
            f"processes ({found.kind})", got=f"no answer{at}: {str(error).splitlines()[0][:200]}",
            expected=f"{found.processes or 'all'} processes that find each other",
            fix="See that all of them started and that the address can be reached from each host.",
        ) from error  # fmt: skip


def serve_profiler(port: int) -> None:
    """Lets xprof or TensorBoard take a trace of this process while it runs.

    Raises:
      InputError: a port that is none, or is taken.
    """
    import jax

    try:
        if not 0 < port < 65536:
            raise ValueError("no port")
        jax.profiler.start_server(port)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            "--profiler_port", got=f"{port} ({str(error).splitlines()[0][:100]})", expected="a free port, 1 to 65535",
            fix="Choose another.",
        ) from error  # fmt: skip


@contextlib.contextmanager
def peers():
    """A process whose peer is gone says so in one message and ends at once, with status 1.

    Leaving in the ordinary way would wait in jax's shutdown for all processes to meet, and abort after its heartbeats
    have timed out (87 s, measured).
    """
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # jax raises a lost connection as either
        if isinstance(error, InputError) or jax.process_count() == 1 or not GONE.search(str(error)):
            raise
        gone = InputError(
            "processes", got=f"no answer from another process of this run ({str(error).splitlines()[0][:200]})",
            expected=f"all {jax.process_count()} to go on",
            fix="See what that one said, then start all of them again: they go on from the last saved step.",
        )  # fmt: skip
        print(f"error: {gone}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def together(name: str, *, seconds: int = 1800) -> None:
    """Waits until every process is here; nothing with one process. `name` is new each time.

    Before the first collective of a program: the CPU's (gloo) give up on a peer that is 30 s late, and processes take
    unequal times to load and to compile. This waits through the coordinator instead, without a collective.
    """
    import jax

    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * seconds)

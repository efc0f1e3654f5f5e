"""Process-wide settings of the launchers: quiet logs, a persistent compilation cache, several processes."""

import contextlib
import os
import pathlib
import re
import sys

from molora_jax.errors import InputError

GONE = re.compile(r"gloo|connection (closed|reset)|heartbeat|unhealthy|coordination service", re.IGNORECASE)


def environment() -> None:
    """Before jax is imported. What the user set stays."""
    cache = pathlib.Path(os.environ.get("MOLORA_CACHE") or "~/.cache/molora_jax").expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def configure() -> None:
    """Before jax is used."""
    environment()
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)
    if os.environ.get("MOLORA_COORDINATOR"):  # host:port; with MOLORA_PROCESSES and MOLORA_PROCESS
        import jax

        jax.distributed.initialize(
            os.environ["MOLORA_COORDINATOR"], int(os.environ["MOLORA_PROCESSES"]), int(os.environ["MOLORA_PROCESS"])
        )


@contextlib.contextmanager
def peers():
    """A process whose peer is gone says so in one message and ends at once, with status 1.

    Leaving in the ordinary way would wait in jax's shutdown for all processes to meet, and abort after its heartbeats
    have timed out (87 s, measured).
    """
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not GONE.search(str(error)):
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

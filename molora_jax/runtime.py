"""Process-wide settings of the launchers: quiet logs, a persistent compilation cache, several processes."""

import os
import pathlib


def configure() -> None:
    """Before jax is imported for work. What the user set in the environment stays."""
    cache = pathlib.Path(os.environ.get("MOLORA_CACHE") or "~/.cache/molora_jax").expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)
    if os.environ.get("MOLORA_COORDINATOR"):  # host:port; with MOLORA_PROCESSES and MOLORA_PROCESS
        import jax

        jax.distributed.initialize(
            os.environ["MOLORA_COORDINATOR"], int(os.environ["MOLORA_PROCESSES"]), int(os.environ["MOLORA_PROCESS"])
        )


def together(name: str, *, seconds: int = 1800) -> None:
    """Waits until every process is here; nothing with one process. `name` is new each time.

    Before the first collective of a program: the CPU's (gloo) give up on a peer that is 30 s late, and processes take
    unequal times to load and to compile. This waits through the coordinator instead, without a collective.
    """
    import jax

    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * seconds)

"""Which processes run together, read from the environment: `molora_jax.runtime.configure` joins them.

| where | what says so | what each process is told |
|---|---|---|
| anywhere | `MOLORA_COORDINATOR=HOST:PORT MOLORA_PROCESSES=N MOLORA_PROCESS=I` | all of it |
| SLURM | `srun` with several tasks | the step's first host, a port from the job's number, task and local task |
| Open MPI | `mpirun -n N` | the launcher's host, a port from the job's number (Open MPI 5: `MOLORA_COORDINATOR` too) |
| Kubernetes | an Indexed Job with `MOLORA_COORDINATOR` and `MOLORA_PROCESSES` | the pod's `JOB_COMPLETION_INDEX` |
| Cloud TPU | a TPU VM, or GKE's `TPU_WORKER_HOSTNAMES` of several hosts | what `jax.distributed.initialize()` finds |

`MOLORA_COORDINATOR` comes first wherever it is set; a scheduler may then give the two numbers. One task, or none of
these, is one process. Only variables are read here, so every row can be tried without the machine.
"""

import dataclasses
import importlib.util
import pathlib
import re
from collections.abc import Mapping

from molora_jax.errors import InputError

OWN = ("MOLORA_COORDINATOR", "MOLORA_PROCESSES", "MOLORA_PROCESS")
# (name, number of processes, own number, number on the host, processes on the host)
SCHEDULERS = (
    ("SLURM", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ("Open MPI", *(f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"))),
)  # fmt: skip
PORTS = 2**12  # the last ports there are: a job's number picks one, so that two jobs of a host seldom meet


@dataclasses.dataclass(frozen=True)
class Cluster:
    """`kind`, for people; `coordinator` HOST:PORT, `processes`, `process`, `devices` of the host that are this
    process's (None: all). With `coordinator` None jax finds all of it by itself (Cloud TPU)."""

    kind: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    devices: tuple[int, ...] | None = None


def find(environ: Mapping[str, str], *, on_tpu: bool | None = None) -> Cluster | None:
    """The cluster that `environ` describes, None for a process by itself.

    Args:
      on_tpu: whether this is a TPU VM; None looks for its devices.

    Raises:
      InputError: variables that are half set, no numbers, or do not fit each other.

    >>> find({"MOLORA_COORDINATOR": "host0:1234", "MOLORA_PROCESSES": "2", "MOLORA_PROCESS": "1"})
    Cluster(kind='MOLORA_*', coordinator='host0:1234', processes=2, process=1, devices=None)
    >>> find({}, on_tpu=False) is None
    True
    """
    scheduler = next((s for s in SCHEDULERS if _is_step(environ, s)), None)
    if any(environ.get(name) for name in OWN):
        return _own(environ, scheduler)
    if scheduler is not None:
        kind, processes, process = scheduler[0], *_numbers(environ, *scheduler[1:3])
        if processes == 1:
            return None
        address = _slurm(environ) if kind == "SLURM" else _open_mpi(environ)
        return Cluster(kind, address, processes, process, _devices(environ, scheduler))
    hosts = [host for host in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1 or environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return Cluster("Cloud TPU")
    if _is_tpu_vm(environ) if on_tpu is None else on_tpu:
        return Cluster("Cloud TPU")
    return None


def _is_step(environ, scheduler) -> bool:
    """A process that the scheduler started: a batch script, which is none, has no number on its host."""
    return all(name in environ for name in scheduler[1:4])


def _own(environ, scheduler) -> Cluster:
    kind, processes, process = "MOLORA_*", OWN[1], OWN[2]
    if scheduler is not None:
        kind = f"{scheduler[0]}, MOLORA_COORDINATOR"
        processes = processes if environ.get(processes) else scheduler[1]
        process = process if environ.get(process) else scheduler[2]
    elif environ.get("JOB_COMPLETION_INDEX") and not environ.get(process):
        kind, process = "Kubernetes, MOLORA_COORDINATOR", "JOB_COMPLETION_INDEX"
    missing = [name for name in (OWN[0], processes, process) if not environ.get(name)]
    if missing:
        given = ", ".join(f"{name}={environ[name]}" for name in OWN if environ.get(name))
        raise InputError(
            " and ".join(missing), got=f"nothing, with {given}", expected="all three of " + ", ".join(OWN),
            fix="Set them (HOST:PORT of process 0, how many there are, which one this is), or none of them.",
        )  # fmt: skip
    address = environ[OWN[0]]
    if not re.fullmatch(r"[^\s:]+:\d+|\[[^\s\]]+\]:\d+", address):
        raise InputError(OWN[0], got=repr(address), expected="HOST:PORT", fix="Write for instance host0:1234.")
    devices = None if scheduler is None else _devices(environ, scheduler)
    return Cluster(kind, address, *_numbers(environ, processes, process), devices)


def _numbers(environ, processes: str, process: str) -> tuple[int, int]:
    values = []
    for name in (processes, process):
        if not re.fullmatch(r"\d+", environ[name]):
            raise InputError(name, got=repr(environ[name]), expected="a whole number", fix="Correct it.")
        values.append(int(environ[name]))
    if values[0] == 0 or values[1] >= values[0]:
        raise InputError(
            process, got=str(values[1]), expected=f"a number below {processes}={values[0]}",
            fix="Processes are counted from 0.",
        )  # fmt: skip
    return values[0], values[1]


def _slurm(environ) -> str:
    """The first host of the step: `a`, `a,b`, `a[1-4],b` or `a[001,007]`; a port from the job's number."""
    nodes, job = environ.get("SLURM_STEP_NODELIST", ""), environ.get("SLURM_JOB_ID", "")
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if not found or not job.isdigit():
        raise InputError(
            "SLURM_STEP_NODELIST, SLURM_JOB_ID", got=f"{nodes!r}, {job!r}", expected="the hosts of a step and its job",
            fix="Start with srun, or set MOLORA_COORDINATOR=HOST:PORT of the first task.",
        )  # fmt: skip
    return f"{found[1]}{found[2] or ''}:{_port(int(job))}"


def _open_mpi(environ) -> str:
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")  # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
    found = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    if not found or not uri.split(".")[0].isdigit():
        raise InputError(
            "OMPI_MCA_orte_hnp_uri", got=repr(uri), expected="the launcher's address, which Open MPI 5 does not give",
            fix="Set MOLORA_COORDINATOR=HOST:PORT, a free port of the host of rank 0: mpirun -x MOLORA_COORDINATOR=...",
        )  # fmt: skip
    host = found[1] or f"[{found[2]}]"
    return f"{host}:{_port(int(uri.split('.')[0]) // PORTS)}"


def _port(job: int) -> int:
    return 2**16 - PORTS + job % PORTS


def _devices(environ, scheduler) -> tuple[int, ...] | None:
    """One device a process where a host has several processes that all see several; else what the process sees."""
    *_, local, on_host = scheduler
    count = re.match(r"\d+", environ.get(on_host, "1"))
    visible = [device for device in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if count is None or int(count[0]) == 1 or len(visible) == 1 or environ.get("JAX_PLATFORMS") == "cpu":
        return None
    return (int(environ[local]),)


def _is_tpu_vm(environ) -> bool:
    if environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or importlib.util.find_spec("libtpu") is None:
        return False
    return pathlib.Path("/dev/accel0").exists() or pathlib.Path("/dev/vfio/0").exists()

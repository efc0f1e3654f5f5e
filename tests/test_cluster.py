"""Which processes run together, by faked environments; what the schedulers set is from their manuals."""

import pytest

from molora_jax.cluster import Cluster, find
from molora_jax.errors import InputError

OWN = dict(MOLORA_COORDINATOR="host0:1234", MOLORA_PROCESSES="4", MOLORA_PROCESS="3")
SLURM = dict(
    SLURM_JOB_ID="5000", SLURM_STEP_NODELIST="gpu[003-004],big7", SLURM_NTASKS="3", SLURM_PROCID="2", SLURM_LOCALID="0",
    SLURM_STEP_TASKS_PER_NODE="1(x3)",
)  # fmt: skip
MPI = dict(
    OMPI_COMM_WORLD_SIZE="8", OMPI_COMM_WORLD_RANK="5", OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="4",
    OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
)  # fmt: skip


def alone(environ):
    return find(environ, on_tpu=False)


def test_own_variables():
    assert alone(OWN) == Cluster("MOLORA_*", "host0:1234", 4, 3)
    assert alone({}) is None


@pytest.mark.parametrize("missing", OWN)
def test_half_set_variables_are_an_error_that_names_them(missing):
    given = {name: value for name, value in OWN.items() if name != missing}
    with pytest.raises(InputError, match=missing) as error:
        alone(given)
    assert all(f"{name}={value}" in str(error.value) for name, value in given.items())
    with pytest.raises(InputError, match=missing):
        alone({**OWN, missing: ""})


@pytest.mark.parametrize(
    "name, value, said",
    [("MOLORA_PROCESSES", "two", "'two'"), ("MOLORA_PROCESS", "4", "below"), ("MOLORA_PROCESSES", "0", "below"),
     ("MOLORA_COORDINATOR", "host0", "HOST:PORT"), ("MOLORA_PROCESS", "-1", "'-1'")],
)  # fmt: skip
def test_wrong_values_are_named(name, value, said):
    with pytest.raises(InputError, match=said):
        alone({**OWN, name: value})


@pytest.mark.parametrize(
    "nodes, first", [("node7", "node7"), ("a,b", "a"), ("gpu[003-004],big7", "gpu003"), ("n[1,7-9]", "n1")]
)
def test_slurm(nodes, first):
    found = alone({**SLURM, "SLURM_STEP_NODELIST": nodes})
    assert found == Cluster("SLURM", f"{first}:{65536 - 4096 + 5000 % 4096}", 3, 2)


def test_slurm_gives_a_task_one_device_only_where_a_node_has_several_tasks():
    several = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert alone(several).devices == (3,)
    assert alone({**several, "CUDA_VISIBLE_DEVICES": "2"}).devices is None, "srun --gpus-per-task shows it one alone"
    assert alone({**several, "JAX_PLATFORMS": "cpu"}).devices is None


def test_one_task_or_a_batch_script_is_a_process_by_itself():
    assert alone({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    batch = {name: value for name, value in SLURM.items() if name not in ("SLURM_LOCALID", "SLURM_STEP_NODELIST")}
    assert alone(batch) is None


def test_open_mpi():
    assert alone(MPI) == Cluster("Open MPI", f"10.96.0.1:{65536 - 4096 + 1531576320 // 4096 % 4096}", 8, 5, (1,))
    later = {name: value for name, value in MPI.items() if "orte" not in name}
    with pytest.raises(InputError, match="MOLORA_COORDINATOR"):
        alone(later)
    assert alone({**later, "MOLORA_COORDINATOR": "h:7"}) == Cluster("Open MPI, MOLORA_COORDINATOR", "h:7", 8, 5, (1,))


def test_kubernetes_gives_the_number_of_the_pod():
    given = {name: OWN[name] for name in ("MOLORA_COORDINATOR", "MOLORA_PROCESSES")}
    assert alone({**given, "JOB_COMPLETION_INDEX": "2"}).process == 2
    assert alone({"JOB_COMPLETION_INDEX": "0", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None


def test_cloud_tpu_is_left_to_jax():
    assert alone({"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}) == Cluster("Cloud TPU")
    assert alone({"TPU_WORKER_HOSTNAMES": "t0", "TPU_WORKER_ID": "0"}) is None
    assert find({}, on_tpu=True) == Cluster("Cloud TPU")
    assert find({"JAX_PLATFORMS": "cpu"}) is None


def test_a_command_that_is_one_process_refuses_the_others(monkeypatch):
    from molora_jax import runtime

    for name, value in OWN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"4 \(MOLORA_\*\)"):
        runtime.configure()

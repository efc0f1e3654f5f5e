"""`train.exact`: the same bits on 1, 2, 4, 8 devices and in two processes; the ordinary step's values."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import common
from molora_jax import config as schema
from molora_jax import sharding
from molora_jax.adapters import ADAPTERS
from molora_jax.catalogue.methods import METHODS
from molora_jax.errors import InputError
from molora_jax.objectives.held_out import example_nll
from molora_jax.routers import ROUTERS
from molora_jax.runs.identity import compare, identity
from molora_jax.runs.metrics import is_timing
from molora_jax.training.devices import Devices
from molora_jax.training.exact import ExactNLL, ExactStep
from molora_jax.training.step import fresh
from tests import tiny
from tests.battery.cases import BATCH, DEEP, SMALL, TARGETS_PER_ROW, Case, combination, method, random_adapters
from tests.battery.checks import matches
from tests.engines.problems import mesh

ROOT = pathlib.Path(__file__).parents[2]
MIX = ("lora", "softmax_topk", "ffn", "kaiming")
SIXTEEN = {name: np.concatenate([rows, np.roll(rows, 3, axis=0)]) for name, rows in BATCH.items()}
SIXTEEN["loss_weight"][8:11] = 0.0  # micro-steps of unequal weight


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def run(case, adapters, on, *, accumulate=1, data=BATCH, steps=1):
    """`(state, metrics)` on the host after so many exact steps on a mesh."""
    step = ExactStep(
        case.model, case.optimizer, lambda step: 1e-2, mesh=on, clip=1.0, frozen=case.frozen, seed=0,
        accumulate=accumulate, targets_per_row=TARGETS_PER_ROW,
    )  # fmt: skip
    whole = sharding.replicated(on)
    params = sharding.put(jax.device_get(case.params), whole)
    state = sharding.put(jax.device_get(case.start(adapters)), whole)
    for _ in range(steps):
        state, metrics = step(state, params, sharding.put_batch(data, on, len(data["tokens"])))
    return jax.device_get((state, metrics))


def random_everywhere(name):
    """A method's config with dropout and, where its router has any, noise."""
    changes = {}
    for rule, value in method(name).method.rules.items():
        takes = ADAPTERS[value.adapter.name].LIMITS.get("dropout", (0, 1))[1] > 0  # (IA)3 has none
        changes[f"method.rules.{rule}.adapter.dropout"] = 0.2 if takes else 0.0
        for field in ROUTERS[value.router.name].RANDOM if "router" in value else ():
            changes[f"method.rules.{rule}.router.{field}"] = 0.1
    return method(name, **changes)


def test_two_devices_one_device_and_the_ordinary_step():
    """Losses that join rows, layers and micro-steps, two micro-steps: bits of one device, values of the plain step."""
    config = combination(*MIX)
    config.losses.balance.update(weight=1.0, accumulate="exact", over="layer", per_example=True)
    plain = Case(config, accumulate=2, clip=1.0)
    adapters = random_adapters(plain.model, plain.params)
    one = run(plain, adapters, mesh(), accumulate=2, data=SIXTEEN)
    two = run(plain, adapters, mesh(data=2), accumulate=2, data=SIXTEEN)
    assert bits(one) == bits(two)
    _, metrics, gradients = plain.run(plain.start(adapters), SIXTEEN)
    for name in ("loss", "lm_loss", "aux/balance", "aux/entropy", "grad_norm", "tokens"):
        np.testing.assert_allclose(one[1][name], metrics[name], rtol=1e-5, err_msg=name)
    matches(one[1]["site"], metrics["site"], rtol=1e-5, atol=1e-6)
    largest = max(np.abs(g).max() for g in gradients.values())
    matches(flatten_dict(one[0].opt[0], sep="/"), gradients, rtol=0, atol=1e-5 * largest)


def test_held_out_rows_and_the_first_state_have_the_same_bits():
    case = Case(combination("dora", "none", "projection", "pissa"))
    adapters = random_adapters(case.model, case.params)
    rows = BATCH | {"example_index": np.where(BATCH["segment_ids"] > 0, BATCH["example_ids"], 0)}
    sums, starts = [], []
    for on in (mesh(), mesh(data=2, fsdp=2)):
        whole = sharding.replicated(on)
        params, here = (sharding.put(jax.device_get(x), whole) for x in (case.params, adapters))
        batches = [{k: v[i : i + 2 * on.size] for k, v in rows.items()} for i in range(0, 8, 2 * on.size)]
        forward = ExactNLL(case.model, mesh=on, targets_per_row=TARGETS_PER_ROW)
        sums.append(example_nll(
            case.model, params, here, {}, batches, 17, mesh=on, targets_per_row=TARGETS_PER_ROW,
            constrain=lambda x: x, forward=forward,
        ))  # fmt: skip
        start = lambda p: fresh(case.model, case.optimizer, p, case.frozen, jax.random.key(0))  # noqa: E731
        starts.append(Devices(on).once(start)(params))
        assert all(leaf.sharding.is_equivalent_to(whole, leaf.ndim) for leaf in jax.tree.leaves(starts[-1]))
    assert bits(sums[0]) == bits(sums[1]) and sums[0]["nll"].sum() > 1
    assert bits(starts[0]) == bits(starts[1])


@pytest.mark.parametrize(
    "changes, where",
    [
        ({"mesh.expert": 2}, "mesh.expert"),
        ({"mesh.tensor": 2}, "mesh.tensor"),
        ({"engine": "all_to_all"}, "engine"),
        ({"engine": "ragged_all_to_all"}, "engine"),
        ({"train.attention": "fused"}, "train.attention"),
        ({"train.batch_size": 12}, "train.batch_size"),
        ({"train.batch_size": 16, "train.accumulate": 4}, "train.batch_size"),
    ],
)
def test_what_exact_cannot_do_is_refused_by_name(changes, where):
    with pytest.raises(InputError) as error:
        method("mixlora", **{"train.exact": True, **changes})
    assert error.value.where == where
    assert "exact" in str(error.value)
    method("mixlora", **changes)  # without exact it is a config


def test_a_number_of_devices_that_does_not_divide_the_micro_shards():
    config = method("mixlora", **{"train.exact": True, "train.batch_size": 48})
    for devices in (1, 2, 4, 8):
        assert schema.check_mesh(config, devices)["data"] == devices
    for devices in (3, 16):
        with pytest.raises(InputError, match="mesh.data.*exact"):
            schema.check_mesh(config, devices)


def test_exact_is_part_of_a_runs_identity():
    extra = dict(base_digest="b", data_fingerprint="d")
    config = schema.to_dict(common.get_config())
    plain = identity(config, extra)
    del config["train"]["exact"]
    older = identity(config, extra)
    assert compare(older, plain)[0] == [], "runs of older versions go on"
    config["train"]["exact"] = True
    for earlier in (older, plain):
        assert [line.partition(":")[0] for line in compare(earlier, identity(config, extra))[0]] == ["train.exact"]


# ---- slow: every method, every mesh; real runs -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_every_mesh(name):
    """Dropout and noise on, two steps: a step's bits decide the next one's choices."""
    case = Case(random_everywhere(name), DEEP if name == "mola" else SMALL)
    adapters = random_adapters(case.model, case.params)
    one = bits(run(case, adapters, mesh(), steps=2))
    for sizes in (dict(data=8), dict(data=2, fsdp=2), dict(fsdp=2)):
        assert bits(run(case, adapters, mesh(**sizes), steps=2)) == one, sizes


@pytest.mark.slow
@pytest.mark.parametrize("point", [("dora", "top_p", "ffn", "kaiming"), ("dora", "top_p", "projection", "pissa")])
def test_row_factors_and_a_number_of_experts_that_varies(point):
    case = Case(combination(*point, **{"method.rules.mix.adapter.dropout": 0.2}))
    adapters = random_adapters(case.model, case.params)
    one = bits(run(case, adapters, mesh(), accumulate=2, data=SIXTEEN))
    for sizes in (dict(data=4, fsdp=2), dict(data=2, fsdp=4), dict(fsdp=8)):
        assert bits(run(case, adapters, mesh(**sizes), accumulate=2, data=SIXTEEN)) == one, sizes


def launch(folder, *arguments, devices, processes=None, task):
    env = dict(os.environ, PATH=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}", JAX_PLATFORMS="cpu")
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # a device compiles for itself: 30 times in this test
    if not processes:
        env["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    env["PYTHONPATH"] = str(ROOT)
    head = [sys.executable] if not processes else [
        "bash", "launch/local.sh", f"--processes={processes}", f"--devices={devices // processes}"
    ]  # fmt: skip
    done = subprocess.run(
        [*head, "-m", "launch.train", f"--workdir={folder}", "--config.base.source=random:tiny",
         f"--config.data.tasks=jsonl:{task}", "--config.data.seq_len=64", "--config.train.exact=True", *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = max((folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    digests = json.loads((last / "manifest.json").read_text())["tree"]  # of every leaf: adapters, moments, routers
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in rows], digests


@pytest.mark.slow
@pytest.mark.parametrize("config, accumulate", [("mixlora", 2), ("loramoe", 1)])
def test_runs_on_other_devices_and_processes(tmp_path, config, accumulate):
    task = tiny.write_task(tmp_path / "task.jsonl")
    common_ = [
        f"--config=configs/{config}.py", "--config.train.steps=4", f"--config.train.accumulate={accumulate}",
        f"--config.train.batch_size={8 * accumulate}", "--config.train.eval_every=2", "--config.eval.num_items=8",
    ]  # fmt: skip
    if config == "loramoe":
        common_.append("--config.losses.localized_balance.world=double")
    one = launch(tmp_path / "1", *common_, devices=1, task=task)
    assert len(one[0]) == 4 and "valid_nll" in one[0][-1]
    for data, fsdp in ((2, 2), (8, 1)):
        sizes = f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}"
        assert launch(tmp_path / f"{data}x{fsdp}", *common_, *sizes, devices=data * fsdp, task=task) == one, sizes
    assert launch(tmp_path / "two", *common_, devices=8, processes=2, task=task) == one
    folder = tmp_path / "resumed"  # half on one device, half on two
    launch(folder, *common_, "--config.train.stop_after=2", devices=1, task=task)
    assert launch(folder, *common_, devices=2, task=task) == one

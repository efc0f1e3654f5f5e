"""The gradient of the base's kernels, some layers at a time: what it is, where it is taken, its memory."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from configs import common
from molora_jax import config as schema
from molora_jax.adapters import ADAPTERS
from molora_jax.backbones.model import Model
from molora_jax.backbones.sizes import base_shapes
from molora_jax.core.rules import Rule
from molora_jax.errors import InputError
from molora_jax.inits import INITS
from molora_jax.objectives.lm import PLAIN, lm
from molora_jax.runs.checkpoints import load, read_manifest
from molora_jax.training import probe
from molora_jax.training.exact import alone
from molora_jax.training.loop import train
from molora_jax.training.step import fresh, make_step
from tests.battery.cases import SMALL
from tests.regimes import small
from tests.tiny import write_task

SITES = ("q", "down")
START = dict(name="lora_sb", eta=1e-3, batches=2, layers=3)  # of four: two passes


def config(folder, mesh=(2, 2, 2), **fields):
    """Routed cores on two sites, from the gradient of two batches of two micro-steps."""
    out = common.get_config()
    out.base.source = "random:tiny"
    adapter = common.adapter("lora_xs", rank=4, alpha=4.0, dropout=0.0, init=dict(START))
    out.method.rules = dict(
        mix=common.rule("q,down", adapter=adapter, experts="2|3", router=dict(name="softmax_topk", k=1, share="site")),
    )
    out.data.update(tasks=f"jsonl:{write_task(folder / 'task.jsonl', rows=40)}", seq_len=48)
    out.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    out.optim.warmup = 0
    out.train.update(dict(steps=2, batch_size=8, accumulate=2, save_every=1, keep=9) | fields)
    schema.validate(out)
    return out


def leaves(workdir, step):
    folder = workdir / "checkpoints" / str(step)
    tree = load(folder, read_manifest(folder), ["adapters"])["adapters"]
    return {path: np.asarray(x) for path, x in flatten_dict(tree, sep="/").items()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of two steps in two halves on a mesh of eight, and what its probe saw: `(workdir, probe, gradients)`."""
    folder, seen, found = tmp_path_factory.mktemp("probe"), [], {}
    with pytest.MonkeyPatch.context() as patch:

        def spy(self, layers, own=probe.Probe.gradient):
            seen.append(self)
            out = own(self, layers)
            for at, layer in enumerate(layers):
                found[layer] = {site: np.asarray(sums[at]) for site, sums in out.items()}
            return out

        patch.setattr(probe.Probe, "gradient", spy)
        notes = []
        train(config(folder, stop_after=1), str(folder / "run"), note=notes.append)
    assert any(note.startswith("gradient of the base: 4 layers (3 a pass), 2 batches") for note in notes)
    return folder, seen[0], found


def test_it_is_the_gradient_of_full_fine_tuning_of_the_same_batches(ran):
    """`jax.grad` of the whole kernels on one device: the mean over the batches; the base is as it was."""
    _, made, found = ran
    params, model = jax.tree.map(jnp.asarray, jax.device_get(made.run.params)), alone(made.base)

    def loss(kernels, batch):
        blocks = {**params["blocks"], **{s: {"kernel": kernels[s]} for s in SITES}}
        own = {**params, "blocks": blocks}
        hidden = model.hidden(own, {}, {}, batch)[0]
        return lm(model, own, hidden, batch, made.run.targets_per_row) / jnp.sum(batch["loss_weight"])

    kernels = {s: params["blocks"][s]["kernel"] for s in SITES}
    gradient = jax.jit(jax.grad(loss))
    each = [gradient(kernels, jax.device_get(batch)) for batch in made.batches]
    assert len(each) == 2
    for site in SITES:
        wanted = np.mean([np.asarray(g[site], np.float64) for g in each], axis=0)
        got = np.stack([found[layer][site] for layer in range(4)])
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-6 * np.abs(wanted).max())
        np.testing.assert_array_equal(made.run.params["blocks"][site]["kernel"], kernels[site])


def test_its_batches_are_the_runs_first_training_rows(ran):
    _, made, _ = ran
    source = made.run.source(made.run.stages[0])
    for number, batch in enumerate(made.batches):
        np.testing.assert_array_equal(batch["tokens"], source.batch(number)["tokens"])


def test_every_layer_starts_from_its_own_gradient(ran):
    """Both segments (2 and 3 experts), float64 numpy: core = diag of the singular values of -eta sign(g)."""
    folder, _, found = ran
    start = leaves(folder / "run", 0)
    for site in SITES:
        for layer in range(4):
            segment, at, experts = ("000-001", layer, 2) if layer < 2 else ("002-003", layer - 2, 3)
            u, s, vt = np.linalg.svd(-1e-3 * np.sign(found[layer][site].T.astype(np.float64)), full_matrices=False)
            own = {name: start[f"mix/{segment}/{site}/{name}"][at] for name in ("A", "B", "core")}
            np.testing.assert_allclose(own["core"], np.broadcast_to(np.diag(s[:4]), (experts, 4, 4)), atol=1e-6)
            product = own["B"][0].T @ own["core"][0] @ own["A"][0]
            np.testing.assert_allclose(product, (u[:, :4] * s[:4]) @ vt[:4], atol=2e-6)


def test_a_run_that_goes_on_has_its_start_saved_and_asks_for_no_gradient(ran, monkeypatch):
    folder, _, _ = ran
    monkeypatch.setattr(probe, "Probe", lambda *given: pytest.fail("a second probe"))
    assert train(config(folder), str(folder / "run"), note=lambda text: None).step == 2
    steps = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = leaves(folder / "run", 0), leaves(folder / "run", 2)
    assert steps == [1, 2]
    assert all(np.array_equal(before[p], after[p]) for p in before if p.endswith(("/A", "/B")))
    assert any(not np.array_equal(before[p], after[p]) for p in before if p.endswith("/core"))


@pytest.mark.slow
def test_two_runs_of_one_seed_start_alike(ran, tmp_path):
    folder, _, _ = ran
    train(config(tmp_path), str(tmp_path / "run"), note=lambda text: None)
    for path, leaf in leaves(tmp_path / "run", 0).items():
        np.testing.assert_array_equal(leaf, leaves(folder / "run", 0)[path], err_msg=path)


@pytest.mark.slow
def test_with_exact_the_start_has_the_same_bits_on_other_devices(tmp_path):
    starts = []
    for count in (1, 4):
        made, devices = config(tmp_path, (count, 1, 1), exact=True, batch_size=16, stop_after=1), jax.devices()[:count]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "devices", lambda own=devices: own)
            train(made, str(tmp_path / f"run{count}"), note=lambda text: None)
        starts.append(leaves(tmp_path / f"run{count}", 0))
    assert all(np.array_equal(starts[0][path], starts[1][path]) for path in starts[0])
    assert np.abs(starts[0]["mix/000-001/q/core"]).max() > 0


@pytest.mark.slow
def test_leaves_that_a_later_stage_makes_anew_start_from_the_gradient_too(tmp_path):
    """A stage of another rank: two gradients, and a core of two singular values that is not zero."""
    out = config(tmp_path)
    with out.unlocked():
        stage = dict(out.schedule.s00)
        changes = dict(method=dict(rules=dict(mix=dict(adapter=dict(rank=2)))))
        out.schedule = dict(s00=stage | dict(steps=1), s01=stage | dict(steps=0, set=changes))
    schema.validate(out)
    notes = []
    train(out, str(tmp_path / "run"), note=notes.append)
    assert sum(note.startswith("gradient of the base: 4 layers") for note in notes) == 2
    core = leaves(tmp_path / "run", 2)["mix/000-001/q/core"]
    assert core.shape[-2:] == (2, 2) and np.abs(np.diagonal(core, axis1=-2, axis2=-1)).min() > 1e-3


@pytest.mark.slow
def test_clients_of_a_federated_run_share_the_start_and_dp_refuses_it(tmp_path):
    """A, B frozen and common: the server's core is the mean of the clients'. A head trains beside it (classify)."""
    tasks, regime = small.write(tmp_path), dict(name="federated", clients=3, local_steps=2, average="equal")

    def made(**more):
        out = small.config(tasks, regime=regime | more, steps=6)
        adapter = common.adapter("lora_xs", rank=2, alpha=2.0, dropout=0.0, init=dict(START))
        out.method.rules = dict(all=common.rule("q", adapter=adapter))
        schema.validate(out)
        return out

    train(made(), str(tmp_path / "run"), note=lambda text: None)
    start, end, clients = (small.arrays(tmp_path / "run", *at) for at in ((0,), (6,), (3, "clients")))
    path = "all/000-003/q"
    assert np.array_equal(start[f"{path}/A"], end[f"{path}/A"]) and np.diagonal(start[f"{path}/core"][0, 0]).all()
    mean = small.arrays(tmp_path / "run", 3)[f"{path}/core"]
    np.testing.assert_allclose(mean, clients[f"adapters/{path}/core"].mean(axis=0), rtol=1e-5, atol=1e-7)
    with pytest.raises(InputError, match="rules.all.adapter.init: got a start that reads the base's gradient"):
        train(made(dp_clip=0.5, dp_noise=0.7), str(tmp_path / "dp"), note=lambda text: None)


def test_it_holds_a_step_of_the_base_and_two_layers():
    """By the compiler's own account of memory, with wide kernels, the taking apart included; a plain gradient of all
    layers would hold six. Two are what the default asks for in one pass."""
    L, n = 6, INITS["lora_ga"]().layers
    decoder = dataclasses.replace(SMALL, layers=L, width=256, ffn_width=512, heads=4, kv_heads=2, head_dim=64)
    params, shape = base_shapes(decoder), lambda kind, *sizes: jax.ShapeDtypeStruct(sizes, kind)
    names = ("tokens", "targets", "segment_ids", "positions", "task_ids", "example_ids")
    batch = {name: shape(jnp.int32, 4, 32) for name in names} | {"loss_weight": shape(jnp.float32, 4, 32)}
    options = dict(accumulate=1, targets_per_row=8, constrain=lambda x: x)
    adapter = ADAPTERS["rslora"](rank=2, dropout=0.0, init="lora_ga")
    model = Model(decoder, (Rule("mix", decoder.sites, (1,) * L, adapter),), (), "full", 3)
    frozen = model.frozen_patterns()

    def held(function, *given):
        memory = jax.jit(function, donate_argnums=0).lower(*given).compile().memory_analysis()
        sizes = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        return sizes - memory.alias_size_in_bytes

    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(lambda p: fresh(model, optimizer, p, frozen, jax.random.key(0)), params)
    step = held(make_step(model, optimizer, lambda s: 1e-3, clip=1.0, frozen=frozen, **options), state, params, batch)
    sums = {site: shape(jnp.float32, n, *decoder.dims(site)) for site in decoder.sites}
    gradient = probe.make_gradient(model.without_rules(), objective=PLAIN, **options)
    numbers = shape(jnp.int32), shape(jnp.int32), shape(jnp.float32)
    own = held(gradient, sums, params, {}, {}, batch, *numbers)
    layer = sum(4 * np.prod(x.shape[1:]) for x in sums.values())
    assert n == 2 and own <= step + 2 * layer, (own - step) / layer
    begun = held(lambda a, p, n, g: model.begun_anew(jax.random.key(0), p, a, n, {s: x[1] for s, x in g.items()}),
                 state.adapters, params, shape(jnp.int32), sums)  # fmt: skip
    assert begun <= step + 2 * layer, (begun - step) / layer


@pytest.mark.parametrize("placement", [dict(name="chain"), dict(name="base_experts")])
def test_placements_without_a_kernel_of_the_site_refuse_such_a_start(placement):
    made = common.get_config()
    made.base.source = "random:tiny-moe"
    with pytest.raises(InputError, match="adapter.init.*a start that reads no gradient"):
        made.method.rules = dict(
            mix=common.rule("ffn", adapter=common.adapter("lora_xs", init=dict(START)), placement=placement)
        )
        schema.validate(made)

"""Round trips, meshes, templates, retention: what a checkpoint does when nothing goes wrong."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from molora_jax.errors import InputError
from molora_jax.runs.checkpoints import Checkpoints, from_plain, read_manifest, to_plain


def sharding(shape, spec):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return NamedSharding(Mesh(devices, ("data", "expert")), PartitionSpec(*spec))


def small(scale=1.0):
    a = jax.random.normal(jax.random.key(0), (4, 8, 6)) * scale
    adapters = {"ffn": {"000-003": {"gate": {"A": a, "B": (a * 2).astype(jnp.bfloat16)}}}}
    opt = optax.adamw(1e-3).init(adapters)
    train = {"step": 3, "samples": np.int64(2**40), "rate": 0.5, "key": jax.random.key_data(jax.random.key(7))}
    return {"adapters": adapters, "opt": opt, "router_state": {}, "train": train}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_round_trip_of_all_kinds_of_leaves(tmp_path):
    items = small()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, items, meta={"samples": 12, "config": {"seed": 0}, "identity": "abc"})
        assert checkpoints.wait() == []
        restored = checkpoints.restore(3, items)
    same(restored, items)
    assert isinstance(restored["adapters"]["ffn"]["000-003"]["gate"]["A"], jax.Array)
    assert type(restored["train"]["step"]) is int and type(restored["train"]["rate"]) is float
    assert restored["train"]["samples"].dtype == np.int64  # with x64 off

    manifest = read_manifest(tmp_path / "3")
    assert (manifest["format"], manifest["step"], manifest["samples"], manifest["identity"]) == (1, 3, 12, "abc")
    assert manifest["tree"]["adapters"]["ffn/000-003/gate/A"]["shape"] == [4, 8, 6]
    assert manifest["tree"]["adapters"]["ffn/000-003/gate/B"]["dtype"] == "bfloat16"
    assert "0/count" in manifest["tree"]["opt"] and manifest["tree"]["router_state"] == {}
    assert {"adapters", "opt", "router_state", "train", "manifest.json"} <= {p.name for p in (tmp_path / "3").iterdir()}


def test_restore_onto_other_meshes_is_exact_and_digests_do_not_depend_on_the_mesh(tmp_path):
    value = jax.random.normal(jax.random.key(1), (8, 8, 5))
    digests = set()
    layouts = [((4, 2), ("data", "expert")), ((2, 4), (None, "data")), ((1, 1), ()), ((2, 1), ("data",))]
    for step, (shape, spec) in enumerate(layouts):
        with Checkpoints(tmp_path, keep=9) as checkpoints:
            tree = {"a": jax.device_put(value, sharding(shape, spec)), "step": jnp.int32(step)}
            checkpoints.save(step, {"adapters": tree}, meta={}, wait=True)
            for other, other_spec in layouts:
                where = sharding(other, other_spec)
                template = {"a": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where), "step": np.int32(0)}
                a = checkpoints.restore(step, {"adapters": template})["adapters"]["a"]
                assert a.sharding == where
                np.testing.assert_array_equal(a, value)
        digests.add(read_manifest(tmp_path / str(step))["tree"]["adapters"]["a"]["digest"])
    assert len(digests) == 1


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def advance(x):
        return x * -3.0

    x = jax.device_put(jnp.arange(1 << 18, dtype=jnp.float32), sharding((8, 1), ("data",)))
    before = np.array(x)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"adapters": {"x": x}}, meta={})
        for _ in range(5):
            x = advance(x)
        checkpoints.wait()
        np.testing.assert_array_equal(checkpoints.restore(1, {"adapters": {"x": before}})["adapters"]["x"], before)


@pytest.mark.parametrize(
    "template, message",
    [
        ({"a": np.zeros((2, 3), np.int32), "b": np.zeros(2)}, r"adapters/a: got float32\[2, 3\]; expected int32"),
        ({"a": np.zeros((3, 2), np.float32), "b": np.zeros(2)}, r"adapters/a: got float32\[2, 3\]; expected float32"),
        ({"a": np.zeros((2, 3), np.float32)}, "unknown b"),
        ({"a": np.zeros((2, 3), np.float32), "b": np.zeros(2), "c": np.zeros(1)}, "no c"),
    ],
)
def test_another_template_is_refused_by_name(tmp_path, template, message):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"adapters": {"a": np.zeros((2, 3), np.float32), "b": np.zeros(2)}}, meta={}, wait=True)
        with pytest.raises(InputError, match=message):
            checkpoints.restore(1, {"adapters": template})
        with pytest.raises(InputError, match="no item 'opt'"):
            checkpoints.restore(1, {"opt": {}})
        with pytest.raises(InputError, match="no such file"):
            checkpoints.restore(2, {"adapters": template})


def test_some_of_the_items_can_be_restored(tmp_path):
    items = small()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, items, meta={}, wait=True)
        same(checkpoints.restore(1, {"adapters": items["adapters"]}), {"adapters": items["adapters"]})


def test_retention_keeps_the_newest_and_the_best(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, {"train": {"step": step}}, meta={}, best=step == 2)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6] and checkpoints.best() == 2 and checkpoints.newest_valid() == 6
        checkpoints.save(7, {"train": {"step": 7}}, meta={}, best=True, wait=True)
        assert checkpoints.steps() == [6, 7] and checkpoints.best() == 7
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 7}


def test_a_step_can_be_saved_again(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for value in (1, 2):
            checkpoints.save(5, {"train": {"value": value}}, meta={}, wait=True)
        assert checkpoints.failures == [] and checkpoints.steps() == [5]
        assert checkpoints.restore(5, {"train": {"value": 0}})["train"]["value"] == 2


def test_no_steps_is_not_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", keep=1)
    assert checkpoints.steps() == [] and checkpoints.newest_valid() is None and checkpoints.best() is None
    assert not checkpoints.valid(3)[0]


def test_keep_and_keys_are_checked(tmp_path):
    with pytest.raises(InputError, match="train.keep"):
        Checkpoints(tmp_path, keep=0)
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(ValueError, match="key_data"):
        checkpoints.save(1, {"train": {"key": jax.random.key(0)}}, meta={})
    for tree in ({"a/b": 1}, {"..": 1}, {"": 1}):
        with pytest.raises(ValueError, match="cannot name"):
            checkpoints.save(1, {"train": tree}, meta={})


def test_optimizer_states_as_plain_trees():
    params = {"w": jnp.ones((2, 3)), "v": {"b": jnp.zeros(3)}}
    for optimizer in (optax.adam(1e-3), optax.adamw(optax.constant_schedule(1e-3)), optax.sgd(0.1)):
        state = optax.chain(optax.clip_by_global_norm(1.0), optimizer).init(params)
        plain = to_plain(state)
        assert all(isinstance(k, str) for k in plain)
        same(from_plain(plain, state), state)
    with pytest.raises(InputError, match="no v/b and unknown u"):
        from_plain({"w": 1, "u": 2}, params)

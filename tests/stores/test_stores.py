"""Runs on an object store: a fake with the limits of GCS, in this process. Against moto's S3: `test_s3.py`."""

import json
import pathlib

import pytest

from molora_jax import stores
from molora_jax.errors import InputError
from molora_jax.evaluation.run import load_run
from molora_jax.runs import remote
from molora_jax.runs.verify import verify
from molora_jax.runs.workdir import Workdir
from molora_jax.training.loop import train
from tests.stores.fake import FakeGS
from tests.training.test_loop import leaves, rows, tiny

URL = "gs://bucket/runs/one"


@pytest.fixture
def gs(monkeypatch, tmp_path):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "machine-a"))
    return FakeGS.install(monkeypatch)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(remote, "RENEW", 0.05)
    monkeypatch.setattr(remote, "LEASE", 0.4)


def test_the_operations_of_a_store(gs, tmp_path):
    store = stores.Store(URL)
    assert store.list() == {} and store.info("a") is None
    assert store.create(b"one", "a") and not store.create(b"two", "a") and store.read("a") == b"one"
    store.put(b"three", "b/c")
    first = store.list()
    assert list(first) == ["a", "b/c"] and first["b/c"][1] == 5 and store.read("b/c", 1, 3) == b"hr"
    store.put(b"four!", "b/c")
    assert store.list()["b/c"] != first["b/c"], "the tag does not change with the content"
    stores.Store(URL + "-other").put(b"x", "a")
    assert list(store.list()) == ["a", "b/c"] and list(store.list("b")) == ["b/c"]
    store.delete(["a", "a", "nothing"])
    assert list(store.list()) == ["b/c"]
    with pytest.raises(FileNotFoundError):
        store.read("a")


def test_a_copy_is_brought_once_and_follows_the_store(gs):
    store = stores.Store("gs://bucket/model")
    for name in ("config.json", "model.safetensors", "onnx/model.bin"):
        store.put(name.encode(), name)
    skip = lambda name: "/" in name  # noqa: E731
    folder = stores.at_hand("gs://bucket/model", skip=skip)
    assert sorted(p.name for p in folder.iterdir() if p.name != stores.TAGS) == ["config.json", "model.safetensors"]
    gs.calls.clear()
    stores.at_hand("gs://bucket/model", skip=skip)
    assert not [call for call in gs.calls if call[0] == "read"]
    store.put(b"new", "config.json")
    store.delete(["model.safetensors"])
    assert (stores.at_hand("gs://bucket/model", skip=skip) / "config.json").read_bytes() == b"new"
    assert not (folder / "model.safetensors").exists()
    assert stores.at_hand("gs://bucket/model/config.json").read_bytes() == b"new"
    with pytest.raises(InputError, match="gs://bucket/nothing.*does not exist"):
        stores.at_hand("gs://bucket/nothing", where="base.source")


def test_one_writer_at_a_time(gs, quick, tmp_path):
    notes = []
    with Workdir(URL, note=notes.append) as first:
        with pytest.raises(InputError, match="in use by process"):  # of this machine: its lock says so at once
            Workdir(URL)
        other = remote.Lease(stores.Store(URL), note=notes.append)  # of another one: the lease is seen to be renewed
        with pytest.raises(InputError, match="in use by process"):
            other.take()
        assert "seeing whether it still is" in notes[-1]
        first.check_there()
    taken = remote.Lease(stores.Store(URL), note=notes.append)
    taken.take()  # given back
    later = remote.Lease(stores.Store(URL), note=notes.append)
    later.take()  # nobody renewed it
    with pytest.raises(InputError, match="taken over by another process"):
        taken.renew()
    later.renew()
    assert list(stores.Store(URL).list("lock")) == [f"lock/{later.generation:09d}"]


def test_a_run_whose_lease_was_taken_ends_and_writes_nothing_more(gs, quick):
    with Workdir(URL) as workdir:
        thief = remote.Lease(stores.Store(URL), note=lambda text: None)
        thief.generation = workdir.remote.lease.generation
        thief._make(thief.generation + 1)
        before = dict(gs.objects)
        (workdir.path / "config.json").write_text("{}")
        with pytest.raises(InputError, match="taken over"):
            workdir.remote.push_step(0)
            workdir.remote._thread.join(5)
            workdir.check_there()
    own = {name: at for name, at in gs.objects.items() if "/lock/" not in name}
    assert own.keys() - {"bucket/runs/one/config.json"} == {n for n in before if "/lock/" not in n}


def test_metrics_are_put_by_parts_and_cut_as_the_file_is(gs, monkeypatch):
    monkeypatch.setattr(remote, "PART", 10)
    with Workdir(URL) as workdir:
        path = workdir.path / "metrics.jsonl"
        path.write_bytes(b"0123456789abcde")
        workdir.remote.push()
        gs.calls.clear()
        path.write_bytes(b"0123456789abcdefghijk")
        workdir.remote.push()
        put = [name for operation, name in gs.calls if operation == "put"]
        assert put == [f"bucket/runs/one/metrics/00000{i}.jsonl" for i in (1, 2)], "a full part was put again"
        path.write_bytes(b"012345678")  # a resume cuts it
        workdir.remote.push()
    assert [n for n in gs.objects if "metrics" in n] == ["bucket/runs/one/metrics/000000.jsonl"]
    assert (remote.at_hand(URL) / "metrics.jsonl").read_bytes() == b"012345678"


def test_a_run_killed_at_any_put_goes_on_with_the_same_bits(gs, tmp_path, monkeypatch):
    """What a kill leaves is what the store held at some moment: every such moment is kept, and opened."""
    config, disk, moments = tiny(keep=1), tmp_path / "disk", []
    config.train.save_every = 2
    train(config, disk, note=lambda text: None)

    def kept(operation, path):
        if operation in ("put", "delete"):
            moments.append(dict(FakeGS.objects))

    monkeypatch.setattr(FakeGS, "fails", staticmethod(kept))
    train(config, URL, note=lambda text: None)
    monkeypatch.setattr(FakeGS, "fails", staticmethod(lambda operation, path: None))
    assert not list(pathlib.Path.cwd().glob("gs:*"))
    here = remote.at_hand(URL)
    assert leaves(here, 6) == leaves(disk, 6) and rows(here) == rows(disk)
    found = verify(here)
    assert found["ok"] and [s["step"] for s in found["steps"]] == [6], "older steps went from the store as well"
    run = load_run(URL)
    assert run.step == 6 and len(run.metrics()) == 6

    seen, before = {}, None
    for number, objects in enumerate(moments):
        now = {n for n in objects if n.endswith(("manifest.json", "best.json"))}
        if now == before and number % 60:
            continue
        before = now
        steps = [n.split("/")[4] for n in objects if "/checkpoints/" in n and n.endswith("manifest.json")]
        if objects.keys() - {"bucket/runs/one/lock/000000001"}:
            monkeypatch.setattr(FakeGS, "objects", dict(objects))
            monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "reader"))
            found = verify(remote.at_hand(URL)) if any("config.json" in n for n in objects) else dict(steps=[])
            assert all(s["valid"] for s in found["steps"]), number
            assert {str(s["step"]) for s in found["steps"]} == set(steps), "a step without its manifest counts"
            seen.setdefault(max(map(int, steps), default=None), []).append(number)
    assert {0, 2, 4} <= seen.keys()

    for number in (seen[2][-1],):  # on another machine, where nothing is
        objects = {n: x for n, x in moments[number].items() if "/lock/" not in n}  # its lease is over
        monkeypatch.setattr(FakeGS, "objects", objects)
        monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / f"machine-{number}"))
        notes = []
        train(config, URL, note=notes.append)
        assert any("resumed at step" in text for text in notes)
        again = remote.at_hand(URL)
        assert leaves(again, 6) == leaves(disk, 6) and rows(again) == rows(disk)


@pytest.mark.slow
def test_a_store_that_refuses_a_step_is_asked_again(gs, monkeypatch, tmp_path):
    from molora_jax.io import disk as waits

    monkeypatch.setattr(waits, "WAITS", (0.01, 0.01))
    refused = []

    def full(operation, path):
        if operation == "put" and path.endswith("6/manifest.json") and len(refused) < 2:
            refused.append(path)
            raise RuntimeError("503 Slow Down")

    monkeypatch.setattr(FakeGS, "fails", staticmethod(full))
    notes = []
    train(tiny(), URL, note=notes.append)
    assert len(refused) == 2 and "bucket/runs/one/checkpoints/6/manifest.json" in gs.objects
    assert verify(remote.at_hand(URL))["ok"]


@pytest.mark.slow
def test_rows_and_base_are_read_from_a_store(gs, tmp_path):
    from tests.tiny import write_task

    write_task(tmp_path / "rows.jsonl")
    stores.Store("gs://bucket/data").put(tmp_path / "rows.jsonl", "rows.jsonl")
    config = tiny(tasks="jsonl:gs://bucket/data/rows.jsonl", steps=6)
    config.train.stop_after = 1
    train(config, tmp_path / "run", note=lambda text: None)
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["tasks"].endswith(
        "gs://bucket/data/rows.jsonl"
    )


def test_what_cannot_be_served_is_named(gs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path, said in (
        ("az://bucket/run", "gs://BUCKET/NAME or s3"),
        ("gs://bucket", "gs://BUCKET/NAME"),
        ("gs:///x", "gs://BUCKET"),
    ):
        with pytest.raises(InputError, match=said):
            stores.served("workdir", path)

    def refuse(operation, path):
        raise PermissionError("AccessDenied: no such key of yours")

    monkeypatch.setattr(FakeGS, "fails", staticmethod(refuse))
    with pytest.raises(InputError, match="workdir.*gs://bucket/runs/one.*AccessDenied"):
        train(tiny(), URL)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("gs")]

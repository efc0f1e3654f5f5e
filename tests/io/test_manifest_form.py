"""A manifest with a right checksum from a stranger: whatever it says, a named error and nothing outside its folder."""

import contextlib
import copy
import json
import os
import pathlib
import random
import shutil
import tarfile

import numpy as np
import pytest

from molora_jax.errors import InputError
from molora_jax.runs import identity, saved, warm_start
from molora_jax.runs.checkpoints import Checkpoints
from molora_jax.runs.manifest import json_hash, read_manifest
from molora_jax.runs.manifest_form import malformed
from molora_jax.runs.steps import read_best
from molora_jax.runs.verify import verify

LEAF = "all/000-001/q/A"


def items():
    return {"adapters": {"all": {"000-001": {"q": {"A": np.arange(12, dtype=np.float32).reshape(2, 1, 2, 3)}}}},
            "router_state": {}, "train": {"step": 1}}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    Checkpoints(folder, keep=1).save(1, items(), meta={"samples": 4, "config": {"seed": 0}}, wait=True)
    return folder


@pytest.fixture
def step(whole, tmp_path):
    """A copy, to be damaged."""
    shutil.copytree(whole, tmp_path / "checkpoints", symlinks=True)
    return tmp_path / "checkpoints" / "1"


def forge(folder, manifest):
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    (folder / "manifest.json").write_text(json.dumps(body | {"checksum": json_hash(body)}))


def read(folder):
    return json.loads((folder / "manifest.json").read_text())


def paths(value, at=()):
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from paths(value[key], (*at, key))


STRANGE = [None, True, -1, 0, 1, 10**30, 1.5, float("nan"), "", "..", "../../x", "/etc/passwd", "\x00", "a" * 5000,
           "\ud800", [], [[]], {}, {"": 1}, [1, 2, 3], {"shape": [2**40], "dtype": "float32", "digest": "0" * 16},
           "float99", "object", "V8", [-1], [2**62, 2**62]]  # fmt: skip


def mutated(manifest, rng):
    manifest = copy.deepcopy(manifest)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.choice([p for p in paths(manifest) if p and p[0] not in ("packages", "checksum")])
        parent = manifest
        for key in at[:-1]:
            parent = parent[key]
        kind = rng.choice(["value", "value", "delete", "key", "copy"])
        if kind == "value" or isinstance(parent, list):
            parent[at[-1]] = copy.deepcopy(rng.choice(STRANGE))
        elif kind == "delete":
            del parent[at[-1]]
        elif kind == "key":
            parent[str(rng.choice(STRANGE))] = parent.pop(at[-1])
        else:
            parent[at[-1]] = copy.deepcopy(manifest.get(rng.choice(list(manifest) or ["tree"])))
    return manifest


def try_all(folder, before):
    """Every reader, each with an answer or a named error."""
    for reader in (
        lambda: Checkpoints(folder.parent, keep=1, warn=lambda text: None).newest_valid(),
        lambda: Checkpoints(folder.parent, keep=1).restore(1, {"adapters": items()["adapters"]}),
        lambda: warm_start.load(str(folder.parent.parent)),
        lambda: warm_start.start(str(folder.parent.parent), {"adapters": items()["adapters"]}, base={"digest": "b"}),
    ):
        try:
            found = reader()
        except InputError:
            continue
        if isinstance(found, dict) and "adapters" in found:
            for leaf in [
                v for v in [found["adapters"].get("all", {}).get("000-001", {}).get("q", {}).get("A")] if v is not None
            ]:
                np.testing.assert_array_equal(leaf, before)
    assert isinstance(verify(folder.parent.parent)["ok"], bool)


def fuzz(step, seeds):
    manifest, before = read(step), items()["adapters"]["all"]["000-001"]["q"]["A"]
    for seed in seeds:
        forge(step, mutated(manifest, random.Random(seed)))
        try_all(step, before)


def test_forged_manifests_are_named_errors(step):
    fuzz(step, range(60))


@pytest.mark.slow
def test_forged_manifests_are_named_errors_1000(step):
    fuzz(step, range(1000, 2000))


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/hostname", "adapters/../../../secret", "a\\b", "a//b", "./a", ""]
)
def test_files_cannot_leave_the_folder(step, name):
    manifest = read(step)
    manifest["files"] = {name: [1, "0" * 32]}
    forge(step, manifest)
    assert "not inside the step's folder" in Checkpoints(step.parent, keep=1).valid(1)[1]


@pytest.mark.parametrize("kind", ["link", "linked folder", "pipe", "ring"])
def test_links_and_pipes_are_not_read(step, tmp_path, kind):
    """A pipe would be waited for, a link out of the folder would be hashed."""
    name = next(n for n in read(step)["files"] if "/c/" in n)
    path, outside = step / name, tmp_path / "outside"
    if kind == "linked folder":
        os.rename(path.parent, outside)
        path.parent.symlink_to(outside)
    else:
        os.rename(path, outside)
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(path if kind == "ring" else outside)
    valid, reason = Checkpoints(step.parent, keep=1).valid(1)
    assert not valid and name in reason


def test_what_is_written_is_well_formed(step):
    assert malformed(read(step)) == ""
    body = read(step)
    for part, wrong in (("tree", {"adapters": {"a": {"shape": [], "dtype": "float32", "digest": "0" * 16},
                                               "a/b": {"shape": [], "dtype": "float32", "digest": "0" * 16}}}),
                        ("step", True), ("files", [])):  # fmt: skip
        assert malformed(body | {part: wrong})


SURROGATE = "\ud800".encode("utf-8", "surrogatepass")
BEST = ["{", "[]", "null", "[" * 100_000, SURROGATE, *(f'{{"step": {x}}}' for x in ('"1"', "true", "-1", "9", "1e99"))]


@pytest.mark.parametrize("text", BEST, ids=range(len(BEST)))
def test_best_json_is_checked_and_said(step, text):
    path = step.parent / "best.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = []
    checkpoints = Checkpoints(step.parent, keep=1, warn=said.append)
    assert checkpoints.best() is None and checkpoints.best() is None
    assert len(said) == 1 and "best.json" in said[0]
    assert read_best(step.parent)[0] is None


def test_a_start_from_leaves_that_do_not_fit_reads_nothing(step, monkeypatch):
    run, new = str(step.parent.parent), items()["adapters"]
    monkeypatch.setattr(Checkpoints, "restore", lambda *_: pytest.fail("read before it was compared"))
    for wrong in (np.zeros((2, 1, 2, 4), np.float32), np.zeros((2, 1, 2, 3), np.float16)):
        tree = {"all": {"000-001": {"q": {"A": wrong}}}}
        with pytest.raises(InputError, match=r"init_from: got float32\[1, 2, 3\] for all, layer 0, q/A"):
            warm_start.start(run, {"adapters": tree}, base={"digest": "b"})
    (step.parent.parent / "identity.json").write_text(json.dumps({"base": {"digest": "another"}}))
    with pytest.raises(InputError, match="trained on base another"):
        warm_start.start(run, {"adapters": new}, base={"digest": "b"})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_start_with_numbers_that_are_not_finite_is_refused(tmp_path, value):
    tree = items()
    tree["adapters"]["all"]["000-001"]["q"]["A"][1, 0, 1, 2] = value
    Checkpoints(tmp_path / "checkpoints", keep=1).save(1, tree, meta={}, wait=True)
    with pytest.raises(InputError, match="NaN or Inf in adapters/all/000-001/q/A"):
        warm_start.start(str(tmp_path), {"adapters": tree["adapters"]}, base={"digest": "b"})


def test_forged_configs_and_identities_are_named_errors(tmp_path, monkeypatch):
    """The golden run with a step whose config and identity are anything at all."""
    with tarfile.open(pathlib.Path(__file__).parents[1] / "golden" / "v1.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    step = tmp_path / "random" / "checkpoints" / "6"
    whole = read(step)
    new = identity.identity(whole["config"], {"base_digest": "b", "data_fingerprint": "d", "base": {"tokenizer": "t"}})
    for seed in range(40):
        rng = random.Random(seed)
        forged = whole | {"config": mutated(whole["config"], rng)}
        forged |= {"run": mutated(new, rng)} if seed % 2 else {}
        forged |= {"identity": rng.choice(["x", None, json_hash(new)])} if seed % 3 == 0 else {}
        forge(step, forged)
        for reader in (
            lambda: saved.read_config("random", "latest"),
            lambda: saved.fingerprint("random", 6),
            lambda: identity.check_step(read_manifest(step), new, where="w"),
            lambda: identity.check_record(identity.read("random/identity.json"), read_manifest(step), where="w"),
        ):
            with contextlib.suppress(InputError):
                reader()
        assert isinstance(verify("random")["ok"], bool)

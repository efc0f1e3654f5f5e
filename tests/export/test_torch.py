"""The foreign programs themselves: peft, transformers, the mixlora package and gguf read what we wrote, in a process of
the python that has torch (MOLORA_TORCH_PYTHON, else this one)."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from molora_jax.io import gguf, huggingface
from molora_jax.io.base import load_base
from tests.export import runs

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = os.environ.get("MOLORA_TORCH_PYTHON", sys.executable)
KINDS = {
    "peft": runs.STATIC | runs.EXPERT | runs.MIXED, "molora": runs.ROUTED,
    "merged": {n: runs.STATIC[n] for n in ("lora", "two", "dora", "pissa", "ia3", "vera", "qwen3", "untied")}
    | runs.EXPERT | {"router": runs.TRAINED_ROUTER},
    "mixlora": {"mixlora": runs.ROUTED["mixlora"]},
}  # fmt: skip
NEEDS = {"peft": "peft", "molora": "transformers", "merged": "transformers", "mixlora": "mixlora"}


def has(module: str) -> bool:
    return subprocess.run([PYTHON, "-c", f"import torch, {module}"], capture_output=True, check=False).returncode == 0


def bases(tmp_path, cases) -> dict:
    """`{source: a Hugging Face folder of it}`."""
    out = {}
    for source in {source for _, source in cases.values()}:
        out[source] = tmp_path / source.replace(":", "_")
        out[source].mkdir()
        huggingface.write_base(out[source], load_base(source))
    return out


def given(folder, jobs):
    """What the foreign programs give: an open `.npz` of logits by the jobs' names. `folder`: for files between."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = ROOT / "tests" / "export" / "with_torch.py"
    subprocess.run([PYTHON, "-W", "ignore", script, folder / "jobs.json", folder / "out.npz"], check=True)
    return np.load(folder / "out.npz")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_foreign_program_gives_our_logits(exported, tmp_path, kind):
    """molora also with a cache, the last three tokens one by one; a router that reads the base's state needs none."""
    if not has(NEEDS[kind]):
        pytest.skip(f"{PYTHON} has no torch and {NEEDS[kind]}: set MOLORA_TORCH_PYTHON to one that has")
    cases = KINDS[kind]
    folders, jobs, want = bases(tmp_path, cases), [], {}
    for name, case in cases.items():
        run, out, _ = exported(name, case, kind)
        want[name] = runs.logits(run)
        steps = 3 if kind == "molora" and not name.startswith("x_lora") else 0
        jobs.append(dict(name=name, kind=kind, base=str(folders[case[1]]), out=str(out), ids=runs.IDS, steps=steps))
    with given(tmp_path, jobs) as got:
        assert {name.partition("/")[0] for name in got} == set(cases)
        for name, logits in got.items():
            np.testing.assert_allclose(logits, want[name.partition("/")[0]], atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_the_gguf_package_reads_the_adapter(exported, tmp_path):
    if not has("gguf"):
        pytest.skip(f"{PYTHON} has no torch and gguf: set MOLORA_TORCH_PYTHON to one that has")
    _, out, _ = exported("two", runs.STATIC["two"], "gguf")
    read = (
        "import gguf, json, sys; r = gguf.GGUFReader(sys.argv[1]); "
        "print(json.dumps([r.fields['general.type'].contents(), r.fields['adapter.lora.alpha'].contents(),"
        " {t.name: [t.tensor_type.name, list(map(int, t.data.shape)), float(t.data.sum())] for t in r.tensors}]))"
    )
    done = subprocess.run([PYTHON, "-c", read, out / "adapter.gguf"], check=True, capture_output=True, text=True)
    kind, alpha, found = json.loads(done.stdout)
    own = gguf.read(out / "adapter.gguf")
    assert (kind, alpha) == ("adapter", 5.0) and found.keys() == own.entries.keys()
    for name, (dtype, shape, total) in found.items():
        value = own.tensor(name)
        assert (dtype, tuple(shape)) == ("F32", value.shape)
        np.testing.assert_allclose(total, value.sum(), atol=1e-4)

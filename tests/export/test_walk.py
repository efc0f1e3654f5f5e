"""The walk of docs/export.md, its lines as they stand: strangers' adapters in, routed between, trained, out again."""

import importlib
import json
import pathlib
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest

from molora_jax.io import huggingface, tensors
from molora_jax.io.base import load_base
from molora_jax.runs.opened import open_run
from tests.export import runs
from tests.export.test_torch import PYTHON, ROOT, has
from tests.tiny import write_task

SECTION = (ROOT / "docs" / "export.md").read_text().split("## A walk")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder in which the lines were run, and what they printed."""
    place, here = tmp_path_factory.mktemp("walk"), pathlib.Path.cwd()
    (place / "stranger").mkdir()
    huggingface.write_base(place / "stranger", load_base("random:tiny-untied"))
    shutil.copytree(ROOT / "tests" / "fixtures" / "adapters", place / "adapters")
    write_task(place / "rows.jsonl")
    (place / "mix.py").write_text(re.search(r"```python\n(.*?)```", SECTION, re.DOTALL)[1])
    lines = [line for line in SECTION.splitlines() if line.startswith("python -m launch.")]
    assert len(lines) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for line in lines:
            _, _, module, *argv = shlex.split(line)
            importlib.import_module(module).run(argv)
    assert pathlib.Path.cwd() == here
    return place


def test_the_experts_are_the_strangers_and_the_router_trained(walked, monkeypatch):
    monkeypatch.chdir(walked)
    start, end = (open_run(walked / "runs" / "mix", step, warn=str).items["adapters"]["mix"] for step in (0, 6))
    segment = "000-003"
    B = end[segment]["gate"]["B"]
    assert not B[:, 0].any() and B[:, 1, 0].any() and not B[:, 1, 1:].any()  # the second's alone, of rank 1
    np.testing.assert_array_equal(start[segment]["gate"]["B"], B)
    assert (start[segment]["router"]["q"]["W"] != end[segment]["router"]["q"]["W"]).any()


def test_both_folders_are_there(walked):
    config = json.loads((walked / "exported" / "xlora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "XLORA" and len(config["adapters"]) == 2
    told = tensors.read_metadata(walked / "exported" / "mix" / "torch.safetensors")
    assert "lacks" not in json.loads(told["molora_torch"])


@pytest.mark.slow
def test_peft_and_transformers_give_the_runs_logits(walked, monkeypatch):
    if not has("peft"):
        pytest.skip(f"{PYTHON} has no torch and peft: set MOLORA_TORCH_PYTHON to one that has")
    monkeypatch.chdir(walked)
    jobs = [dict(name=kind, kind=kind, base="stranger", out=f"exported/{out}", ids=runs.IDS)
            for kind, out in (("peft", "xlora"), ("molora", "mix"))]  # fmt: skip
    (walked / "jobs.json").write_text(json.dumps(jobs))
    script = ROOT / "tests" / "export" / "with_torch.py"
    subprocess.run([PYTHON, "-W", "ignore", script, "jobs.json", "out.npz"], check=True)
    want = runs.logits("runs/mix")
    with np.load("out.npz") as got:
        for kind in got:
            np.testing.assert_allclose(got[kind], want, atol=1e-5, err_msg=kind)

"""Notebooks run from top to bottom, the quickstart's on a fresh run, and are committed without outputs."""

import os
import re

import nbclient
import nbformat
import pytest

from launch.flags import ROOT
from tests.tiny import copy_of_tiny_run

FOLDER = ROOT / "experiments" / "quickstart"
NOTEBOOKS = (FOLDER / "quickstart.ipynb", ROOT / "experiments" / "library" / "notebook.ipynb")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.parent.name)
def test_it_has_no_outputs_and_names_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_it_runs(tmp_path, tmp_path_factory, monkeypatch):
    run = copy_of_tiny_run(tmp_path_factory, tmp_path)
    notebook = nbformat.read(FOLDER / "quickstart.ipynb", as_version=4)
    monkeypatch.setenv("MOLORA_RUN", str(run))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "step 3, base random:tiny" in text and "ffn/000-003/gate" in text
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1


@pytest.mark.slow
def test_the_library_in_a_model_that_is_not_ours_runs(tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOKS[1], as_version=4)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    nbclient.NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    before, after = re.search(r"dark +([0-9.]+)% -> ([0-9.]+)%", text).groups()
    assert float(after) > float(before) + 20
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 1

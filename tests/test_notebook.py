"""Notebooks run from top to bottom. The quickstart's and the library's are kept without outputs, others with them."""

import os
import re

import nbclient
import nbformat
import pytest

from experiments.notebooks.__main__ import HERE, NAMES, executed
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


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook_has_the_outputs_of_one_run(name):
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert len(outputs) >= 4 and not any(output.output_type == "error" for output in outputs)
    for text in (str(output.get("text", output.get("data", {}).get("text/html", ""))) for output in outputs):
        assert not re.search(r"/(home|root|tmp|work|Users)/|<script", text), text[:300]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook_runs_and_puts_out_the_same_kinds(name, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MOLORA_NOTEBOOKS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device, as a reader has
    kinds = lambda cell: {key for out in cell.get("outputs", ()) for key in out.get("data", [out.get("name")])}  # noqa: E731
    stored = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    for old, new in zip(stored.cells, executed(name).cells, strict=True):
        assert kinds(old) == kinds(new), old.source

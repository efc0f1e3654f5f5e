"""The quickstart's notebook runs from top to bottom on a fresh run, and is committed without outputs."""

import nbclient
import nbformat

from launch.flags import ROOT
from tests.tiny import train_tiny

FOLDER = ROOT / "experiments" / "quickstart"


def test_it_has_no_outputs_and_names_no_machine():
    notebook = nbformat.read(FOLDER / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_it_runs(tmp_path, monkeypatch):
    run = train_tiny(tmp_path)
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

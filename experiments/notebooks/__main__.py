"""Executes the notebooks of this folder, one after the other, and stores them with what they put out.

python -m experiments.notebooks [NAME ...]

`MOLORA_NOTEBOOKS=DIR` is where their runs lie (default: runs/notebooks). A finished run there is opened, not made anew.
"""

import os
import pathlib
import re
import sys
import time

HERE = pathlib.Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in HERE.glob("*.ipynb")))


def executed(name: str, *, seconds: int = 3000):
    """The notebook of that name, run from top to bottom in this folder; raises what one of its cells raised."""
    import nbclient
    import nbformat

    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    settings = {"metadata": {"path": str(HERE)}}
    nbclient.NotebookClient(notebook, timeout=seconds, resources=settings, record_timing=False).execute()
    for cell in notebook.cells:  # progress lines and warnings: of one start, not of the notebook
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    root = re.compile(re.escape(f"{HERE.parents[1]}/"))  # no machine's paths are stored
    for out in (out for cell in notebook.cells for out in cell.get("outputs", ())):
        if "text" in out:
            out["text"] = root.sub("", out["text"])
    return notebook


def main(names):
    import nbformat

    unknown = set(names) - set(NAMES)
    if unknown:
        raise SystemExit(f"error: got {', '.join(sorted(unknown))}; expected names among {', '.join(NAMES)}")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    for name in names or NAMES:
        began = time.monotonic()
        nbformat.write(executed(name), HERE / f"{name}.ipynb")
        print(f"{name}: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The snippets of docs/library.md run one after the other, and so does that of the README; names are as documented."""

import pathlib
import re
import subprocess
import sys

import molora_jax as mj
from molora_jax.config.members import members

ROOT = pathlib.Path(__file__).parents[2]


def snippets(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(text):
    names = {"__name__": "snippets"}
    for code in snippets(text):
        exec(compile(code, "snippet", "exec"), names)
    return names


def test_the_page_runs():
    names = run((ROOT / "docs" / "library.md").read_text())
    assert names["losses"][-1] < names["losses"][0] and names["gates"].shape == (8, 6, 4)


def test_the_section_of_the_readme_runs():
    section = (ROOT / "README.md").read_text().split("## In your own Flax model")[1].split("\n## ")[0]
    assert len(snippets(section)) == 1
    run(section)


def test_every_member_is_a_public_name():
    from molora_jax.adapters import ADAPTERS
    from molora_jax.losses import LOSSES
    from molora_jax.objectives import OBJECTIVES
    from molora_jax.optim import OPTIMIZERS
    from molora_jax.placements import PLACEMENTS
    from molora_jax.routers import ROUTERS

    for axis, table in dict(adapters=ADAPTERS, routers=ROUTERS, losses=LOSSES, placements=PLACEMENTS, optim=OPTIMIZERS,
                            objectives=OBJECTIVES).items():  # fmt: skip
        assert set(table) == set(members(axis))
        for kind in table.values():
            assert getattr(mj, kind.__name__) is kind and kind.__name__ in dir(mj)
    for name in dir(mj):
        getattr(mj, name)
    assert {"Engine", "Router", "Adapter", "Loss", "Backbone", "rank_gated", "routed_ffn", "nnx"} <= set(dir(mj))


def test_importing_and_listing_import_nothing_else():
    code = "import sys, molora_jax as mj; dir(mj); print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"

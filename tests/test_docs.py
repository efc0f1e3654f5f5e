"""What is written down twice is the same: the tables of methods (docs/combinations.md: tests/battery)."""

import pathlib
import re

from molora_jax.methods import LEGEND, METHODS, methods_table, readme_table

ROOT = pathlib.Path(__file__).parents[1]


def test_tables_are_those_of_the_code():
    """Mend with `python -m molora_jax.methods > docs/methods.md`, and copy `readme_table()` into the README."""
    assert readme_table() in (ROOT / "README.md").read_text()
    assert (ROOT / "docs" / "methods.md").read_text().endswith(methods_table() + LEGEND)


def test_every_config_is_a_row_or_a_start():
    shipped = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "common", "quickstart"}
    assert shipped == {pathlib.Path(row.config).stem for row in METHODS.values()}


def test_links_of_the_readme_exist():
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_worked_example_is_the_file():
    router = (ROOT / "molora_jax" / "routers" / "top_p.py").read_text()
    assert router in (ROOT / "CONTRIBUTING.md").read_text()

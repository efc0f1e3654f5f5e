"""What is written down twice is the same."""

import pathlib
import re

from launch.docs import documents
from molora_jax.catalogue.methods import METHODS, ORGANISED, SURGERIES, readme_table
from molora_jax.surgery import SURGERIES as MEMBERS
from tests.left_out import LEFT_OUT

ROOT = pathlib.Path(__file__).parents[1]


def test_documents_are_those_of_the_code():
    """Mend with `python -m launch.docs`."""
    for path, text in documents().items():
        assert (ROOT / path).read_text() == text, path
        assert path != "README.md" or readme_table() in text


def test_every_config_is_a_row_or_a_start():
    shipped = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "common", "quickstart"}
    shipped -= {"minilm_classify", "preference", "moe_lora"}  # an objective or a base is shown, no method
    shipped -= {pathlib.Path(row.config).stem for row in SURGERIES.values()}
    assert shipped == {pathlib.Path(row.config).stem for row in (*METHODS.values(), *ORGANISED.values())}
    assert SURGERIES.keys() == MEMBERS.keys()


def test_links_of_the_readme_exist():
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_worked_example_is_the_file():
    router = (ROOT / "molora_jax" / "routers" / "top_p.py").read_text()
    assert router in (ROOT / "CONTRIBUTING.md").read_text()


def test_every_test_that_an_ordinary_run_leaves_out_exists():
    for pattern in LEFT_OUT:
        path, test = pattern.split("::")
        text = (ROOT / "tests" / path).read_text()
        name = re.match(r"\w*", test).group()
        assert not name or f"def {name}" in text or test.startswith("*"), pattern
        for part in re.findall(r"test_\w+|does_not_\w+", test):
            assert part in text, pattern

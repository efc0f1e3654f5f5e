"""What is written down twice is the same."""

import importlib
import pathlib
import re

from launch.docs import documents
from molora_jax.catalogue.methods import EVERY, readme_table
from molora_jax.catalogue.surgeries import SURGERIES
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
    shipped -= {"minilm_classify", "preference", "moe_lora", "full"}  # an objective or a base is shown, no method
    shipped -= {pathlib.Path(row.config).stem for row in SURGERIES.values()}
    assert shipped == {pathlib.Path(row.config).stem for row in EVERY}
    assert SURGERIES.keys() == MEMBERS.keys()


def test_words_of_the_glossary_are_in_the_code():
    """`docs/design.md`, Words: each word once, and what it names is there."""
    text = (ROOT / "docs" / "design.md").read_text().split("\n## Words\n")[1].split("\n## ")[0]
    rows = [row.strip("|").split(" | ") for row in text.splitlines() if row.startswith("| ")][1:]
    words = [word.strip() for row in rows for word in row[0].split(", ")]
    assert len(words) == len(set(words)) > 25
    for *_, name in rows:
        room, file, *path = name.strip(" `").split(".")
        found = importlib.import_module(f"molora_jax.{room}.{file}")
        for part in path[:-1]:
            found = getattr(found, part)
        assert hasattr(found, path[-1]) or path[-1] in found.__annotations__, name


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

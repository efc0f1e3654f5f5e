"""The site: what its pages say of the code is so, it builds without a warning, nothing in it is from another host."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

from configs import common
from launch import pages
from molora_jax.catalogue.methods import METHODS, ORGANISED, SURGERIES

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
NAMED = re.compile(r"^### `(.+)`\n<!-- in: (\S+) -->$", re.M)


@pytest.fixture(scope="module")
def made():
    return pages.pages()


def test_every_quoted_message_stands_in_the_code():
    """A heading of docs/troubleshooting.md is a piece of a message; `...` stands for what differs."""
    found = NAMED.findall((DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(found) > 30
    for message, path in found:
        texts = _texts(ROOT / path)
        for piece in filter(None, (part.strip() for part in re.split(r"\.\.\.(?:; expected )?", message))):
            assert any(piece in text for text in texts), f"{path} says nothing like {piece!r}"


def _texts(path) -> list[str]:
    """The literal texts of a Python file, those of an f-string with `\0` where a value stands; or the file itself."""
    if path.suffix != ".py":
        return [path.read_text(encoding="utf-8")]
    strings = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
            strings.append("".join(parts))
    return strings


def test_every_method_and_every_public_name_has_its_place(made):
    import molora_jax

    rows = METHODS | ORGANISED | SURGERIES
    assert {f"methods/{name}.md" for name in rows} == {page for page in made if page.startswith("methods/")}
    for name, row in rows.items():
        page = made[f"methods/{name}.md"]
        below = (ROOT / row.config).read_text(encoding="utf-8").split('"""\n', 1)[1].strip()  # its docstring
        assert row.title in page and row.equation in page and below in page
    told = "".join(text for page, text in made.items() if page.startswith("api/"))
    modules = {"data", "errors", "nnx"}
    for name in dir(molora_jax):
        assert name.startswith("__") or name in modules or f"\n## {name}\n" in told, name


def test_links_between_pages_lead_somewhere(made):
    """Of every page, written or made: a link without a host is a page or a picture of the site."""
    texts = {f"{file.name}": (file.read_text(encoding="utf-8"), f"docs/{file.name}") for file in DOCS.glob("*.md")}
    texts |= {page: (text, pages.sources().get(page, "")) for page, text in made.items() if page.endswith(".md")}
    there = {*made, *(file.name for file in DOCS.iterdir())}
    for page, (text, source) in texts.items():
        text = pages.linked(text, page, source) if source else text
        outside_code = "".join(part for i, part in enumerate(pages.FENCE.split(text)) if not i % 2)
        for _, _, target, _ in pages.LINK.findall(outside_code):
            if target and "://" not in target:
                at = os.path.normpath(os.path.join(os.path.dirname(page), target))
                assert at in there, f"{page}: {target}"


def test_fields_that_a_reader_of_another_library_is_sent_to_exist():
    """docs/coming_from.md: each field in its right columns is one of the schema or an option of a member."""
    from molora_jax.config import members

    groups = common.get_config().to_dict().items()
    known = {f"{group}.{name}" for group, own in groups if isinstance(own, dict) for name in own}
    text = (DOCS / "coming_from.md").read_text(encoding="utf-8")
    cells = [row.split(" | ", 1)[1] for row in text.splitlines() if row.startswith("| ") and " | " in row]
    groups = "data|train|optim|base|mesh|eval|method|expert_parallel|adapter|router"
    told = re.findall(rf"`({groups})\.(\w+)", "".join(cells))
    assert len(told) > 30
    for group, name in told:
        axis = {"adapter": "adapters", "router": "routers", "optim": "optim"}.get(group)
        if axis:
            options = {option for one in members.members(axis) for option in members.options(axis, one)}
            assert name in {"name", *options}, f"{group}.{name}"
        else:
            assert f"{group}.{name}" in known, f"{group}.{name}"
    for name in re.findall(r"`configs/(\w+)\.py`|, `(\w+)\.py`", text):
        assert (ROOT / "configs" / f"{''.join(name)}.py").is_file(), name


def test_the_workflow_runs_the_two_commands_of_the_readme_with_every_python():
    workflow = (ROOT / ".github" / "workflows" / "readme.yml").read_text(encoding="utf-8")
    readme, project = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "pyproject.toml"))
    commands = re.findall(r"^(\./launch/\w+\.sh)", readme, re.M)
    assert sorted(commands) == sorted(re.findall(r"- run: (\S+)\n", workflow)) and len(commands) == 2
    assert re.findall(r"Python :: (3\.\d+)", project) == re.findall(r'"(3\.\d+)"', workflow)


@pytest.mark.slow
def test_it_builds_and_nothing_in_it_is_from_another_host(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = sorted(tmp_path.rglob("*.html"))
    assert len(found) > 90
    for file in found:
        text = file.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=[\"']?([^\"'\s>]+)", text)
        loaded += re.findall(r"<link\b[^>]*\bhref=[\"']?([^\"'\s>]+)", text)
        loaded += re.findall(r"url\([\"']?([^\"')]+)", text) + re.findall(r"@import\s+[\"']([^\"']+)", text)
        for address in loaded:
            assert not re.match(r"(https?:)?//", address), f"{file.name}: {address}"
        assert 'class="mermaid"' not in text and "arithmatex" not in text
    for file in [*tmp_path.rglob("*.css"), *tmp_path.rglob("*.js")]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"url\([\"']?(https?:)?//|@import\s+[\"'](https?:)?//", text), file.name
        for host in ("unpkg.com", "cdn.jsdelivr", "cdnjs.", "fonts.googleapis", "polyfill.io"):
            assert host not in text, f"{file.name}: {host}"


@pytest.mark.slow
def test_from_clone_to_own_data_as_it_is_written(tmp_path):
    """The commands of docs/start.md from step 2 on, in an empty folder."""
    text = (DOCS / "start.md").read_text(encoding="utf-8")
    script = "set -e\n" + "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S))
    assert script.count("launch.") == 5
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "mine" / "report" / "report.json").is_file()

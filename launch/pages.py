"""The pages of the site that docs/ does not hold, and the links between all of them: a hook of mkdocs (mkdocs.yml).

    pip install -e '.[site]' && mkdocs build --strict

README, CONTRIBUTING, CHANGELOG and the experiments' READMEs stand where they are; a method's page is its row of the
catalogue and its config, the API is the docstrings of the public names, a notebook's page is its cells and outputs.
"""

import ast
import base64
import dataclasses
import functools
import importlib
import inspect
import json
import os
import pathlib
import posixpath
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # mkdocs loads this file by its path

LINK = re.compile(r"(!?)\[([^\]\[]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.M | re.S)
ITEM = re.compile(r"  [`\w{][^:]*: ")  # a line of a section that begins something new
NAMED = re.compile(r"^([a-z_][\w, ]*|InputError):")
EXAMPLE = re.compile(r"^ *>>> .*(\n *\S.*)*\n?", re.M)
SECTION = re.compile(r"^(Args|Returns|Raises):$")
FUNCTIONS = ("load_config", "train", "evaluate", "perform", "load_run", "write_run", "load_base", "load_base_run")
AXES = "adapters inits routers placements losses optim objectives backbones regimes surgery".split()
TITLES = dict(
    functions="Functions", runs="A loaded run", modules="Layers for a Flax model", ops="Operations and engines",
    adapters="Adapters", inits="Starts", routers="Routers", placements="Placements", losses="Losses",
    optim="Optimizers", objectives="Objectives", backbones="Base models", regimes="Regimes", surgery="Surgeries",
)  # fmt: skip


# ---- pages -----------------------------------------------------------------------------------------------------------


def pages() -> dict[str, str | bytes]:
    """`{path in the site: content}` of every page and picture that is not a file of docs/."""
    return {**written(), **methods(), **api(), **notebooks()}


@functools.cache
def sources() -> dict[str, str]:
    """`{path in the site: path below the root}` of pages that are files elsewhere in the repository."""
    found = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
    for file in sorted((ROOT / "experiments").glob("*/*")):
        path = file.relative_to(ROOT).as_posix()
        if file.suffix in (".md", ".png") and file.parent.name != "notebooks":
            found[path.replace("README.md", "index.md")] = path
    return found


def written() -> dict[str, str | bytes]:
    return {
        page: (ROOT / path).read_bytes() if path.endswith(".png") else (ROOT / path).read_text(encoding="utf-8")
        for page, path in sources().items()
    }


def methods() -> dict[str, str]:
    """A page a row of the catalogue."""
    from molora_jax.catalogue.methods import METHODS, ORGANISED, SURGERIES

    rows = METHODS | ORGANISED | SURGERIES
    return {f"methods/{name}.md": method_page(name, row) for name, row in rows.items()}


def method_page(name, row) -> str:
    from molora_jax.backbones.families import SMOLLM2

    source = (ROOT / row.config).read_text(encoding="utf-8")
    said = ast.parse(source).body[0]  # the docstring: a part of the page by itself
    body = "\n".join(source.splitlines()[said.end_lineno :]).strip()
    changes = "".join(f" --config.{field}={value}" for field, value in getattr(row, "overrides", {}).items())
    launcher, more = ("train", "") if hasattr(row, "axes") else ("surgery", " --config.surgery.inputs=runs/a,runs/b")
    facts = []
    if row.paper:
        facts.append(f"Paper: [arXiv {row.paper}](https://arxiv.org/abs/{row.paper})")
    if launcher == "train":
        facts += [f"Its own on the axes: {row.axes}", f"Trains {row.params(SMOLLM2):,} parameters on SmolLM2-135M"]
        facts += [f"Where it differs from the paper's code: {row.differs}"] if row.differs else []
        facts += ["Files: " + ", ".join(f"`molora_jax/{file}`" for file in row.own)] if row.own else []
    else:
        facts += [f"Takes: {row.takes}"] + ([f"Where it differs: {row.differs}"] if row.differs else [])
    return METHOD.format(
        title=row.title, equation=row.equation, facts="\n".join(f"- {fact}" for fact in facts),
        command=f"python -m launch.{launcher} --config={row.config} --workdir=runs/{name}{changes}{more}",
        config=row.config, said=ast.get_docstring(ast.parse(source)), source=body,
    )  # fmt: skip


METHOD = """\
# {title}

```text
{equation}
```

{facts}

```
{command}
```

[All methods](../methods.md) in one table, with what each symbol means.

## What its config says

{said}

## The config

`{config}`, below its docstring:

```python
{source}
```
"""


def notebooks() -> dict[str, str | bytes]:
    """A page a notebook of experiments/notebooks, as it is stored, and its pictures."""
    found: dict[str, str | bytes] = {}
    for file in sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb")):
        page, text = f"notebooks/{file.stem}.md", []
        for number, cell in enumerate(json.loads(file.read_text(encoding="utf-8"))["cells"]):
            source = "".join(cell["source"])
            text.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
            for at, out in enumerate(cell.get("outputs", ())):
                data = out.get("data", {})
                if "image/png" in data:
                    picture = f"{file.stem}-{number}-{at}.png"
                    found[f"notebooks/{picture}"] = base64.b64decode(data["image/png"])
                    text.append(f"![output of the cell above]({picture})")
                elif "text/html" in data:
                    text.append(f"<div>{''.join(data['text/html'])}</div>".replace("\n", ""))
                else:
                    shown = "".join(out.get("text", data.get("text/plain", ""))).rstrip()
                    text.append(f"```text\n{shown}\n```" if shown else "")
        text.insert(1, f"This page is the notebook `experiments/notebooks/{file.stem}.ipynb` with its outputs.")
        found[page] = "\n\n".join(text) + "\n"
    return found


# ---- the API ---------------------------------------------------------------------------------------------------------


def api() -> dict[str, str]:
    """Pages of the public names of `molora_jax`: functions, layers, and the members of every axis."""
    import molora_jax

    homes = {name: molora_jax._HOMES.get(name) or molora_jax._members().get(name, "") for name in dir(molora_jax)}
    homes = {name: home for name, home in homes.items() if home}
    rooms: dict[str, list[str]] = {}
    for name, home in homes.items():
        room = "ops" if home == "kernels_pallas" or name == "Engine" else home.split(".")[1]
        rooms.setdefault("functions" if name in FUNCTIONS else room, []).append(name)
    out = {f"api/{room}.md": room_page(room, names, homes) for room, names in rooms.items()}
    run = importlib.import_module("molora_jax.evaluation.run").Run
    head = "# A loaded run\n\nWhat `molora_jax.load_run(DIR)` returns.\n\n"
    out["api/runs.md"] = head + shown("Run", run, methods=True) + "\n"
    return out


def room_page(room, names, homes) -> str:
    """The contract of an axis first, then its members by file; of other rooms the names as they are."""
    module = lambda name: importlib.import_module(homes[name])  # noqa: E731
    base = [name for name in names if homes[name].endswith(".base")]
    parts = [f"# {TITLES[room]}", "`import molora_jax as mj`; each name below is `mj.NAME`."]
    for name in (*base, *(name for name in names if name not in base)):
        said = inspect.getdoc(module(name)) if room in AXES else ""
        parts.append(shown(name, getattr(module(name), name), above=said or "", methods=name in base))
    return "\n\n".join(parts) + "\n"


def shown(name, found, *, above="", methods=False) -> str:
    """A name with its signature and docstring; `above`: what its module says; `methods`: the public ones too."""
    parts = [f"## {name}", markdown(above), f"```python\n{signature(name, found)}\n```"]
    own = found.__doc__ if isinstance(found, type) else inspect.getdoc(found)
    if own and not own.startswith(f"{name}("):  # what a dataclass writes for itself
        parts.append(markdown(inspect.cleandoc(own)))
    for key, method in vars(found).items() if methods and isinstance(found, type) else ():
        if not key.startswith("_") and inspect.isfunction(method) and method.__doc__:
            parts += [f"### {name}.{key}", f"```python\n{signature(key, method)}\n```"]
            parts.append(markdown(inspect.getdoc(method)))
    return "\n\n".join(part for part in parts if part)


def signature(name, found) -> str:
    """As a caller would write it, a long one with a line a parameter."""
    if isinstance(found, type) and dataclasses.is_dataclass(found):
        flax = ("parent", "name")  # fields of every Linen module
        fields = [f for f in dataclasses.fields(found) if not f.name.startswith("_") and f.name not in flax]
        args = [f"{f.name}: {_type(f.type)}{_default(f)}" for f in fields]
    else:
        try:
            told = inspect.signature(found)
        except (TypeError, ValueError):
            return name
        own = [p for p in told.parameters.values() if p.name != "self"]
        args = [_plain(re.sub(r": '([^']+)'", r": \1", str(p))) for p in own]
        named = [i for i, p in enumerate(own) if p.kind is p.KEYWORD_ONLY]
        if named and all(p.kind is not p.VAR_POSITIONAL for p in own):
            args.insert(named[0], "*")
    text = f"{name}({', '.join(args)})"
    return text if len(text) <= 88 else f"{name}(\n    " + ",\n    ".join(args) + ",\n)"


def _type(annotation) -> str:
    return _plain(annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))


def _plain(text: str) -> str:
    """A parameter without the modules of its types, and without the address of a default that is a function."""
    text = re.sub(r"<(bound method|function) .*>", "...", text)
    return re.sub(r"\b(typing|collections\.abc|jax(\.jaxlib)?\.(_jax|_src[\w.]*)|molora_jax(\.\w+)+)\.", "", text)


def _default(field) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}" if len(repr(field.default)) < 40 else " = ..."
    return "" if field.default_factory is dataclasses.MISSING else " = ..."


def markdown(text: str) -> str:
    """A docstring as Markdown: its sections Args, Returns and Raises as lists, its examples as code."""
    out, inside = [], False
    for line in EXAMPLE.sub(lambda found: f"```pycon\n{inspect.cleandoc(found[0])}\n```\n", text).splitlines():
        if SECTION.match(line):
            out += ["", f"**{line[:-1]}**", ""]
            inside = True
        elif inside and line.startswith("  "):
            new = ITEM.match(line) or not out[-1]
            out.append(("- " if new else "  ") + NAMED.sub(r"`\1`:", line.strip()))
        else:
            inside = inside and not line
            out.append(line)
    return "\n".join(out).strip()


# ---- links -----------------------------------------------------------------------------------------------------------


@functools.cache
def places() -> dict[str, str]:
    """`{path below the root: path in the site}` of all that a page may link to."""
    found = {path: page for page, path in sources().items()}
    found |= {f"docs/{file.name}": file.name for file in (ROOT / "docs").glob("*.*")}
    found |= {posixpath.dirname(path): page for path, page in found.items() if path.endswith("/README.md")}
    found |= {f"experiments/notebooks/{f.stem}.ipynb": f"notebooks/{f.stem}.md" for f in _notebooks()}
    return found


def _notebooks():
    return sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))


def linked(text: str, page: str, source: str) -> str:
    """The text of a file of the repository as a page: links go to pages; what is no page is named, not linked."""

    def link(match):
        picture, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        at = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if at in places():
            there = posixpath.relpath(places()[at], posixpath.dirname(page) or ".")
            return f"{picture}[{label}]({there}{anchor})"
        return label if label.startswith("`") else f"{label} (`{at}`)" if label.strip("/") != at else f"`{label}`"

    parts = FENCE.split(text)
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))


# ---- what mkdocs calls -----------------------------------------------------------------------------------------------


def on_config(config):
    """Fills the entries of the nav that end in "...": with a folder of pages, or with files of docs/ named nowhere."""
    made = sorted(page for page in pages() if page.endswith(".md"))
    named = re.findall(r"[\w-]+\.md", json.dumps(config["nav"]))
    found = {"docs": sorted({file.name for file in (ROOT / "docs").glob("*.md")} - set(named))}

    def filled(entries):
        for entry in entries:
            for title, below in entry.items() if isinstance(entry, dict) else ():
                if title.endswith("...") and isinstance(below, str):
                    inside = found.get(below, [page for page in made if page.startswith(f"{below}/")])
                    yield from [{title.removesuffix("..."): inside}] if inside else []
                else:
                    yield {title: list(filled(below)) if isinstance(below, list) else below}
            if not isinstance(entry, dict):
                yield entry

    config["nav"] = list(filled(config["nav"]))
    return config


def on_files(files, config):
    from mkdocs.structure.files import File

    for page, content in pages().items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(text, page, config, files):
    path = page.file.src_uri
    source = sources().get(path, "" if path in pages() else f"docs/{path}")
    return linked(text, path, source) if source else text


def on_post_build(config):
    """Takes the address of a drawing library that the theme would load for diagrams, of which there are none."""
    for file in pathlib.Path(config["site_dir"], "assets", "javascripts").glob("bundle.*.js"):
        text = file.read_text(encoding="utf-8")
        file.write_text(re.sub(r"https://unpkg\.com/[^\"'`]*", "", text), encoding="utf-8")
        for maps in file.parent.rglob("*.map"):
            os.remove(maps)

"""The checks of `config.base` and `config.data`: where model and rows come from."""

import importlib.util
import os
import re

from molora_jax.config import fields as tables
from molora_jax.config.fields import did_you_mean, one_of, wrong
from molora_jax.config.resolve import FILES, file_of, resolve_fields, resolve_template_args, split_commas
from molora_jax.config.values import path_of, shown, there
from molora_jax.errors import InputError
from molora_jax.stores import is_url

FAMILY = re.compile(r"(\w+):[\w\-]+(/[\w\-]+)*")
HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+(@[\w.\-/]+)?")
DRAW = re.compile(r"([^@]*)@(0|[1-9]\d{0,8})")  # of a random base
SOURCES = dict(
    pkg="pkg:NAME", gguf="gguf:FILE", dir="dir:FOLDER", hf="hf:ORG/NAME", sandbox="sandbox:6m", random="random:tiny"
)


def base_problems(config):
    source, where = config["base"].get("source"), "base.source"
    if not isinstance(source, str):
        return
    form, colon, name = source.partition(":")
    if form not in SOURCES and there((path_of(source) / "config.json").is_file):
        return  # the folder of a model, without `dir:`
    if form not in SOURCES or not name:
        yield wrong(where, shown(source), one_of(SOURCES.values()), did_you_mean(form, SOURCES) if colon else "")
    elif form in ("pkg", "sandbox", "random"):
        names = dict(pkg=tables.BASE_PACKAGES, sandbox=tables.BASE_SANDBOX, random=tables.BASE_RANDOM)[form]
        drawn = DRAW.fullmatch(name) if form == "random" else None
        name = drawn[1] if drawn else name
        if name not in names:
            yield wrong(where, shown(source), f"{form}: and {one_of(names)}", did_you_mean(name, names))
    elif is_url(name):
        if form not in ("dir", "gguf"):
            yield wrong(where, shown(source), "dir: or gguf: before a URL")
    elif form == "gguf" and not there(path_of(name).is_file):
        yield wrong(where, f"{source!r} (no such file)", "an existing GGUF file", "Check the path.")
    elif form == "dir" and not there((path_of(name) / "config.json").is_file):
        what = "no config.json in it" if there(path_of(name).is_dir) else "no such folder"
        yield wrong(where, f"{source!r} ({what})", "a folder in Hugging Face form", "Check the path.")
    elif form == "hf" and not HUB_NAME.fullmatch(name):
        yield wrong(where, shown(source), "hf:ORG/NAME or hf:ORG/NAME@REVISION")


def data_problems(config):
    data = config["data"]
    names = tasks_of(config)
    for name in names:
        if name.startswith(FILES):
            yield from _file("data.tasks", name, r" (a comma in its path is written \,)")
        elif name not in tables.TASKS and not of_family(name):
            files = "jsonl:PATH, parquet:PATH"
            expected = f"{files}, {', '.join(tables.TASK_FAMILIES.values())} or {one_of(tables.TASKS)}"
            yield wrong("data.tasks", shown(name), expected, did_you_mean(name, tables.TASKS))
    if not names:
        yield wrong("data.tasks", shown(data.get("tasks")), "at least one task (task names or jsonl:PATH)")
    yield from repeated("data.tasks", names)
    valid = task_list(data.get("valid", ""))
    yield from repeated("data.valid", valid)
    for name in valid:
        if name.startswith(FILES):
            yield from _file("data.valid", name)
        else:
            yield wrong("data.valid", shown(name), 'jsonl:PATH, parquet:PATH, or "" to hold out rows of data.tasks')
    yield from _resolved(data, "fields", resolve_fields)
    yield from _resolved(data, "template_args", resolve_template_args)
    yield from raw_problems(data)


def raw_problems(data):
    """Fields of `config.data` that have no effect, or no meaning, with `data.raw`."""
    if data.get("raw") is True:
        for name in ("system", "template_args"):
            if data.get(name):
                expected = '"" with data.raw, where no chat template is used'
                yield wrong(f"data.{name}", shown(data[name]), expected, "Drop it, or set data.raw=False.")
        if data.get("format", "auto") in ("messages", "sharegpt"):
            yield wrong("data.format", shown(data["format"]), "'auto' with data.raw: its rows are text, not turns")


def repeated(where, entries):
    """The problem of a task or a file that is named twice, in whatever spelling of its path."""
    seen = {}
    for entry in entries:
        path = file_of(entry)
        key = there(lambda p=path: os.path.realpath(path_of(p))) if path and not is_url(path) else entry
        first = seen.setdefault(key or entry, entry)
        if first is not entry:
            got = (
                f"{entry[:200]!r} twice"
                if entry == first
                else f"{first[:200]!r} and {entry[:200]!r}, which are one file"
            )
            yield wrong(where, got, "every task once", "Drop one.")


def of_family(name: str) -> bool:
    """Whether an entry of data.tasks is `rg:NAME` or `bb:NAME`; if there is such a name is known once it is read."""
    found = FAMILY.fullmatch(name)
    return bool(found) and found[1] in tables.TASK_FAMILIES


def tasks_of(config):
    return task_list(config["data"].get("tasks"))


def task_list(text):
    return split_commas(text) if isinstance(text, str) else ()


def may_name_more(tasks):
    """Whether there may be tasks of other names: a file's are known once it is read (`DataSet` checks them then)."""
    return any(task.startswith(FILES) for task in tasks)


def _file(where, entry, beside=""):
    path, form = file_of(entry), entry.partition(":")[0]
    if not is_url(path) and not there(path_of(path).is_file):
        yield wrong(
            where, f"{entry[:200]!r} (no such file, or a folder)", f"an existing {form} file{beside}", "Check it."
        )
    if form == "parquet" and importlib.util.find_spec("pyarrow") is None:
        yield wrong(
            where, f"{entry[:200]!r}, without pyarrow", "the extra `parquet`", "pip install 'molora_jax[parquet]'."
        )


def _resolved(data, name, resolve):
    """The problem of a field that has a small language of its own."""
    try:
        resolve(data[name] if isinstance(data.get(name), str) else "")
    except InputError as problem:
        yield problem

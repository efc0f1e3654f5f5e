"""The checks of `config.base` and `config.data`: where model and rows come from."""

import re

from molora_jax.config import fields as tables
from molora_jax.config.fields import did_you_mean, one_of, wrong
from molora_jax.config.resolve import resolve_fields, resolve_template_args, split_commas
from molora_jax.config.values import path_of, shown, there
from molora_jax.errors import InputError

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
        if name.startswith("jsonl:"):
            yield from _file("data.tasks", name, r" (a comma in its path is written \,)")
        elif name not in tables.TASKS:
            expected = f"jsonl:PATH or {one_of(tables.TASKS)}"
            yield wrong("data.tasks", shown(name), expected, did_you_mean(name, tables.TASKS))
    if not names or len(names) != len(set(names)):
        yield wrong("data.tasks", shown(data.get("tasks")), "every task once, at least one (task names or jsonl:PATH)")
    valid = data.get("valid", "")
    for name in task_list(valid):
        if name.startswith("jsonl:"):
            yield from _file("data.valid", name)
        else:
            yield wrong("data.valid", shown(name), 'jsonl:PATH, or "" to hold out rows of data.tasks')
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


def tasks_of(config):
    return task_list(config["data"].get("tasks"))


def task_list(text):
    return split_commas(text) if isinstance(text, str) else ()


def may_name_more(tasks):
    """Whether there may be tasks of other names: a file's are known once it is read (`DataSet` checks them then)."""
    return any(task.startswith("jsonl:") for task in tasks)


def _file(where, entry, beside=""):
    if not there(path_of(entry[6:]).is_file):
        yield wrong(
            where, f"{entry[:200]!r} (no such file, or a folder)", f"an existing jsonl file{beside}", "Check it."
        )


def _resolved(data, name, resolve):
    """The problem of a field that has a small language of its own."""
    try:
        resolve(data[name] if isinstance(data.get(name), str) else "")
    except InputError as problem:
        yield problem

"""The checks of a config, section by section; each yields `InputError`s and none stops the others."""

import math
import os
import pathlib
import re

from molora_jax.config import fields as known
from molora_jax.config import limits, objectives
from molora_jax.config.fields import ATTENTION, FFN, MICRO_SHARDS, did_you_mean, one_of, wrong
from molora_jax.config.members import attribute, members, options, unlisted
from molora_jax.config.resolve import (
    at_fault,
    expert_counts,
    resolve_experts,
    resolve_fields,
    resolve_layers,
    resolve_sites,
    resolve_template_args,
    split_commas,
)
from molora_jax.errors import InputError

NAME = re.compile(r"[a-z0-9_]+")
FREEZE = re.compile(r"[\w*?/.\-\[\]!]+")
MOST = 2**31 - 1  # steps, counts and sizes are int32 on a device
STAGE_NAME = re.compile(r"s\d\d")
HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+(@[\w.\-/]+)?")
SOURCES = dict(pkg="pkg:NAME", gguf="gguf:FILE", dir="dir:FOLDER", hf="hf:ORG/NAME", random="random:tiny")


def problems(config):
    """All mistakes of a plain nested dict, as a list of InputErrors."""
    if not isinstance(config, dict):
        return [wrong("config", f"a {type(config).__name__}", "groups of fields", "See configs/common.py.")]
    found = list(_fields("", config, known.FIELDS))
    if any(not isinstance(config.get(key), dict) for key, field in known.FIELDS.items() if isinstance(field, dict)):
        return found  # a section is missing: the rest would only repeat that
    rules = list(_rules(config))
    found += [*_base(config), *_data(config), *rules, *_losses(config), *_engine(config), *_train(config)]
    found += [*_member("optim", config["optim"], "optim"), *_objective(config), *_mesh(config), *_exact(config)]
    return found + list(_schedule(config, valid=not found))


def plain(config):
    return config.to_dict() if hasattr(config, "to_dict") else config


def check_names(config, where="config"):
    """Raises InputError unless every name is text without dots, which paths such as `--config.a.b` need."""
    fields = config if isinstance(config, dict) else vars(config).get("_fields", {})  # a ConfigDict sorts its names
    for name, value in fields.items():
        if not isinstance(name, str) or "." in name or not name:
            raise wrong(where, f"a field named {_shown(name)}", "names that are text without dots", "Rename it.")
        if isinstance(value, dict) or hasattr(value, "to_dict"):
            check_names(value, f"{where}.{name}")


def raise_all(found):
    """One error for all: the first one's fields, the others in its text."""
    if not found:
        return
    first, others = found[0], {str(other): None for other in found[1:]}
    fix = first.fix + "".join(f"\n  and {text}" for text in others if text != str(first))
    raise InputError(first.where, got=first.got, expected=first.expected, fix=fix)


def check_value(where, value, field):
    """Problems of one value: its type, that it is finite, its range."""
    types = {float: (float, int), tuple: (tuple, list)}.get(field.kind, field.kind)
    if not isinstance(value, types) or (isinstance(value, bool) and field.kind is not bool):
        return [wrong(where, f"{_shown(value)} (a {type(value).__name__})", str(field))]
    if isinstance(value, float) and not math.isfinite(value):
        return [wrong(where, value, f"a finite number {field.expected}".rstrip())]
    if field.kind is int and not -MOST <= value <= MOST:
        return [wrong(where, _shown(value), f"{field}, at most {MOST:,} (32 bits)")]
    if field.kind is float and value and not 1e-37 < abs(value) < 1e37:
        return [wrong(where, _shown(value), f"{field} that float32 holds")]
    if isinstance(value, str) and not value.isascii() and value.encode(errors="replace").decode() != value:
        return [wrong(where, ascii(value), "text that is valid Unicode")]  # half a surrogate: bytes that are not UTF-8
    return [] if field.accepts(value) else [wrong(where, _shown(value), str(field), _near(value, field))]


def _shown(value):
    """A value as text of at most 200 characters; `repr` refuses integers of thousands of digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"{type(value).__name__} too large to print"
    return text if len(text) <= 200 else text[:197] + "..."


def _near(value, field):
    return did_you_mean(value, re.findall(r"'(\w+)'", field.expected)) if field.kind is str else ""


def _fields(where, values, fields, *, more=(), of=""):
    """Problems of a group: unknown keys, missing keys, wrong values."""
    dot = f"{where}." if where else ""
    for key in values:
        if key not in fields and key not in more:
            names = [*fields, *more]
            at = key if isinstance(key, str) and 0 < len(key) <= 200 else _shown(key)
            yield wrong(f"{dot}{at}", "an unknown field", f"{of}{one_of(names)}", did_you_mean(key, names))
    for key, field in fields.items():
        if key not in values:
            needed = key not in known.LATER if isinstance(field, dict) else field.default is known.REQUIRED
            if needed:
                text = "a group of fields" if isinstance(field, dict) else str(field)
                yield wrong(f"{dot}{key}", "nothing", text, "Add it, or start from configs/common.py.")
        elif not isinstance(field, dict):
            yield from check_value(f"{dot}{key}", values[key], field)
        elif not isinstance(values[key], dict):
            yield wrong(f"{dot}{key}", _shown(values[key]), "a group of fields", "See configs/common.py.")
        elif field:
            yield from _fields(f"{dot}{key}", values[key], field)


def _member(where, value, axis, *, name=""):
    """Problems of `dict(name=..., options)`; where the member's name is the key, it comes as `name`."""
    if not isinstance(value, dict):
        return [wrong(where, _shown(value), "a dict of options")]
    member, more = (name, ()) if name else (value.get("name"), ("name",))
    at, names = where if name else f"{where}.name", members(axis)
    if not isinstance(member, str) or member not in names:
        got = "nothing" if member is None else _shown(member)
        return [wrong(at, got, one_of(names), did_you_mean(member, names))]
    if unlisted(axis, member):
        file = f"molora_jax/{axis}/__init__.py"
        return [wrong(at, f"{member!r}, which {file} does not list", "a member of its dict", f"Add it to {file}.")]
    return list(_fields(where, value, options(axis, member), more=more, of=f"an option of {member}: "))


def _path(text):
    return pathlib.Path(os.path.expanduser(text))  # pathlib's own raises where there is no such user


def there(test):
    """A test of a path; one that the system refuses (too long a name, no permission) does not exist for us."""
    try:
        return test()
    except (OSError, ValueError):
        return False


def _split(text):
    return [part.strip() for part in text.split(",")] if isinstance(text, str) else []


def _base(config):
    source, where = config["base"].get("source"), "base.source"
    if not isinstance(source, str):
        return
    form, colon, name = source.partition(":")
    if form not in SOURCES or not name:
        yield wrong(where, _shown(source), one_of(SOURCES.values()), did_you_mean(form, SOURCES) if colon else "")
    elif form in ("pkg", "random"):
        names = known.BASE_PACKAGES if form == "pkg" else known.BASE_RANDOM
        if name not in names:
            yield wrong(where, _shown(source), f"{form}: and {one_of(names)}", did_you_mean(name, names))
    elif form == "gguf" and not there(_path(name).is_file):
        yield wrong(where, f"{source!r} (no such file)", "an existing GGUF file", "Check the path.")
    elif form == "dir" and not there((_path(name) / "config.json").is_file):
        what = "no config.json in it" if there(_path(name).is_dir) else "no such folder"
        yield wrong(where, f"{source!r} ({what})", "a folder in Hugging Face form", "Check the path.")
    elif form == "hf" and not HUB_NAME.fullmatch(name):
        yield wrong(where, _shown(source), "hf:ORG/NAME or hf:ORG/NAME@REVISION")


def _data(config):
    data = config["data"]
    names = _tasks(config)
    for name in names:
        if name.startswith("jsonl:"):
            yield from _file("data.tasks", name, r" (a comma in its path is written \,)")
        elif name not in known.TASKS:
            expected = f"jsonl:PATH or {one_of(known.TASKS)}"
            yield wrong("data.tasks", _shown(name), expected, did_you_mean(name, known.TASKS))
    if not names or len(names) != len(set(names)):
        yield wrong("data.tasks", _shown(data.get("tasks")), "every task once, at least one (task names or jsonl:PATH)")
    valid = data.get("valid", "")
    for name in _task_list(valid):
        if name.startswith("jsonl:"):
            yield from _file("data.valid", name)
        else:
            yield wrong("data.valid", _shown(name), 'jsonl:PATH, or "" to hold out rows of data.tasks')
    yield from _resolved(data, "fields", resolve_fields)
    yield from _resolved(data, "template_args", resolve_template_args)
    yield from raw_problems(data)


def raw_problems(data):
    """Fields of `config.data` that have no effect, or no meaning, with `data.raw`."""
    if data.get("raw") is True:
        for name in ("system", "template_args"):
            if data.get(name):
                expected = '"" with data.raw, where no chat template is used'
                yield wrong(f"data.{name}", _shown(data[name]), expected, "Drop it, or set data.raw=False.")
        if data.get("format", "auto") in ("messages", "sharegpt"):
            yield wrong("data.format", _shown(data["format"]), "'auto' with data.raw: its rows are text, not turns")


def _tasks(config):
    return _task_list(config["data"].get("tasks"))


def _task_list(text):
    return split_commas(text) if isinstance(text, str) else ()


def _open(tasks):
    """Whether there may be tasks of other names: a file's are known once it is read (`DataSet` checks them then)."""
    return any(task.startswith("jsonl:") for task in tasks)


def _file(where, entry, more=""):
    if not there(_path(entry[6:]).is_file):
        yield wrong(where, f"{entry[:200]!r} (no such file, or a folder)", f"an existing jsonl file{more}", "Check it.")


def _resolved(data, name, resolve):
    """The problem of a field that has a small language of its own."""
    try:
        resolve(data[name] if isinstance(data.get(name), str) else "")
    except InputError as problem:
        yield problem


def _rules(config):
    rules = config["method"].get("rules")
    yield from _fields("method", config["method"], {"rules": {}, "train_base": known.since(known.TEXT, "")})
    for name, rule in rules.items() if isinstance(rules, dict) else ():
        where = f"method.rules.{name}"
        if not NAME.fullmatch(str(name)):
            yield wrong(where, _shown(name), "a name of a-z, 0-9 and _", "Rename the rule.")
        if not isinstance(rule, dict):
            yield wrong(where, _shown(rule), "a rule (see configs/common.py)")
            continue
        found = list(_fields(where, rule, known.RULE, more=("adapter", "router", "placement")))
        found += _member(f"{where}.adapter", rule.get("adapter"), "adapters")
        if "router" in rule:
            found += _member(f"{where}.router", rule["router"], "routers")
        if "placement" in rule:
            found += _placement(f"{where}.placement", rule["placement"])
        yield from found or _rule(where, rule, start=config["train"].get("init_from"))


def _placement(where, value):
    names = [name for name in members("placements") if limits.named(name)]
    if isinstance(value, dict) and value.get("name") not in names:
        fix = "Leave placement out: the sites say whether experts are whole FFNs or projections."
        return [wrong(f"{where}.name", _shown(value.get("name")), one_of(names), fix)]
    return _member(where, value, "placements")


def _rule(where, rule, *, start):
    """What ties a rule's fields together; each field alone is right by now."""
    sites, counts = (), ()
    try:
        sites = resolve_sites(rule["sites"], where=f"{where}.sites")
        counts = covered(where, rule)
    except InputError as problem:
        yield problem
    for path in rule["load"]:
        if not isinstance(path, str) or not there(_path(path).exists):
            yield wrong(f"{where}.load", _shown(path), "paths that exist", "Check the path.")
    if rule["load"]:
        yield from _load(where, rule, counts)
    init, inits = rule["adapter"].get("init"), members("inits")
    if init is not None and init not in inits:
        yield wrong(f"{where}.adapter.init", _shown(init), one_of(inits), did_you_mean(init, inits))
    if sites:
        yield from _placed(where, rule, sites, start=start)
    if counts:
        yield from check_counts(where, rule, counts)


def covered(where, rule, num_layers=None):
    """Expert counts of the layers that a rule covers (each count once, where the number of layers is not known)."""
    if num_layers is None and rule["layers"] == "all":
        return tuple(count for count, _ in expert_counts(rule["experts"], where=f"{where}.experts"))
    layers = resolve_layers(rule["layers"], num_layers, where=f"{where}.layers")
    return resolve_experts(rule["experts"], len(layers), where=f"{where}.experts")


def check_counts(where, rule, counts):
    """What a rule asks of its expert counts."""
    if "router" not in rule:
        if set(counts) != {1}:
            yield wrong(f"{where}.experts", _shown(rule["experts"]), '"1" without a router', "Add a router, or say 1.")
        return
    k = limits.option(rule, "router.k") or 1
    if k > min(counts):
        expected = f"k <= experts, and the fewest experts are {min(counts)}"
        yield wrong(f"{where}.router.k", f"{k} (K > E)", expected, "Lower k or raise experts.")
    if limits.option(rule, "router.share") == "model" and len(set(counts)) > 1:
        got = f"'model' with {', '.join(map(str, sorted(set(counts))))} experts"
        yield wrong(f"{where}.router.share", got, "equal counts in all layers", "Change experts or share.")


def _placed(where, rule, sites, *, start):
    """What the rule's placement asks of its sites, and what any of its members says that it cannot serve."""
    place = limits.placement_of(rule, sites)
    served = limits.states("placements", place, "SITES")
    if not set(sites) <= set(served):
        fix = "Write other sites as another rule."
        yield wrong(f"{where}.sites", _shown(rule["sites"]), f"sites of a {place}: {','.join(served)}", fix)
    if rule["load"] and not attribute("placements", place, "LOADS"):
        able = [name for name in members("placements") if attribute("placements", name, "LOADS")]
        yield wrong(f"{where}.load", f"runs for a {place}", f"a rule whose placement reads runs: {', '.join(able)}")
    for group, axis in limits.AXES.items():
        name = place if group == "placement" else rule[group]["name"] if group in rule else None
        if name is not None:
            yield from limits.refused(where, rule, limits.states(axis, name, "REFUSES"), start=start)
    if "router" in rule and not limits.named(place):
        yield from _share(f"{where}.router.share", limits.option(rule, "router.share") or "site", sites)


def _share(where, share, sites):
    got = f"{share!r} on sites {','.join(sites)}"
    if share == "attn" and not set(sites) <= set(ATTENTION):
        yield wrong(where, got, "sites among q,k,v,o for share 'attn'", "Write two rules, or use 'site'.")
    if share == "ffn" and sites != ("ffn",) and not set(sites) <= set(FFN):
        yield wrong(where, got, "sites among gate,up,down, or ffn, for share 'ffn'", "Write two rules, or use 'site'.")


def _load(where, rule, counts):
    """Loaded experts are read as products B A, one expert a run."""
    number, adapter = len(rule["load"]), rule["adapter"]
    if set(counts) != {number}:
        yield wrong(f"{where}.experts", _shown(rule["experts"]), f'"{number}", one for each of the runs in load')
    init = limits.option(rule, "adapter.init")
    if not attribute("adapters", adapter["name"], "LOADS") or "base" in limits.states("inits", init, "NEEDS"):
        able = " or ".join(name for name in members("adapters") if attribute("adapters", name, "LOADS"))
        starts = " or ".join(repr(name) for name in members("inits") if not limits.states("inits", name, "NEEDS"))
        got = f"{adapter['name']!r} with init {init!r}"
        yield wrong(f"{where}.adapter", got, f"{able} with init {starts}, to hold what load reads")


def _losses(config):
    rules = config["method"].get("rules")
    rules = rules.values() if isinstance(rules, dict) else ()
    routed = any(isinstance(rule, dict) and "router" in rule for rule in rules)
    for name, loss in config["losses"].items():
        where = f"losses.{name}"
        yield from _member(where, loss, "losses", name=name)
        if name in members("losses") and attribute("losses", name, "ROUTING") is not False and not routed:
            yield wrong(where, "a loss on routing", "a rule with a router", "Remove the loss or add a router.")
        yield from _task_names(where, name, loss, _tasks(config))


def _task_names(where, name, loss, tasks):
    """Options that a loss declares as task names (`TASKS`) are entries of data.tasks."""
    if name not in members("losses") or not isinstance(loss, dict):
        return
    for option in attribute("losses", name, "TASKS") or ():
        for task in _task_list(loss.get(option, options("losses", name)[option].default)):
            if task not in tasks and not _open(tasks):
                expected = f"tasks among data.tasks = {','.join(tasks)}"
                yield wrong(f"{where}.{option}", _shown(task), expected, did_you_mean(task, tasks))


def _objective(config):
    """The run's objective, and what it excludes; a stage's own is checked with the stage."""
    if "objective" in config:
        yield from _member("objective", config["objective"], "objectives")
    yield from objectives.problems(config)


def engines():
    """The engines: files of `engines/` that say whether tokens travel (MOVES)."""
    return tuple(name for name in members("engines") if attribute("engines", name, "MOVES") is not None)


def _engine(config):
    engine, names = config.get("engine"), ("auto", *engines())
    if isinstance(engine, str) and engine not in names:
        planned = engine in known.ENGINES_PLANNED
        fix = f"{engine} is not available yet." if planned else did_you_mean(engine, names)
        yield wrong("engine", _shown(engine), one_of(names), fix)
    options = config["expert_parallel"]
    for name in ("capacity", "rank_space"):
        if engine in engines() and not attribute("engines", engine, "MOVES") and options.get(name):
            expected = f"0 with engine {engine!r}, which sends no tokens"
            yield wrong(f"expert_parallel.{name}", options[name], expected, "Set engine to 'all_to_all' or 'auto'.")


def _train(config):
    data, every = config["data"], config["train"].get("eval_every")
    if data.get("test_share", 0.05) == 0 and not data.get("valid", "") and every:
        fix = "Set train.eval_every=0, name a file in data.valid, or hold rows out with data.test_share."
        yield wrong("train.eval_every", _shown(every), "0 where data.test_share=0.0 holds no row out", fix)
    start = config["train"].get("init_from")
    if isinstance(start, str) and start and not there(_path(start).is_dir):
        yield wrong(
            "train.init_from", f"{start!r} (no such folder)", 'a workdir to start from, or ""', "Check the path."
        )


def _mesh(config):
    """What can be said of batch and mesh before the number of devices is known."""
    mesh, train = config["mesh"], config["train"]
    numbers = [*(mesh.get(axis) for axis in known.MESH_AXES[:3]), train.get("batch_size"), train.get("accumulate")]
    if not all(isinstance(n, int) and n and -1 <= n <= MOST for n in numbers):
        return
    data, fsdp, expert, batch, parts = numbers
    if batch % parts:
        fix = "Change batch_size or accumulate."
        yield wrong("train.batch_size", batch, f"a multiple of train.accumulate = {parts}", fix)
    elif batch // parts % (max(data, 1) * fsdp * expert * objectives.unit(config)):
        unit = objectives.unit(config)
        rows = f"{batch // parts} rows" if unit == 1 else f"{batch // parts} rows (units of {unit} rows)"
        expected = f"data * fsdp * expert to divide the {rows} of a micro-step"
        got = f"data={_shown(data)}, fsdp={_shown(fsdp)}, expert={_shown(expert)}"
        fault = at_fault(dict(data=data, fsdp=fsdp, expert=expert), known.MESH_AXES[:3], batch // parts)
        yield wrong("mesh", got, expected, f"Change {fault}, train.batch_size or train.accumulate.")


def _exact(config):
    """`train.exact` gives every device whole micro-shards, and no token leaves its device."""
    train, mesh = config["train"], config["mesh"]
    if train.get("exact") is not True:
        return
    why = "with train.exact, which splits rows alone (over data and fsdp)"
    for axis in ("expert", "tensor"):
        if isinstance(mesh.get(axis), int) and mesh[axis] > 1:
            yield wrong(f"mesh.{axis}", mesh[axis], f"1 {why}", "Give its devices to mesh.data, or leave exact out.")
    if config.get("engine") in engines() and attribute("engines", config["engine"], "MOVES"):
        expected = "'auto' with train.exact: no token leaves its device"
        yield wrong("engine", repr(config["engine"]), expected, "Change engine, or leave exact out.")
    if train.get("attention") == "fused":
        expected = "'xla' with train.exact: cuDNN's is there on a single GPU alone"
        yield wrong("train.attention", "'fused'", expected, "Change attention, or leave exact out.")
    batch, parts = train.get("batch_size"), train.get("accumulate")
    if all(isinstance(n, int) and n > 0 for n in (batch, parts)) and batch // parts % MICRO_SHARDS:
        expected = f"a multiple of {MICRO_SHARDS} rows a micro-step with train.exact (batch_size / accumulate)"
        yield wrong("train.batch_size", f"{batch} in {parts} micro-steps", expected, "Change batch_size or accumulate.")


def exact_devices(train, sizes):
    """The same of a mesh whose sizes are known."""
    devices = sizes["data"] * sizes["fsdp"]
    if train.get("exact") and MICRO_SHARDS % devices:
        got = f"{devices} devices (data={sizes['data']}, fsdp={sizes['fsdp']})"
        fix = "Change mesh.data and mesh.fsdp, or leave exact out."
        yield wrong("mesh.data", got, f"a divisor of {MICRO_SHARDS}, the micro-shards of train.exact", fix)


def _schedule(config, *, valid):
    stages, total, tasks = config["schedule"], config["train"].get("steps"), _tasks(config)
    if not stages or not all(isinstance(stage, dict) for stage in stages.values()):
        yield wrong("schedule", _shown(stages), "at least one stage: s00=dict(steps, tasks, freeze, set, route)")
        return
    for name, stage in stages.items():
        where = f"schedule.{name}"
        if not STAGE_NAME.fullmatch(str(name)):
            yield wrong(where, _shown(name), "a stage named s00, s01, ...", "Stages run in the order of their names.")
        yield from _fields(where, stage, {**known.STAGE, "set": {}}, more=("objective",))
        if stage.get("objective"):
            yield from _member(f"{where}.objective", stage["objective"], "objectives")
        elif "objective" in stage and not isinstance(stage["objective"], dict):
            yield wrong(f"{where}.objective", _shown(stage["objective"]), "a dict of options")
        for task in _task_list(stage.get("tasks")):
            if task not in tasks and not _open(tasks):
                yield wrong(
                    f"{where}.tasks", _shown(task), f"tasks among data.tasks = {','.join(tasks)}", "Add it there."
                )
        if stage.get("freeze") and not all(FREEZE.fullmatch(part) for part in _split(stage["freeze"])):
            yield wrong(f"{where}.freeze", _shown(stage["freeze"]), "a comma list of path patterns such as */router/*")
        rules = config["method"].get("rules")
        rules = rules if isinstance(rules, dict) else {}
        if stage.get("route") and not any(isinstance(rule, dict) and "router" in rule for rule in rules.values()):
            yield wrong(f"{where}.route", _shown(stage["route"]), "a rule with a router", "There is nothing to route.")
        changes = stage.get("set")
        if isinstance(changes, dict) and changes:
            found = list(_changes(f"{where}.set", changes, config))
            yield from found
            if not found and valid:
                for problem in problems({**_merged(config, changes), "schedule": {"s00": known.WHOLE}}):
                    yield wrong(f"{where}.set.{problem.where}", problem.got, problem.expected, problem.fix)
    steps = [stages[name].get("steps") for name in sorted(stages, key=str)]
    if not all(isinstance(n, int) and 0 <= n <= MOST for n in [*steps, total]) or total < 1:
        return
    if config["train"].get("epochs", 0.0):
        return  # train.steps is known once the data are read: checked then
    text, fix = f"stages of {', '.join(map(str, steps))} steps", "Change the stages or train.steps."
    open_stages = steps.count(0)
    if sum(steps) + open_stages > total or not open_stages and sum(steps) != total:
        yield wrong("schedule", text, f"a sum of train.steps = {total} (stages of 0 steps share the rest)", fix)


def _changes(where, changes, config):
    """A stage's `set` may change fields that exist, to values of the same shape."""
    for key, value in changes.items():
        if key not in config:
            yield wrong(f"{where}.{key}", "an unknown field", one_of(map(str, config)), did_you_mean(key, config))
        elif isinstance(value, dict) != isinstance(config[key], dict):
            yield wrong(f"{where}.{key}", _shown(value), f"a value like {_shown(config[key])}")
        elif isinstance(value, dict):
            yield from _changes(f"{where}.{key}", value, config[key])


def _merged(config, changes):
    merged = {key: _merged(config[key], v) if isinstance(v, dict) else v for key, v in changes.items()}
    return {**config, **merged}

"""The checks of a config, section by section; each yields `InputError`s and none stops the others.

Single values: `values.py`; base and data: `data_checks.py`; rules: `rule_checks.py`; objectives: `objectives.py`.
"""

import re

from molora_jax.config import fields as tables
from molora_jax.config import objectives, outside
from molora_jax.config.data_checks import base_problems, data_problems, may_name_more, task_list, tasks_of
from molora_jax.config.fields import MICRO_SHARDS, did_you_mean, one_of, wrong
from molora_jax.config.members import attribute, is_member, loss_of, member_problem, members, options
from molora_jax.config.regimes import regime_problems
from molora_jax.config.resolve import at_fault, split_commas
from molora_jax.config.rule_checks import rule_problems
from molora_jax.config.values import MOST, group_problems, member_problems, merged, parts_of, path_of, shown, there
from molora_jax.errors import InputError
from molora_jax.stores import is_url, served

FREEZE = re.compile(r"[\w*?/.\-\[\]!]+")
STAGE_NAME = re.compile(r"s\d\d")
ROWS = re.compile(r"(\d{1,3})-(\d{1,3})", re.ASCII)


def problems(config):
    """All mistakes of a plain nested dict, as a list of InputErrors."""
    if not isinstance(config, dict):
        return [wrong("config", f"a {type(config).__name__}", "groups of fields", "See configs/common.py.")]
    found = list(group_problems("", config, tables.FIELDS)) + list(_remote(config))
    if any(not isinstance(config.get(key), dict) for key, field in tables.FIELDS.items() if isinstance(field, dict)):
        return found  # a section is missing: the rest would only repeat that
    rules = list(rule_problems(config))
    found += [
        *base_problems(config),
        *data_problems(config),
        *rules,
        *_losses(config),
        *_engine(config),
        *_train(config),
    ]
    found += [*member_problems("optim", config["optim"], "optim"), *_objective(config), *_mesh(config), *_exact(config)]
    found += regime_problems(config)
    found += _surgery(config)
    return found + list(_schedule(config, valid=not found))


def _remote(config):
    """Texts that name a place which is neither mounted here nor of a store that is served."""
    left, seen = [("", config)], set()  # no recursion: a wrong config may be deep, or hold itself
    while left:
        where, value = left.pop()
        if isinstance(value, (dict, tuple, list)):
            if id(value) in seen:
                continue
            seen.add(id(value))
        if isinstance(value, dict):
            left += [(f"{where}.{name}".lstrip("."), own) for name, own in value.items() if isinstance(name, str)]
        elif isinstance(value, (tuple, list)):
            left += [(where, own) for own in value]
        elif where != "data.system":
            try:
                served(where, value)
            except InputError as problem:
                yield problem


def _losses(config):
    rules = config["method"].get("rules")
    rules = rules.values() if isinstance(rules, dict) else ()
    own = lambda rule: "router" in rule or rule.get("base_router") == "trained"  # noqa: E731
    routed = any(isinstance(rule, dict) and own(rule) for rule in rules)
    for key, rule in config["method"]["rules"].items() if isinstance(config["method"].get("rules"), dict) else ():
        router = rule.get("router") if isinstance(rule, dict) else None
        if isinstance(router, dict) and isinstance(router.get("name"), str) and is_member("routers", router["name"]):
            where = f"method.rules.{key}.router"
            yield from _task_names(where, router["name"], router, tasks_of(config), "routers")
    for name, loss in config["losses"].items():
        where = f"losses.{name}"
        yield from member_problems(where, loss, "losses", name=name)
        member = loss_of(name, loss)
        if not isinstance(loss, dict) or not isinstance(member, str) or not is_member("losses", member):
            continue
        if attribute("losses", member, "ROUTING") is not False and not routed:
            yield wrong(where, "a loss on routing", "a rule with a router", "Remove the loss or add a router.")
        yield from _read_by(where, member, rules)
        yield from _task_names(where, member, loss, tasks_of(config))


def _read_by(where, name, rules):
    """A loss that reads what single routers say names them (`ROUTERS`); one from outside may say it too."""
    known = attribute("losses", name, "ROUTERS") or ()
    found = [
        rule["router"].get("name") for rule in rules if isinstance(rule, dict) and isinstance(rule.get("router"), dict)
    ]
    found = [name for name in found if isinstance(name, str)]  # another kind is told by the rule's own check
    if known and found and not any(router in known or outside.is_path(router) for router in found):
        got = f"a loss beside {', '.join(map(repr, dict.fromkeys(found)))}"
        yield wrong(where, got, f"a rule whose router is {one_of(known)}", "Remove the loss or name that router.")


def _task_names(where, name, member, tasks, axis="losses"):
    """Options that a loss or a router declares as task names (`TASKS`) are entries of data.tasks."""
    for option in attribute(axis, name, "TASKS") or ():
        value = member.get(option, options(axis, name)[option].default)
        texts = value if isinstance(value, (tuple, list)) else (value,)
        for task in [task for text in texts for task in task_list(text)]:
            if task not in tasks and not may_name_more(tasks):
                expected = f"tasks among data.tasks = {','.join(tasks)}"
                yield wrong(f"{where}.{option}", shown(task), expected, did_you_mean(task, tasks))


def _objective(config):
    """The run's objective, and what it excludes; a stage's own is checked with the stage."""
    if "objective" in config:
        yield from member_problems("objective", config["objective"], "objectives")
    yield from objectives.problems(config)


def _surgery(config):
    """`surgery`: empty, or a member's options and the runs that go in; whether they are there is asked at the start."""
    value = config.get("surgery")
    if not value:
        return
    if not isinstance(value, dict):
        yield wrong("surgery", shown(value), "a dict of options")
        return
    yield from member_problems("surgery", {k: v for k, v in value.items() if k != "inputs"}, "surgery")
    inputs = value.get("inputs", ())
    if isinstance(inputs, str):
        fix = f"Write ({', '.join(map(repr, split_commas(inputs)))},), or --config.surgery.inputs=DIR,DIR@step."
        yield wrong("surgery.inputs", f"{shown(inputs)} (a str)", "a tuple of folders of runs: DIR or DIR@step", fix)
    elif not isinstance(inputs, (tuple, list)) or not all(isinstance(one, str) and one.strip() for one in inputs):
        yield wrong("surgery.inputs", shown(inputs), "folders of runs, each a text: DIR or DIR@step")


def _engine(config):
    engine = config.get("engine")
    if isinstance(engine, str) and engine != "auto":
        found = member_problem("engine", "engines", engine, among=("auto", *members("engines")))
        if found and engine in tables.ENGINES_PLANNED:
            found = wrong("engine", found.got, found.expected, f"{engine} is not available yet.")
        yield from [found] if found else []
    stays = isinstance(engine, str) and attribute("engines", engine, "MOVES") is False
    options = config["expert_parallel"]
    for name in ("capacity", "rank_space"):
        if stays and options.get(name):
            expected = f"0 with engine {engine!r}, which sends no tokens"
            moving = one_of(["auto", *(one for one in members("engines") if attribute("engines", one, "MOVES"))])
            yield wrong(f"expert_parallel.{name}", options[name], expected, f"Set engine to {moving}.")


def _train(config):
    data, every = config["data"], config["train"].get("eval_every")
    if data.get("test_share", 0.05) == 0 and not data.get("valid", "") and every:
        fix = "Set train.eval_every=0, name a file in data.valid, or hold rows out with data.test_share."
        yield wrong("train.eval_every", shown(every), "0 where data.test_share=0.0 holds no row out", fix)
    if config["train"].get("patience") and every == 0:
        fix = "Set train.eval_every to the steps between two evaluations, or train.patience to 0."
        yield wrong("train.patience", shown(config["train"]["patience"]), "0 where train.eval_every=0", fix)
    start = config["train"].get("init_from")
    if isinstance(start, str) and start and not is_url(start) and not there(path_of(start).is_dir):
        yield wrong(
            "train.init_from", f"{start!r} (no such folder)", 'a workdir to start from, or ""', "Check the path."
        )


def _mesh(config):
    """What can be said of batch and mesh before the number of devices is known."""
    mesh, train = config["mesh"], config["train"]
    numbers = [*(mesh.get(axis) for axis in tables.MESH_AXES[:3]), train.get("batch_size"), train.get("accumulate")]
    if not all(isinstance(n, int) and n and -1 <= n <= MOST for n in numbers):
        return
    data, fsdp, expert, batch, parts = numbers
    slices = mesh.get("dcn", 1)
    data = max(data, 1) * (slices if isinstance(slices, int) and slices > 0 else 1)
    if batch % parts:
        fix = "Change batch_size or accumulate."
        yield wrong("train.batch_size", batch, f"a multiple of train.accumulate = {parts}", fix)
        return
    unit = objectives.unit(config)
    if batch // parts % unit:
        expected = f"whole units of {unit} rows a micro-step, which this objective keeps together"
        yield wrong("train.batch_size", f"{batch} in {parts} micro-steps", expected, "Change batch_size or accumulate.")
    elif batch // parts % (data * fsdp * expert * unit):
        rows = f"{batch // parts} rows" if unit == 1 else f"{batch // parts} rows (units of {unit} rows)"
        expected = f"data * fsdp * expert to divide the {rows} of a micro-step"
        got = f"data={shown(data)}, fsdp={shown(fsdp)}, expert={shown(expert)}"
        fault = at_fault(dict(data=data, fsdp=fsdp, expert=expert), tables.MESH_AXES[:3], batch // parts)
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
    if isinstance(config.get("engine"), str) and attribute("engines", config["engine"], "MOVES"):
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
    stages, total, tasks = config["schedule"], config["train"].get("steps"), tasks_of(config)
    if not stages or not all(isinstance(stage, dict) for stage in stages.values()):
        yield wrong("schedule", shown(stages), "at least one stage: s00=dict(steps, tasks, freeze, set, route)")
        return
    other = [name for name in stages if not isinstance(name, str)]
    if other:  # a number may have more digits than Python prints
        yield wrong("schedule", shown(other[0]), "stages named s00, s01, ...", "They run in the order of their names.")
        return
    for name, stage in stages.items():
        where = f"schedule.{name}"
        if not STAGE_NAME.fullmatch(name):
            yield wrong(where, shown(name), "a stage named s00, s01, ...", "Stages run in the order of their names.")
        yield from group_problems(where, stage, {**tables.STAGE, "set": {}}, elsewhere=("objective",))
        if stage.get("objective"):
            yield from member_problems(f"{where}.objective", stage["objective"], "objectives")
        elif "objective" in stage and not isinstance(stage["objective"], dict):
            yield wrong(f"{where}.objective", shown(stage["objective"]), "a dict of options")
        for task in task_list(stage.get("tasks")):
            if task not in tasks and not may_name_more(tasks):
                yield wrong(
                    f"{where}.tasks", shown(task), f"tasks among data.tasks = {','.join(tasks)}", "Add it there."
                )
        bounds = ROWS.fullmatch(stage["rows"]) if isinstance(stage.get("rows"), str) else None
        if stage.get("rows") and not (bounds and int(bounds[1]) < int(bounds[2]) <= 100):
            expected = '"", or percent of the training prompts, such as "0-60" and "60-100"'
            yield wrong(f"{where}.rows", shown(stage["rows"]), expected)
        if stage.get("freeze") and not all(FREEZE.fullmatch(part) for part in parts_of(stage["freeze"])):
            yield wrong(f"{where}.freeze", shown(stage["freeze"]), "a comma list of path patterns such as */router/*")
        rules = config["method"].get("rules")
        rules = rules if isinstance(rules, dict) else {}
        if stage.get("route") and not any(isinstance(rule, dict) and "router" in rule for rule in rules.values()):
            yield wrong(f"{where}.route", shown(stage["route"]), "a rule with a router", "There is nothing to route.")
        changes = stage.get("set")
        if isinstance(changes, dict) and changes:
            found = list(_changes(f"{where}.set", changes, config))
            yield from found
            if not found and valid:
                for problem in problems({**merged(config, changes), "schedule": {"s00": tables.WHOLE}}):
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
            yield wrong(f"{where}.{key}", shown(value), f"a value like {shown(config[key])}")
        elif isinstance(value, dict):
            yield from _changes(f"{where}.{key}", value, config[key])

"""Objectives and trained copies in a config: which members a run uses, the rows that they read, what excludes what."""

from molora_jax.config.fields import did_you_mean, one_of, wrong
from molora_jax.config.members import attribute, is_member, members
from molora_jax.config.values import merged, shown

PLAIN = {"name": "lm"}  # of a config without `objective`, as older versions wrote it
COPIES = ("embed", "head", "norms", "all")


def used(config) -> dict[str, dict]:
    """`{where: options}` of the run's objective and of each stage's own, of a ConfigDict or a nested dict."""
    found, schedule = {"objective": config.get("objective") or PLAIN}, config.get("schedule", {})
    for name, stage in schedule.items() if hasattr(schedule, "items") else ():
        own = stage.get("objective") if hasattr(stage, "get") else None
        if own and isinstance(name, str):
            found[f"schedule.{name}.objective"] = own
    return dict(sorted(found.items()))


def trained(config) -> dict[str, dict]:
    """Of `used`, those that some stage trains by: without the run's own where every stage has another."""
    found, schedule = used(config), config.get("schedule", {})
    own = [where for where in found if where != "objective"]
    return {where: found[where] for where in own} if own and len(own) == len(schedule) else found


def in_stage(config: dict, name: str) -> dict:
    """A run's config as its stage `name` changes it, `set` and `objective` (whole: another member has other options).

    The stages that train by the run's own objective then say so, so that its head is still known.
    """
    schedule = config["schedule"]
    stage = schedule[name]
    out, own = merged(config, stage.get("set") or {}), stage.get("objective")
    if own:
        run = config.get("objective") or PLAIN
        out["schedule"] = {n: {**s, "objective": s.get("objective") or run} for n, s in schedule.items()}
        out["objective"] = own
    return out


def _states(config, wanted) -> dict[str, object]:
    """A class attribute of every member used, where the config names one that exists."""
    names = {where: value.get("name") for where, value in used(config).items() if hasattr(value, "get")}
    found = {w: n for w, n in names.items() if isinstance(n, str) and is_member("objectives", n)}
    return {where: attribute("objectives", name, wanted) for where, name in found.items()}


def unit(config) -> int:
    """Consecutive rows that belong together."""
    return max(_states(config, "UNIT").values(), default=1)


def reads(config) -> str:
    """What the rows of the run are: "text", "label" or "pair"."""
    return next(iter(_states(config, "READS").values()), "text")


def has_head(config) -> bool:
    """Whether something trains without a rule."""
    return any(_states(config, "HEAD").values())


def train_base(config) -> tuple[str, ...]:
    text = config["method"].get("train_base", "")
    return tuple(part.strip() for part in text.split(",") if part.strip()) if isinstance(text, str) else ()


def problems(config):
    """What ties objectives, trained copies and other fields together."""
    kinds = _states(config, "READS")
    for where, kind in kinds.items():
        first = next(iter(kinds))
        if kind != kinds[first]:
            expected = f"an objective that reads the same rows as {first} ({kinds[first]} rows)"
            fix = "Give it a run of its own, with train.init_from=DIR of this one."
            yield wrong(f"{where}.name", f"{used(config)[where]['name']!r}, which reads {kind} rows", expected, fix)
    yield from _form(config, next(iter(kinds.values()), "text"))
    names, rules = train_base(config), config["method"].get("rules")
    for name in names:
        if name not in COPIES:
            expected = f"a comma list of {one_of(COPIES)}"
            yield wrong("method.train_base", repr(name)[:200], expected, did_you_mean(name, COPIES))
    if "all" in names and len(names) > 1:
        yield wrong("method.train_base", repr(",".join(names))[:200], "'all' alone, or some of embed,head,norms")
    if "all" in names and rules:
        reason = "no rules: beside experts the gradient of a frozen kernel is not formed"
        yield wrong("method.train_base", "'all' with rules", reason, "Take the rules out, or name embed,head,norms.")
    quant = config["base"].get("quant", "none")
    if "all" in names and quant != "none":
        reason = "'' or some of embed,head,norms with base.quant: the codes of a kernel have no gradient"
        yield wrong("method.train_base", f"'all' with base.quant={quant!r}", reason, "Set base.quant=none.")
    if isinstance(rules, dict) and "modules" in rules:
        reason = "another name: the trained modules beside the rules stand under it"
        yield wrong("method.rules.modules", "a rule of this name", reason, "Rename the rule.")
    if config["train"].get("exact") is True:
        for where, exact in _states(config, "EXACT").items():
            if not exact:
                sums = [name for name in members("objectives") if attribute("objectives", name, "EXACT")]
                expected = f"{one_of(sums)} with train.exact"
                yield wrong(f"{where}.name", repr(used(config)[where]["name"]), expected, "Leave exact out.")
        if names:
            yield wrong("method.train_base", repr(",".join(names)), '"" with train.exact', "Leave exact out.")


FORMATS = {"labelled": "label", "preference": "pair"}  # of data.format; the others are text


def _form(config, kind):
    """Fields of `data` that say what the rows are, against what the objective reads."""
    data = config["data"]
    form = data.get("format", "auto")
    if isinstance(form, str) and form != "auto" and FORMATS.get(form, "text") != kind:
        expected = f"'auto', or the form of {kind} rows, which the objective reads"
        yield wrong("data.format", repr(form)[:200], expected)
    if kind != "text" and data.get("raw") is True:
        yield wrong("data.raw", "True", f"False: {kind} rows have a form of their own")
    if kind == "label":
        for name in ("system", "template_args"):
            if data.get(name):
                yield wrong(f"data.{name}", shown(data[name]), '"": a labelled text has no chat template')

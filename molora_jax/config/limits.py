"""The limits that members state about the rule they stand in, and their reading.

A member says which rules it cannot serve with literals, which are read here and never imported:

    REFUSES = ((field, ((path, test, value), ...), expected, fix), ...)

A row refuses a rule of which all conditions hold, in the name of `field`. Paths are `adapter.rank`, `router.share`,
`placement.iterations`, `down` (of the rule) or `train.init_from` (of the config). Tests: `is`, `in`, `not in`, `above`
of a value; `differs from` the value at another path; `given`, whether it is there at all; `states` and `needs` of the
member that a path names: whether its file states the attribute `value` as true, or has `value` among its NEEDS. A
condition on what is not there does not hold.
"""

from molora_jax.config.fields import wrong
from molora_jax.config.members import attribute, is_member, members, options

AXES = dict(adapter="adapters", router="routers", placement="placements")
TESTS = {
    "is": lambda value, of: value == of,
    "in": lambda value, of: value in of,
    "not in": lambda value, of: value not in of,
    "above": lambda value, of: value > of,
}


def placement_of(rule: dict, sites: tuple[str, ...]) -> str:
    """The name of a rule's placement: the one that it names, or the one of its sites."""
    if "placement" in rule:
        return rule["placement"]["name"]
    return next(
        n for n in members("placements") if not named(n) and set(sites) <= set(states("placements", n, "SITES"))
    )


def named(placement: str) -> bool:
    """Whether a rule has to name it."""
    return bool(attribute("placements", placement, "NAMED"))


def states(axis: str, name: str, wanted: str):
    """A literal of a member's file, () where it has none."""
    found = attribute(axis, name, wanted) if is_member(axis, name) else None
    return () if found is None else found


def option(rule: dict, path: str):
    """The value at `adapter.rank`, `down`, ... of a rule, its default where left out, None where there is none."""
    group, _, name = path.rpartition(".")
    if not group:
        return rule.get(name)
    if group not in rule:
        return None
    member = rule[group]["name"]
    field = options(AXES[group], member).get(name)
    found = rule[group].get(name, None if field is None else field.default)
    return found.get("name") if isinstance(found, dict) else found  # of a start with options its name


def refused(where: str, rule: dict, rows, *, start: str):
    """Problems of a rule by `rows` of a member's REFUSES; `start` is train.init_from."""
    values = {"train.init_from": start or ""}

    def value(path):
        return values[path] if path in values else option(rule, path)

    def holds(path, test, of):
        found = value(path)
        if test == "given":
            return (path.partition(".")[0] in rule) == of
        if found is None:
            return False
        if test == "differs from":
            return found != value(of)
        if test in ("states", "needs"):
            group, _, name = path.partition(".")
            axis = "inits" if name == "init" else AXES[group]
            return of in states(axis, found, "NEEDS") if test == "needs" else bool(states(axis, found, of))
        return TESTS[test](found, of)

    for field, conditions, expected, fix in rows:
        if all(holds(*condition) for condition in conditions):
            yield wrong(f"{where}.{field}", repr(value(field)), expected, fix.format(where=where))

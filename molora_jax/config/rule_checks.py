"""The checks of `config.method.rules`: each field, and what ties a rule's fields together."""

import re

from molora_jax.config import fields as tables
from molora_jax.config import limits
from molora_jax.config.fields import ATTENTION, FFN, SSM, wrong
from molora_jax.config.members import attribute, member_problem, members, stated_with
from molora_jax.config.resolve import adapter_source, expert_counts, resolve_experts, resolve_layers, resolve_sites
from molora_jax.config.values import group_problems, member_problems, path_of, shown, there
from molora_jax.errors import InputError
from molora_jax.stores import is_url

NAME = re.compile(r"[a-z0-9_]+")


def rule_problems(config):
    rules = config["method"].get("rules")
    yield from group_problems("method", config["method"], {"rules": {}, "train_base": tables.since(tables.TEXT, "")})
    for name, rule in rules.items() if isinstance(rules, dict) else ():
        where = f"method.rules.{name}"
        if not NAME.fullmatch(str(name)):
            yield wrong(where, shown(name), "a name of a-z, 0-9 and _", "Rename the rule.")
        if not isinstance(rule, dict):
            yield wrong(where, shown(rule), "a rule (see configs/common.py)")
            continue
        found = list(group_problems(where, rule, tables.RULE, elsewhere=("adapter", "router", "placement")))
        found += adapter_problems(f"{where}.adapter", rule.get("adapter"))
        if "router" in rule:
            found += member_problems(f"{where}.router", rule["router"], "routers")
        if "placement" in rule:
            found += _placement(f"{where}.placement", rule["placement"])
        yield from found or _rule(where, rule, start=config["train"].get("init_from"))


def adapter_problems(where, value):
    """Of an adapter's options; its start may have options too, `init=dict(name=..., option=...)`."""
    start = value.get("init") if isinstance(value, dict) else None
    if not isinstance(start, dict):
        return member_problems(where, value, "adapters")
    found = member_problems(f"{where}.init", start, "inits")
    return found or member_problems(where, value | {"init": start["name"]}, "adapters")


def _placement(where, value):
    if isinstance(value, dict):
        names = [name for name in members("placements") if limits.named(name)]
        found = member_problem(f"{where}.name", "placements", value.get("name"), among=names)
        leave = "Leave placement out: the sites say whether experts are whole FFNs or projections."
        if found:
            return [found if found.fix else wrong(found.where, found.got, found.expected, leave)]
    return member_problems(where, value, "placements")


def _rule(where, rule, *, start):
    """What ties a rule's fields together; each field alone is right by now."""
    sites, counts = (), ()
    try:
        sites = resolve_sites(rule["sites"], where=f"{where}.sites")
        counts = covered(where, rule)
    except InputError as problem:
        yield problem
    for path in rule["load"]:
        own = adapter_source(path)[1] if isinstance(path, str) else ""
        if not own or not is_url(own) and not there(path_of(own).exists):
            fix = "Check the path." if isinstance(path, str) else "Write (PATH,), with a comma, for one."
            yield wrong(f"{where}.load", shown(path), "paths that exist: DIR of a run, peft:DIR or molora:DIR", fix)
    if rule["load"]:
        yield from _load(where, rule, counts)
    init = limits.option(rule, "adapter.init")
    if init is not None:
        strange = member_problem(f"{where}.adapter.init", "inits", init)
        if strange:
            yield strange
            return
    yield from check_start(where, rule)
    if rule.get("adapters"):
        yield from _kinds(where, rule, sites)
    if sites:
        yield from _at_sites(where, rule, sites, start=start)
    if counts:
        yield from check_counts(where, rule, counts)


def covered(where, rule, num_layers=None):
    """Expert counts of the layers that a rule covers (each count once, where the number of layers is not known)."""
    if num_layers is None and rule["layers"] == "all":
        return tuple(count for count, _ in expert_counts(rule["experts"], where=f"{where}.experts"))
    layers = resolve_layers(rule["layers"], num_layers, where=f"{where}.layers")
    return resolve_experts(rule["experts"], len(layers), where=f"{where}.experts")


def check_start(where, rule):
    """What a start away from B A = 0, or one with a core, asks of the adapter."""
    adapter, init = rule["adapter"]["name"], limits.option(rule, "adapter.init")
    if limits.states("inits", init, "AWAY") and not stated_with("adapters", adapter, "SUBTRACTS", "factors"):
        able = [name for name in members("adapters") if stated_with("adapters", name, "SUBTRACTS", "factors")]
        expected = f"a start of B A = 0: {adapter} does not take a start off, which {', '.join(able)} do"
        yield wrong(f"{where}.adapter.init", shown(init), expected, "Choose another init or adapter.")
    core = bool(stated_with("adapters", adapter, "CORE", "factors"))
    if core != bool(limits.states("inits", init, "CORE")):
        able = [name for name in members("inits") if bool(limits.states("inits", name, "CORE")) == core]
        expected = f"a start {'with' if core else 'without'} a core for {adapter}: {', '.join(able)}"
        yield wrong(f"{where}.adapter.init", shown(init), expected, "Choose another init or adapter.")


def check_counts(where, rule, counts):
    """What a rule asks of its expert counts."""
    if "router" not in rule:
        if set(counts) != {1}:
            placement = rule["placement"]["name"] if "placement" in rule else ""
            base_routes = bool(limits.states("placements", placement, "BASE_ROUTER"))
            why = '"1": the base says how many experts it has' if base_routes else '"1" without a router'
            fix = "Leave experts out." if base_routes else "Add a router, or say 1."
            yield wrong(f"{where}.experts", shown(rule["experts"]), why, fix)
        return
    k, most = limits.option(rule, "router.k") or 1, min(counts) * _places(rule)
    if k > most:
        expected = f"k <= experts, and the fewest experts are {most}"
        yield wrong(f"{where}.router.k", f"{k} (K > E)", expected, "Lower k or raise experts.")
    if limits.option(rule, "router.share") == "model" and len(set(counts)) > 1:
        got = f"'model' with {', '.join(map(str, sorted(set(counts))))} experts"
        yield wrong(f"{where}.router.share", got, "equal counts in all layers", "Change experts or share.")


def _at_sites(where, rule, sites, *, start):
    """What the rule's placement asks of its sites, and what any of its members says that it cannot serve."""
    placement = limits.placement_of(rule, sites)
    served = limits.states("placements", placement, "SITES")
    if not set(sites) <= set(served):
        fix = "Write other sites as another rule."
        yield wrong(f"{where}.sites", shown(rule["sites"]), f"sites of a {placement}: {','.join(served)}", fix)
    if rule.get("base_router", "frozen") != "frozen" and not attribute("placements", placement, "BASE_ROUTER"):
        able = [name for name in members("placements") if attribute("placements", name, "BASE_ROUTER")]
        expected = f"'frozen', or placement=dict(name='{able[0]}')"
        yield wrong(f"{where}.base_router", shown(rule["base_router"]), expected)
    if rule["load"] and not attribute("placements", placement, "LOADS"):
        able = [name for name in members("placements") if attribute("placements", name, "LOADS")]
        yield wrong(f"{where}.load", f"runs for a {placement}", f"a rule whose placement reads runs: {', '.join(able)}")
    for group, axis in limits.AXES.items():
        name = placement if group == "placement" else rule[group]["name"] if group in rule else None
        if name is not None:
            yield from limits.refused(where, rule, limits.states(axis, name, "REFUSES"), start=start)
    if "router" in rule and not limits.named(placement):
        yield from _share(f"{where}.router.share", limits.option(rule, "router.share") or "site", sites)


def _share(where, share, sites):
    got = f"{share!r} on sites {','.join(sites)}"
    if share == "attn" and not set(sites) <= {*ATTENTION, *SSM}:
        expected = f"sites among {','.join((*ATTENTION, *SSM))} for share 'attn'"
        yield wrong(where, got, expected, "Write two rules, or use 'site'.")
    if share == "ffn" and sites != ("ffn",) and not set(sites) <= set(FFN):
        yield wrong(where, got, "sites among gate,up,down, or ffn, for share 'ffn'", "Write two rules, or use 'site'.")


def _own_kinds(rule) -> tuple[str, ...]:
    """Kinds of adapters that the rule's placement has of its own."""
    return tuple(limits.states("placements", rule["placement"]["name"], "KINDS")) if "placement" in rule else ()


def _places(rule) -> int:
    """How often a rule's experts stand in a block, where one decision is about all of them."""
    own = _own_kinds(rule)
    if not own:
        return 1
    kinds = rule.get("adapters") or (rule["adapter"]["name"],)
    at_sites = [kind for kind in kinds if kind not in own]
    return len(at_sites) * len(resolve_sites(rule["sites"])) + len(kinds) - len(at_sites)


def _kinds(where, rule, sites):
    """`adapters`: names of adapters, and of kinds that the placement has of its own."""
    where, kinds, own = f"{where}.adapters", rule["adapters"], _own_kinds(rule)
    if not own:
        able = next(name for name in members("placements") if limits.states("placements", name, "KINDS"))
        yield wrong(where, shown(kinds), f"none without placement=dict(name={able!r})", "Add that to the rule.")
        return
    for kind in kinds:
        found = None if kind in own else member_problem(where, "adapters", kind, among=(*members("adapters"), *own))
        if found:
            yield found
            return
    first = next((kind for kind in kinds if kind not in own), None)
    if len(set(kinds)) < len(kinds):
        yield wrong(where, shown(kinds), "each kind once")
    elif first != rule["adapter"]["name"]:
        expected = f"{rule['adapter']['name']!r} as the first that stands at projections, since adapter has its options"
        yield wrong(where, shown(kinds), expected, "Name it first, or another adapter.name.")
    if rule["experts"] != "1":
        rule_at = where.removesuffix(".adapters")
        yield wrong(f"{rule_at}.experts", shown(rule["experts"]), '"1" with adapters: one of each kind')


def _load(where, rule, counts):
    """Loaded experts are read as products B A, one expert a run."""
    number, adapter = len(rule["load"]), rule["adapter"]
    if set(counts) != {number}:
        yield wrong(f"{where}.experts", shown(rule["experts"]), f'"{number}", one for each entry of load')
    init = limits.option(rule, "adapter.init")
    if not attribute("adapters", adapter["name"], "LOADS") or limits.states("inits", init, "NEEDS"):
        able = " or ".join(name for name in members("adapters") if attribute("adapters", name, "LOADS"))
        starts = " or ".join(repr(name) for name in members("inits") if not limits.states("inits", name, "NEEDS"))
        got = f"{adapter['name']!r} with init {init!r}"
        yield wrong(f"{where}.adapter", got, f"{able} with init {starts}, to hold what load reads")

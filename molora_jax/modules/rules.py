"""The rules of `attach`: as in a config, but that `sites` are paths of Dense layers in the caller's model."""

import dataclasses
import fnmatch
import re
from collections.abc import Mapping

from molora_jax.adapters.base import Adapter
from molora_jax.config.fields import did_you_mean, one_of, shown, wrong
from molora_jax.modules.members import Made, made
from molora_jax.routers.base import Router

NAME = re.compile(r"[a-z0-9_]+")
TAKEN = ("kernel", "bias")  # names of a Dense layer's own
# Fields of a config's rule that mean a stack of layers: only with these values
NEUTRAL = {
    "layers": "all", "load": (), "loaded": "frozen", "down": "once", "shrink": False, "base_router": "frozen",
    "placement": None,
}  # fmt: skip
FIELDS = ("sites", "experts", "adapter", "router")


@dataclasses.dataclass(frozen=True)
class SiteRule:
    """`patterns` are matched against the whole path of a Dense layer; `*` stands for any characters, `/` too."""

    name: str
    patterns: tuple[str, ...]
    made: Made

    def matches(self, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.patterns)


def read(rules, engine, mesh) -> tuple[SiteRule, ...]:
    """Args:
      rules: `{name: rule}` (a config's `method.rules` too) or a list of rules, `rule0`, `rule1`, ...

    Raises:
      InputError: an unknown field, one that a foreign model has no use for, members that do not go together.
    """
    rules = rules.to_dict() if hasattr(rules, "to_dict") else rules
    if not isinstance(rules, Mapping):
        if isinstance(rules, (str, bytes)) or not hasattr(rules, "__iter__"):
            raise wrong("rules", shown(rules), "a list of rules, or a dict of them by name")
        rules = {f"rule{i}": rule for i, rule in enumerate(rules)}
    if not rules:
        raise wrong("rules", "no rule", "at least one", 'Such as [dict(sites="*/mlp/*", adapter=mj.Lora(rank=8))].')
    return tuple(_rule(name, rule, engine, mesh) for name, rule in rules.items())


def _rule(name, rule, engine, mesh) -> SiteRule:
    where = f"rules.{name}"
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in TAKEN:
        raise wrong(where, shown(name), f"a name of a-z, 0-9 and _, not {' or '.join(TAKEN)}", "Rename the rule.")
    if not isinstance(rule, Mapping):
        raise wrong(where, shown(rule), f"a dict with {', '.join(FIELDS)}")
    for field, value in rule.items():
        if field in NEUTRAL:
            value = tuple(value) if isinstance(value, list) else value
            if value != NEUTRAL[field]:
                fix = "Leave it out: a foreign model has no layers by number; choose Dense layers by `sites`."
                raise wrong(f"{where}.{field}", shown(value), repr(NEUTRAL[field]), fix)
        elif field not in FIELDS:
            raise wrong(f"{where}.{field}", "an unknown field", one_of(FIELDS), did_you_mean(field, FIELDS))
    sites = rule.get("sites")
    patterns = tuple(part.strip() for part in sites.split(",")) if isinstance(sites, str) else tuple(sites or ())
    if not patterns or not all(isinstance(part, str) for part in patterns):
        expected = 'patterns of paths by commas, such as "*/attention/*,head"'
        raise wrong(f"{where}.sites", shown(sites), expected, "`mj.sites(model, x)` lists the paths.")
    if "adapter" not in rule:
        raise wrong(f"{where}.adapter", "nothing", "an adapter", "Such as adapter=mj.Lora(rank=8).")
    experts, router = rule.get("experts", 1), rule.get("router")
    parts = made(where, "projection", ("dense",), experts, rule["adapter"], router, engine, mesh)
    _one_layer(where, parts)
    return SiteRule(name, patterns, parts)


def _one_layer(where: str, parts: Made) -> None:
    """Raises InputError for members that belong to several layers: here every Dense layer is on its own."""
    own, router = type(parts.adapter), parts.router
    if own.init_shared is not Adapter.init_shared:
        fix = "It works at one layer (`mj.RoutedLoRA`) and in a run of this library."
        raise wrong(f"{where}.adapter", f"{own.__name__}, whose leaves the layers share", "leaves of one layer", fix)
    if router is not None and type(router).init_shared is not Router.init_shared:
        raise wrong(f"{where}.router", f"{type(router).__name__}, whose leaves the layers share", "leaves of one layer")
    if router is not None and router.share != "site":
        fix = "Every Dense layer has a router of its own here."
        raise wrong(f"{where}.router.share", repr(router.share), "'site'", fix)

"""From a config to a `Model`: the only place where names become members."""

from molora_jax import config as config_lib
from molora_jax import placements
from molora_jax.adapters import ADAPTERS
from molora_jax.backbones.base import Backbone
from molora_jax.backbones.model import Model
from molora_jax.config import outside
from molora_jax.config.resolve import split_commas
from molora_jax.core.rules import Rule, adapter_sites, router_site
from molora_jax.errors import InputError
from molora_jax.losses import LOSSES
from molora_jax.losses.base import Penalty
from molora_jax.placements import PLACEMENTS
from molora_jax.routers import ROUTERS
from molora_jax.routers.asked import check_slots


def _member(axis, table, options, name=None):
    options = dict(options)
    return outside.member(axis, table, options.pop("name", name))(**options)


def compile_model(config, decoder: Backbone, *, max_segments: int = 0, tasks: tuple[str, ...] | None = None) -> Model:
    """The validated config's rules on this decoder. Rules keep the config's (sorted) order.

    Args:
      tasks: the names behind `task_ids`, as the config's losses use them; None: the entries of `data.tasks`.

    Raises:
      InputError: an adapter that this decoder's widths or layers do not fit.
    """
    rules = []
    for name, rule in sorted(config.method.rules.items()):
        layers = config_lib.resolve_layers(rule.layers, decoder.layers)
        counts = dict(zip(layers, config_lib.resolve_experts(rule.experts, len(layers)), strict=True))
        rules.append(
            Rule(
                name=name,
                sites=config_lib.resolve_sites(rule.sites, absent=decoder.ABSENT),
                experts=tuple(counts.get(layer, 0) for layer in range(decoder.layers)),
                adapter=_member("adapters", ADAPTERS, rule.adapter),
                router=_member("routers", ROUTERS, rule.router) if "router" in rule else None,
                down=rule.down,
                gates_scale_base=rule.shrink,
                base_router=rule.get("base_router", "frozen"),  # not in runs of older versions
                load=tuple(rule.load),
                loaded=rule.get("loaded", "frozen"),  # not in runs of older versions
                placement=_member("placements", PLACEMENTS, rule.placement) if "placement" in rule else None,
            )
        )
    model = Model(
        decoder, tuple(rules), apart(compile_losses(config))[0], remat=config.train.remat, max_segments=max_segments,
        attention=config.train.get("attention", "xla"),  # not in runs of older versions
        tasks=split_commas(config.data.tasks) if tasks is None else tasks,
    )  # fmt: skip
    _one_change_of_base_experts(rules)
    for rule in rules:
        rule.adapter.check(f"method.rules.{rule.name}.adapter", adapter_sites(decoder, rule, model.segments))
        _check_router(rule, model)
    return model


def _check_router(rule: Rule, model: Model) -> None:
    """Asks a router from outside once for every number of experts and width that it serves."""
    acting = [segment for segment in model.segments if rule.experts[segment.start]]
    found = [router_site(model.config, scope, segment, rule) for segment in acting for scope in rule.router_scopes]
    for site in {(site.experts, site.d_in): site for site in reversed(found)}.values():
        check_slots(rule.router, site, f"method.rules.{rule.name}.router")


def compile_base(config, decoder: Backbone) -> Model:
    """A frozen base alone, under the rest of a config: no rules, no losses."""
    with config.copy_and_resolve_references().unlocked() as plain:
        plain.method.rules, plain.losses = {}, {}
    return compile_model(plain, decoder)


def _one_change_of_base_experts(rules):
    """Raises InputError where two rules change a base's own experts in one layer: hidden states are formed once."""
    acting = [rule for rule in rules if "experts" in placements.of(rule).acts(rule)]
    for i, rule in enumerate(acting):
        for other in acting[:i]:
            if any(a and b for a, b in zip(rule.experts, other.experts, strict=True)):
                raise InputError(
                    f"method.rules.{rule.name}.layers", got=f"layers of the rule {other.name} too",
                    expected="one rule of the placement base_experts a layer", fix="Give them different layers.",
                )  # fmt: skip


def compile_losses(config) -> tuple[tuple[str, object], ...]:
    """`(name, member)` of the config's losses beside the objective's (a stage may change their weights)."""
    return tuple((name, _member("losses", LOSSES, options, name)) for name, options in sorted(config.losses.items()))


def apart(losses) -> tuple[tuple, tuple]:
    """`(routing losses, penalties)` of `compile_losses`."""
    of = lambda kind: tuple(pair for pair in losses if isinstance(pair[1], Penalty) == kind)  # noqa: E731
    return of(False), of(True)

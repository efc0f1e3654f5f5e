"""Which form of each method enters a table: what is changed in its shipped config, and nothing else.

    rank     every projection sees rank 16 at work: R (rank of an expert) times the most experts that a token may use
             (its K, all where a router may take all), times the passes of a chain
    params   as many trained parameters as plain LoRA of rank 16, within 5 %

alpha / R stays the config's, so that a change of R is no change of scale. A change is a dotted field and its text, as
after `--config.` on a command line.
"""

import dataclasses
import math

from launch import flags
from molora_jax import config as config_lib
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.sizes import num_trainable
from molora_jax.catalogue.methods import METHODS
from molora_jax.errors import InputError

TABLES = ("rank", "params")
FULL, TITLE = "full", "full fine-tuning"  # no method of the literature: every parameter of the base
RANK = 16
TOLERANCE = 0.05

# rank: where R alone cannot do it. Dense mixtures of 6 experts have no whole R; SMoRA's experts are of rank 1.
FIRST = {
    "dynmole": {"method.rules.ffn.experts": "8"},
    "loramoe": {"method.rules.ffn.experts": "8"},
    "smora": {"method.rules.all.router.k": "16"},
}
# params: what is turned in place of R
KNOBS = {"mos": "method.rules.all.adapter.budget", "smora": "method.rules.all.experts"}
# what a table leaves as shipped, because the turn that it asks for has no sense there
AS_SHIPPED = {
    "rank": {
        "vera": "its R is the number of directions of a frozen pair",
        "ia3": "it has vectors and no rank",
        "randlora": "its change has full rank, and a smaller R trains more",
        "mora_cl": "its experts are a bank for tasks that come one after the other",
    },
    "params": {
        "vera": "its R would be far above the widths",
        "ia3": "it has a vector a projection",
        "nola": "random matrices for so many coefficients would cost more than full fine-tuning",
        "lora_xs": "a core of so many parameters would be far wider than the kernel",
        "lora_sb": "a core of so many parameters would be far wider than the kernel",
        "mora_cl": "its experts are a bank for tasks that come one after the other",
    },
}
FALLING = ("randlora",)  # trains less the larger R is, about as 1 / R
FEWER = (1.0, 0.9, 0.75, 0.6, 0.5)  # of the experts, tried in this order where R alone leaves 5 %
WHOLE = dict.fromkeys(("x_lora", "meteora"), "an expert for each task, and R is a whole number")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method with other fields, which a claim is about; no row of a table of all methods. `times`: of the steps."""

    method: str
    title: str
    changes: dict[str, str] = dataclasses.field(default_factory=dict)
    times: int = 1


VARIANTS = {
    "lora_twice": Variant("lora", "LoRA with twice the samples", times=2),
    "mola_rectangle": Variant("mola", "MoLA, as many experts in every layer", {"method.rules.all.experts": "5"}),
    "mola_triangle": Variant("mola", "MoLA, more experts in lower layers", {"method.rules.all.experts": "8|6|4|2"}),
    "mixlora_unbalanced": Variant("mixlora", "MixLoRA without its balance loss", {"losses.balance.weight": "0.0"}),
    "mixlora_balanced": Variant("mixlora", "MixLoRA with ten times the balance loss", {"losses.balance.weight": "0.1"}),
}


def base_of(method: str) -> str:
    """The method that a name stands for, variants included."""
    return VARIANTS[method].method if method in VARIANTS else method


def title(method: str) -> str:
    return VARIANTS[method].title if method in VARIANTS else METHODS[method].title


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method in a table: its `changes`, and its config for each seed.

    `rank` is at work (see above); `cannot` says why the method misses the table's rule.
    """

    method: str
    changes: dict[str, str]
    configs: tuple
    rank: int
    trainable: int
    cannot: str = ""
    grid: dict | None = None  # validation loss by learning rate, and the rate that was taken
    rate: str = ""

    @property
    def title(self) -> str:
        return TITLE if self.method == FULL else title(self.method)


def settled(method: str, changes: dict, common: list):
    """The validated config of a method with a table's changes, after those that all runs share."""
    row = METHODS["lora" if method == FULL else method]
    own = [(field, str(value)) for field, value in row.overrides.items()]
    config = flags.load(flags.ROOT / row.config)
    if method == FULL:
        with config.unlocked():
            config.method.rules, config.method.train_base = {}, "all"
    config = flags.override(config, [*own, *common, *changes.items()])
    config_lib.validate(config)
    return config


def entry(table: str, method: str, decoder, common: list, seeds: int, own=()) -> Entry:
    """The form of a method in a table, on this decoder; `own`: more changes of this method, whatever the table.

    Raises:
      InputError: a config that the decoder does not fit.
    """
    if method in VARIANTS:
        variant = VARIANTS[method]
        changes = dict(variant.changes)
        if variant.times != 1:
            changes["train.steps"] = str(variant.times * int(dict(common)["train.steps"]))
        found = entry(table, variant.method, decoder, common, seeds, [*own, *changes.items()])
        return dataclasses.replace(found, method=method, changes=changes | found.changes)
    if method == FULL:
        configs = [settled(method, {}, [*common, ("seed", str(seed))]) for seed in range(seeds)]
        count = sum(math.prod(leaf.shape) for leaf in decoder.shapes().values())
        return Entry(method, {}, tuple(configs), 0, count, "it trains the base itself")
    search = _Search(method, decoder, common, own)
    common = [*common, *own]
    shipped = AS_SHIPPED[table].get(method, "")
    changes = {} if shipped else search.equal_rank() if table == "rank" else search.equal_params()
    model, config = search.model(changes), search.config({})
    changes = {field: text for field, text in changes.items() if text != str(_at(config, field))}
    rank, count, cannot = max(map(at_work, model.rules)), num_trainable(model), ""
    if shipped:
        cannot = shipped
    elif table == "rank" and {at_work(rule) for rule in model.rules} != {RANK}:
        cannot = WHOLE.get(method, f"no whole R gives {RANK}")
    elif table == "params" and abs(count / search.wanted - 1) > TOLERANCE:
        cannot = WHOLE.get(method, "no R and number of experts does")
    configs = [settled(method, changes, [*common, ("seed", str(seed))]) for seed in range(seeds)]
    return Entry(method, changes, tuple(configs), rank, count, cannot)


def at_work(rule) -> int:
    """R times the most experts of a token, times the passes."""
    experts = 1 if rule.router is None else max(rule.router.k_max(n) for n in rule.experts if n)
    return rule.adapter.rank * experts * getattr(rule.placement, "iterations", 1)


class _Search:
    def __init__(self, method, decoder, common, own):
        self.method, self.decoder, self.common = method, decoder, [*common, *own]
        plain = compile_model(settled("lora", {}, common), decoder)
        self.wanted = num_trainable(plain)

    def config(self, changes):
        return settled(self.method, changes, self.common)

    def model(self, changes):
        config = self.config(changes)
        config_lib.check_model(config, self.decoder.layers, self.decoder.dims)
        return compile_model(config, self.decoder)

    def ranked(self, ranks: dict) -> dict:
        """Changes that set R of the named rules."""
        config, changes = self.config({}), {}
        for name, rank in ranks.items():
            adapter = config.method.rules[name].adapter
            changes[f"method.rules.{name}.adapter.rank"] = str(rank)
            if "alpha" in adapter:  # ALLoRA has none
                changes[f"method.rules.{name}.adapter.alpha"] = str(adapter.alpha / adapter.rank * rank)
        return changes

    def equal_rank(self) -> dict:
        first = FIRST.get(self.method, {})
        model = self.model(first)
        return first | self.ranked({r.name: max(1, round(RANK * r.adapter.rank / at_work(r))) for r in model.rules})

    def equal_params(self) -> dict:
        if self.method in KNOBS:
            field = KNOBS[self.method]
            return self.nearest(lambda n: {field: str(n)}, int(_at(self.config({}), field)))
        found, rules = [], self.config({}).method.rules
        if self.method in FALLING:
            (name, rule), count = *rules.items(), num_trainable(self.model({}))
            near = round(rule.adapter.rank * count / self.wanted)
            return min((self.ranked({name: n}) for n in range(max(1, near - 1), near + 2)), key=self.miss)
        for fraction in (1.0,) if self.method in WHOLE else FEWER:
            fewer = self.fewer(fraction)
            found.append(self.nearest(lambda n, fewer=fewer: fewer | self.ranked(dict.fromkeys(rules, n)), 2))
            if self.miss(found[-1]) <= TOLERANCE:
                return found[-1]
        return min(found, key=self.miss)

    def fewer(self, fraction: float) -> dict:
        """Changes that keep a fraction of every rule's experts, never fewer than a token uses."""
        changes = {}
        for name, rule in self.config({}).method.rules.items():
            if "router" in rule and fraction < 1:
                least = rule.router.get("k", 1)
                counts = [max(least, 1, round(fraction * int(n))) for n in rule.experts.split("|")]
                changes[f"method.rules.{name}.experts"] = "|".join(map(str, counts))
        return changes

    def nearest(self, changes_of, start: int) -> dict:
        """The whole number whose count is nearest to the wanted one; counts are affine in it."""
        counts = [num_trainable(self.model(changes_of(n))) for n in (start, start + 1)]
        exact = start + (self.wanted - counts[0]) / (counts[1] - counts[0])
        return changes_of(max(1, round(exact)))

    def miss(self, changes) -> float:
        return abs(num_trainable(self.model(changes)) / self.wanted - 1)


def _at(config, field):
    for key in field.split("."):
        config = config[key]
    return config


def check_methods(text: str, extra=()) -> list[str]:
    """The names of `--methods`, in the order of the table of methods; `extra` ones come first, variants last.

    All are all but the variants.
    """
    every = [*extra, *METHODS, *VARIANTS]
    names = [*extra, *METHODS] if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in every:
            near = flags.did_you_mean(name, every)
            raise InputError("--methods", got=repr(name), expected="all, or names among " + ", ".join(every), fix=near)
    if len(names) != len(set(names)):
        raise InputError("--methods", got=repr(text), expected="every method once")
    return [name for name in every if name in names]

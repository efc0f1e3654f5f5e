"""The config contract: validate a config, check it against a model and a mesh, turn it to and from JSON.

`validate(config)` runs before jax is imported; `check_model` once the base model's shape is known; `check_mesh` once
the number of devices is. All raise `InputError`: field, what was got, what was expected, what to change; several
mistakes are reported together. Fields and ranges: `config/fields.py`; options of members: their own files.
"""

from molora_jax.config import checks as config_checks
from molora_jax.config import objectives
from molora_jax.config.fields import PROJECTIONS, wrong
from molora_jax.config.limits import option, placement_of, states
from molora_jax.config.resolve import resolve_experts, resolve_layers, resolve_mesh, resolve_sites
from molora_jax.config.rule_checks import check_counts, covered
from molora_jax.config.values import plain, raise_all
from molora_jax.errors import InputError

__all__ = [
    "check_mesh", "check_model", "from_dict", "resolve_experts", "resolve_layers", "resolve_mesh", "resolve_sites",
    "to_dict", "validate",
]  # fmt: skip


def validate(config, *, need_rules=True):
    """Checks every field of a ConfigDict or nested dict. `need_rules=False` accepts a config that trains nothing."""
    config = plain(config)
    problems = config_checks.problems(config)
    beside = problems or objectives.train_base(config) or objectives.has_head(config)
    if need_rules and not beside and not config["method"]["rules"]:
        fix = "Start from a config such as configs/lora.py."
        if config.get("surgery"):
            fix = "This config is a surgery on finished runs: python -m launch.surgery --config=FILE.py --workdir=OUT."
        problems = [wrong("method.rules", "no rule", "at least one", fix)]
    raise_all(problems)


def check_model(config, num_layers, dims=None, absent=None):
    """The second pass, against the base model: `dims` maps a projection to `(D_in, D_out)` (or is such a function);
    `absent` maps sites that this base does not have to the reason."""
    absent = absent or {}
    problems = []
    for name, rule in plain(config)["method"]["rules"].items():
        where = f"method.rules.{name}"
        try:
            problems += check_counts(where, rule, covered(where, rule, num_layers))
        except InputError as problem:
            problems.append(problem)
        try:
            sites = resolve_sites(rule["sites"], where=f"{where}.sites", absent=absent)
        except InputError as problem:
            problems.append(problem)
            continue
        needs = states("placements", placement_of(rule, sites), "NEEDS")
        fixed = states("placements", placement_of(rule, sites), "OWNS") if "placement" in rule else ()
        missing = [site for site in sites if site in absent and not fixed]
        for need in (need for need in needs if need in absent):
            placement = rule["placement"]["name"]
            problems.append(wrong(f"{where}.placement.name", repr(placement), f"a base with {need}", absent[need]))
        if missing:
            have = f"sites of this base, which has no {', '.join(missing)}"
            problems.append(wrong(f"{where}.sites", repr(rule["sites"]), have, absent[missing[0]]))
            continue
        owned = states("placements", placement_of(rule, sites), "OWNS") or sites
        bound = states("inits", option(rule, "adapter.init"), "RANK") or "larger"
        for site in (name for name in owned if name in PROJECTIONS):
            if isinstance(dims, dict) and site not in dims:
                problems.append(wrong(f"{where}.sites", repr(site), f"a projection of this model: {', '.join(dims)}"))
                continue
            rank, widths = rule["adapter"].get("rank"), dims and (dims[site] if isinstance(dims, dict) else dims(site))
            most = widths and {"smaller": min(widths), "half": min(widths) // 2}.get(bound, max(widths))
            if widths and rank and rank > most and states("adapters", rule["adapter"]["name"], "RANK_BOUND"):
                whose = "half the smaller" if bound == "half" else f"the {bound}"
                expected = f"<= {most}, {whose} width of {site}"
                problems.append(wrong(f"{where}.adapter.rank", rank, expected, "Lower the rank."))
    raise_all(problems)


def check_mesh(config, num_devices):
    """`resolve_mesh` of a config, against its batch and `train.exact`."""
    train = config["train"]
    rows, unit = train["batch_size"] // train["accumulate"], objectives.unit(config)
    sizes = resolve_mesh(config["mesh"], num_devices, rows=rows, unit=unit)
    raise_all(list(config_checks.exact_devices(train, sizes)))
    return sizes


def to_dict(config):
    """A nested dict that JSON can hold: tuples become lists."""
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return {key: to_dict(value) for key, value in config.items()} if isinstance(config, dict) else config


def from_dict(tree):
    """The ConfigDict that `to_dict` was made from: lists become tuples."""
    from ml_collections import ConfigDict

    def tuples(value):
        if isinstance(value, dict):
            return {key: tuples(v) for key, v in value.items()}
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    return ConfigDict(tuples(tree))

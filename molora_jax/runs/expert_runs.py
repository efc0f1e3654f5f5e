"""Experts from elsewhere: `rules.X.load=(DIR, "peft:DIR", "molora:DIR", ...)`, expert a of the rule is the a-th.

    s B_a A_a = s_a B A of the run's newest checkpoint,   A_a [R, D_in], B_a [R, D_out], zero rows beyond the run's rank
    peft:DIR      an adapter of peft's, `peft_adapters.py`;   molora:DIR   a run that launch.export wrote

A router that JOINS takes runs of one expert under a router of its kind as well, with what the router learned there.

Whatever a run's adapter is, it is read as its factors (PiSSA's start and MoS's pools included), so any rank up to the
rule's and any scale will do. A projection or layer that a run does not adapt gets zeros. Where they are to train
(`loaded="trained"`) B is zero there and A stays as it was drawn, so that these rows can learn: the output is the same.
R rank of the rule.
"""

import dataclasses

import numpy as np

from molora_jax.backbones.compile import compile_model
from molora_jax.config.resolve import adapter_source
from molora_jax.core.rules import layers_named
from molora_jax.errors import InputError
from molora_jax.runs import exported, peft_adapters, saved, warm_start
from molora_jax.runs.products import products
from molora_jax.runs.view import View


def load_experts(model, adapters: dict, base: dict, *, note=lambda text: None) -> dict:
    """`adapters` (nested dicts of arrays) with the experts of every rule with `load` filled in. `base` and `note`: of
    this run, as in `same_base`.

    Raises:
      InputError: no run there, one on another base, a mixture, an adapter that is more than B A, a rank above the
        rule's, or a projection or layer that the rule does not cover.
    """
    adapters = dict(adapters)
    for rule in model.rules:
        if rule.load:
            runs = [_factors(path, rule, model.config, base, note) for path in rule.load]
            adapters[rule.name] = _fill(rule, adapters[rule.name], [factors for factors, _ in runs])
            if rule.router is not None and rule.router.JOINS:
                adapters[rule.name] = _join(rule, adapters[rule.name], [rows for _, rows in runs])
    return adapters


def _factors(text, rule, decoder, base, note) -> tuple[dict, dict]:
    """`{(layer, site): [(A [R_a, D_in], s_a B [R_a, D_out]), ...]}`, where several rules on one site add, and
    `{(layer, router/scope): leaves}` of a router that this rule's joins."""
    where = f"method.rules.{rule.name}"

    def refuse(got, expected, fix="Choose another run."):
        return InputError(f"{where}.load", got=f"{text}, {got}", expected=expected, fix=fix)

    kind, path = adapter_source(text)
    if kind == "peft":
        return peft_adapters.read(path, decoder, refuse=refuse), {}
    if kind == "molora":
        tell = lambda line: note(f"{where}.load: {text} was {line}")  # noqa: E731
        return _added(exported.read(path, decoder, base, refuse=refuse, note=tell)), {}
    _, step, manifest = warm_start.newest(path, where=f"{where}.load")
    warm_start.check_base(path, manifest, base, where=f"{where}.load", note=note)
    if any(leaf.startswith("base/") for leaf in manifest["tree"].get("modules", ())):
        raise refuse("which trained base leaves as well (method.train_base)", "a run that is adapters alone")
    # the step's own config: config.json may have changed since; the data and base that it names may be gone
    config = saved.read_config(path, step, need_base=False)
    run, rows = compile_model(config, decoder), {}
    tree = warm_start.load_adapters(path, where=f"{where}.load")
    owned = [own.name for own in run.rules if _joins(rule, own)]
    if owned:
        rows = {key[1:]: leaves for key, leaves in View(tree).by_site().items() if key[0] in owned and _routes(key[2])}
        plain = (dataclasses.replace(own, router=None) if own.name in owned else own for own in run.rules)
        run = dataclasses.replace(run, rules=tuple(plain))
    return _added(products(run, tree, refuse=refuse)), rows


def _joins(rule, own) -> bool:
    """Whether a run's rule is one expert under a router that this rule's puts together with others."""
    if rule.router is None or own.router is None or not rule.router.JOINS:
        return False
    return type(own.router) is type(rule.router) and set(own.experts) <= {0, 1} and own.share == rule.share


def _routes(site: str) -> bool:
    return site.startswith("router/")


def _join(rule, own: dict, rows: list[dict]) -> dict:
    """The router's leaves of joined runs; they stay where all runs are plain, whose rows follow from documents."""
    where = f"method.rules.{rule.name}"
    lacks = [path for path, found in zip(rule.load, rows, strict=True) if not found]
    if lacks and (len(lacks) < len(rows) or not rule.router.documents):
        raise InputError(
            f"{where}.load", got=f"{lacks[0]}, a run without this router",
            expected="runs that all have it, with one expert, or none of which has it and router.documents above 0",
            fix=f"Train it with this router, or set {where}.router.documents.",
        )  # fmt: skip
    if lacks:
        return own
    if rule.router.documents:
        raise InputError(
            f"{where}.router.documents", got=str(rule.router.documents), expected="0: the loaded runs have their rows",
            fix="Set it to 0.",
        )  # fmt: skip
    view = View({rule.name: own})
    for (name, layer, site), leaves in view.by_site().items():
        if not _routes(site):
            continue
        theirs = [found.get((layer, site)) for found in rows]
        if None in theirs:
            raise InputError(
                f"{where}.load", got=f"{rule.load[theirs.index(None)]}, without a row at {site} of layer {layer}",
                expected="the rows of every router of this rule", fix="Choose a run of the same layers and share.",
            )  # fmt: skip
        for leaf, value in rule.router.joined(leaves, theirs, rule.load, f"{where}.load").items():
            view[name, layer, site, leaf] = value
    return view.tree()[rule.name]


def _added(found: dict) -> dict:
    """By place, whatever the rule."""
    out: dict = {}
    for (_, layer, site), pair in found.items():
        out.setdefault((layer, site), []).append(pair)
    return out


def _fill(rule, own: dict, runs: list[dict]) -> dict:
    where = f"method.rules.{rule.name}"
    covered = {(layer, site) for layer, n in enumerate(rule.experts) if n for site in rule.projections}
    for path, run in zip(rule.load, runs, strict=True):
        beyond = sorted(run.keys() - covered)
        if beyond:
            layer, site = beyond[0]
            raise InputError(
                f"{where}.sites", got=f"no {site} of layer {layer}, which {path} adapts",
                expected="every projection and layer that a loaded run adapts", fix="Add it, or choose another run.",
            )  # fmt: skip
        rank = max(sum(len(A) for A, _ in pairs) for pairs in run.values())
        if rank > rule.adapter.rank:
            raise InputError(
                f"{where}.adapter.rank", got=str(rule.adapter.rank), expected=f"at least {rank}, the rank of {path}",
                fix="Raise it: smaller ranks are padded.",
            )  # fmt: skip
    out = dict(own)
    for segment, sites in own.items():
        if segment == "shared":
            continue
        out[segment] = dict(sites)
        for site in rule.projections:
            leaves = {name: np.zeros(sites[site][name].shape, np.float32) for name in ("A", "B")}
            if rule.loaded == "trained":
                leaves["A"] = np.array(sites[site]["A"], np.float32)
            for i in range(len(leaves["A"])):
                for a, run in enumerate(runs):
                    at = 0
                    for A, B in run.get((layers_named(segment)[i], site), ()):
                        rows = slice(at, at + len(A))
                        leaves["A"][i, a, rows], leaves["B"][i, a, rows] = A, B / rule.adapter.scale()
                        at += len(A)
            out[segment][site] = leaves
    return out

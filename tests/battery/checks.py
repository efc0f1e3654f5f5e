"""The battery's assertions, shared by the rows of the table and the points of the product."""

import fnmatch
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from molora_jax.config.fields import PROJECTIONS
from molora_jax.core import rules as rules_lib
from molora_jax.core import trees
from tests.battery import reference
from tests.battery.cases import BATCH

TABLES = ("I_A", "I_B", "seed", "check")  # the only leaves that are not float32


def matches(a, b, *, rtol, atol=0.0):
    """Two trees of arrays, equal to these tolerances; the paths that are not are named."""
    a, b = flatten_dict(a, sep="|"), flatten_dict(b, sep="|")
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=rtol, atol=atol, err_msg=path)


def same_step(metrics, gradients, other_metrics, other_gradients, *, atol=1e-9):
    """Two runs of one step on other numbers of devices: the gradients' norm to 1e-6, statistics and losses to 2e-6 of
    their own size (a balance loss of 1e-3 is not held to a share of 1; 1.5e-6 was measured, on one of two processors).

    A single entry of a gradient is a sum of many terms in another order: to 2e-6 of the leaves' largest. The gradient
    of a leaf that all layers share is a sum over layers too: 4e-6, and so is the norm. `atol`: of statistics that are
    differences of larger terms.
    """
    apart = 4e-6 if any("/shared/" in path for path in gradients) else 1e-6
    np.testing.assert_allclose(metrics["grad_norm"], other_metrics["grad_norm"], rtol=apart)
    rest = [{k: v for k, v in m.items() if k != "grad_norm"} for m in (metrics, other_metrics)]
    matches(*rest, rtol=2e-6, atol=atol)
    largest = max(np.abs(g).max() for g in gradients.values())
    matches(gradients, other_gradients, rtol=1e-5, atol=max(apart, 2e-6) * largest)


def check_tree(model, adapters):
    """Plain nested dicts with string keys: `rule/segment/site/leaf` and `rule/segment/router/scope/leaf`."""

    def plain(node):
        return type(node) is dict and all(
            type(k) is str and (not hasattr(v, "items") or plain(v)) for k, v in node.items()
        )

    assert plain(adapters)
    segments = {segment.name: len(segment.layers) for segment in model.segments}
    for path, leaf in flatten_dict(adapters, sep="/").items():
        rule, segment, *rest, name = path.split("/")
        assert leaf.dtype == (jnp.int32 if name in TABLES else jnp.float32), path
        if segment == "shared":
            continue
        assert re.fullmatch(r"\d{3}-\d{3}", segment) and leaf.shape[0] == segments[segment], path
        (rule,) = [r for r in model.rules if r.name == rule]
        assert rest in [[site] for site in rule.projections] + [["router", s] for s in rule.router_scopes], path
    state = model.init_router_state()
    assert plain(state)
    for path in flatten_dict(state, sep="/"):
        rule, segment, router, scope, _ = path.split("/")
        assert router == "router" and segment in {*segments, "shared"} and scope in rules_lib.SCOPES + PROJECTIONS, path


def check_step(case, adapters, metrics):
    """Loss, its parts and the routing statistics against the naive form in float64."""
    params, adapters = map(reference.as_float64, (case.params, adapters))
    hidden, decisions = reference.forward(np, case.model, params, adapters, BATCH)
    np.testing.assert_allclose(metrics["lm_loss"], reference.nll(np, params, hidden, BATCH), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], reference.loss(np, case.model, params, adapters, BATCH), rtol=1e-5)
    assert int(metrics["tokens"]) == (BATCH["segment_ids"] > 0).sum() and int(metrics["skipped"]) == 0
    for (layer, rule, scope), d in decisions.items():
        table, row = metrics["site"][f"{rule}/{scope}"], [r for r in case.model.rules if r.name == rule][0]
        at = sum(n > 0 for n in row.experts[:layer]) if scope != "model" else 0
        chosen, probs = d.selected[d.valid], d.probs[d.valid]
        first = np.where(chosen, np.abs(d.gates[d.valid]), -1).argmax(axis=1)
        wanted = dict(
            active_experts=chosen.sum(axis=1).mean(),
            load_max_over_mean=chosen.sum(axis=0).max() / chosen.sum(axis=0).mean(),
            entropy=-(probs * np.log(np.where(probs > 0, probs, 1.0))).sum(axis=1).mean(),
            top1_share=np.bincount(first).max() / len(first),
            clipped_share=0.0,
        )
        for name, value in wanted.items():
            np.testing.assert_allclose(table[name][at], value, rtol=1e-5, atol=1e-6, err_msg=f"{layer} {scope} {name}")
    layers = [(r, 1 if s == "model" else sum(n > 0 for n in r.experts)) for r in case.model.rules for s in r.scopes]
    assert len(decisions) == sum(n for _, n in layers)


def check_gradients(case, adapters, gradients, norm, exceptions=()):
    """Of trainable adapter leaves only; none of them dead; all as by `jax.grad` of the naive form."""
    trainable, fixed = trees.split(adapters, case.frozen)
    trainable, fixed = flatten_dict(trainable, sep="/"), flatten_dict(fixed, sep="/")
    assert gradients.keys() == trainable.keys()
    assert all(path.split("/")[0] in {rule.name for rule in case.model.rules} for path in gradients)
    np.testing.assert_allclose(norm, np.sqrt(sum(np.sum(np.square(g)) for g in gradients.values())), rtol=1e-5)
    unflat = trees.unflatten_dict
    objective = lambda leaves: reference.loss(  # noqa: E731
        jnp, case.model, case.params, unflat({**leaves, **fixed}, sep="/"), BATCH
    )
    wanted = jax.device_get(jax.jit(jax.grad(objective))(trainable))
    for path, g in gradients.items():
        assert np.isfinite(g).all(), path
        if not any(fnmatch.fnmatchcase(path, pattern) for pattern in exceptions):
            rows = g[None] if path.split("/")[1] == "shared" else g
            dead = np.abs(rows).reshape(len(rows), -1).max(axis=1) == 0
            assert not dead.any(), f"{path}: no gradient in layers {np.flatnonzero(dead)} of the segment"
        # both are float32 and sum in orders of their own: processors differ by a little more than 1e-5 of the largest
        np.testing.assert_allclose(g, wanted[path], rtol=1e-4, atol=2e-5 * np.abs(wanted[path]).max(), err_msg=path)

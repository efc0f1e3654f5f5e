"""The plain adapters of a run as products, whatever parameterises them: `s B A` of each rule, layer and site.

PiSSA's start, LoRA-XS's core, MoS's pools and every scale are written out: `A [R, D_in]`, `s B [R, D_out]`, numpy. Rows
of zeros stay.
"""

import jax
import numpy as np

from molora_jax import placements
from molora_jax.core.rules import adapter_sites
from molora_jax.core.types import Context
from molora_jax.runs.view import View


def products(model, adapters: dict, *, refuse) -> dict[tuple[str, int, str], tuple[np.ndarray, np.ndarray]]:
    """`{(rule, layer, site): (A [R, D_in], s B [R, D_out])}` of all rules of a model.

    Args:
      adapters: nested dicts of numpy arrays.
      refuse: `(got, expected) -> InputError`, raised for a rule that is a mixture, an adapter that is more than a
        product, and leaves that are not what the model's rules say.
    """
    found, by_site = {}, View(adapters).by_site()
    for rule in model.rules:
        if rule.router is not None:
            raise refuse(
                f"whose rule {rule.name} is a mixture (it has a router)", "plain adapters: one expert, no router"
            )
        if not placements.of(rule).LOADS:
            got = f"whose rule {rule.name} has the placement {placements.of(rule).NAME}"
            raise refuse(got, "adapters at single projections")
        shared = adapters.get(rule.name, {}).get("shared", {})
        for site in adapter_sites(model.config, rule, model.segments):
            for layer in site.layers:
                where = rule.name, layer, site.name
                found[where] = _product(rule.adapter, site, by_site.get(where, {}), shared, refuse, where)
    return found


def _product(adapter, site, own: dict, shared: dict, refuse, where):
    if not own or any(leaf.dtype not in (np.float32, np.int32) for leaf in own.values()):
        raise refuse(f"without float32 leaves of {where}", "what its config says")
    blank = Context(None, None, None, None, None, site=site)
    base = jax.ShapeDtypeStruct((site.d_in, site.d_out), np.float32)
    init = lambda W: adapter.init_leaves(jax.random.key(0), site, site.layers[0], base=W, base_grad=W)  # noqa: E731
    try:
        if jax.eval_shape(init, base).keys() - own:  # a start A0, B0 that is lost would be one of zero
            raise KeyError
        shapes = jax.eval_shape(adapter.factors, own, shared, blank.replace(base=base))
    except (KeyError, TypeError, AttributeError):
        raise refuse(f"without the leaves of {where}", "what its config says") from None
    if any(part is not None for part in (shapes.out, shapes.inp, shapes.form)):
        name = type(adapter).__name__
        raise refuse(f"whose adapter is {name}", "adapters that are a product B A: others do not mix linearly")
    f = adapter.factors(own, shared, blank)
    A = np.asarray(f.A[0] if f.mid is None else f.mid[0] @ f.A[0])
    B = np.float32(adapter.scale()) * np.asarray(f.B[0])
    if A.shape != (len(B), site.d_in) or B.shape[1:] != (site.d_out,) or A.dtype != np.float32:
        got = f"with {A.dtype} A {list(A.shape)} and B {list(B.shape)} at {where}"
        raise refuse(got, f"float32 [R, {site.d_in}] and [R, {site.d_out}]")
    return A, B

"""A router, asked: what it answers is held against the contract (`base.py`), whoever wrote it.

B batch, S sequence, D width, E experts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax.core.types import Array, Context, Routing, Site
from molora_jax.errors import InputError
from molora_jax.routers.base import Router

LENGTH = 64  # tokens of a trial


def decide(router: Router, p: dict, shared: dict, x: Array, ctx: Context, where: str) -> tuple:
    """`router.route(p, shared, x, ctx)`: `(decision, carry, sums)`.

    Raises:
      InputError: in the name of `where`: no such tuple, other shapes than `[B, S, E]`, a larger `k_max` than its own.
    """
    name, found = type(router).__name__, router.route(p, shared, x, ctx)
    parts = found if isinstance(found, tuple) else (found,)
    if len(parts) != 3 or not isinstance(parts[0], Routing) or not isinstance(parts[2], dict):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise InputError(
            where, got=f"{name}.route, which gave {f'({kinds})' if isinstance(found, tuple) else kinds}",
            expected="(Routing, carry, sums), sums a dict", fix="Return routing.finish(...), ctx.carry, {}.",
        )  # fmt: skip
    decision, E = found[0], ctx.site.experts
    for field in ("gates", "selected", "logits", "probs"):
        shape, wanted = jnp.shape(getattr(decision, field)), (*ctx.valid.shape, E)
        if shape != wanted:
            raise InputError(
                where, got=f"{name}.route, whose {field} have the shape {shape}", expected=f"{wanted}: [B, S, E]"
            )
    if decision.k_max > router.k_max(E):  # outside training it may be less
        raise InputError(
            where, got=f"{name}.route, which says k_max={decision.k_max} where {name}.k_max({E}) is {router.k_max(E)}",
            expected="one number", fix="Write routing.finish(..., k_max=self.k_max(z.shape[-1])).",
        )  # fmt: skip
    return found


@functools.lru_cache(maxsize=256)
def check_slots(router: Router, site: Site, where: str) -> None:
    """Asks a router of somebody else's once, on random tokens, whether it selects at most `k_max` experts.

    A token has so many slots: what is beyond them would be dropped without a word.

    Raises:
      InputError: in the name of `where`: it selects more.
    """
    if type(router).__module__.startswith("molora_jax.routers."):
        return
    with jax.ensure_compile_time_eval():
        try:
            selected = _selected(router, site)
        except Exception:  # it needs what only a call has, or breaks the contract: the call says what is wrong
            return
    most, allowed = int(selected.sum(-1).max()), router.k_max(site.experts)
    if most > allowed:
        raise InputError(
            where, got=f"{type(router).__name__}.route, which selects {most} experts of a token",
            expected=f"at most k_max, which is {allowed}",
            fix="Let k_max(experts) return the most that route may select, or select fewer.",
        )  # fmt: skip


def _selected(router: Router, site: Site) -> np.ndarray:
    """`[1, S, E]`: the experts of tokens of usual size, and of some of thirty times that."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (1, LENGTH, site.d_in)).at[:, LENGTH // 2 :].multiply(30.0)
    valid, zeros = jnp.ones((1, LENGTH), bool), jnp.zeros((1, LENGTH), jnp.int32)
    ctx = Context(
        valid, segment_ids=zeros + 1, positions=jnp.arange(LENGTH, dtype=jnp.int32)[None], task_ids=zeros,
        example_ids=zeros, site=site, state=router.init_state(site), carry=router.init_carry(1, LENGTH),
        max_segments=1,
    )  # fmt: skip
    shared = router.init_shared(keys[1], (site,))
    x = router.base_features(shared, x, ctx) if router.INPUT else x
    return np.asarray(router.route(router.init_leaves(keys[2], site, 0), shared, x, ctx)[0].selected)

"""What the routers of a model decided in one call, as it was sown: losses, the routers' own updates, statistics.

The collection `routing` holds a `Sown` for every decision, at the path of its module; under `nn.scan` its arrays lead
with the layers. L layers, B batch, S sequence, E experts.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.core import unfreeze

from molora_jax.config.fields import shown, wrong
from molora_jax.core import routing as routing_math
from molora_jax.core.types import Array, Context, Routing
from molora_jax.losses.base import Loss, value_of
from molora_jax.modules.members import member

NAME = "experts"  # under which a module sows


@flax.struct.dataclass
class Sown:
    """One decision: `decision.gates [B, S, E]` and so on (`core.types.Routing`), the `sums` of the router's update,
    `counts [2]` slots sent and dropped where an engine may drop them, and the router."""

    decision: Routing
    sums: dict
    counts: Array | None
    router: Any = flax.struct.field(pytree_node=False)

    @property
    def stacked(self) -> int:
        """Leading axes, of `nn.scan` or `nn.vmap`."""
        return self.decision.valid.ndim - 2

    def over_layers(self, function, *trees):
        """`function` of each layer's trees; its results lead with one axis of layers (one where nothing is stacked)."""
        join = lambda x: x.reshape(math.prod(x.shape[: self.stacked]), *x.shape[self.stacked :])  # noqa: E731
        return jax.vmap(function)(*jax.tree.map(join, trees))


def entries(sown) -> list[tuple[tuple[str, ...], Sown]]:
    """`(path of the module, its decision)` of all that was sown; `sown` as `mutable=["routing"]` returned it.

    Raises:
      InputError: nothing was, or it is no collection.
    """
    fix = 'Call with mutable=["routing"] and pass on the second of what it returns (in NNX: mj.nnx.sown(model)).'
    if not isinstance(sown, Mapping):
        kind, shape = type(sown).__name__, f" of shape {jnp.shape(sown)}" if isinstance(sown, jax.Array) else ""
        raise wrong("sown", f"a {kind}{shape}", "the collection of what was sown, a dict", fix)
    tree = sown["routing"] if "routing" in sown else sown
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, Sown))
    found = [(tuple(str(key.key) for key in path[:-2]), leaf) for path, leaf in found if isinstance(leaf, Sown)]
    if not found:
        fix += " Without a router nothing is sown."
        raise wrong("sown", "no decision of a router", "what was sown in the collection routing", fix)
    return found


def routing_loss(sown, loss, *, segment_ids=None, task_ids=None, tasks: tuple[str, ...] = ()) -> Array:
    """The value of a routing loss on what was sown, to be multiplied by a weight of your own.

    Args:
      sown: what a call with `mutable=["routing"]` returned second.
      loss: a member (`mj.ZLoss()`) or `dict(name="entropy", kind="tsallis")`.
      segment_ids: `[B, S]` int, 0 at padding, for losses an example (by default a row is one example).
      task_ids: `[B, S]` int, indices into `tasks`, for losses that tell tasks apart.

    Returns:
      A float32 scalar.

    >>> import jax, molora_jax as mj
    >>> layer = mj.RoutedLoRA(16, experts=4, adapter=mj.Lora(rank=2), router=mj.SoftmaxTopK(k=2))
    >>> x, W = jax.random.normal(jax.random.key(0), (2, 5, 8)), jax.numpy.ones((8, 16))
    >>> variables = layer.init(jax.random.key(1), x, kernel=W)
    >>> y, sown = layer.apply(variables, x, kernel=W, mutable=["routing"])
    >>> float(mj.routing_loss(sown, mj.ZLoss())) > 0
    True
    """
    loss: Loss = member("losses", loss, "loss")
    stats: dict = {}
    for path, entry in entries(sown):
        shape = entry.decision.valid.shape[entry.stacked :]
        ids = {"segment_ids": segment_ids, "task_ids": task_ids}
        for name, value in ids.items():
            if value is not None and jnp.shape(value) != shape:
                raise wrong(name, f"shape {jnp.shape(value)}", f"{shape}, as at {'/'.join(path) or 'the layer'}")

        def sums(decision, ids=ids):
            segments = decision.valid.astype(jnp.int32) if ids["segment_ids"] is None else ids["segment_ids"]
            zeros = jnp.zeros_like(segments)
            most = 1 if ids["segment_ids"] is None else segments.shape[-1]
            own = zeros if ids["task_ids"] is None else ids["task_ids"]
            ctx = Context(decision.valid, segments, zeros, own, zeros, max_segments=most, tasks=tuple(tasks))
            return loss.stats(decision, ctx)

        layer, scope = "/".join(path[:-2]), "/".join(path[-2:])  # the module that holds the Dense, and the Dense
        own = stats.setdefault("", {}).setdefault(layer, {})
        new = entry.over_layers(sums, entry.decision)
        own[scope] = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), own[scope], new) if scope in own else new
    return value_of(loss, stats, "loss")


IDLE = ("weight", "accumulate")  # options of every loss that its value does not depend on


def balance(sown, **options) -> Array:
    """The balance loss of what was sown: Switch's E sum_e f_e P_e, 1 at uniform routing; the mean over routers.

    Args:
      sown: what a call with `mutable=["routing"]` returned second.
      options: of `mj.Balance`: `over`, `normalise`, `counts`, ... Multiply the value by a weight of your own.

    >>> import jax, molora_jax as mj
    >>> layer = mj.RoutedLoRA(16, experts=4, router=mj.SoftmaxTopK(k=1))
    >>> x, W = jax.random.normal(jax.random.key(0), (2, 5, 8)), jax.numpy.ones((8, 16))
    >>> y, sown = layer.apply(layer.init(jax.random.key(1), x, kernel=W), x, kernel=W, mutable=["routing"])
    >>> 0.9 < float(mj.balance(sown)) < 4.1
    True
    """
    for name in IDLE:
        if name in options:
            fix = "Multiply the value: 0.01 * mj.balance(sown)." if name == "weight" else "Leave it out."
            raise wrong(name, shown(options[name]), "nothing: it is a training loop's", fix)
    return routing_loss(sown, {"name": "balance", **options})


def update_routers(router_state: dict, *sown) -> dict:
    """Every router's own update, once a step; returns the new collection `router_state`.

    Args:
      router_state: the collection of that name, {} where no router has any.
      sown: what the calls of the step returned (several: of micro-steps, whose sums are added).

    Raises:
      InputError: a router with state that sowed nothing.

    >>> import jax, molora_jax as mj
    >>> layer = mj.RoutedLoRA(16, experts=4, router=mj.SigmoidTopK(k=2, bias_rate=0.1))
    >>> x, W = jax.random.normal(jax.random.key(0), (2, 5, 8)), jax.numpy.ones((8, 16))
    >>> variables = layer.init(jax.random.key(1), x, kernel=W)
    >>> y, sown = layer.apply(variables, x, kernel=W, mutable=["routing"])
    >>> state = mj.update_routers(variables["router_state"], sown)
    >>> state["b"].shape
    (4,)
    """
    whole = isinstance(router_state, Mapping)
    found = [name for name in ("params", "adapters", "router_state", "routing") if whole and name in router_state]
    if not whole or found:
        kind = f"collections ({', '.join(found)})" if found else f"a {type(router_state).__name__}"
        expected = "the collection router_state, {} where no router has any"
        raise wrong("router_state", kind, expected, 'Pass variables["router_state"], and what was sown after it.')
    if not jax.tree.leaves(router_state):
        return router_state
    sums: dict = {}
    for tree in sown:
        for path, entry in entries(tree):
            if entry.sums:
                old = sums.get(path)
                sums[path] = entry if old is None else entry.replace(sums=jax.tree.map(jnp.add, old.sums, entry.sums))

    def walk(tree, path):
        if path in sums:
            entry = sums.pop(path)
            new = entry.over_layers(entry.router.update, tree, entry.sums)
            return jax.tree.map(lambda n, o: n.reshape(o.shape), new, tree)
        if not isinstance(tree, dict):
            raise wrong(f"sown: {'/'.join(path)}", "nothing", "what that router decided", "Pass all that was sown.")
        return {name: walk(below, (*path, name)) for name, below in tree.items()}

    return walk(unfreeze(router_state), ())


def routing_metrics(sown) -> dict[str, dict[str, Array]]:
    """Statistics of expert load by router: `load_max_over_mean` (1 is balanced, E collapse), `entropy`, ...

    Returns:
      `{path: {statistic: scalar}}`, `[L]` under `nn.scan`; the statistics are those of a run's `metrics.jsonl`.

    >>> import jax, molora_jax as mj
    >>> layer = mj.RoutedLoRA(16, experts=4, router=mj.SoftmaxTopK(k=2))
    >>> x, W = jax.random.normal(jax.random.key(0), (2, 5, 8)), jax.numpy.ones((8, 16))
    >>> y, sown = layer.apply(layer.init(jax.random.key(1), x, kernel=W), x, kernel=W, mutable=["routing"])
    >>> float(mj.routing_metrics(sown)[""]["active_experts"])
    2.0
    """
    out: dict = {}
    for path, entry in entries(sown):
        total = entry.over_layers(routing_math.sums, entry.decision)
        if entry.counts is not None:
            counts = entry.counts.reshape(-1, 2)
            total |= {"sent": counts[:, 0], "dropped": counts[:, 1]}
        found = routing_math.expert_load(total)
        name = "/".join(path)
        while name in out:  # a module that was called again
            name += "'"
        out[name] = found if entry.stacked else jax.tree.map(lambda x: x[0], found)
    return out

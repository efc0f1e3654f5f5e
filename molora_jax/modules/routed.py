"""What all modules of routed experts share: where their leaves lie, what a router is told, what is sown.

B batch, S sequence, D width, E experts.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType

from molora_jax.config.fields import wrong
from molora_jax.core.types import Array, Context, Routing, Site
from molora_jax.engines import ALONE, Engine
from molora_jax.errors import InputError
from molora_jax.modules.members import Made
from molora_jax.modules.sown import NAME, Sown
from molora_jax.routers.asked import check_slots, decide


class Routed(nn.Module):
    """A module with experts. Subclasses have the fields `experts, adapter, router, engine, mesh`."""

    def module_path(self) -> str:
        """The module's path, for messages."""
        return "/".join(self.path) or type(self).__name__

    def engine_now(self) -> Engine:
        """The engine of a call. While leaves are made one device is enough: no engine changes a value."""
        on = ALONE if self.is_initializing() else self.made().engine
        mesh = jax.sharding.get_abstract_mesh()
        if not on.alone and AxisType.Explicit in mesh.axis_types:
            got = f"explicit axes ({', '.join(mesh.axis_names)})"
            raise wrong(f"{self.module_path()}, the mesh of jax.set_mesh", got, "automatic ones", AUTOMATIC)
        return on

    def leaves(self, made: Made, sites: dict[str, Site], kernels: dict[str, Array]) -> tuple[dict, dict]:
        """`(leaves by site, shared leaves)`, drawn where the collection `adapters` may be written and has none.

        One site's leaves lie at the module itself, those of several under their names.
        """
        adapter, names = made.adapter, made.adapter.FROZEN

        def draw(key):
            tree = {}
            for i, (name, site) in enumerate(sites.items()):
                kernel = jax.lax.stop_gradient(kernels[name])
                tree[name] = adapter.init_leaves(jax.random.fold_in(key, i), site, 0, base=kernel)
            tree = tree if len(sites) > 1 else tree[next(iter(sites))]
            shared = adapter.init_shared(jax.random.fold_in(key, 1000), tuple(sites.values()))
            return tree | ({"shared": shared} if shared else {})

        def apart(tree, frozen: bool):
            below = {k: apart(v, frozen) if isinstance(v, dict) else v for k, v in tree.items()}
            return {k: v for k, v in below.items() if (v if isinstance(v, dict) else (k in names) == frozen)}

        drawn = functools.cache(lambda: draw(self._start()))
        shapes = jax.eval_shape(draw, jax.random.key(0))
        tree = {}
        for collection, frozen in (("adapters", False), ("frozen", True)):
            own = self._held(collection, apart(shapes, frozen), lambda frozen=frozen: apart(drawn(), frozen))
            tree = _joined(tree, own)
        shared = tree.pop("shared", {})
        return (tree if len(sites) > 1 else {next(iter(sites)): tree}), shared

    def route(self, made: Made, site: Site, x: Array, ctx: Context) -> tuple[Routing, dict] | None:
        """The router's decision on `x [B, S, D]`, and the sums that its update asks for; None without a router."""
        router = made.router
        if router is None:
            return None
        leaves = {"router": lambda key: router.init_leaves(key, site, 0)}
        shapes = {name: jax.eval_shape(draw, jax.random.key(0)) for name, draw in leaves.items()}
        own = self._held("adapters", shapes, lambda: {name: draw(self._start()) for name, draw in leaves.items()})
        fresh = lambda: router.init_state(site)  # noqa: E731
        state = self._held("router_state", jax.eval_shape(fresh), fresh)
        x = jnp.where(ctx.valid[..., None], x, 0)  # a row that nobody wrote may hold NaN
        with jax.named_scope("route"):
            check_slots(router, site, f"{self.module_path()}.router")
            decision, _, sums = decide(
                router,
                own.get("router", {}),
                {},
                x,
                ctx.replace(site=site, state=state),
                f"{self.module_path()}.router",
            )
        return decision, sums

    def put(self, made: Made, routed, counts) -> None:
        """Sows what a router decided. Not at init: a later call would add to it."""
        if routed is not None and not self.is_initializing():
            counts = None if counts is None else jax.lax.stop_gradient(counts).sum(axis=0)
            self.sow("routing", NAME, Sown(*routed, counts, made.router))

    def context(self, made: Made, x: Array, valid: Array | None, train: bool) -> Context:
        """Of `x [B, S, D]`; `valid` is broadcast to `[B, S]`."""
        B, S, _ = x.shape
        valid = jnp.ones((B, S), bool) if valid is None else valid
        rows = jnp.broadcast_to(jnp.arange(B, dtype=jnp.int32)[:, None], (B, S))
        positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
        return Context(
            valid=valid, segment_ids=valid.astype(jnp.int32), positions=positions, task_ids=jnp.zeros_like(rows),
            example_ids=rows, key=self._key(made) if train else None, train=train, max_segments=1,
            dropout=made.adapter.dropout,
        )  # fmt: skip

    def _key(self, made: Made):
        """The call's key of randomness; None where nothing is random."""
        if self.has_rng("dropout"):
            return self.make_rng("dropout")
        random = made.random
        if random:
            fix = 'Pass rngs={"dropout": key}, or train=False.'
            if _lifted(self):
                fix = f'Add "dropout": True to split_rngs of the transform around it ({self.scope.path_text}).'
            raise wrong(
                f"{self.module_path()}, train=True", "no rng named dropout", f"one, for {', '.join(random)}", fix
            )

    def _start(self) -> Array:
        """The key of fresh leaves."""
        return self.make_rng("adapters" if self.has_rng("adapters") else "params")

    def _held(self, collection: str, shapes: dict, make) -> dict:
        """This module's own leaves (of these names and shapes) in a collection; `make()`'s, where they are not there
        and may be written.

        Raises:
          InputError: they are not there and may not be written, or they have other shapes.
        """
        wanted = flatten_dict(shapes, sep="/")
        if not wanted:
            return {}
        self._reached(collection)
        have = flatten_dict(_plain(self.variables.get(collection, {})), sep="/")
        own = {path: have[path] for path in wanted if path in have}
        where = lambda path: f"variables[{collection!r}]: {'/'.join([*self.path, path])}"  # noqa: E731
        if len(own) == len(wanted):
            for path, leaf in own.items():
                if jnp.shape(leaf) != wanted[path].shape:
                    raise wrong(where(path), f"shape {jnp.shape(leaf)}", str(wanted[path].shape))
                check_sharding(where(path), leaf)
            return unflatten_dict(own, sep="/")
        if not self.is_mutable_collection(collection):
            missing = next(path for path in wanted if path not in own)
            raise wrong(where(missing), "nothing", f"a leaf of shape {wanted[missing].shape}", _how(collection, self))
        made = make()
        for name, leaf in made.items():
            self.put_variable(collection, name, leaf)
        return made

    def reached(self, made: Made) -> None:
        """Raises InputError where a lifted transform around the module keeps a collection of ours from it."""
        for collection in ("adapters", *(("routing",) if made.router is not None else ())):
            self._reached(collection)

    def _reached(self, collection):
        outer = _outermost()
        if outer is None or not outer.scope.is_mutable_collection(collection):
            return
        if not self.scope.is_mutable_collection(collection):
            raise InputError(
                f"variable_axes of the nn.scan or nn.vmap around {self.module_path()}", got=f"no entry {collection!r}",
                expected=f"{{{collection!r}: 0}} among them: without it what the layer writes there is lost",
                fix=_entries(self),
            )  # fmt: skip


def check_arrays(where: str, **arrays) -> None:
    """Raises InputError for an argument of a call that is no array with axes, or whose sharding is part of its type."""
    for name, value in arrays.items():
        if value is not None and not getattr(value, "shape", ()):
            got = f"a {type(value).__name__}"
            raise wrong(f"{where}, {name}", got, "an array", "Pass the leaf itself, such as params['kernel'].")
        if value is not None:
            check_sharding(f"{where}, {name}", value)


def check_sharding(where: str, value) -> None:
    """Raises InputError for an array that is split over explicit axes: products in here would have to say for each
    result how it is split (the default of `jax.make_mesh`; of flax.linen's own layers the gradient fails likewise)."""
    sharding = getattr(jax.typeof(value), "sharding", None)
    if sharding is None or sharding.mesh.empty:
        return
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    used = [axis for entry in sharding.spec for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis]
    explicit = [axis for axis in used if kinds[axis] == AxisType.Explicit]
    if explicit:
        got = f"an array that is split over the explicit axis {explicit[0]}"
        raise wrong(where, got, "one that is split over automatic axes, or whole", AUTOMATIC)


AUTOMATIC = "Make the mesh with jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * number_of_axes)."


def floating(x: Array, kernel: Array) -> Array:
    """`x` as it meets the kernel: integers are numbers of the kernel's type, as in a product with it."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(kernel.dtype)


def batched(x: Array) -> Array:
    """`[..., D]` as `[B, S, D]`: the last leading axis is S, those before it are B."""
    lead = x.shape[:-1] or (1,)
    return x.reshape(math.prod(lead[:-1]), lead[-1], x.shape[-1])


def batched_valid(valid, x: Array, where: str) -> Array | None:
    """`valid`, of the leading axes of `x [..., D]`, as `[B, S]`."""
    if valid is None:
        return None
    if jnp.shape(valid) != x.shape[:-1]:
        raise wrong(
            f"{where}, valid", f"shape {jnp.shape(valid)}", f"{x.shape[:-1]}, the leading axes of its input {x.shape}",
            "True at tokens, False at padding; None where all are tokens.",
        )  # fmt: skip
    return batched(jnp.asarray(valid, bool)[..., None])[..., 0]


def serves(on: Engine, placement, factors, where: str) -> None:
    """Raises InputError where tokens travel and the experts cannot serve them away from home."""
    whole = factors.form is not None and on.ways("tensor") > 1
    why = placement.stays(factors) if on.moves_tokens or whole else None
    if why:
        raise wrong(f"{where}.engine", repr(on.name), "gather or replicate", f"With these adapters {why}.")


def _plain(tree) -> dict:
    return unfreeze(meta.unbox(tree))


def _joined(a: dict, b: dict) -> dict:
    out = dict(a)
    for name, value in b.items():
        out[name] = _joined(out.get(name, {}), value) if isinstance(value, dict) else value
    return out


def _outermost():
    """The module that `init` or `apply` was called on, None where it cannot be known."""
    stack = getattr(nn.module._context, "module_stack", ())
    return next((module for module in stack if module is not None and module.scope is not None), None)


def _lifted(module) -> bool:
    return "(" in module.scope.path_text


def _how(collection: str, module) -> str:
    outer = _outermost()
    if _lifted(module) and (outer is None or collection in outer.variables):
        return _entries(module)
    return f"`init`, or mj.init_adapters for params that are there, makes them; pass {collection!r} to `apply`."


def _entries(module) -> str:
    """What a lifted transform around the module has to be told."""
    entries = "variable_axes=dict(params=0, adapters=0, router_state=0, frozen=0, routing=0)"
    where = f"Give the transform ({module.scope.path_text}) these entries, beside its own: {entries}"
    return f"{where}; where it has params in variable_broadcast (nn.RNN does), all but routing go there."

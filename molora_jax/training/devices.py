"""A mesh as N devices that each run programs of their own (`train.exact`), and arrays that go between the two views.

An array that all devices hold, or `[N, ...]` with a part of each, is a global array outside and N arrays inside.
"""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from molora_jax import sharding
from molora_jax.sharding import ROWS


class Devices:
    """A mesh as N devices that each run programs of their own; this process has some of them."""

    def __init__(self, mesh):
        self.mesh, self.count = mesh, mesh.size
        self.own = [(n, d) for n, d in enumerate(mesh.devices.flat) if d.process_index == jax.process_index()]
        self.each, self.all = NamedSharding(mesh, P(ROWS)), sharding.replicated(mesh)

    def parts(self, tree) -> list:
        """What each device of this process has of the arrays: its copy, or its rows."""
        leaves, form = jax.tree.flatten(tree)
        leaves = [[shard.data for shard in x.addressable_shards] for x in leaves]
        return [form.unflatten([x[i] for x in leaves]) for i in range(len(self.own))]

    def same(self, trees_):
        """The reverse of `parts`: every device made the same arrays."""
        join = jax.make_array_from_single_device_arrays
        return jax.tree.map(lambda *x: join(x[0].shape, self.all, list(x)), *trees_)

    def side_by_side(self, trees_):
        """`[1, ...]` of every device -> `[N, ...]`."""
        join = jax.make_array_from_single_device_arrays
        return jax.tree.map(lambda *x: join((self.count, *x[0].shape[1:]), self.each, list(x)), *trees_)

    def once(self, function, shardings=None):
        """`function` of arrays that all devices hold, computed by one device of each process and copied to its others.

        Everything that makes arrays of the run's state outside the step goes through this: its program is one device's.
        `shardings` has no say: all devices hold what it makes.
        """
        function = jax.jit(function)

        def run(*arguments):
            out = function(*self.parts(arguments)[0])
            return self.same([jax.device_put(out, device) for _, device in self.own])

        return run

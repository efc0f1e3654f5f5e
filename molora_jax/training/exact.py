"""`train.exact`: a step whose bits do not depend on the number of devices.

A sum of floating-point numbers depends on its order, and a compiler orders and fuses by what it sees: other shapes, or
a program partitioned over other numbers of devices, are other bits. So every micro-step is cut into 8 micro-shards of
rows. A micro-shard is computed by a program for one device, the same program on every device of every mesh; what joins
their results only copies and adds, in programs of its own (nothing is fused across the border of two programs).

    spread    batch -> all of it on every device                          copies
    sums      a micro-shard -> the routing losses' sums                   one device's program
    stack     -> those of all micro-shards on every device                copies
    slopes    -> values of the losses, d value / d sums                   one device's program, run by all
    gradient  a micro-shard, its slopes -> gradient, loss, statistics     one device's program
    add       running totals + N of them, in order                        copies; one addition after the other
    whole     -> the totals on every device                               copies
    update    clip, optimizer, routers                                    one device's program, run by all

The losses are those of the ordinary step: of a micro-step's, or with `accumulate="exact"` of the batch's, sums over all
micro-shards. They need one more forward pass for the sums; a model without routing losses does not. Random keys follow
from seed, step, micro-step and micro-shard, so that dropout and noise are other draws than the ordinary step's.

A micro-steps, N devices (over `data` and `fsdp`), B rows, S sequence.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding

from molora_jax.config.fields import MICRO_SHARDS
from molora_jax.core import trees
from molora_jax.engines import ALONE
from molora_jax.losses.base import value_of
from molora_jax.objectives.lm import lm, token_nll
from molora_jax.sharding import ROWS
from molora_jax.training.devices import Devices
from molora_jax.training.step import (
    decision_sums,
    key_of,
    loss_sums,
    make_update,
    micro_batches,
    own_weights,
    penalised,
)


class ExactStep:
    """`step(state, params, batch, fixed, knobs) -> (state, metrics)`, as `make_step` makes it; compiled by `compile`.

    All devices hold all of the base, the state and (while a step runs) the batch.

    Args:
      mesh: only `data` and `fsdp` may be larger than 1, and N divides 8. Others: as of `make_step`.
    """

    def __init__(
        self, model, optimizer, schedule, *, mesh, clip: float, frozen, accumulate: int, targets_per_row: int,
        seed: int = 0, rated=None, penalties=(),
    ):  # fmt: skip
        self.model, self.on, self.frozen = alone(model), Devices(mesh), frozen
        self.seed, self.accumulate, self.targets_per_row = seed, accumulate, targets_per_row
        self.rounds = MICRO_SHARDS * accumulate // self.on.count
        self.losses, self.penalties = dict(self.model.losses), penalties
        self._update = make_update(self.model, optimizer, schedule, clip=clip, frozen=frozen, rated=rated, seed=seed)
        self._programs, self._base = None, (None, None)

    def compile(self, state, params, batch, fixed=None, knobs=None, memory=None) -> "ExactStep":
        """Compiles every program for these arrays; nothing runs."""
        on, programs = self.on, {}

        def over_mesh(name, function, shardings, *arguments, donate=()):
            lowered = jax.jit(function, out_shardings=shardings, donate_argnums=donate).lower(*arguments)
            programs[name] = lowered.compile()
            return _shapes(lowered.out_info, shardings)

        def by_device(name, function, *arguments, donate=()):
            program = jax.jit(function, donate_argnums=donate)
            lowered = [program.lower(*_shapes(arguments, SingleDeviceSharding(device))) for _, device in on.own]
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # an executable is a device's own
                programs[name] = list(pool.map(lambda program: program.compile(), lowered))
            return lowered[0].out_info

        def lead(tree):  # one `[1, ...]` of each device, as one array
            grown = jax.tree.map(lambda s: jax.ShapeDtypeStruct((on.count, *s.shape[1:]), s.dtype), tree)
            return _shapes(grown, on.each)

        batch = over_mesh("spread", lambda batch: batch, on.all, batch)
        which = jax.ShapeDtypeStruct((), jnp.int32)
        given = (state.adapters, state.router_state, state.step, params, batch, knobs, which)
        values = slopes = {}
        if self.losses:
            sums = lead(by_device("sums", self.sums, *given))
            stacked = over_mesh("stack", self.stack, on.all, [sums] * self.rounds)
            values, slopes = by_device("slopes", self.slopes, stacked)
        result = lead(by_device("gradient", self.gradient, *given, slopes))
        total = over_mesh("zero", lambda: jax.tree.map(self._zero, result), on.each)
        over_mesh("add", self._adder(), on.each, total, result, donate=0)
        like = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), result)
        total = over_mesh("whole", lambda total: jax.tree.map(_shaped, total, like), on.all, total)
        by_device("update", self.update, state, total, values, batch["segment_ids"], knobs, memory, donate=0)
        self._which = [
            [jax.device_put(np.int32(turn * on.count + n), device) for n, device in on.own]
            for turn in range(self.rounds)
        ]
        self._programs = programs
        return self

    def __call__(self, state, params, batch, fixed=None, knobs=None, memory=None):
        if self._programs is None:
            self.compile(state, params, batch, fixed, knobs, memory)
        run, on = self._programs, self.on
        if self._base[0] is not params:
            self._base = params, on.parts(params)
        batch = on.parts(run["spread"](batch))
        state, knobs, memory = on.parts(state), on.parts(knobs), on.parts(memory)
        each = zip(state, self._base[1], batch, knobs, strict=True)
        given = [(s.adapters, s.router_state, s.step, base, rows, own) for s, base, rows, own in each]

        def turn(name, which, *rest):
            parts = zip(run[name], given, which, *rest, strict=True)
            return on.side_by_side([program(*given, index, *own) for program, given, index, *own in parts])

        values = slopes = [{}] * len(on.own)
        if self.losses:
            stacked = on.parts(run["stack"]([turn("sums", which) for which in self._which]))
            values, slopes = zip(*(program(s) for program, s in zip(run["slopes"], stacked, strict=True)), strict=True)
        total = run["zero"]()
        for which in self._which:
            total = run["add"](total, turn("gradient", which, slopes))
        total = on.parts(run["whole"](total))
        ids = [b["segment_ids"] for b in batch]
        update = zip(run["update"], state, total, values, ids, knobs, memory, strict=True)
        done = [program(*x) for program, *x in update]
        return on.same(done)

    # ---- what depends on the number of devices: copies and additions -------------------------------------------------

    def stack(self, rounds):
        """Rounds of `[N, ...]` -> `[A, 8, ...]`."""
        joined = jax.tree.map(lambda *x: jnp.concatenate(x), *rounds)
        return jax.tree.map(lambda x: x.reshape(self.accumulate, MICRO_SHARDS, *x.shape[1:]), joined)

    def _zero(self, like):
        """Totals of `[N, ...]`: flat, padded to N shards."""
        shard = -(-like.size // like.shape[0] // self.on.count)
        return jnp.zeros(shard * self.on.count, like.dtype)

    def _adder(self):
        """`total + shard 0 + shard 1 ...`, each device its part of the numbers; additions in this order on any N."""
        N = self.on.count

        def added(total, own):
            flat = jnp.pad(own.reshape(-1), (0, len(total) * N - own.size)).reshape(N, -1)
            if N > 1:
                flat = jax.lax.all_to_all(flat, ROWS, 0, 0)
            for other in range(N):
                total = total + flat[other]
            return total

        local = lambda total, own: jax.tree.map(added, total, own)  # noqa: E731
        return jax.shard_map(local, mesh=self.on.mesh, in_specs=(P(ROWS), P(ROWS)), out_specs=P(ROWS), check_vma=False)

    # ---- programs of one device --------------------------------------------------------------------------------------

    def _forward(self, adapters, router_state, step, params, batch, knobs, which):
        """Micro-shard `which % 8` of micro-step `which // 8`: `(rows, hidden, sums)`."""
        micros = micro_batches(batch, self.accumulate)
        rows = jax.tree.map(lambda x: x.reshape(self.accumulate * MICRO_SHARDS, -1, *x.shape[2:])[which], micros)
        step_key = key_of(self.seed, knobs, step)
        key = jax.random.fold_in(jax.random.fold_in(step_key, which // MICRO_SHARDS + 1), which % MICRO_SHARDS)
        hidden, stats, _, _ = self.model.hidden(
            params, adapters, router_state, rows, train=True, key=key, step_key=step_key, step=step
        )
        return rows, hidden, {rule: sums for rule, sums in stats.items() if sums}

    def sums(self, *given):
        _, _, stats = self._forward(*given)
        return _leading({name: loss_sums(stats, name) for name in self.losses})

    def slopes(self, stacked):
        """From the sums `[A, 8, ...]`: each loss's value (of the batch, or the mean over micro-steps), its slopes."""
        values, slopes = {}, {}
        for name, loss in self.model.losses:

            def whole(sums, loss=loss, name=name):
                value = lambda sums: value_of(loss, loss.join(sums), f"losses.{name}")  # noqa: E731
                if loss.accumulate == "exact":
                    return value(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), sums))
                micros = [jax.tree.map(lambda x, i=i: x[i], sums) for i in range(self.accumulate)]
                return sum(map(value, micros)) / self.accumulate

            values[name], slopes[name] = jax.value_and_grad(whole)(stacked[name])
        return values, slopes

    def gradient(self, adapters, router_state, step, params, batch, knobs, which, slopes):
        """`(grads, out)` of one micro-shard; the batch's are their sums."""
        trainable, fixed = trees.split(adapters, self.frozen)
        weight = jnp.maximum(jnp.sum(batch["loss_weight"]), 1.0)
        weights = own_weights(self.model) if knobs is None else knobs.weights

        def objective(trainable):
            adapters = trees.merge(trainable, fixed)
            rows, hidden, stats = self._forward(adapters, router_state, step, params, batch, knobs, which)
            nll = lm(self.model, params, hidden, rows, self.targets_per_row) / weight
            total = nll
            for name, slope in slopes.items():  # d value(all sums) = slope . d(own sums)
                own = jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:])[which], slope)
                products = jax.tree.map(lambda a, b: jnp.sum(a * b), own, loss_sums(stats, name))
                total = total + weights[name] * sum(jax.tree.leaves(products))
            sums = {"expert_load": decision_sums(stats, "expert_load"), "router": decision_sums(stats, "router")}
            return total, {"objective": nll, "metrics": {"lm_loss": nll}, **sums}

        return _leading(jax.grad(objective, has_aux=True)(trainable))

    def update(self, state, total, values, segment_ids, knobs, memory):
        grads, out = total
        trainable, _ = trees.split(state.adapters, self.frozen)
        weights = own_weights(self.model) if knobs is None else knobs.weights
        grads, out = penalised(grads, out | {"aux": dict(values)}, self.penalties, trainable, weights, memory)
        return self._update(state, grads, out, segment_ids, knobs)


def alone(model):
    """The model as one device runs it."""
    return dataclasses.replace(model, engine=ALONE)


def _shapes(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _leading(tree):
    return jax.tree.map(lambda x: x[None], tree)


def _shaped(total, like):
    return total[: like.size].reshape(like.shape)


class ExactNLL:
    """The forward pass of `example_nll`, a micro-shard of rows at a time: batches of N of them."""

    def __init__(self, model, *, mesh, targets_per_row: int):
        self.model, self.on, self.targets_per_row = alone(model), Devices(mesh), targets_per_row
        self._forward = jax.jit(self.forward)

    def forward(self, params, adapters, router_state, rows):
        hidden, _, _, _ = self.model.hidden(params, adapters, router_state, rows)
        nll, weight, right, places = token_nll(self.model, params, hidden, rows, self.targets_per_row)
        return _leading((nll, weight, right, jnp.take_along_axis(rows["example_index"], places, axis=1)))

    def __call__(self, params, adapters, router_state, batch):
        on = self.on
        parts = on.parts((params, adapters, router_state, batch))
        return on.side_by_side([self._forward(*given) for given in parts]), {}

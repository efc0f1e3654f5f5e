"""The gradient of the frozen kernels at the start of a run, for starts that read it, a few layers at a time.

    G_l = (1 / N) sum_n d L(batch n) / d W_l,  l = 0, 1, ...;    leaves of layer l = start(W_l, G_l);    G_l is dropped

L is the stage's objective of the base alone, in its training form; the batches are the first N of the run's own
training rows (of clients, N of each), so that all follows from the run's seed and data. Nothing of the base, the
optimizer or the random keys is touched. One pass gives n layers (`backbones.tap`; n is the start's option `layers`):
the gradient of the others is never kept, so beside what a step of the base holds there are n layers' kernels, in
float32. What is paid is L / n passes in place of one. A run saves what it started from: nobody who resumes comes here.
"""

import dataclasses
import itertools
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from molora_jax import sharding
from molora_jax.backbones import leaves
from molora_jax.backbones.tap import Tap
from molora_jax.core.quant import is_quantised
from molora_jax.engines import ALONE
from molora_jax.objectives import Forward, Frozen
from molora_jax.training.devices import Devices
from molora_jax.training.frozen import START
from molora_jax.training.step import micro_batches


def make_gradient(model, *, objective, accumulate: int, targets_per_row: int, constrain):
    """`gradient(sums, params, heads, fixed, batch, micro, first, part) -> sums`, to be jitted with `sums` donated.

    sums: site -> `[n, D_in, D_out]`, float32, of n layers from `first` (absolute, traced), to which `part` times the
    gradient of the `micro`-th micro-step of the batch's loss is added. model: without rules; `heads`: the objective's
    leaves.
    """

    def gradient(sums, params, heads, fixed, batch, micro, first, part):
        norm = objective.norm(batch)
        rows = jax.tree.map(lambda x: x[micro], micro_batches(batch, accumulate, objective.UNIT))

        def loss(zeros):
            tap = Tap(first, zeros)
            hidden = lambda rows: model.hidden(params, {}, {}, rows, train=True, constrain=constrain, tap=tap)[0]  # noqa: E731
            forward = Forward(model, params, hidden, targets_per_row, constrain)
            return objective.loss(forward, heads, fixed, rows, norm)[0], tap.zeros

        value, back = jax.vjp(loss, jax.tree.map(jnp.zeros_like, sums))
        (total,) = back((part.astype(value[0].dtype), sums))
        return total

    return gradient


def begin(run, stage, state):
    """The state of a stage's start, with the factors that start from the base's gradient; `state` where none do."""
    compiled, program = run.compiled(stage), run.programs[stage.name]
    rules = [rule for rule in program.model.rules if leaves.reads_gradient(rule)]
    if not rules:
        return state
    began, probe = time.monotonic(), Probe(run, stage, rules, state)
    adapters = state.adapters
    for layers in probe.passes:
        sums = probe.gradient(layers)
        for layer in layers:
            adapters = probe.begun(adapters, layer, sums, layer - layers[0])
    jax.block_until_ready(adapters)
    count, seconds = sum(map(len, probe.passes)), time.monotonic() - began
    run.note(f"gradient of the base: {count} layers ({probe.most} a pass), {probe.count} batches, {seconds:.0f} s")
    return run.fresh_moments(compiled, dataclasses.replace(state, adapters=adapters))


class Probe:
    """A run's gradients by layer, and what the rules begin with there.

    `passes`: the layers of each, in their order; `most` of them in one.
    """

    def __init__(self, run, stage, rules, state):
        program, config = run.programs[stage.name], run.config.train
        self.run, self.program, self.rules = run, program, rules
        self.exact, self.model = run.exact, program.model
        if self.exact:
            self.model = dataclasses.replace(self.model, engine=ALONE)
        self.base = self.model.without_rules()
        self.count = min(max(rule.adapter.start.batches for rule in rules), max(1, config.steps // run.turn))
        self.batches = list(self._batches(stage))
        self.accumulate = config.accumulate if program.each is None else 1
        self.heads = state.modules.get(program.head, {})
        self.fixed = {
            name: Frozen(run.params, {}, {}, self.base) if source == START else run.frozen[source]
            for name, source in program.objective.frozen().items()
        }  # the run as it begins is, for its own start, the base
        self.key = run.compiled(stage).start_key(run.knobs[stage.name].seed)
        self.shardings = run.compiled(stage).shardings.adapters
        constrain = (lambda x: x) if self.exact else run.constrain
        self._function = make_gradient(
            self.base, objective=program.objective, accumulate=self.accumulate, targets_per_row=run.targets_per_row,
            constrain=constrain,
        )  # fmt: skip
        self._gradients, self._starts = {}, {}
        self.passes = self._passes(max(getattr(rule.adapter.start, "layers", 1) for rule in rules))
        self.most = max(map(len, self.passes))

    def _passes(self, most: int) -> list[list[int]]:
        """Neighbours in one stack with the same sites, at most so many."""
        out, kind = [], lambda layer: (self.base.config.stack_of(layer).name, self.sites(layer))
        for (_, sites), layers in itertools.groupby(range(self.base.config.layers), kind):
            own = list(layers) if sites else []
            out += [own[at : at + most] for at in range(0, len(own), most)]
        return out

    def _batches(self, stage):
        """The first training batches, on the mesh; clients' rows one client after the other."""
        run, source = self.run, self.run.source(stage)
        own = None if run.regime.side_by_side else sharding.rows_of_process(run.config.train.batch_size, run.mesh)
        for number in range(self.count):
            batch = source.batch(number, own)
            clients = range(run.turn) if run.regime.side_by_side else ()
            for rows in [{name: x[k] for name, x in batch.items()} for k in clients] or [batch]:
                if self.exact:
                    yield sharding.put(rows, sharding.replicated(run.mesh))
                else:
                    yield sharding.put_batch(rows, run.mesh, run.config.train.batch_size)

    def sites(self, layer: int) -> tuple[str, ...]:
        """Projections of a layer whose gradient is asked for."""
        wanted = {name for rule in self.rules if rule.experts[layer] for name in rule.projections}
        return tuple(site for site in self.base.config.stack_of(layer).sites if site in wanted)

    def gradient(self, layers: list[int]) -> dict:
        """Site -> `[n, D_in, D_out]`, float32, placed as the kernels; `layers` of one pass come first."""
        config, params, sites = self.base.config, self.run.params, self.sites(layers[0])
        stack, n = config.stack_of(layers[0]), self.most
        kernels = {site: params[stack.name][site]["kernel"] for site in sites}
        if (stack, sites) not in self._gradients:
            places = {site: _of_layers(kernel) for site, kernel in kernels.items()}
            self._gradients[stack, sites] = self._made(self._function, places, donate=0), places
        function, places = self._gradients[stack, sites]
        sums = {s: jax.device_put(jnp.zeros((n, *w.shape[1:]), jnp.float32), places[s]) for s, w in kernels.items()}
        for batch in self.batches:
            for micro in range(self.accumulate):
                given = self._given(jnp.int32(micro), jnp.int32(layers[0]), jnp.float32(1 / len(self.batches)))
                sums = function(sums, params, self.heads, self.fixed, batch, *given)
        return sums

    def begun(self, adapters: dict, layer: int, sums: dict, at: int) -> dict:
        """`adapters`, whose leaves at one layer begin anew from its gradient `sums[site][at]`; the old ones are given
        up."""
        (segment,) = [s for s in self.model.segments if layer in s.layers]
        if segment not in self._starts:

            def start(adapters, params, key, layer, sums, at, segment=segment):
                model, own = self.model, {site: of_layers[at] for site, of_layers in sums.items()}
                return leaves.begun_anew(model.config, self.rules, (segment,), key, params, adapters, layer, own)

            self._starts[segment] = self._made(start, self.shardings, donate=0)
        key, layer, at = self._given(self.key, jnp.int32(layer), jnp.int32(at))
        return self._starts[segment](adapters, self.run.params, key, layer, sums, at)

    def _made(self, function, shardings, donate):
        if self.exact:
            return Devices(self.run.mesh).once(function)
        return jax.jit(function, out_shardings=shardings, donate_argnums=donate)

    def _given(self, *scalars):
        return jax.device_put(scalars, sharding.replicated(self.run.mesh))


def _of_layers(kernel) -> NamedSharding:
    """Where some layers of a stacked kernel lie."""
    kernel = kernel.arrays["codes"] if is_quantised(kernel) else kernel
    mesh = kernel.sharding.mesh
    return NamedSharding(mesh, P(None, *kernel.sharding.spec[1:]))

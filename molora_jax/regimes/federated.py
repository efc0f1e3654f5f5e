"""`federated`: clients with rows of their own, rounds of local steps, an average of what trains (McMahan et al. 2017).

    round:   client k starts at the server's leaves and makes `local_steps` optimizer steps on its own rows
             server: x <- sum_k w_k x_k,    w_k = n_k / n, or 1 / N

Exactly what trains is averaged: adapters, trained modules and the routers' state; frozen leaves are the same everywhere
and never sent. Clients are an axis of runs in one program (`training.many`): a turn of the loop is one local step of
every client, N optimizer steps of the run. Optimizer moments are never averaged: fresh each round ("reset"), or a
client's own ("kept"); the learning rate follows the client's own steps, over all rounds.

With `dp_clip` a client's step is DP-SGD (`core.privacy`): each of its examples is drawn with probability b / n_k (b =
`train.batch_size`), alone in its row, its gradient over everything that trains is clipped, and noise is added once. The
guarantee is of one example's presence, for all that leaves a client over all rounds; clients' rows are disjoint, so
that of the run is the largest of its clients. Reported losses and held-out measurements are not covered by it.
N clients.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax.backbones.leaves import reads_gradient
from molora_jax.core import accountant, trees
from molora_jax.core.privacy import Private
from molora_jax.data import clients as clients_lib
from molora_jax.data.example import seed_of
from molora_jax.errors import InputError
from molora_jax.regimes.base import Regime, one_stage
from molora_jax.text import table

OVERFLOW = 1e-9  # chance that any sample of a run has more examples than places


@dataclasses.dataclass(frozen=True)
class Federated(Regime):
    """`alpha`, `skew`: of `split` (`data.clients`). `dp_noise`: sigma; 0 with `dp_epsilon` above 0: the one that spends
    so much at `dp_delta` over the whole run."""

    PATIENCE: ClassVar[bool] = True

    clients: int = 3
    local_steps: int = 10
    split: Literal["task", "iid", "dirichlet", "skew"] = "iid"
    alpha: float = 0.5
    skew: float = 0.85
    average: Literal["examples", "equal"] = "examples"
    moments: Literal["reset", "kept"] = "reset"
    dp_clip: float = 0.0
    dp_noise: float = 0.0
    dp_epsilon: float = 0.0
    dp_delta: float = 1e-5

    LIMITS: ClassVar = {
        "clients": (1, 10_000), "local_steps": (1, None), "alpha": (1e-3, 1e6), "skew": (0.0, 1.0),
        "dp_clip": (0.0, None), "dp_noise": (0.0, None), "dp_epsilon": (0.0, None), "dp_delta": (1e-30, 0.5),
    }  # fmt: skip

    @property
    def side_by_side(self):
        return self.clients

    @property
    def private(self) -> bool:
        return self.dp_clip > 0

    def settled(self, steps):
        """Whole turns: every client makes as many steps, at least one."""
        return self.clients * max(1, steps // self.clients)

    def turns(self, config) -> int:
        """Local steps of each client in the whole run."""
        return config.train.steps // self.clients

    def stages(self, config, data):
        last, length = self.turns(config), self.local_steps
        starts = range(0, last, length)
        return tuple(
            one_stage(config, f"r{i:05d}", self.clients * t, self.clients * min(t + length, last))
            for i, t in enumerate(starts)
        )

    def check(self, config, data, model):
        if (self.dp_noise or self.dp_epsilon) and not self.private:
            raise InputError(
                "regime.dp_clip", got="0.0 with noise", expected="a clipping norm above 0",
                fix="Noise is in units of it: set regime.dp_clip, or leave dp_noise and dp_epsilon out.",
            )  # fmt: skip
        if self.split == "task" and self.clients > data.num_trained:
            raise InputError(
                "regime.clients", got=f"{self.clients} with split 'task'",
                expected=f"at most the {data.num_trained} tasks of the data",
            )  # fmt: skip
        sizes = self.source(data, config, None).sizes  # raises for a client without rows
        if not self.private:
            return
        for rule in filter(reads_gradient, model.rules):
            raise InputError(
                f"method.rules.{rule.name}.adapter.init", got="a start that reads the base's gradient, with DP-SGD",
                expected="one that reads no rows", fix="That gradient is of the clients' rows, without noise.",
            )  # fmt: skip
        if data.unit > 1:
            raise InputError(
                "regime.dp_clip", got="an objective whose examples are several rows", expected="0.0 with it",
                fix="DP-SGD clips the gradient of one row: choose another objective, or no DP.",
            )  # fmt: skip
        if jax.tree.leaves(jax.eval_shape(model.init_router_state)):
            raise InputError(
                "regime.dp_clip", got="a router that keeps a state", expected="0.0 with it",
                fix="That state follows the routing of the rows without noise: choose another router, or no DP.",
            )  # fmt: skip
        if config.engine not in ("auto", "replicate"):
            raise InputError(
                "engine", got=repr(config.engine), expected="'auto' or 'replicate' with regime.dp_clip",
                fix="One example's gradient is formed at a time, on the device that has its row.",
            )  # fmt: skip
        for k, size in enumerate(sizes):
            if config.train.batch_size > size:
                raise InputError(
                    "train.batch_size", got=f"{config.train.batch_size} with {size} examples of client {k}",
                    expected="at most as many: they are drawn with probability batch_size / examples",
                    fix="Lower it, or give the client more rows.",
                )  # fmt: skip

    def source(self, data, config, stage):
        stream = data.train.for_tasks(next(iter(config.schedule.values())).tasks)
        each = clients_lib.divide(
            stream.split, stream.task_ids, self.clients, self.split, seed=config.seed, alpha=self.alpha,
            skew=self.skew, unit=data.unit, labelled=bool(data.classes),
        )  # fmt: skip
        seeds = [seed_of("client", config.seed, k) for k in range(self.clients)]
        if not self.private:
            return clients_lib.Clients(
                [clients_lib.packed(stream, ids, seed) for ids, seed in zip(each, seeds, strict=True)]
            )
        expected = config.train.batch_size
        rates = [_rate(config, len(ids)) for ids in each]
        chance = OVERFLOW / (self.turns(config) * self.clients)
        places = max(accountant.most_drawn(len(ids), q, chance) for ids, q in zip(each, rates, strict=True))
        places = -(-places // expected) * expected  # what divides the rows of a step divides these
        return clients_lib.Clients(
            [
                clients_lib.Drawn(stream, ids, rate=q, places=places, seed=seed)
                for ids, q, seed in zip(each, rates, seeds, strict=True)
            ]
        )

    # ---- privacy ---------------------------------------------------------------------------------------------------

    def noise(self, config, sizes) -> float:
        if self.dp_noise or not self.dp_epsilon:
            return self.dp_noise
        return accountant.noise_for(self.dp_epsilon, _highest_rate(config, sizes), self.turns(config), self.dp_delta)

    def each(self, config, data):
        if not self.private:
            return None
        sizes = self.source(data, config, None).sizes
        return Private(self.dp_clip, self.noise(config, sizes), float(config.train.batch_size))

    def spent(self, config, sizes, turns: int) -> float:
        """Epsilon of the client that spent most, after so many local steps."""
        return accountant.epsilon(_highest_rate(config, sizes), self.noise(config, sizes), turns, self.dp_delta)

    # ---- rounds ----------------------------------------------------------------------------------------------------

    def weights(self, sizes) -> np.ndarray:
        weights = np.asarray(sizes, np.float64) if self.average == "examples" else np.ones(len(sizes))
        return (weights / weights.sum()).astype(np.float32)

    def knobs(self, knobs):
        """Of every client, stacked: random keys of its own."""
        seeds = [np.int32(seed_of("client", int(knobs.seed), k) & 0x7FFFFFFF) for k in range(self.clients)]
        each = [knobs.replace(seed=seed) for seed in seeds]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *each)

    def server(self, state, weights, frozen):
        """The clients' states `[N, ...]` averaged by `weights [N]`: `(adapters, router_state, modules)`; traceable."""
        trainable, still = trees.split(state.leaves, frozen)
        first = lambda x: x[0]  # noqa: E731  (frozen leaves are the same everywhere: a mean would round them)

        def mean(x):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x[0]
            return sum(weights[k] * x[k].astype(jnp.float32) for k in range(self.clients)).astype(x.dtype)

        whole = trees.merge(jax.tree.map(mean, trainable), jax.tree.map(first, still))
        adapters, modules = trees.apart(whole)
        return adapters, jax.tree.map(mean, state.router_state), modules

    def round(self, state, weights, frozen, optimizer):
        """The clients' states at the start of the next round; traceable."""
        adapters, router_state, modules = self.server(state, weights, frozen)
        adapters, router_state, modules = trees.repeated((adapters, router_state, modules), self.clients)
        new = state.replace(adapters=adapters, router_state=router_state, modules=modules)
        if self.moments == "kept":
            return new
        trainable, _ = trees.split(new.leaves, frozen)
        return new.replace(opt=jax.vmap(optimizer.init)(trainable))

    def between(self, run, stage, state, memory):
        compiled, source = run.compiled(stage), run.source(stage)
        state = compiled.once(self.round, state, self.weights(source.sizes))
        sent = self.bytes(run, compiled)
        over = 1 + run.stages.index(stage)
        row = {"bytes_up": sent, "bytes_down": sent, "bytes_total": 2 * sent * self.clients * over}
        if self.private:
            row["epsilon"] = self.spent(run.config, source.sizes, stage.stop // self.clients)
        return state, memory, row

    def bytes(self, run, compiled) -> int:
        """What a client sends in a round; the server sends it as much back."""
        trainable, _ = trees.split(compiled.shapes.leaves, compiled.frozen)
        leaves = jax.tree.leaves((trainable, compiled.shapes.router_state))
        return int(sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves))

    def report(self, run, memory):
        stage = run.stages[0]
        source, compiled, done = run.source(stage), run.compiled(stage), run.step_now
        sent, over = self.bytes(run, compiled), sum(stage.stop <= done for stage in run.stages)
        rows = [
            ("clients", "examples", "local steps", "rounds", "bytes up, a client and round", "bytes, whole run"),
            (str(self.clients), " ".join(f"{n:,}" for n in source.sizes), f"{done // self.clients:,}", f"{over:,}",
             f"{sent:,}", f"{2 * sent * self.clients * over:,}"),
        ]  # fmt: skip
        text = table(rows)
        if self.private:
            q = _highest_rate(run.config, source.sizes)
            spent = self.spent(run.config, source.sizes, done // self.clients)
            sigma = self.noise(run.config, source.sizes)
            text += (
                f"\n(epsilon {spent:.3f}, delta {self.dp_delta:g}) of one example: clip {self.dp_clip:g}, noise "
                f"{sigma:.3f}, q {q:.4f} (the client with fewest examples); what this run reports is not covered"
            )
        return text


def _rate(config, size: int) -> float:
    """The probability with which an example of a client with so many is drawn."""
    return min(1.0, config.train.batch_size / size)


def _highest_rate(config, sizes) -> float:
    """Of the client with the fewest examples, which spends most."""
    return max(_rate(config, size) for size in sizes)

"""The pure training step: `step(state, params, batch, fixed, knobs, memory) -> (state, metrics)`.

Gradients are taken with respect to the trainable leaves of `adapters` and `modules` only. Accumulated micro-steps give
exactly the loss of the whole batch for the objective's part; balance losses are not linear in their sums, so each says
whether it averages the micro-steps' values or is taken of the global sums (`accumulate="exact"`, one more pass).
A step whose loss or gradient is not finite changes nothing and is counted.
Seed, learning rate and loss weights are arguments (`Knobs`), so that runs which differ in them share one program.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from molora_jax.core import routing, trees, turns
from molora_jax.core.types import Array
from molora_jax.losses.base import value_of
from molora_jax.objectives import Forward
from molora_jax.objectives.lm import PLAIN


@flax.struct.dataclass
class TrainState:
    """`step` int32: updates made; `skipped` int32: steps in a row that were not finite; `modules`: what trains beside
    the adapters (`runs/modules.py`), {} for nothing."""

    step: Array
    skipped: Array
    adapters: dict
    opt: Any
    router_state: dict
    modules: dict = flax.struct.field(default_factory=dict)

    @property
    def leaves(self) -> dict:
        """All that may train, as one tree."""
        return trees.joined(self.adapters, self.modules)


@flax.struct.dataclass
class Knobs:
    """What may differ between two runs of one compiled step. `seed` int32; `rates` float32, as of `Optimizer.rates`;
    `weights` float32, of the routing losses by name."""

    seed: Array
    rates: dict
    weights: dict

    @classmethod
    def of(cls, seed: int, optimizer, losses) -> "Knobs":
        """On the host. `optimizer`: a member of `optim`; `losses`: `(name, member)` pairs."""
        weights = {name: np.float32(loss.weight) for name, loss in losses}
        rates = {name: np.float32(rate) for name, rate in optimizer.rates().items()}
        return cls(np.int32(seed), rates, weights)


def fresh(model, optimizer, params, frozen, key, init_modules=lambda key, params: {}) -> TrainState:
    """State of step 0; traceable."""
    adapters, modules = model.init_adapters(key, params), init_modules(key, params)
    trainable, _ = trees.split(trees.joined(adapters, modules), frozen)
    return TrainState(
        jnp.int32(0), jnp.int32(0), adapters, optimizer.init(trainable), model.init_router_state(), modules
    )


def micro_batches(batch: dict, n: int, unit: int = 1) -> dict:
    """`[B, S] -> [n, B/n, S]`, units of rows dealt in turn so that every device keeps a part of each micro-batch."""

    def deal(x):
        units = x.reshape(x.shape[0] // (n * unit), n, unit, *x.shape[1:]).swapaxes(0, 1)
        return units.reshape(n, -1, *x.shape[1:])

    return jax.tree.map(deal, batch)


def loss_sums(stats: dict, name: str) -> dict:
    """`{rule: {segment: {scope: sums}}}` of one loss."""
    return {r: {s: {k: v["losses"][name] for k, v in sc.items()} for s, sc in seg.items()} for r, seg in stats.items()}


def decision_sums(stats: dict, name: str) -> dict:
    """`expert_load` or `router`: the statistics, or the sums that a router's own update asks for, of every decision."""
    return {r: {s: {k: v[name] for k, v in sc.items()} for s, sc in seg.items()} for r, seg in stats.items()}


def make_gradient(
    model, *, frozen, accumulate: int, targets_per_row: int, constrain, objective=PLAIN, head: str = "lm",
    seed: int = 0, each=None, penalties=(),
):  # fmt: skip
    """`gradient(state, params, batch, fixed, knobs, memory) -> (grads, out)`: of the trainable leaves, and the sums
    that left the layers.

    Args:
      seed: where no `knobs` are given; the weights are then those of the model's losses.
      frozen: path patterns of leaves that do not train.
      objective: a member of `objectives`; its head is `modules/<head>`.
      targets_per_row: the packer's bound M.
      constrain: pins activations to the mesh.
      each: what is done to every example's gradient (`core.privacy`): rows then hold one example each, or none.
      penalties: `(name, loss)` on the trainable leaves, given `memory[name]` where they remember something
        (`losses.base.Penalty`).
    """
    batched = each is None
    exact = [name for name, loss in model.losses if batched and accumulate > 1 and loss.accumulate == "exact"]
    losses = dict(model.losses)

    def gradient(
        state: TrainState, params: dict, batch: dict, fixed: dict | None = None, knobs: Knobs | None = None,
        memory: dict | None = None,
    ):  # fmt: skip
        weights = own_weights(model) if knobs is None else knobs.weights
        step_key = key_of(seed, knobs, state.step)
        trainable, still = trees.split(state.leaves, frozen)
        norm = objective.norm(batch) if batched else None
        parts = accumulate if batched else 1  # of which a loss is one

        def forward(trainable, i):
            """The model of this step for micro-step i, and where its one pass leaves the layers' sums."""
            adapters, modules = trees.apart(trees.merge(trainable, still))
            own, left = trees.overlay(params, modules.get("base", {})), []

            def hidden(micro):
                if left:
                    raise ValueError("an objective asks for the hidden states of the model that trains once")
                out, stats, _, _ = model.hidden(
                    own, adapters, state.router_state, micro, train=True,
                    key=jax.random.fold_in(step_key, i + 1), step_key=step_key, step=state.step, constrain=constrain,
                )  # fmt: skip
                left.append({r: s for r, s in stats.items() if s})
                return out

            return Forward(model, own, hidden, targets_per_row, constrain), modules.get(head, {}), left

        micros = micro_batches(batch, accumulate, objective.UNIT) if accumulate > 1 else None

        def over_micros(function):
            """The sum of `function(micro, i)` over the micro-steps, one at a time."""
            shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], micros), 0)
            zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

            def add(total, i_micro):
                i, micro = i_micro
                return jax.tree.map(jnp.add, total, function(micro, i)), None

            return jax.lax.scan(add, zero, (jnp.arange(accumulate), micros))[0]

        slopes, exact_values = {}, {}
        if exact:

            def sums_of(i_micro):
                i, micro = i_micro
                pass_, _, left = forward(trainable, i)
                pass_.hidden(micro)
                return {n: loss_sums(left[0], n) for n in exact}

            stacked = jax.lax.map(sums_of, (jnp.arange(accumulate), micros))
            for n in exact:
                whole = lambda sums, n=n: value_of(losses[n], losses[n].join(sums), f"losses.{n}")  # noqa: E731
                exact_values[n], slopes[n] = jax.value_and_grad(whole)(stacked[n])

        def whole_loss(trainable, micro, i):
            pass_, heads, left = forward(trainable, i)
            of = objective.norm(micro) if norm is None else norm
            own, metrics = objective.loss(pass_, heads, fixed or {}, micro, of)
            (stats,) = left
            total, aux = own, {}
            for name, loss in model.losses:
                sums = loss_sums(stats, name)
                if name in slopes:  # d value(all sums) = slope . d(own sums)
                    products = jax.tree.map(lambda a, b: jnp.sum(a[i] * b), slopes[name], sums)
                    total = total + weights[name] * sum(jax.tree.leaves(products))
                    aux[name] = exact_values[name] / parts
                else:
                    aux[name] = value_of(loss, sums, f"losses.{name}") / parts
                    total = total + weights[name] * aux[name]
            sums = {
                "aux": aux,
                "expert_load": decision_sums(stats, "expert_load"),
                "router": decision_sums(stats, "router"),
            }
            return total, {"objective": own, "metrics": metrics, **sums}

        grad = jax.grad(whole_loss, has_aux=True)
        function = lambda micro, i: grad(trainable, micro, i)  # noqa: E731
        if each is not None:
            function = lambda micro, i: of_examples(grad, each, trainable, micro, i)  # noqa: E731
        grads, out = function(batch, 0) if accumulate == 1 else over_micros(function)
        if each is not None:
            grads, out = each.noised(grads, step_key), mean_of_examples(out)
        return penalised(grads, out, penalties, trainable, weights, memory)

    return gradient


def penalised(grads: dict, out: dict, penalties, trainable: dict, weights: dict, memory: dict | None):
    """`(grads, out)` with the slopes and values of the losses on parameters, once a step."""
    for name, loss in penalties:
        value, slope = jax.value_and_grad(loss.penalty)(trainable, (memory or {}).get(name, {}))
        grads = jax.tree.map(lambda g, s, w=weights[name]: g + w * s, grads, slope)
        out["aux"][name] = value
    return grads, out


def of_examples(grad, each, trainable: dict, micro: dict, i):
    """`(sum over examples of what each makes of its gradient, sums over examples)` of rows that hold one example each.

    grad: `(trainable, rows, number) -> (grads, out)`; `number` of a row is its own, so that dropout is.
    """
    rows = len(micro["tokens"])

    def of_example(row, number):
        return grad(trainable, jax.tree.map(lambda x: x[None], row), number)

    grads, out = jax.vmap(of_example)(micro, i * rows + jnp.arange(rows))
    there = jnp.any(micro["loss_weight"] > 0, axis=1)
    grads, norms = each.clipped(grads, there)
    out["metrics"] |= {"clipped": norms > each.clip}
    sums = jax.tree.map(lambda x: jnp.sum(jnp.where(there[(..., *[None] * (x.ndim - 1))], x, 0), axis=0), out)
    return grads, sums | {"examples": jnp.sum(there)}


def mean_of_examples(out: dict) -> dict:
    """What is reported of a step of single examples: means; sums of the routers stay sums."""
    count = out.pop("examples")
    mean = {
        name: jax.tree.map(lambda x: x / jnp.maximum(count, 1), out[name]) for name in ("objective", "metrics", "aux")
    }
    mean["metrics"] |= {"examples": count}
    return out | mean


def make_step(model, optimizer, schedule, *, clip: float, frozen, rated=None, **options):
    """The step function of one stage, to be jitted with its state donated.

    Args:
      optimizer: an optax transformation over the trainable leaves; schedule: step -> learning rate, for the metrics.
      clip: global norm, 0 for none. rated: `rates -> (optimizer, schedule)`, for a step that is given `knobs`.
      options: of `make_gradient`.
    """
    gradient = make_gradient(model, frozen=frozen, **options)
    seed = options.get("seed", 0)
    update = make_update(model, optimizer, schedule, clip=clip, frozen=frozen, rated=rated, seed=seed)

    def train_step(
        state: TrainState, params: dict, batch: dict, fixed: dict | None = None, knobs: Knobs | None = None,
        memory: dict | None = None,
    ):  # fmt: skip
        grads, out = gradient(state, params, batch, fixed, knobs, memory)
        return update(state, grads, out, batch["segment_ids"], knobs)

    return train_step


def own_weights(model) -> dict:
    """Of the model's losses, by name: constants."""
    return {name: loss.weight for name, loss in model.losses}


def key_of(seed: int, knobs: Knobs | None, step: Array) -> Array:
    """The key of one step's randomness; `seed` where no knobs are given."""
    return jax.random.fold_in(jax.random.key(seed if knobs is None else knobs.seed), step)


def make_update(model, optimizer, schedule, *, clip: float, frozen, rated=None, seed: int = 0):
    """`update(state, grads, out, segment_ids, knobs) -> (state, metrics)`: all that follows the gradient of a step.

    `grads, out` as from `make_gradient`; `segment_ids` of the batch, of which the metrics count what is not padding.
    """

    def update(state: TrainState, grads: dict, out: dict, segment_ids: Array, knobs: Knobs | None = None):
        weights = own_weights(model) if knobs is None else knobs.weights
        moves, rate = (optimizer, schedule) if knobs is None else rated(knobs.rates)
        trainable, still = trees.split(state.leaves, frozen)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            loss = out["objective"] + sum(weights[n] * v for n, v in out["aux"].items())
            scale = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12)) if clip else 1.0
            before = at_step(state.opt, state.step)
            updates, opt = moves.update(jax.tree.map(lambda g: g * scale, grads), before, trainable)
            step_key = key_of(seed, knobs, state.step)
            for rule in model.rules:
                if rule.name in updates:
                    updates[rule.name] = rule.adapter.update_mask(updates[rule.name], state.step, step_key)
            updates = turns.moved(model, updates, state.router_state)
            # of a finite gradient Adam's update is finite (the config bounds what it is multiplied by), so nothing here
            # waits for the updates: one pass over the state
            finite = jnp.isfinite(norm) & jnp.isfinite(loss)
            moved, modules = trees.apart(trees.merge(optax.apply_updates(trainable, updates), still))
            router_state = state.router_state
            if model.route != "task":  # a stage that routes by itself leaves the routers alone
                router_state = update_routers(model, router_state, out["router"])
            keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)  # noqa: E731
            state = TrainState(
                step=state.step + 1,
                skipped=jnp.where(finite, 0, state.skipped + 1),
                adapters=keep(moved, state.adapters),
                opt=keep(opt, state.opt),
                router_state=keep(router_state, state.router_state),
                modules=keep(modules, state.modules),
            )
        metrics = {
            "loss": loss,
            **out["metrics"],
            **{f"aux/{n}": v for n, v in out["aux"].items()},
            "grad_norm": norm,
            "lr": jnp.asarray(rate(state.step - 1), jnp.float32),
            "tokens": jnp.sum(segment_ids > 0),
            "skipped": state.skipped,
            "site": site_metrics(model, out["expert_load"]),
        }
        return state, metrics

    return update


def at_step(opt, step: Array):
    """An optimizer's state whose learning rate is that of the run's step.

    A stage begins with a fresh state, and a step that is not finite leaves it as it was: its own count would begin the
    schedule again, or fall behind.
    """
    counted = lambda part: isinstance(part, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(lambda part: part._replace(count=step) if counted(part) else part, opt, is_leaf=counted)


def update_routers(model, state: dict, sums: dict) -> dict:
    """Every router's own update, once a step, on sums over the whole global batch; layers side by side."""
    new = {}
    for rule in model.rules:
        for segment, scopes in state.get(rule.name, {}).items():
            for scope, old in scopes["router"].items():
                own = sums[rule.name]["model" if segment == "shared" else segment][scope]
                done = jax.vmap(rule.router.update)(old, own)
                new.setdefault(rule.name, {}).setdefault(segment, {}).setdefault("router", {})[scope] = done
    return new


COUNTS = ("count", "top1")


def site_metrics(model, sums: dict) -> dict:
    """`{rule/scope: {statistic: [layers]}}` in the order of layers.

    `COUNTS` of them are `[layers, E_max]` and no statistics of a row: the tokens that chose each expert, and those
    whose strongest it was; -1 beyond a layer's experts.
    """
    out = {}
    for rule in model.rules:
        for scope in (*rule.scopes, "base"):  # base: of a base's own router that the rule trains
            segments = [scopes for _, scopes in sorted(sums.get(rule.name, {}).items()) if scope in scopes]
            parts = [routing.expert_load(scopes[scope]) for scopes in segments]
            if parts:
                E = max(scopes[scope]["count"].shape[-1] for scopes in segments)
                wide = lambda x, E=E: jnp.pad(x, ((0, 0), (0, E - x.shape[-1])), constant_values=-1)  # noqa: E731
                counts = {name: jnp.concatenate([wide(s[scope][name]) for s in segments]) for name in COUNTS}
                out[f"{rule.name}/{scope}"] = jax.tree.map(lambda *x: jnp.concatenate(x), *parts) | counts
    return out

"""Router collapse, noticed while it trains: nearly all tokens of a layer go to the same few experts.

    c_e     tokens that chose expert e, summed over the last WINDOW optimizer steps
    N       exp(-sum_e q_e log q_e), q = c / sum c: how many experts are in use; E when all are alike
    k       experts a token, the mean of the window (at least 1): what N cannot fall below
    r       (N - k) / (E - k); collapse: r < LIMIT; over again: r > 2 LIMIT

A top-1 router of 8 experts collapses below N = 1.7, one of the top 2 below 2.6. Nothing is said where a token has all
experts or nearly all (dense routers, single experts: E - k < 1/2), of routers that follow the task
(`Router.COLLAPSES`), and in a stage that routes by task. Said once a collapse and layer; `watch/collapsed` of
metrics.jsonl counts the layers that are collapsed now. A new start looks at a whole window anew.
"""

import collections

import numpy as np

from molora_jax.config.members import members

WINDOW, EVERY, LIMIT = 20, 5, 0.1


class CollapseWatch:
    """`config`: of the run, for the advice; `note`: called with a line of text for each collapse."""

    def __init__(self, config, note):
        self.config, self.note = config, note
        self._windows, self._down = {}, set()

    def seen(self, step: int, site: dict, model) -> dict[str, int]:
        """Takes a step's `{rule/scope: {"count": [layers, E], "active_experts": [layers]}}`.

        `count` is -1 beyond a layer's experts. Returns the columns of the step's row.
        """
        rules = {rule.name: rule for rule in model.rules} if not model.route else {}
        watched = {name: sums for name, sums in site.items() if self._is_watched(name, rules)}
        for name in self._windows.keys() - watched.keys():
            del self._windows[name]
            self._down = {(one, layer) for one, layer in self._down if one != name}
        for name, sums in watched.items():
            rows = self._windows.setdefault(name, collections.deque(maxlen=WINDOW))
            count = np.asarray(sums["count"], np.float64)
            if rows and rows[0][0].shape != count.shape:  # a stage of other experts
                rows.clear()
            rows.append((count, np.asarray(sums["active_experts"], np.float64)))
            if len(rows) == WINDOW and step % EVERY == 0:
                self._look(step, name, rows, rules[name.partition("/")[0]])
        return {"watch/collapsed": len(self._down)} if watched else {}

    @staticmethod
    def _is_watched(name: str, rules: dict) -> bool:
        rule = rules.get(name.partition("/")[0])
        return rule is not None and (rule.router is None or rule.router.COLLAPSES)

    def _look(self, step, name, rows, rule):
        counts = sum(np.maximum(count, 0) for count, _ in rows)  # [layers, E]
        experts = np.sum(rows[-1][0] >= 0, axis=1)
        slots = [np.sum(np.maximum(count, 0), axis=1) for count, _ in rows]
        tokens = sum(s / np.maximum(active, 1e-9) for s, (_, active) in zip(slots, rows, strict=True))
        new = []
        for layer, (own, E) in enumerate(zip(counts, experts, strict=True)):
            if not own.sum():
                continue
            used, k = in_use(own), max(own.sum() / max(tokens[layer], 1.0), 1.0)
            place = (used - k) / (E - k) if E - k >= 0.5 else 1.0
            if place < LIMIT and (name, layer) not in self._down:
                self._down.add((name, layer))
                new.append((layer, used, int(E), int(np.argmax(own)), own.max() / max(tokens[layer], 1.0)))
            elif place > 2 * LIMIT:
                self._down.discard((name, layer))
        if new:
            self.note(f"step {step}: " + self._told(name, rule, new, len(counts)))

    def _told(self, name, rule, new, layers) -> str:
        acts = [layer for layer, count in enumerate(rule.experts) if count]
        acts = acts if len(acts) == layers else list(range(layers))
        layer, used, experts, expert, part = min(new, key=lambda one: one[1])
        said = f"layers {', '.join(str(acts[one[0]]) for one in new)}" if layers > 1 else "all layers"
        worst = f" (the most in layer {acts[layer]})" if len(new) > 1 else ""
        found = f"{used:.1f} of {experts} experts are in use{worst}, expert {expert} by {part:.0%} of the tokens"
        return f"router collapse, {name}, {said}: over the last {WINDOW} steps {found}. {self.advice(rule)}"

    def advice(self, rule) -> str:
        """What to change, with the values that the config has now."""
        losses, options = self.config.get("losses", {}), []
        known = [name for name in losses if "balance" in str(losses[name].get("name", name))]
        known += [
            name for name in losses if name in ("importance", "load", "mean_entropy") and name in members("losses")
        ]
        if known:
            options.append(f"raise losses.{known[0]}.weight (now {losses[known[0]].get('weight', 0.01):g})")
        else:
            options.append("add a balance loss (--config.losses.balance.weight=0.01)")
        off = [field for field in getattr(rule.router, "RANDOM", ()) if not getattr(rule.router, field)]
        if off:
            options.append(f"set method.rules.{rule.name}.router.{off[0]} (now 0)")
        options.append(f"lower optim.learning_rate (now {self.config.optim.learning_rate:g})")
        return f"What helps: {', '.join(options[:-1])}, or {options[-1]}; start anew, as a collapse seldom heals."


def in_use(counts) -> float:
    """The number of experts in use: exp of the entropy of their load `[E]`.

    >>> in_use([5, 5, 0, 0])
    2.0
    """
    q = np.asarray(counts, np.float64) / np.sum(counts)
    q = q[q > 0]
    return float(np.exp(-np.sum(q * np.log(q))))

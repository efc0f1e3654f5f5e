"""Router collapse, noticed while it trains: nearly all tokens of a layer go to the same few experts, or to one first.

    c_e     tokens that chose expert e, summed over the last WINDOW optimizer steps;  t_e: whose strongest it was
    N(c)    exp(-sum_e q_e log q_e), q = c / sum c: how many experts are in use; E when all are alike
    k       experts a token, the mean of the window (at least 1): what N(c) cannot fall below
    r       min((N(c) - k) / (E - k), (N(t) - 1) / (E - 1));   collapse: r < LIMIT;   over again: r > 2 LIMIT

With 8 experts that is N(t) below 1.7 (one expert is the strongest of some nine tokens in ten), or the same two for
nearly all tokens of a top-2 router. Nothing is said where a token has all experts or nearly all (dense routers, single
experts: E - k < 1/2), of routers that follow the task (`Router.COLLAPSES`), and in a stage that routes by task. Said
once a collapse and layer; `watch/collapsed` of metrics.jsonl counts the layers that are collapsed now. A new start
looks at a whole window anew.
"""

import collections

import numpy as np

WINDOW, EVERY, LIMIT = 20, 5, 0.1


class CollapseWatch:
    """`config`: of the run, for the advice; `note`: called with a line of text for each collapse."""

    def __init__(self, config, note):
        self.config, self.note = config, note
        self._windows, self._down = {}, set()

    def seen(self, step: int, site: dict, model) -> dict[str, int]:
        """Takes a step's `{rule/scope: {"count", "top1": [layers, E], "active_experts": [layers]}}`.

        Counts are -1 beyond a layer's experts. Returns the columns of the step's row.
        """
        rules = {rule.name: rule for rule in model.rules} if not model.route else {}
        watched = {name: sums for name, sums in site.items() if self._is_watched(name, rules)}
        for name in self._windows.keys() - watched.keys():
            del self._windows[name]
            self._down = {(one, layer) for one, layer in self._down if one != name}
        for name, sums in watched.items():
            rows = self._windows.setdefault(name, collections.deque(maxlen=WINDOW))
            new = [np.asarray(sums[part], np.float64) for part in ("count", "top1", "active_experts")]
            if rows and rows[0][0].shape != new[0].shape:  # a stage of other experts
                rows.clear()
            rows.append(new)
            if len(rows) == WINDOW and step % EVERY == 0:
                self._look(step, name, rows, rules[name.partition("/")[0]])
        return {"watch/collapsed": len(self._down)} if watched else {}

    @staticmethod
    def _is_watched(name: str, rules: dict) -> bool:
        rule = rules.get(name.partition("/")[0])
        return rule is not None and (rule.router is None or rule.router.COLLAPSES)

    def _look(self, step, name, rows, rule):
        whole = [sum(np.maximum(row[part], 0) for row in rows) for part in (0, 1)]  # count, top1 [layers, E]
        experts = np.sum(rows[-1][0] >= 0, axis=1)
        tokens = sum(np.sum(np.maximum(count, 0), axis=1) / np.maximum(active, 1e-9) for count, _, active in rows)
        new = []
        for layer, (count, top1, E, number) in enumerate(zip(*whole, experts, tokens, strict=True)):
            if not top1.sum():
                continue
            k, first = max(count.sum() / max(number, 1.0), 1.0), in_use(top1)
            place = 1.0 if E - k < 0.5 else min((in_use(count) - k) / (E - k), (first - 1) / (E - 1))
            if place < LIMIT and (name, layer) not in self._down:
                self._down.add((name, layer))
                new.append((layer, in_use(count), int(E), int(np.argmax(top1)), top1.max() / top1.sum()))
            elif place > 2 * LIMIT:
                self._down.discard((name, layer))
        if new:
            self.note(f"step {step}: " + self._told(name, rule, new, len(experts)))

    def _told(self, name, rule, new, layers) -> str:
        acts = [layer for layer, count in enumerate(rule.experts) if count]
        acts = acts if len(acts) == layers else list(range(layers))
        layer, used, experts, expert, part = max(new, key=lambda one: one[4])
        said = f"layers {', '.join(str(acts[one[0]]) for one in new)}" if layers > 1 else "all layers"
        worst = f" (the most in layer {acts[layer]})" if len(new) > 1 else ""
        found = (
            f"expert {expert} of {experts} is the strongest of {part:.0%} of the tokens{worst}, {used:.1f} are in use"
        )
        return f"router collapse, {name}, {said}: over the last {WINDOW} steps {found}. {self.advice(rule)}"

    def advice(self, rule) -> str:
        """What to change, with the values that the config has now."""
        losses, options = self.config.get("losses", {}), []
        known = [name for name in losses if "balance" in str(losses[name].get("name", name))]
        known += [name for name in losses if name in ("importance", "load", "mean_entropy")]
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

"""Multiple choice by likelihood: rows with `choices` and `answer`. C choices of an item.

    s_c = log p(choice c | question), summed over its tokens, the end token included
    choice        the fraction of items where the right choice has the largest s_c
    choice_norm   the same for s_c / len(c), characters of the choice (as lm-eval's acc_norm)
    chance        the mean of 1 / C

A draw between the right choice and others counts as wrong. The choices are rendered as answers of the question in the
run's own template, so what is measured is what the run was trained to write.
"""

import numpy as np

from molora_jax.evaluation import intervals
from molora_jax.evaluation.measure import encoded_example, sums_over
from molora_jax.text import table

KEYS = ("choice", "choice_norm")


def score(run, examples, *, base: bool, phases) -> dict[int, np.ndarray]:
    """`{index of the example: s [C]}` of those that offer choices, of the run or of its base alone."""
    at = [(i, answer) for i, example in enumerate(examples) for answer in example.offered or ()]
    if not at:
        return {}
    texts = [encoded_example(run, answer) for _, answer in at]
    phases.start(f"{'base' if base else 'tuned'}: likelihood of {len(at)} choices", len(at))
    where = "data.tasks, a row with choices"
    sums = sums_over(run, [(t.ids, t.loss_mask) for t in texts], where=where, base=base, done=phases.advance)
    phases.end()
    out: dict[int, list] = {}
    for (i, _), nll in zip(at, sums["nll"], strict=True):
        out.setdefault(i, []).append(-nll)
    return {i: np.array(scores) for i, scores in out.items()}


def rows(examples, items, base: dict, tuned: dict) -> dict:
    """The keys of one task, whose examples are `items`; {} where none of them offers choices."""
    items = [i for i in items if i in tuned]
    if not items:
        return {}
    out = {"choices": len(items), "chance": float(np.mean([1 / len(tuned[i]) for i in items]))}
    for name, scores in (("", tuned), ("_base", base)):
        for key in KEYS:
            right = sum(_right(examples[i], scores[i], by_length=key == "choice_norm") for i in items)
            out[key + name] = intervals.wilson(float(right), len(items))
    return out


def _right(example, scores, *, by_length: bool) -> bool:
    offered = [answer.target for answer in example.offered]
    scores = scores / np.array([len(text) for text in offered]) if by_length else scores
    return bool(np.sum(scores >= scores[offered.index(example.target)]) == 1)


def text_table(report: dict) -> str:
    """A line a task that offers choices; "" without any."""
    lines = [("multiple choice", "items", "chance", "base", "tuned", "95 %", "by length: base", "tuned", "95 %")]
    for name, t in report["tasks"].items():
        if "choice" in t:
            cells = [cell for key in KEYS for cell in (f"{t[f'{key}_base'][0]:.1%}", *_shown(t[key]))]
            lines.append((name, str(t["choices"]), f"{t['chance']:.1%}", *cells))
    return table(lines, right=tuple(range(1, 9))) if len(lines) > 1 else ""


def _shown(interval) -> tuple[str, str]:
    value, low, high = interval
    return f"{value:.1%}", f"{low:.1%} - {high:.1%}"

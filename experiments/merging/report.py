"""results.md and results.png from results.json. Intervals are those of an evaluation (95 %, over items)."""

import numpy as np

from molora_jax.evaluation import intervals
from molora_jax.pictures import BASE, TUNED, figure, save

AGAINST = "average of A and of B"  # what a merge is compared with, item by item


def mean_nll(score: dict) -> float:
    """Mean over tasks of nats an answer token."""
    return float(np.mean([sum(one["nll"]) / sum(one["tokens"]) for one in score.values()]))


def mean_exact(score: dict) -> list[float]:
    """Share of items with every answer token the likeliest, over all tasks, with Wilson's interval."""
    right = [r == t for one in score.values() for r, t in zip(one["right"], one["tokens"], strict=True)]
    return intervals.wilson(float(sum(right)), len(right))


def _pooled(score: dict, key: str) -> np.ndarray:
    return np.concatenate([np.asarray(one[key], float) for one in score.values()])


def change(score: dict, other: dict) -> list[float]:
    """Paired change of the NLL an answer token over all items, from `other` to `score`."""
    return intervals.ratio_change(_pooled(other, "nll"), _pooled(score, "nll"), _pooled(score, "tokens"))


def table(tree: dict) -> str:
    scores = tree["scores"]
    head = ["", *scores[AGAINST], "mean NLL", "exact, all tasks", f"NLL minus that of {AGAINST}, paired"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, score in scores.items():
        nll = [f"{sum(one['nll']) / sum(one['tokens']):.3f}" for one in score.values()]
        exact, paired = mean_exact(score), change(score, scores[AGAINST])
        exact = f"{exact[0]:.0%} ({exact[1]:.0%} to {exact[2]:.0%})"
        paired = "-" if name == AGAINST else f"{paired[0]:+.3f} ({paired[1]:+.3f} to {paired[2]:+.3f})"
        rows.append("| " + " | ".join([name, *nll, f"{mean_nll(score):.3f}", exact, paired]) + " |")
    return "\n".join(rows) + "\n"


def write(folder, tree: dict) -> None:
    asked = tree["asked"]
    text = (
        f"Rank {asked['rank']}, {asked['steps']} steps a LoRA, {asked['items']} held-out items a task; NLL in nats an "
        "answer token; 95 % intervals over items.\n\n"
    )
    (folder / "results.md").write_text("# Merging, measured\n\n" + text + table(tree), encoding="utf-8")
    names = [name for name in tree["scores"] if not name.startswith("halved")]
    fig, ax = figure(figsize=(8, 0.9 + 0.36 * len(names)), layout="constrained")
    for i, name in enumerate(names):
        score = tree["scores"][name]
        ax.barh(i, mean_nll(score), 0.62, color=BASE if name == "base model" or name.startswith("LoRA of") else TUNED)
        each = [sum(one["nll"]) / sum(one["tokens"]) for one in score.values()]
        ax.plot(each, [i] * len(each), ".", color="#333333", ms=5)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set(xlabel="NLL per answer token (nats), mean over tasks; a dot a task\nlower is better")
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    save(fig, folder / "results.png")

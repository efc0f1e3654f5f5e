"""The table and the picture of `experiments.lora_mixer`."""

import numpy as np

from experiments.lora_mixer.tasks import TASKS
from molora_jax.io.files import write_atomically
from molora_jax.pictures import figure, save, shades

FORMS = {"top 3": dict(k=3), "soft": dict(hard="never"), "top 1": dict(k=1)}  # of use; training is soft


def accuracy(score) -> np.ndarray:
    """Of answer tokens, by task."""
    return np.array(score["right"]) / np.array(score["tokens"])


def own(score) -> float:
    """The part of the gates that goes to the task's own expert, the mean over tasks and layers."""
    gates = np.array(score["gates"])  # [tasks, L, E]
    return float(np.mean([gates[i, :, i] for i in range(len(gates))]))


def load(score) -> np.ndarray:
    """The part of the gates of each expert, tasks alike."""
    return np.array(score["gates"]).mean(axis=(0, 1))


def lines(found) -> list[tuple]:
    runs, out = list(found["runs"].values()), []
    for name in runs[0]:
        scores = [run[name] for run in runs]
        each = np.array([accuracy(score) for score in scores])
        whole = np.array([np.sum(s["whole"]) / np.sum(s["items"]) for s in scores])
        nll = np.array([np.sum(s["nll"]) / np.sum(s["tokens"]) for s in scores])
        means = 100 * each.mean(axis=1)
        row = [name.replace(" | ", ", "), f"{means.mean():.1f} ({', '.join(f'{m:.1f}' for m in means)})"]
        row += [f"{100 * value:.0f}" for value in each.mean(axis=0)] + [
            f"{100 * whole.mean():.1f}",
            f"{nll.mean():.3f}",
        ]
        routed = all("gates" in score for score in scores) and "own expert" not in name
        row.append(f"{100 * np.mean([own(s) for s in scores]):.0f}" if routed else "-")
        share = np.mean([load(s) for s in scores], axis=0) if routed else []
        row.append(" ".join(f"{100 * part:.0f}" for part in share) or "-")
        out.append(tuple(row))
    return out


def write(out, found) -> str:
    """Writes results.md and results.png below `out`; the table."""
    head = ("", "answer tokens right, % (seeds)", *TASKS, "whole answers, %", "NLL a token", "own expert, %", "load, %")
    table = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *lines(found))]
    text = "\n".join(table) + "\n"
    write_atomically(out / "results.md", text)
    picture(out, found)
    return text


def picture(out, found):
    """Accuracy of each way, a dot a seed."""
    runs = list(found["runs"].values())
    fig, ax = figure(figsize=(8, 4.2), layout="constrained")
    for at, (name, colour) in enumerate(zip(runs[0], shades(len(runs[0])), strict=True)):
        means = [100 * accuracy(run[name]).mean() for run in runs]
        ax.plot(means, [at] * len(means), "o", color=colour)
    ax.set(yticks=range(len(runs[0])), yticklabels=list(runs[0]), xlabel="answer tokens right (%)")
    ax.invert_yaxis()
    ax.grid(alpha=0.3)
    save(fig, out / "results.png")

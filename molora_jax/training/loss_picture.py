"""The loss of a run as a picture, from its metrics."""

import json
import math
import pathlib

from molora_jax.pictures import BASE, TUNED, figure, line, plain, save, say, shades


def plot_loss(workdir) -> pathlib.Path:
    """`report/loss.png` from `metrics.jsonl`: loss, the language-model part, held-out NLL where it was measured.

    Each step pale, the smoothed course in full colour. Values that are not finite leave a gap; without rows the picture
    says so.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = [row for row in map(_row, lines) if row]
    fig, ax = figure(figsize=(7, 4), layout="constrained")
    for name, label, color in (("loss", "with router losses", BASE), ("lm_loss", "answer tokens", TUNED)):
        points = [(r["step"], _finite(r[name])) for r in rows if name in r]
        if points:
            line(ax, points, label=label, color=color)
    seen = [(r["step"], _finite(r["valid_nll"])) for r in rows if "valid_nll" in r]
    if seen:
        ax.plot(*zip(*seen, strict=True), "o-", color="#d1495b", label="held-out (valid)")
    ax.set(xlabel="step", ylabel="nats a token", title=plain(workdir.resolve().name))
    if rows:
        ax.legend(frameon=False)
        ax.xaxis.get_major_locator().set_params(integer=True)
    else:
        say(ax, "no step yet")
    ax.grid(alpha=0.3)
    return save(fig, workdir / "report" / "loss.png")


def plot_losses(folder, names) -> pathlib.Path:
    """`losses.png` of several runs, the folders `names` in `folder`: a line a run, on one axis."""
    folder = pathlib.Path(folder)
    fig, ax = figure(figsize=(8, 4.5), layout="constrained")
    for name, color in zip(names, shades(len(names)), strict=True):
        path = folder / name / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        points = [(row["step"], _finite(row["loss"])) for row in map(_row, lines) if row and "loss" in row]
        if points:
            line(ax, points, label=plain(name), color=color)
    ax.set(xlabel="step", ylabel="loss, nats a token", title=plain(folder.resolve().name))
    if ax.get_lines():
        ax.legend(frameon=False, fontsize="small", ncols=1 + len(names) // 9)
        ax.xaxis.get_major_locator().set_params(integer=True)
    else:
        say(ax, "no step yet")
    ax.grid(alpha=0.3)
    return save(fig, folder / "losses.png")


def _row(line: bytes) -> dict | None:
    """None for what is no row: half a line, which a kill leaves behind (the next start of the training cuts it)."""
    try:
        row = json.loads(line)
        return row if math.isfinite(row["step"]) else None
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def _finite(value) -> float:
    try:
        value = float(value)  # "NaN" and "Infinity" are text in metrics.jsonl
    except (ValueError, TypeError, OverflowError):  # a damaged row: a gap, as for what is not finite
        return math.nan
    return value if math.isfinite(value) else math.nan

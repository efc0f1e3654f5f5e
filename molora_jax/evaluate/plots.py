"""The pictures of a report: loss, tasks, routing. Matplotlib without a display."""

import json
import math
import pathlib

import numpy as np

BASE, TUNED = "#9aa5b1", "#1f6fb2"
# Differences: the ends of matplotlib's RdBu are nearly black, both of them; without them each end keeps its colour.
SIGNED_ENDS = (0.12, 0.88)


def figure(*args, **kwargs):
    """`(figure, axes)` as `plt.subplots`, but not registered with pyplot: no display, nothing to close."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    options = {name: kwargs.pop(name) for name in ("figsize", "layout") if name in kwargs}
    fig = Figure(**options)
    FigureCanvasAgg(fig)
    return fig, fig.subplots(*args, **kwargs)


def save(fig, path) -> pathlib.Path:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120, bbox_inches="tight")  # a label wider than its axes is outside what the layout knows
    return path


def signed():
    """Blue for less, white for equal, red for more."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["RdBu_r"](np.linspace(*SIGNED_ENDS, 256)), name="signed")


def stack(pictures, path) -> pathlib.Path:
    """Pictures one above the other, as wide as the widest; a narrower one is in the middle."""
    from matplotlib.image import imread, imsave

    images = [imread(picture)[..., :3] for picture in pictures]
    width = max(image.shape[1] for image in images)
    rows = [
        np.pad(image, ((0, 0), ((width - w) // 2, (width - w + 1) // 2), (0, 0)), constant_values=1.0)
        for image, w in ((image, image.shape[1]) for image in images)
    ]
    imsave(path, np.concatenate(rows))
    return pathlib.Path(path)


def plot_loss(workdir) -> pathlib.Path:
    """`report/loss.png` from `metrics.jsonl`: loss, the language-model part, held-out NLL where it was measured.

    Values that are not finite leave a gap; without rows the picture says so.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = [row for row in map(_row, lines) if row]
    fig, ax = figure(figsize=(7, 4), layout="constrained")
    for name, label, color in (("loss", "with router losses", BASE), ("lm_loss", "answer tokens", TUNED)):
        points = [(r["step"], _finite(r[name])) for r in rows if name in r]
        if points:
            marker = "." if len(points) < 60 else None
            ax.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, lw=1.5)
    seen = [(r["step"], _finite(r["valid_nll"])) for r in rows if "valid_nll" in r]
    if seen:
        ax.plot(*zip(*seen, strict=True), "o-", color="#d1495b", label="held-out (valid)")
    ax.set(xlabel="step", ylabel="nats a token", title=workdir.resolve().name)
    if rows:
        ax.legend(frameon=False)
        ax.xaxis.get_major_locator().set_params(integer=True)
    else:
        _say(ax, "no step yet")
    ax.grid(alpha=0.3)
    return save(fig, workdir / "report" / "loss.png")


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


def _say(ax, text):
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="#666666")
    ax.set(xticks=[], yticks=[])


def plot_tasks(report: dict, path) -> pathlib.Path:
    """Base against tuned, task by task, with 95 % intervals: NLL per answer token, exact match where generated."""
    tasks = report["tasks"]
    shown = any(t["exact"] is not None for t in tasks.values())
    height = 1.3 + 0.48 * len(tasks)
    fig, axes = figure(1, 1 + shown, figsize=(6 + 4 * shown, height), layout="constrained", sharey=True, squeeze=False)
    _bars(axes[0, 0], tasks, "nll", 1.0)
    axes[0, 0].set(xlabel="NLL per answer token (nats)\nlower is better")
    if shown:
        _bars(axes[0, 1], tasks, "exact", 100.0)
        n = max(t["generated"] for t in tasks.values())
        axes[0, 1].set(xlabel=f"exact match (%) of at most {n} answers\nhigher is better", xlim=(0, 100))
    names = [f"{name} ({t['items']})" for name, t in tasks.items()]
    axes[0, 0].set_yticks(range(len(tasks)), names)
    axes[0, 0].invert_yaxis()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return save(fig, path)


def _bars(ax, tasks, key, factor):
    for offset, name, color, label in ((-0.2, f"{key}_base", BASE, "base model"), (0.2, key, TUNED, "tuned")):
        found = [(i, t[name]) for i, t in enumerate(tasks.values()) if t[name] is not None]
        at, values = np.array([i for i, _ in found]), factor * np.array([v for _, v in found])
        error = np.abs(values[:, 1:] - values[:, :1]).T
        ax.barh(at + offset, values[:, 0], 0.38, xerr=error, color=color, label=label,
                error_kw=dict(lw=1, capsize=2, ecolor="#333333"))  # fmt: skip
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def plot_routing(routing: dict, experts: dict, path) -> pathlib.Path:
    """Where the tokens of each task go: a column of panels a task, a row a router scope; layers down, experts across.

    With few scopes a second row shows how each task differs from the mean of the tasks.

    Args:
      routing: `{rule: {scope: {task: [L][E]}}}`, shares that sum to 1 over a layer's experts.
      experts: `{rule: experts of each layer}`; what is beyond is left grey.
    """
    scopes = [(rule, scope, by_task) for rule, scopes in routing.items() for scope, by_task in scopes.items()]
    if not scopes:
        fig, ax = figure(figsize=(6, 2), layout="constrained")
        _say(ax, "This run has no router: every token uses the same adapter.")
        return save(fig, path)
    tasks = list(scopes[0][2])
    shares = [_masked(by_task, experts[rule], scope) for rule, scope, by_task in scopes]
    names = [rule if scope in (rule, "site") else f"{rule}: {scope}" for rule, scope, _ in scopes]
    top = max(float(np.nanpercentile(x, 99.5)) for x in shares)
    rows = [(f"{n}\nlayer", x, dict(cmap="magma_r", vmin=0, vmax=top)) for n, x in zip(names, shares, strict=True)]
    if len(scopes) <= 2 and len(tasks) > 1:
        for name, x in zip(names, shares, strict=True):
            change = x - np.mean(x, axis=0)
            most = max(1e-3, float(np.nanpercentile(np.abs(change), 99.5)))
            rows.append((f"{name}, minus mean\nlayer", change, dict(cmap=signed(), vmin=-most, vmax=most)))
    size = (1.8 + 1.05 * len(tasks), 0.9 + sum(max(1.2, 0.08 * x.shape[1]) + 0.2 for _, x, _ in rows))
    fig, axes = figure(
        len(rows), len(tasks), figsize=size, layout="constrained", squeeze=False, sharey="row", sharex="row"
    )
    for row, (label, x, colours) in enumerate(rows):
        for column, ax in enumerate(axes[row]):
            ax.set_facecolor("#e4e4e4")
            image = ax.imshow(x[column], aspect="auto", **colours)
        _dress(axes[row], label, x)
        if row == 0 or "minus" in label:  # rows of one scale share a bar
            label = "difference in share" if "minus" in label else "mean share of the gates"
            group = axes[: len(scopes)] if row == 0 else axes[row]
            bar = fig.colorbar(image, ax=group, fraction=0.03, pad=0.01, extend="max" if row == 0 else "both")
            bar.set_label(label, fontsize=8)
            bar.ax.tick_params(labelsize=7)
    for ax, task in zip(axes[0], tasks, strict=True):
        ax.set_title(task, fontsize=9)
    fig.supxlabel("expert", fontsize=9)
    return save(fig, path)


def _dress(axes, label, x):
    """Ticks at whole layers and at the first and last expert."""
    L, E = x.shape[1:]
    axes[0].set_ylabel(label if L > 1 else label.replace("layer", "all layers"), fontsize=8)
    axes[0].yaxis.get_major_locator().set_params(integer=True)
    for ax in axes:
        ax.set_xticks([0, E - 1] if E > 1 else [0])
        ax.tick_params(labelsize=7, length=2)


def _masked(by_task, counts, scope):
    """`[tasks, L, E]`, NaN where there is no expert."""
    share = np.array(list(by_task.values()), float)
    counts = [max(counts)] if scope == "model" else counts
    for layer, count in enumerate(counts):
        share[:, layer, count:] = np.nan
    return share

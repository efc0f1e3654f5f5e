"""What every picture shares: a figure without a display, its files (PNG, and PDF beside it), its colours, its lines."""

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
    """Writes the PNG at `path` and a PDF of the same name beside it, the same bytes for the same figure."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120, bbox_inches="tight")  # a label wider than its axes is outside what the layout knows
    fig.savefig(path.with_suffix(".pdf"), bbox_inches="tight", metadata={"CreationDate": None})
    return path


def smoothed(values, width: int | None = None) -> np.ndarray:
    """The mean of what is finite among the `width` values around each one, `[N]`; NaN where none is.

    Centred, so that it does not lag, over whole values: near the ends it takes those that are there. `width` (odd) is a
    fifteenth of the length by default, at least 5 and at most 101; of fewer than 10 values each stands for itself.

    >>> smoothed([1.0, 3.0, 5.0, float("nan")], 3).tolist()
    [2.0, 3.0, 4.0, 5.0]
    """
    values = np.asarray(values, float)
    width = (1 if len(values) < 10 else min(max(len(values) // 15, 5), 101) | 1) if width is None else width
    known, half = np.isfinite(values), width // 2

    def sums(x):
        total = np.concatenate([[0.0], np.cumsum(x)])
        at = np.arange(len(x))
        return total[np.minimum(at + half + 1, len(x))] - total[np.maximum(at - half, 0)]

    count = sums(known.astype(float))
    return np.where(count > 0, sums(np.where(known, values, 0.0)) / np.maximum(count, 1.0), np.nan)


def line(ax, points, *, label, color, **style):
    """A measured line: as it is, pale, and its smoothed course in full colour (of few points the line alone)."""
    steps, values = zip(*points, strict=True)
    if len(points) < 10:
        ax.plot(steps, values, label=label, color=color, marker=".", lw=1.5, **style)
        return
    ax.plot(steps, values, color=color, lw=0.8, alpha=0.3, **style)
    ax.plot(steps, smoothed(values), label=label, color=color, lw=1.7, **style)


def signed():
    """Blue for less, white for equal, red for more."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["RdBu_r"](np.linspace(*SIGNED_ENDS, 256)), name="signed")


def shades(count: int) -> list:
    """As many colours, in order from dark to light; the lightest, which white paper swallows, are left out."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0, 0.88, count)]


def plain(text: str) -> str:
    """A text of a run as a label: matplotlib reads what stands between two `$` as mathematics."""
    return str(text).replace("$", r"\$")


def say(ax, text):
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="#666666")
    ax.set(xticks=[], yticks=[])

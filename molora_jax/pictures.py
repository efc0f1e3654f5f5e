"""What every picture shares: a figure without a display, its file, its colours."""

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


def shades(count: int) -> list:
    """As many colours, in order from dark to light; the lightest, which white paper swallows, are left out."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0, 0.88, count)]


def say(ax, text):
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="#666666")
    ax.set(xticks=[], yticks=[])

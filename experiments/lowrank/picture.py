"""NLL against what a method trains, and against what its step costs: a dot a seed, the method's name at their mean."""

from molora_jax import pictures


def cost(row):
    """LoRA is the unit; None where nothing was measured."""
    return 1.0 if row.entry.method == "lora" else row.cost and row.cost["median"]


def name(ax, dots):
    """The title of each `(title, x, y)` beside its dot; those of one column (dots less than a tenth of the width apart)
    are moved up until they are apart, each with a line to its dot."""
    ax.get_xlim(), ax.get_ylim()  # settles the limits that the transform needs
    to_axes = (ax.transData + ax.transAxes.inverted()).transform
    columns: list[list] = []
    for x, y, title in sorted((*to_axes(dot), title) for title, *dot in dots):
        if not columns or x - columns[-1][0][0] > 1 / 10:
            columns.append([])
        columns[-1].append((x, y, title))
    for column in columns:
        right, height = column[-1][0], -1.0
        for x, y, title in sorted(column, key=lambda spot: spot[1]):
            height = max(y, height + 0.035)
            ax.annotate(
                title, (x, y), xytext=(right + 0.025, height), xycoords="axes fraction", fontsize=8, va="center",
                annotation_clip=False,
                arrowprops=dict(arrowstyle="-", color="0.6", lw=0.6, shrinkA=0, shrinkB=2, relpos=(0, 0.5)),
            )  # fmt: skip


def draw(rows: dict, tree: dict, path):
    seen = [row for group in rows.values() for row in group if row.runs]
    fig, axes = pictures.figure(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    panels = (
        ("trained parameters", lambda row: row.entry.trainable, "log"),
        ("step, times plain LoRA", cost, "linear"),
    )
    for ax, (label, at, scale) in zip(axes, panels, strict=True):
        for row in seen:
            if at(row):
                values = list(row.scores.values())
                ax.plot([at(row)] * len(values), values, "o", color=pictures.TUNED, ms=4)
        ax.set_xscale(scale)
        ax.set_xlabel(label, fontsize=8)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    for ax, (_, at, _) in zip(axes, panels, strict=True):  # when all dots are there: the panels share an axis
        name(ax, [(row.title, at(row), row.mean) for row in seen if at(row)])
    axes[0].set_ylabel("NLL per answer token, mean over tasks (nats)", fontsize=8)
    pictures.save(fig, path)

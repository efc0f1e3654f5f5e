"""NLL against what a method trains, and against what its step costs: a dot a seed, the method's name at their mean."""

from molora_jax import pictures


def cost(row):
    """LoRA is the unit; None where nothing was measured."""
    return 1.0 if row.entry.method == "lora" else row.cost and row.cost["median"]


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
                ax.annotate(row.title, (at(row), row.mean), xytext=(5, 0), textcoords="offset points", fontsize=8)
        ax.set_xscale(scale)
        ax.set_xlabel(label, fontsize=8)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("NLL per answer token, mean over tasks (nats)", fontsize=8)
    pictures.save(fig, path)

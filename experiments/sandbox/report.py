"""`results.json`, `results.md` and `results.png` of the sandbox base."""

import json
import pathlib

import numpy as np

from molora_jax import pictures
from molora_jax.io.files import write_atomically

MODELS = ("bigram", "trigram", "base")


def curve(folder: pathlib.Path) -> list[list[float]]:
    """`[[tokens so far, loss], ...]` of both runs, about 200 points, each the mean of the steps that it stands for."""
    rows = []
    for run in ("steady", "decay"):
        for line in (folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append((row["tokens"], float(row["loss"])))
    tokens, loss = np.cumsum([row[0] for row in rows]), np.array([row[1] for row in rows])
    cuts = np.array_split(np.arange(len(rows)), min(200, len(rows)))
    return [[int(tokens[cut[-1]]), round(float(loss[cut].mean()), 4)] for cut in cuts]


def totals(nll: dict) -> dict[str, float]:
    """Nats a token of each model over all sources, and bits a byte."""
    tokens = sum(row["tokens"] for row in nll.values())
    return {name: sum(row[name] * row["tokens"] for row in nll.values()) / tokens for name in MODELS}


def write(out, found: dict):
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.json", json.dumps(found, indent=1) + "\n")
    write_atomically(folder / "results.md", markdown(found))
    draw(found, folder / "results.png")


def markdown(found: dict) -> str:
    setting = " ".join(f"--{name}={value}" for name, value in found["setting"].items())
    lines = [
        "# The sandbox base\n", f"Made by `python -m experiments.sandbox {setting}`.\n", "## Corpus\n",
        "| source | from | licence | documents | held out | characters | held out | sha256 |", "|---" * 8 + "|",
    ]  # fmt: skip
    for name, row in found["corpus"].items():
        cells = (name, row["version"], row["licence"], row["documents"], row["held_out"], f"{row['characters']:,}",
                 f"{row['characters_held_out']:,}", f"`{row['sha256'][:16]}`")  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "\n## Held-out documents: nats a token\n",
        "| source | tokens | " + " | ".join(MODELS) + " | base, bits a byte |",
    ]
    lines += ["|---" * (len(MODELS) + 3) + "|"]
    for name, row in found["nll"].items():
        bits = row["base"] * row["tokens"] / row["bytes"] / np.log(2)
        lines.append(
            f"| {name} | {row['tokens']:,} | " + " | ".join(f"{row[m]:.3f}" for m in MODELS) + f" | {bits:.2f} |"
        )
    lines.append("| all | | " + " | ".join(f"{x:.3f}" for x in totals(found["nll"]).values()) + " | |")
    lines.append(f"\nTrained on {found['curve'][-1][0]:,} tokens.\n\n## Samples (temperature 0.7, seed 0)\n")
    lines += [
        f"- **{prompt}**{json.dumps(said, ensure_ascii=False)[1:-1]}" for prompt, said in found["samples"].items()
    ]
    return "\n".join(lines) + "\n"


def draw(found: dict, path):
    """The training loss, with what bigrams and trigrams come to as lines."""
    figure, axes = pictures.figure(figsize=(7, 4), layout="constrained")
    at, loss = np.array(found["curve"]).T
    axes.plot(at / 1e6, loss, color=pictures.TUNED, label="the base, on what it is trained on")
    for (name, value), style in zip(totals(found["nll"]).items(), (":", "--", "-"), strict=True):
        axes.axhline(value, color=pictures.TUNED if name == "base" else "#555555", linestyle=style, linewidth=1)
        axes.annotate(
            f"{name}, held out: {value:.2f}", (1.01, value), xycoords=("axes fraction", "data"), va="center", fontsize=9
        )
    axes.set(xlabel="million tokens", ylabel="nats a token", ylim=(min(loss.min(), 3.5) - 0.3, min(8.5, loss.max())))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    pictures.save(figure, path)

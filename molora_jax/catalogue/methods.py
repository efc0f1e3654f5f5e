"""The methods that the project ships, as tables: of the README, of `docs/methods.md` and of the shared battery."""

from molora_jax.backbones.families import SMOLLM2
from molora_jax.catalogue.lowrank import LOWRANK
from molora_jax.catalogue.organised import ORGANISED
from molora_jax.catalogue.routed import ROUTED
from molora_jax.catalogue.row import Method
from molora_jax.catalogue.surgeries import SURGERIES

METHODS = LOWRANK | ROUTED
EVERY = (*METHODS.values(), *ORGANISED.values())


def surgeries_table() -> str:
    rows = ["| surgery | paper | what | takes runs | differs from the paper | config |", "|---|---|---|---|---|---|"]
    for row in SURGERIES.values():
        cells = [row.title, _paper(row), row.equation, row.takes, row.differs or "-", f"`--config={row.config}`"]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def methods_table() -> str:
    """The table of `docs/methods.md`, in Markdown."""
    head = ["method", "paper", "what it changes (axis and member)", "equation", "differs from the paper's code"]
    head += ["trained on SmolLM2-135M", "files of its own", "config"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in EVERY:
        cells = [row.title, _paper(row), row.axes, row.equation, row.differs or "-"]
        cells += [f"{row.params.__doc__}: {row.params(SMOLLM2):,}", _files(row), _command(row)]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def readme_table() -> str:
    """The table of the README: the same rows, fewer columns."""
    rows = ["| method | paper | what it changes (axis and member) | run it with |", "|---|---|---|---|"]
    for row in EVERY:
        axes = row.axes.replace("|", "\\|")
        rows.append(f"| {row.title} | {_paper(row)} | {axes} | {_command(row)} |")
    return "\n".join(rows) + "\n"


def _files(row: Method) -> str:
    """The config (where it is not another row's with one option changed), then the files of its own."""
    return ", ".join(f"`{name}`" for name in (*(() if row.overrides else (row.config,)), *row.own)) or "-"


def _paper(row: Method) -> str:
    return f"[{row.paper}](https://arxiv.org/abs/{row.paper})" if row.paper else "-"


def _command(row: Method) -> str:
    changes = "".join(f" --config.{field}={value}" for field, value in row.overrides.items())
    return f"`--config={row.config}{changes}`"


LEGEND = """
Trained parameters are those of factors and routers in all stages. In the formulas, p(sites) is the sum of D_in +
D_out over the sites of a layer, d(sites) the sum of D_in, o(sites) the sum of D_out; L is the number of layers, D the
width. "all" means q, k, v, o, gate, up, down; "attn" means q, k, v, o; "ffn" means gate, up, down. A test compares
each formula with the count of the model's own leaves (`tests/battery/test_methods.py`). [design.md](design.md) has
what a method needed in other files.
"""


def document() -> str:
    """docs/methods.md."""
    head = "\n## Surgeries\n\nRuns in, one run out, by `python -m launch.surgery` ([surgery.md](surgery.md)).\n\n"
    return "# Methods\n\nMade by `python -m launch.docs`.\n\n" + methods_table() + LEGEND + head + surgeries_table()

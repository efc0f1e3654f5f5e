"""The methods that the project ships: one row each, read by the README and by the shared battery of tests.

A row is a config (with overrides where a method is one option away from another), the paper, the equation, what the
method has of its own on the axes, where it departs from the paper's code, and the paper's count of trained parameters
as a function of the decoder's shape. Imports neither jax nor a config. D width, F FFN width, E experts, R rank.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from molora_jax.config_resolve import resolve_experts
from molora_jax.models.families import ATTENTION, FFN, PROJECTIONS, DecoderConfig


@dataclasses.dataclass(frozen=True)
class Method:
    """One method of the literature.

    `params(decoder)` is the paper's number of trained parameters; `zero_init` says that the start changes nothing;
    `exceptions` are path patterns of leaves that get no gradient at random factors, by the method's own design.
    """

    config: str
    title: str
    paper: str  # arXiv id
    axes: str  # what is its own, by axis
    equation: str
    params: Callable[[DecoderConfig], int]
    differs: str = ""
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # dotted field of the config -> value
    zero_init: bool = True
    exceptions: tuple[str, ...] = ()


def low_rank(decoder: DecoderConfig, sites, rank: int) -> int:
    """Parameters of one pair A, B on each of the sites of one layer: `R (D_in + D_out)`."""
    return sum(rank * sum(decoder.dims(site)) for site in sites)


def lora(decoder: DecoderConfig) -> int:
    return decoder.layers * low_rank(decoder, PROJECTIONS, 16)


def dora(decoder: DecoderConfig) -> int:
    """LoRA's and one magnitude an output row."""
    return lora(decoder) + decoder.layers * sum(decoder.dims(site)[1] for site in PROJECTIONS)


def ffn_experts(decoder: DecoderConfig) -> int:
    """LoRA on attention, 8 whole-FFN experts, one router `[E, D]` a layer."""
    experts = 8 * (low_rank(decoder, FFN, 16) + decoder.width)
    return decoder.layers * (low_rank(decoder, ATTENTION, 16) + experts)


def mola(decoder: DecoderConfig) -> int:
    """`N_j` pairs and one router `[N_j, D_in]` on each projection of layer j."""
    one = low_rank(decoder, PROJECTIONS, 8) + sum(decoder.dims(site)[0] for site in PROJECTIONS)
    return one * sum(resolve_experts("2|4|6|8", decoder.layers))


def mos(decoder: DecoderConfig) -> int:
    """`e L (D_in + D_out)` a projection type, whatever the active rank: LoRA of rank e = 8."""
    return decoder.layers * low_rank(decoder, PROJECTIONS, 8)


def coe(decoder: DecoderConfig) -> int:
    """8 experts `[16, D]` and `[16, D]`, and a router `[8, D]` for each of two passes."""
    return decoder.layers * 8 * (2 * 16 + 2) * decoder.width


def x_lora(decoder: DecoderConfig) -> int:
    """Nine adapters of rank 16 on five projections, and a head with `9 (D + 1)` for each of the wrapped linears."""
    sites = (*ATTENTION, "gate")
    return decoder.layers * 9 * (low_rank(decoder, sites, 16) + len(sites) * (decoder.width + 1))


METHODS = {
    "lora": Method(
        config="configs/lora.py",
        title="LoRA",
        paper="2106.09685",
        axes="adapter `lora`",
        equation="y = W x + (alpha / R) B A x",
        params=lora,
    ),
    "rslora": Method(
        config="configs/lora.py",
        overrides={"method.rules.all.adapter.name": "rslora"},
        title="rsLoRA",
        paper="2312.03732",
        axes="adapter `rslora`",
        equation="y = W x + (alpha / sqrt(R)) B A x",
        params=lora,
    ),
    "dora": Method(
        config="configs/lora.py",
        overrides={"method.rules.all.adapter.name": "dora"},
        title="DoRA",
        paper="2402.09353",
        axes="adapter `dora`",
        equation="y = m (W + s B A) / \\|\\|W + s B A\\|\\|_row x",
        differs="with dropout, the base term keeps the undropped input",
        params=dora,
    ),
    "pissa": Method(
        config="configs/lora.py",
        overrides={"method.rules.all.adapter.init": "pissa"},
        title="PiSSA",
        paper="2404.02948",
        axes="init `pissa`",
        equation="y = W x + s (B A - B0 A0) x; s B0 A0 = rank-R part of W",
        differs="W is not altered: the start is saved and subtracted; exact SVD",
        params=lora,
    ),
    "lora_plus": Method(
        config="configs/lora.py",
        overrides={"optim.name": "lora_plus"},
        title="LoRA+",
        paper="2402.12354",
        axes="optimizer `lora_plus`",
        equation="lr_B = 16 lr_A",
        params=lora,
    ),
    "mixlora": Method(
        config="configs/mixlora.py",
        title="MixLoRA",
        paper="2404.15159",
        axes="placement `ffn`, router `softmax_topk`, loss `balance` over all layers",
        equation="y = sum_k w_k FFN_k(x), w = top 2 of softmax(W_r x), renormalised",
        differs="loss weight 1e-2 (paper) not 1e-3 (code); router jitter off, and never seen by the experts",
        params=ffn_experts,
    ),
    "mola": Method(
        config="configs/mola.py",
        title="MoLA",
        paper="2402.08562",
        axes='placement `projection` with `experts="2\\|4\\|6\\|8"`, loss `balance` over a layer',
        equation="y = W x + s sum_k w_k B_k A_k x, a router a projection",
        differs="padding is neither routed nor counted",
        params=mola,
    ),
    "dynamic_moe": Method(
        config="configs/dynamic_moe.py",
        title="Dynamic MoE (top-p)",
        paper="2403.07652",
        axes="router `top_p`, loss `entropy`",
        equation="y = sum_{i <= t} p_i FFN_i(x) + (1 - sum p_i) FFN_0(x), t = fewest with sum p_i > P",
        differs="LoRA experts over a frozen FFN, which keeps the mass that is not kept",
        params=ffn_experts,
    ),
    "mos": Method(
        config="configs/mos.py",
        title="MoS",
        paper="2410.00938",
        axes="adapter `mos`: pools shared by the layers, frozen index tables",
        equation="y = W x + (alpha / r) B A x, row j of A and B = n shards of a shared pool",
        differs="pools saved, not only their expansion; no inert random scaling; private rows and shards are ours",
        params=mos,
        exceptions=("all/shared/*",),  # rows of the pool that no layer drew
    ),
    "coe": Method(
        config="configs/coe.py",
        title="Chain of Experts",
        paper="2506.18945",
        axes="placement `chain`",
        equation="z_t = z_{t-1} + sum_e g_{t,e} s B_e A_e z_{t-1}, y = FFN(z_0) + z_C - z_0",
        differs="LoRA experts beside the frozen FFN, whose residual stream stays; balance per packed example",
        params=coe,
    ),
    "x_lora": Method(
        config="configs/x_lora.py",
        title="X-LoRA",
        paper="2402.07148",
        axes="router `x_lora` on the frozen base's hidden state, stages (or `load`)",
        equation="y = W x + s sum_a softmax(V_l h)_a B_a A_a x, h = base(tokens)",
        differs="top-k softmax per token, not over the batch; a KV cache for both passes",
        params=x_lora,
    ),
}


def methods_table() -> str:
    """The table of the README, in Markdown."""
    rows = ["| method | paper | its own on the axes | equation | differs from the paper's code | config |"]
    rows.append("|---|---|---|---|---|---|")
    for method in METHODS.values():
        changes = "".join(f" `--config.{field}={value}`" for field, value in method.overrides.items())
        paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})"
        cells = (
            method.title,
            paper,
            method.axes,
            method.equation,
            method.differs or "-",
            f"`{method.config}`{changes}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"

"""How many parameters a method trains on a decoder, by its paper's formula (which is the docstring).

    p(sites) = sum of D_in + D_out     d(sites) = sum of D_in     o(sites) = sum of D_out     over the sites of a layer

L layers, D width; all: q, k, v, o, gate, up, down; attn: q, k, v, o; ffn: gate, up, down. The first number of a product
is a rank or a count of experts of the shipped config.
"""

from molora_jax.backbones.base import Backbone
from molora_jax.config.resolve import resolve_experts


def low_rank(decoder: Backbone, sites, rank: int) -> int:
    """Parameters of one pair A, B on each of the sites of one layer: `R (D_in + D_out)`."""
    return sum(rank * sum(decoder.dims(site)) for site in sites)


def inward(decoder: Backbone, sites) -> int:
    """`sum of D_in` over the sites of a layer."""
    return sum(decoder.dims(site)[0] for site in sites)


def outward(decoder: Backbone, sites) -> int:
    """`sum of D_out` over the sites of a layer."""
    return sum(decoder.dims(site)[1] for site in sites)


def lora(decoder: Backbone) -> int:
    """`16 L p(all)`"""
    return decoder.layers * low_rank(decoder, decoder.sites, 16)


def lora_fa(decoder: Backbone) -> int:
    """`16 L o(all)`"""
    return decoder.layers * 16 * outward(decoder, decoder.sites)


def vera(decoder: Backbone) -> int:
    """`L (7 * 256 + o(all))`"""
    return decoder.layers * (256 * len(decoder.sites) + outward(decoder, decoder.sites))


def ia3(decoder: Backbone) -> int:
    """`L (o(k,v) + d(down))`"""
    return decoder.layers * (outward(decoder, ("k", "v")) + inward(decoder, ("down",)))


def nola(decoder: Backbone) -> int:
    """`7 L (128 + 128)`, whatever rank and widths"""
    return decoder.layers * len(decoder.sites) * (128 + 128)


def randlora(decoder: Backbone) -> int:
    """`L sum over all of N (d + 32)`, d = min(D_in, D_out), N = ceil(d / 32)"""
    smaller = [min(decoder.dims(site)) for site in decoder.sites]
    return decoder.layers * sum(-(-d // 32) * (d + 32) for d in smaller)


def adalora(decoder: Backbone) -> int:
    """`L (12 p(all) + 12 * 7)`; 8 of 12 triplets stay"""
    return decoder.layers * (low_rank(decoder, decoder.sites, 12) + 12 * len(decoder.sites))


def lora_ga(decoder: Backbone) -> int:
    """`8 L p(all)`"""
    return decoder.layers * low_rank(decoder, decoder.sites, 8)


def lora_xs(decoder: Backbone) -> int:
    """`16^2 * 7 L`, whatever the widths"""
    return decoder.layers * len(decoder.sites) * 16**2


def fedit(decoder: Backbone) -> int:
    """`8 L p(q,v)`; a client sends as many a round"""
    return decoder.layers * low_rank(decoder, ("q", "v"), 8)


def ffa_lora(decoder: Backbone) -> int:
    """`8 L o(q,v)`; half of LoRA's where D_in = D_out"""
    return decoder.layers * 8 * sum(decoder.dims(site)[1] for site in ("q", "v"))


def dora(decoder: Backbone) -> int:
    """`16 L p(all) + L o(all)`"""
    return lora(decoder) + decoder.layers * sum(decoder.dims(site)[1] for site in decoder.sites)


def ffn_experts(decoder: Backbone) -> int:
    """`L (16 p(attn) + 8 (16 p(ffn) + D))`"""
    experts = 8 * (low_rank(decoder, decoder.ffn_sites, 16) + decoder.width)
    return decoder.layers * (low_rank(decoder, decoder.attention_sites, 16) + experts)


def mola(decoder: Backbone) -> int:
    """`sum_l E_l (8 p(all) + d(all))`, E_l = 2, 4, 6, 8 by depth"""
    expert = low_rank(decoder, decoder.sites, 8) + inward(decoder, decoder.sites)
    return expert * sum(resolve_experts("2|4|6|8", decoder.layers))


def mos(decoder: Backbone) -> int:
    """`8 L p(all)`, whatever the active rank"""
    return decoder.layers * low_rank(decoder, decoder.sites, 8)


def coe(decoder: Backbone) -> int:
    """`8 L (16 * 2 D + 2 D)`, a router a pass"""
    return decoder.layers * 8 * (2 * 16 + 2) * decoder.width


def x_lora(decoder: Backbone) -> int:
    """`9 L (16 p(q,k,v,o,gate) + 5 (D + 1))`"""
    sites = (*decoder.attention_sites, "gate")
    return decoder.layers * 9 * (low_rank(decoder, sites, 16) + len(sites) * (decoder.width + 1))


def dynmole(decoder: Backbone) -> int:
    """`6 L (24 p(ffn) + d(ffn))`"""
    return (
        decoder.layers
        * 6
        * (low_rank(decoder, decoder.ffn_sites, 24) + sum(decoder.dims(site)[0] for site in decoder.ffn_sites))
    )


def smora(decoder: Backbone) -> int:
    """`64 L (p(all) + d(all))`"""
    return decoder.layers * (low_rank(decoder, decoder.sites, 64) + 64 * inward(decoder, decoder.sites))


def loramoe(decoder: Backbone) -> int:
    """`6 L (4 p(ffn) + d(ffn))`"""
    return (
        decoder.layers
        * 6
        * (low_rank(decoder, decoder.ffn_sites, 4) + sum(decoder.dims(site)[0] for site in decoder.ffn_sites))
    )


def rmoe(decoder: Backbone) -> int:
    """`L (16 p(attn) + 8 * 16 p(ffn)) + L P (D + 8) + 6 P (P + 1)`, P = 128"""
    L, D, P, E = decoder.layers, decoder.width, 128, 8
    return ffn_experts(decoder) - L * D * E + L * P * D + 6 * P * P + 6 * P + L * P * E


def llava_mole(decoder: Backbone) -> int:
    """`L (32 p(attn) + 3 (32 p(ffn) + D + 1))`"""
    ffn = 3 * (low_rank(decoder, decoder.ffn_sites, 32) + decoder.width + 1)
    return decoder.layers * (low_rank(decoder, decoder.attention_sites, 32) + ffn)


def deepseek_moe(decoder: Backbone) -> int:
    """`L (16 p(ffn) + 28 (4 p(ffn) + D))`"""
    routed = 28 * (low_rank(decoder, decoder.ffn_sites, 4) + decoder.width)
    return decoder.layers * (low_rank(decoder, decoder.ffn_sites, 16) + routed)


def stelocoder(decoder: Backbone) -> int:
    """`5 L 4 p(q,k,v,o,down) + 5 D`, one gate for the model"""
    sites = (*decoder.attention_sites, "down")
    return 5 * decoder.layers * low_rank(decoder, sites, 4) + 5 * decoder.width


def lora_mixer(decoder: Backbone) -> int:
    """`9 L (8 p(attn) + D)`, a router a layer"""
    return 9 * decoder.layers * (low_rank(decoder, decoder.attention_sites, 8) + decoder.width)


def meteora(decoder: Backbone) -> int:
    """`9 L (8 p(all) + d(all))`, a gate at every projection"""
    return 9 * decoder.layers * (low_rank(decoder, decoder.sites, 8) + inward(decoder, decoder.sites))


def mora_cl(decoder: Backbone) -> int:
    """`4 * 8 L p(all)`, 8 ranks a task"""
    return 4 * decoder.layers * low_rank(decoder, decoder.sites, 8)


def flexolmo(decoder: Backbone) -> int:
    """`6 L (16 p(ffn) + D + 1)`: a row and a bias an owner"""
    return 6 * decoder.layers * (low_rank(decoder, decoder.ffn_sites, 16) + decoder.width + 1)


def kshot_experts(decoder: Backbone) -> int:
    """`4 L (16 p(q,v) + d(q,v))`, experts and gates"""
    return 4 * decoder.layers * (low_rank(decoder, ("q", "v"), 16) + inward(decoder, ("q", "v")))


def ld_mole(decoder: Backbone) -> int:
    """`8 L (8 p(all) + d(all)) + sum over distinct D_in of 128 (D_in + 2) + 1`"""
    widths = {decoder.dims(site)[0] for site in decoder.sites}
    experts = 8 * decoder.layers * (low_rank(decoder, decoder.sites, 8) + inward(decoder, decoder.sites))
    return experts + sum(128 * (width + 2) + 1 for width in widths)


def goat(decoder: Backbone) -> int:
    """`8 L (2 p(all) + d(all))`"""
    return 8 * decoder.layers * (low_rank(decoder, decoder.sites, 2) + inward(decoder, decoder.sites))


def comol(decoder: Backbone) -> int:
    """`L (16 p(q,k,v,o,down) + 5 (8 * 16^2 + 8 * 16))`"""
    sites = (*decoder.attention_sites, "down")
    return decoder.layers * (low_rank(decoder, sites, 16) + len(sites) * 8 * (16**2 + 16))


def hydralora(decoder: Backbone) -> int:
    """`L (4 d(ffn) + 4 * 4 o(ffn) + 4 d(ffn))`, the router's last"""
    sites = decoder.ffn_sites
    return decoder.layers * (4 * inward(decoder, sites) + 16 * outward(decoder, sites) + 4 * inward(decoder, sites))


def adamole(decoder: Backbone) -> int:
    """`L (8 (4 p(attn) + d(attn)) + d(attn) + 4)`"""
    sites = decoder.attention_sites
    threshold = inward(decoder, sites) + len(sites)
    return decoder.layers * (8 * (low_rank(decoder, sites, 4) + inward(decoder, sites)) + threshold)


def flylora(decoder: Backbone) -> int:
    """`32 L o(all)`: B alone"""
    return decoder.layers * 32 * outward(decoder, decoder.sites)


def moa_hetero(decoder: Backbone) -> int:
    """`L (8 p(q,k,v,o,down) + 10 D + H + 33 D + 16 + 56 (D + 1) + 7 * 29)`, H heads"""
    D, K = decoder.width, 7
    kinds = low_rank(decoder, (*decoder.attention_sites, "down"), 8) + 10 * D + decoder.heads + 33 * D + 16
    return decoder.layers * (kinds + 2 * 4 * K * (D + 1) + K * (4 * K + 1))


def dmoerm(decoder: Backbone) -> int:
    """`2 L (16 p(all) + 32 p(q,v))` of two categories of one point each, and the heads"""
    return decoder.layers * 2 * (low_rank(decoder, decoder.sites, 16) + low_rank(decoder, ("q", "v"), 32))

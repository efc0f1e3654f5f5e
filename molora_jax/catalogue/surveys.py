"""The checklist of two surveys: every gate and loss they name, and where it is here, or why not.

    python -m launch.docs

"A Survey on Mixture of Experts in Large Language Models" (Cai et al. 2024, arXiv 2407.06204), "A Comprehensive Survey
of Mixture-of-Experts" (Mu and Lin 2025, arXiv 2503.07137). An item is several where the surveys put several gates on
one line. A place is a member with its options, as a config writes them, or a field of the config: each exists,
by `tests/test_surveys.py`.
"""

import dataclasses

ABSENT = "absent"


@dataclasses.dataclass(frozen=True)
class Item:
    """`key` is the survey's line (G5, L2). `axis` is "routers", "losses", "config" (a field, `where` its path and
    value), or ABSENT with its entry of REASONS in `where`. `options` are the member's, beside `name`."""

    key: str
    title: str
    axis: str
    where: str
    options: dict = dataclasses.field(default_factory=dict)
    config: str = ""  # a shipped config that has it


def router(key, title, name, config="", **options):
    return Item(key, title, "routers", name, options, config)


def loss(key, title, name, config="", **options):
    return Item(key, title, "losses", name, options, config)


def field(key, title, path, config=""):
    return Item(key, title, "config", path, {}, config)


def absent(key, title, reason):
    return Item(key, title, ABSENT, reason)


def reason(item: Item) -> str:
    return " ".join(REASONS[item.where].split())


REASONS = {
    "base": """
        BASE runs an auction over all tokens of a global batch, one token after the other, in every layer and step. It
        gives exactly equal counts. Sinkhorn reaches the same balance with a few matrix products, and S-BASE uses it
        in place of the auction. Once trained, BASE too gives each token its own best expert.""",
    "sparse mixer": """
        Its estimator draws one expert and scales its output at random, by a midpoint rule. This gives a gradient to a
        router although the other experts are not run. Experts here have a low rank, so running all of them costs
        little: ReLU gates and the dense softmax have the exact gradient, and `straight_through` has the cheap one.""",
    "expert choice": """
        Whether an expert takes a token depends on later tokens too. In decoding these do not exist yet, so the choice
        would differ from the one in training. `expert_choice` is therefore refused on a base that predicts the next
        token.""",
    "soft": """
        The input of an expert is a mean over all tokens of the sequence, later ones included. So no token's output can
        be decoded, and causal bases are out. On an encoder it would not be a routing of tokens to experts: an expert
        here changes a projection of the token's own input, whose frozen product is computed once. For a mean over
        tokens there is no such frozen product to add to.""",
    "lory": """
        In every layer the merged expert of a segment depends on the hidden states of the segment before. Decoding would
        need a cache for the router beside that for keys and values, and routers have none. `sequence_gate` decides
        once, from the prompt, so its answers with and without a cache are equal.""",
    "outputs": """
        No engine computes what each expert says of a token: gates act on rank activations, and outputs are summed
        before they are sent. Computing them would take E outputs for each token. `diversity` asks for the same of
        the weight changes themselves.""",
    "stable": """
        It asks a second, distilled router for its decision at every site and step. Its purpose is that choices no
        longer change; a stage with `freeze='*/router/*'` does that. Its first stage distils a choice by the token
        alone; `fixed` by token makes such a choice without training.""",
    "consistency": """
        It runs every batch twice with different random experts and pulls the two predictions together. This takes two
        forward passes a step and an objective of pairs. The random experts themselves are there (`fixed`).""",
}

GATES = (
    router("G1", "dense softmax", "softmax_topk", "loramoe", k=0),
    router("G2", "top-k after softmax, renormalised", "softmax_topk", "mixlora", k=2, renormalise=True),
    router("G2", "top-k after softmax, raw", "softmax_topk", k=2, renormalise=False),
    router("G3", "softmax after top-k: the same as G2 renormalised", "softmax_topk", "mixlora", k=2),
    router("G4", "sigmoid, a bias for the choice alone", "biased_topk", score="sigmoid", renormalise=True, scale=2.5),
    router("G4", "sqrt(softplus) scores", "biased_topk", score="sqrt_softplus", renormalise=True),
    router("G5", "noisy top-k", "noisy_topk", k=2),
    router("G5", "noise of a fixed size 1/E (V-MoE)", "noisy_topk", learned=False),
    router("G6", "Switch: top-1 with input jitter", "softmax_topk", k=1, renormalise=False, jitter=1e-2),
    router("G6", "GShard: the second expert at random, by its gate", "softmax_topk", k=2, drop_last=1.0),
    router("G7", "cosine with a learned temperature (X-MoE)", "nonlinear_topk", form="cosine"),
    router("G8", "DSelect-k", "dselect_k", k=2),
    router("G9", "top-p", "top_p", "dynamic_moe", p=0.4),
    router("G9", "switched by entropy", "entropy_hybrid", "dynmole"),
    router("G9", "null experts (AdaMoE)", "null_experts", k=3, null=4),
    router("G9", "a learned threshold", "learned_threshold", "adamole"),
    router("G9", "a learned sparsity", "sparsegen", "ld_mole"),
    router("G10", "GRU across layers", "recurrent", "rmoe"),
    router("G10", "MLP", "nonlinear_topk", form="mlp"),
    router("G10", "attention over experts (Yuan 2.0-M32)", "nonlinear_topk", form="attention"),
    router("G11", "group-limited, by the best (V2)", "biased_topk", groups=4, keep_groups=2, group_score="max"),
    router("G11", "group-limited, by the two best (V3)", "biased_topk", groups=4, keep_groups=2, group_score="top2"),
    router("G11", "group-limited, by K / M (Megatron-LM)", "biased_topk", groups=4, keep_groups=2, group_score="share"),
    router("G12", "a gate a task, on the input", "task_gate", on="input"),
    router("G12", "a gate a task, on the task alone", "task_gate", on="id"),
    router("G12", "a gate a sentence, pooled", "sequence_gate", "stelocoder", pool="max"),
    router("G13", "prototypes", "prototypes", groups=2),
    absent("G14", "BASE, the optimal balanced assignment", "base"),
    router("G14", "Sinkhorn (S-BASE), in training for the choice alone", "sinkhorn", k=1),
    router("G15", "ReLU gates with a controlled L1 (ReMoE)", "relu", k=2),
    router("G15", "straight-through", "top1", straight_through=True),
    absent("G15", "SparseMixer", "sparse mixer"),
    router("G16", "hash of the token", "fixed", by="token"),
    router("G16", "random in training, all at use (THOR)", "fixed", by="none", random=1.0),
    absent("G16", "THOR's consistency loss", "consistency"),
    router("G16", "domain id (DEMix)", "fixed", by="task"),
    router("G16", "a group by domain, inside by token (PanGu-Sigma)", "fixed", by="task_token", groups=2),
    field("G16", "by task, for a stage", "schedule.s00.route='task'", "stelocoder"),
    router("G17", "expert choice, within an example: encoders alone", "expert_choice", k=2.0),
    absent("G17", "expert choice for a decoder", "expert choice"),
    absent("G18", "Soft MoE", "soft"),
    router("G19", "expert merging (SMEAR): one merged adapter an example", "sequence_gate", hard="never", pool="mean"),
    absent("G19", "the causal segments of Lory", "lory"),
)

LOSSES_OF = (
    loss("L1", "importance", "importance", weight=0.1),
    loss("L2", "load", "load", weight=0.1),
    loss("L3", "Switch and GShard", "balance", "mola"),
    loss("L3", "f without the 1/K: minimum K", "balance", "mixlora", normalise="tokens"),
    loss("L3", "level of a micro-batch", "balance", accumulate="micro"),
    loss("L3", "level of a sequence", "balance", "llava_mole", per_example=True),
    loss("L3", "level of the global batch", "balance", "deepseek_moe", accumulate="exact"),
    loss("L4", "z-loss", "z_loss", weight=1e-3),
    loss("L5", "mutual information of tokens and experts", "mutual_information", between="token"),
    loss("L5", "mutual information of tasks and experts", "mutual_information", between="task"),
    loss("L6", "experts", "balance", "deepseek_moe", weight=3e-3, reduce="sum"),
    loss("L6", "devices", "device_balance", "deepseek_moe", groups=4),
    loss("L6", "communication", "device_balance", groups=4, counts="devices", limit=2),
    router("L7", "loss-free bias", "biased_topk", score="sigmoid", bias_rate=1e-3),
    router("L7", "quantile bias", "biased_topk", score="sigmoid", bias="quantile", bias_rate=1.0),
    loss("L8", "localized balance", "localized_balance", "loramoe"),
    loss("L9", "V-MoE: half of this", "importance", weight=0.05),
    loss("L9", "V-MoE: and half of that", "load", weight=0.05),
    loss("L10", "entropy of a token, sharpened", "entropy", "dynamic_moe"),
    loss("L10", "Tsallis entropy", "entropy", "dynmole", kind="tsallis"),
    loss("L10", "entropy of the mean, held above a threshold (LIMoE)", "mean_entropy", tau=1.0),
    loss("L11", "orthogonality of experts' changes", "diversity", weight=1e-2),
    loss("L11", "orthogonality of a triplet's factors", "orthogonal", "adalora"),
    absent("L11", "contrast or distillation between experts' outputs", "outputs"),
    absent("L11", "router KL to an earlier router (StableMoE)", "stable"),
    field("L11", "frozen routers in a stage", "schedule.s00.freeze='*/router/*'", "stelocoder"),
    loss("L12", "mean active experts to a target (with `null_experts`)", "router_cost", target=2.0),
    loss("L12", "controlled L1 (with `relu`)", "router_cost", weight=1.0),
    loss("L12", "selectors that decide (with `dselect_k`)", "router_cost", weight=1e-2),
    loss("L12", "a learned lambda pulled up (with `sparsegen`)", "sparsity", "ld_mole"),
    router("L12", "a threshold led by a PI controller", "controlled_threshold", k=2.0),
)

ITEMS = GATES + LOSSES_OF
KEYS = tuple(f"G{i}" for i in range(1, 20)) + tuple(f"L{i}" for i in range(1, 13))


def place(item: Item) -> str:
    """Where an item is, as a row of the table says it."""
    if item.axis == ABSENT:
        return f"absent: [why](absent.md#{anchor(item)})"
    if item.axis == "config":
        return f"`config.{item.where}`"
    options = "".join(f", {name}={value!r}" for name, value in item.options.items())
    written = f"router=dict(name={item.where!r}{options})"
    if item.axis == "losses":
        written = f"losses.{item.where}=dict({options.removeprefix(', ')})"
    return f"`{written}`"


def heading(item: Item) -> str:
    return f"{item.key}: {item.title}"


def anchor(item: Item) -> str:
    """Of the heading, as a Markdown page forms it."""
    return "".join(c for c in heading(item).lower().replace(" ", "-") if c.isalnum() or c in "-_")


def document() -> str:
    def table(items):
        shipped = lambda item: f"`configs/{item.config}.py`" if item.config else ""  # noqa: E731
        rows = [f"| {item.key} | {item.title} | {place(item)} | {shipped(item)} |" for item in items]
        return "\n".join(["| item | what | where | in |", "|---|---|---|---|", *rows])

    return SURVEYS.format(gates=table(GATES), losses=table(LOSSES_OF))


def absent_document() -> str:
    missing = "\n\n".join(f"### {heading(i)}\n\n{reason(i)}" for i in ITEMS if i.axis == ABSENT)
    return NOT_HERE.format(missing=missing)


SURVEYS = """\
# The surveys' checklist

Made by `python -m launch.docs` from `molora_jax/catalogue/surveys.py`. Every gating function (G) and every loss that
keeps routing healthy (L) that two surveys name (Cai et al. 2024, [2407.06204](https://arxiv.org/abs/2407.06204); Mu
and Lin 2025, [2503.07137](https://arxiv.org/abs/2503.07137)), and what to write into a rule, or into `losses`, to get
it. The last column names a shipped config that uses it. `tests/acceptance` compares each with float64 numpy; those
that belong to no method of the table are in `tests/acceptance/test_moe_surveys.py`.

Routers work with any adapter, placement and engine, or are refused with the reason: [combinations.md](combinations.md).

## Gates

{gates}

## Losses

{losses}
"""

NOT_HERE = """\
# What is absent, and why

Made by `python -m launch.docs` from `molora_jax/catalogue/surveys.py`.

## Of the surveys

{missing}
"""

"""The methods that the project ships: one row each, read by the README and by the shared battery of tests.

A row is a config (with overrides where a method is one option away from another), the paper, the equation, what the
method has of its own on the axes, where it departs from the paper's code, and the paper's count of trained parameters
as a function of the decoder's shape.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from molora_jax.backbones.base import Backbone
from molora_jax.backbones.families import SMOLLM2
from molora_jax.catalogue import formulas

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Method:
    """One method of the literature.

    `params(decoder)` is the paper's number of trained parameters; `own` the files under `molora_jax/` that are there
    for it; `zero_init` says that the start changes nothing; `exceptions` are path patterns of leaves that get no
    gradient at random factors, by the method's own design.
    """

    config: str
    title: str
    paper: str  # arXiv id; "" for a method of your own
    axes: str  # what is its own, by axis
    equation: str
    params: Callable[[Backbone], int]
    differs: str = ""
    own: tuple[str, ...] = ()
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # dotted field of the config -> value
    zero_init: bool = True
    exceptions: tuple[str, ...] = ()


METHODS = {
    "lora": Method(
        config="configs/lora.py",
        title="LoRA",
        paper="2106.09685",
        axes="adapter `lora`",
        equation="y = W x + (alpha / R) B A x",
        params=formulas.lora,
        own=("adapters/lora.py",),
    ),
    "rslora": Method(
        config="configs/lora.py",
        overrides={"method.rules.all.adapter.name": "rslora"},
        title="rsLoRA",
        paper="2312.03732",
        axes="adapter `rslora`",
        equation="y = W x + (alpha / sqrt(R)) B A x",
        params=formulas.lora,
        own=("adapters/rslora.py",),
    ),
    "dora": Method(
        config="configs/lora.py",
        overrides={"method.rules.all.adapter.name": "dora"},
        title="DoRA",
        paper="2402.09353",
        axes="adapter `dora`",
        equation="y = m (W + s B A) / ||W + s B A||_row x",
        differs="with dropout, the base term keeps the undropped input",
        params=formulas.dora,
        own=("adapters/dora.py",),
    ),
    "pissa": Method(
        config="configs/lora.py",
        overrides={"method.rules.all.adapter.init": "pissa"},
        title="PiSSA",
        paper="2404.02948",
        axes="init `pissa`",
        equation="y = W x + s (B A - B0 A0) x; s B0 A0 = rank-R part of W",
        differs="W is not altered: the start is saved and subtracted; exact SVD",
        params=formulas.lora,
        own=("inits/pissa.py",),
    ),
    "lora_plus": Method(
        config="configs/lora.py",
        overrides={"optim.name": "lora_plus"},
        title="LoRA+",
        paper="2402.12354",
        axes="optimizer `lora_plus`",
        equation="lr_B = 16 lr_A",
        params=formulas.lora,
        own=("optim/lora_plus.py",),
    ),
    "lora_pro": Method(
        config="configs/lora_pro.py",
        title="LoRA-Pro",
        paper="2407.18242",
        axes="optimizer `lora_pro`: every expert's pair by itself",
        equation="s (B a + b A) = P_B g + g P_A - P_B g P_A, in Adam's direction of it; (a, b) nearest to LoRA's",
        differs="s is the adapter's, not 2; Adam's bias correction counts from 1; a ridge relative to B^T B and A A^T",
        params=formulas.lora,
        own=("optim/lora_pro.py", "core/tangent.py", "core/eigen.py"),
    ),
    "allora": Method(
        config="configs/allora.py",
        title="ALLoRA",
        paper="2410.09692",
        axes="adapter `allora`: c of every expert's rows",
        equation="y = W x + B A x; dB = diag(c) G A^T, dA = B^T diag(c) G, c_i = (||(B A)_i|| + 1 / eta^2)^(-1/2)",
        differs="no public code; c acts before the optimizer, as the paper writes it",
        params=formulas.lora,
        own=("adapters/allora.py",),
    ),
    "dylora": Method(
        config="configs/dylora.py",
        title="DyLoRA",
        paper="2210.07558",
        axes="adapter `dylora`: one b for all experts; surgery `truncate`",
        equation="y = W x + (alpha / b) B_{1:b} A_{1:b} x, b drawn once a step; kept: any b",
        differs="updates are masked, not gradients alone; one b for all devices; `update=frozen` is the code's mode",
        params=formulas.lora,
        own=("adapters/dylora.py", "surgery/truncate.py"),
    ),
    "adalora": Method(
        config="configs/adalora.py",
        title="AdaLoRA",
        paper="2303.10512",
        axes="adapter `adalora`; optimizer `adalora`: all experts in one ranking; loss `orthogonal`",
        equation="y = W x + s B diag(lam) A x; lam = 0 for the b0 - b(t) triplets of the lowest score",
        differs="as peft; the schedule is a fraction of the steps, counted from 1; ties by lam",
        params=formulas.adalora,
        own=("adapters/adalora.py", "optim/adalora.py", "losses/orthogonal.py"),
    ),
    "lora_ga": Method(
        config="configs/lora_ga.py",
        title="LoRA-GA",
        paper="2407.05000",
        axes="init `lora_ga`",
        equation="y = W x + s (B A - B0 A0) x; A0 = c V_R^T, B0 = c U_{R:2R} of dL/dW at the start",
        differs="W is not altered: the start is saved and subtracted; experts start alike; exact SVD; "
        "peft's B = U S is an option",
        params=formulas.lora_ga,
        own=("inits/lora_ga.py",),
    ),
    "lora_xs": Method(
        config="configs/lora_xs.py",
        title="LoRA-XS",
        paper="2405.17604",
        axes="adapter `lora_xs`, init `lora_xs`",
        equation="y = W x + s B C A x; A = S_R V_R^T, B = U_R of W, frozen; C (R x R) trains",
        differs="exact SVD; A and B are shared by the experts of a layer",
        params=formulas.lora_xs,
        zero_init=False,  # the core starts near zero
        own=("adapters/lora_xs.py", "inits/lora_xs.py"),
    ),
    "lora_sb": Method(
        config="configs/lora_sb.py",
        title="LoRA-SB",
        paper="2411.19557",
        axes="adapter `lora_xs`, init `lora_sb`",
        equation="y = W x + s B C A x; s B C A = rank-R part of -eta sign(dL/dW) at the start; C (R x R) trains",
        differs="exact SVD in float32; eta is given, not counted in estimating batches; no decay; experts start alike",
        params=formulas.lora_xs,
        own=("inits/lora_sb.py", "training/probe.py", "backbones/tap.py"),
        zero_init=False,
    ),
    "mixlora": Method(
        config="configs/mixlora.py",
        title="MixLoRA",
        paper="2404.15159",
        axes="placement `ffn`, router `softmax_topk`, loss `balance` over all layers",
        equation="y = sum_k w_k FFN_k(x), w = top 2 of softmax(W_r x), renormalised",
        differs="loss weight 1e-2 (paper) not 1e-3 (code); router jitter off, and never seen by the experts",
        params=formulas.ffn_experts,
        own=(
            "placements/ffn.py",
            "routers/softmax_topk.py",
        ),
    ),
    "mola": Method(
        config="configs/mola.py",
        title="MoLA",
        paper="2402.08562",
        axes='placement `projection` with `experts="2|4|6|8"`, loss `balance` over a layer',
        equation="y = W x + s sum_k w_k B_k A_k x, a router a projection",
        differs="padding is neither routed nor counted",
        params=formulas.mola,
    ),
    "dynamic_moe": Method(
        config="configs/dynamic_moe.py",
        title="Dynamic MoE (top-p)",
        paper="2403.07652",
        axes="router `top_p`, loss `entropy`",
        equation="y = sum_{i <= t} p_i FFN_i(x) + (1 - sum p_i) FFN_0(x), t = fewest with sum p_i > P",
        differs="LoRA experts over a frozen FFN, which keeps the mass that is not kept",
        params=formulas.ffn_experts,
        own=(
            "routers/top_p.py",
            "losses/entropy.py",
        ),
    ),
    "mos": Method(
        config="configs/mos.py",
        title="MoS",
        paper="2410.00938",
        axes="adapter `mos`: pools shared by the layers, frozen index tables",
        equation="y = W x + (alpha / r) B A x, row j of A and B = n shards of a shared pool",
        differs="pools saved, not only their expansion; no inert random scaling; private rows and shards are ours",
        params=formulas.mos,
        own=("adapters/mos.py",),
        exceptions=("all/shared/*",),  # rows of the pool that no layer drew
    ),
    "coe": Method(
        config="configs/coe.py",
        title="Chain of Experts",
        paper="2506.18945",
        axes="placement `chain`",
        equation="z_t = z_{t-1} + sum_e g_{t,e} s B_e A_e z_{t-1}, y = FFN(z_0) + z_C - z_0",
        differs="LoRA experts beside the frozen FFN, whose residual stream stays; balance per packed example",
        params=formulas.coe,
        own=("placements/chain.py",),
    ),
    "x_lora": Method(
        config="configs/x_lora.py",
        title="X-LoRA",
        paper="2402.07148",
        axes="router `x_lora` on the frozen base's hidden state, stages (or `load`)",
        equation="y = W x + s sum_a softmax(V_l h)_a B_a A_a x, h = base(tokens)",
        differs="top-k softmax per token, not over the batch; a KV cache for both passes",
        params=formulas.x_lora,
        own=("routers/x_lora.py",),
    ),
    "dynmole": Method(
        config="configs/dynmole.py",
        title="DynMoLE",
        paper="2504.00661",
        axes="router `entropy_hybrid`, loss `entropy` of kind `tsallis`, loss `balance` with soft counts",
        equation="y = W x + s sum_i g_i B_i A_i x, g = p on all if S_q(p) / max S_q > H, else on top-p or the first k",
        differs="padding is not in the entropy loss; counts of the balance loss may be hard",
        params=formulas.dynmole,
        own=(
            "routers/entropy_hybrid.py",
            "core/entropy.py",
        ),
    ),
    "smora": Method(
        config="configs/smora.py",
        title="SMoRA",
        paper="2501.15103",
        axes="router `sigmoid_topk`, whose load bias is state; experts of rank 1",
        equation="y = W x + (alpha / k) sum_{i in I} g_i b_i a_i^T x, I = top k of sigmoid(W_r x) + bias, sum g = k",
        differs="alpha is given divided by k; the load is counted once a step, without padding",
        params=formulas.smora,
        own=("routers/sigmoid_topk.py",),
    ),
    "loramoe": Method(
        config="configs/loramoe.py",
        title="LoRAMoE",
        paper="2312.09979",
        axes="router `softmax_topk` with k=0 (dense), loss `localized_balance`",
        equation="y = W x + s sum_i p_i B_i A_i x; l = var(I Q) / mean(I Q)^2",
        differs="the loss is on (the script sets its weight to 0), without padding; one dropout mask for all experts",
        params=formulas.loramoe,
        own=("losses/localized_balance.py",),
    ),
    "rmoe": Method(
        config="configs/rmoe.py",
        title="RMoE",
        paper="2408.06793",
        axes="router `recurrent`: a carry through the layers and a GRU that they share",
        equation="h_i = GRU(V_i x, h_{i-1}), w = top 2 of softmax(G_i h_i), experts as MixLoRA's",
        differs="LoRA experts on a frozen model, not from scratch; gates not renormalised (the paper; the code does)",
        params=formulas.rmoe,
        own=("routers/recurrent.py",),
    ),
    "llava_mole": Method(
        config="configs/llava_mole.py",
        title="LLaVA-MoLE",
        paper="2401.16160",
        axes="router `top1`, shared by gate, up and down; loss `balance` per example over all layers",
        equation="y = W x + s B_e A_e x, e = argmax softmax(W_r x + b), no gate factor",
        differs="text only so far; the language-model loss gives the router no gradient, as there",
        params=formulas.llava_mole,
        own=("routers/top1.py",),
    ),
    "deepseek_moe": Method(
        config="configs/deepseek_moe.py",
        title="DeepSeekMoE",
        paper="2401.06066",
        axes="router `biased_topk`, loss `device_balance`; shared experts are a rule without a router",
        equation="y = W x + s B_0 A_0 x + s sum_{i in top K} p_i B_i A_i x, p = softmax(U u) over the routed experts",
        differs="LoRA experts on the frozen FFN; balance over the batch (the code's is by sequence: `per_example`)",
        params=formulas.deepseek_moe,
        own=("routers/biased_topk.py", "losses/device_balance.py"),
    ),
    "stelocoder": Method(
        config="configs/stelocoder.py",
        title="SteloCoder",
        paper="2310.15539",
        axes="router `sequence_gate`: one for the model; stages: a curriculum of experts by task, then the gate",
        equation="y = W x + s sum_e w_e B_e A_e x, w = softmax(max_t W_g x_t); in use the prompt's argmax",
        differs="q, k and v have an A each; no position in the gate's input; no padding in the maximum",
        params=formulas.stelocoder,
        own=("routers/sequence_gate.py",),
    ),
    "lora_mixer": Method(
        config="configs/lora_mixer.py",
        title="LoRA-Mixer",
        paper="2507.00029",
        axes="router `soft_topk`; losses `specialisation`, `preservation`; stages: by task id, then soft (or `load`)",
        equation="y = W x + s sum_e p_e B_e A_e x, p = softmax(W_g h), top 3 in use",
        differs="the entropy's sign is the text's, not the formula's; there is no code",
        params=formulas.lora_mixer,
        own=("routers/soft_topk.py", "losses/specialisation.py", "losses/preservation.py"),
    ),
    "meteora": Method(
        config="configs/meteora.py",
        title="MeteoRA",
        paper="2405.13053",
        axes="router `labelled_topk`, loss `task_label`; experts from runs (`load`), or stages",
        equation="y = W x + sum_{e in S} g_e (alpha / R) B_e A_e x, S = top 2 of z = W_g x, g = softmax_S(z / T)",
        differs='the script trains the adapters too (`adapters="trained"`); packed rows: no label crosses examples',
        params=formulas.meteora,
        own=("routers/labelled_topk.py", "losses/task_label.py"),
    ),
    "mora_cl": Method(
        config="configs/mora_cl.py",
        title="MoRA (MoRAM)",
        paper="2506.21035",
        axes="router `self_activated`: rank-1 experts whose keys choose; regime `continual` opens a task's experts",
        equation="y = W x + sum_{i in S} w_i z_i b_i, z = A x, S = top 8 of s = z / norm(z), w = softmax_S(s / tau)",
        differs="one scale for old and new experts; the bank is allocated from the start, with a mask",
        params=formulas.mora_cl,
        own=("routers/self_activated.py", "core/turns.py"),
    ),
    "flexolmo": Method(
        config="configs/flexolmo.py",
        title="FlexOlmo",
        paper="2507.07024",
        axes="router `document_rows`: rows from documents beside a frozen one of the base; `load` joins, "
        "`eval.without` leaves out",
        equation="y = p_0 FFN_0(x) + sum_e p_e FFN_e(x), p = softmax(r_0 x, r_e x + min(beta_e, 0))",
        differs="LoRA experts; embeddings are the base's own; gates renormalised, as the base norms before its blocks",
        params=formulas.flexolmo,
        own=("routers/document_rows.py", "training/documents.py", "runs/without.py"),
    ),
    "kshot_experts": Method(
        config="configs/kshot_experts.py",
        title="K-shot experts",
        paper="2408.15915",
        axes="rules start from runs and train (`loaded`), init `gaussian`; LoRAs and data picked by K examples: "
        "`python -m experiments.kshot_experts`",
        equation="y = W x + sum_{top 2} w_i B_i A_i x, w = p / sum_{top 2} p, p = softmax(W_g x)",
        differs="a loaded LoRA keeps its alpha / R; doubles go by distance; rows are embedded by MiniLM, not BGE-m3",
        params=formulas.kshot_experts,
        own=("inits/gaussian.py",),
    ),
    "ld_mole": Method(
        config="configs/ld_mole.py",
        title="LD-MoLE",
        paper="2509.25684",
        axes="router `sparsegen`, whose lambda an MLP shared by the layers predicts; losses `sparsity`, `balance`",
        equation="y = W x + s sum_i p_i B_i A_i x, p = argmin |p - W_g x|^2 - lambda(x) |p|^2 over the simplex",
        differs="padding is in no loss; the sparsity loss is on (the script's weight is 0)",
        params=formulas.ld_mole,
        own=("routers/sparsegen.py", "losses/sparsity.py"),
    ),
    "goat": Method(
        config="configs/goat.py",
        title="GOAT",
        paper="2502.16894",
        axes="init `goat`, router `softmax_topk`; the theory's scale as adapter `lora_aligned`",
        equation="y = W x + s sum_{top 2} w_i B_i A_i x - (s / 8) sum_i B0_i A0_i x, s B0_i A0_i = U_i S_i V_i^T / 10",
        differs="W is not altered: the start is saved and subtracted; rank is an expert's; padding is not counted",
        params=formulas.goat,
        own=("inits/goat.py", "adapters/lora_aligned.py"),
        zero_init=False,  # the base's function in expectation over routers
    ),
    "comol": Method(
        config="configs/comol.py",
        title="CoMoL",
        paper="2603.00573",
        axes="adapter `comol`: one A and B, R x R cores as experts; router `core_space` on A x",
        equation="y = W x + s B (z^T sum_i g_i M_i)^T, z = A x, g = softmax(V z)",
        differs="no dropout on the merged cores, which are never formed; the loss is on answers only",
        params=formulas.comol,
        own=("adapters/comol.py", "routers/core_space.py"),
    ),
    "lora_fa": Method(
        config="configs/lora_fa.py",
        title="LoRA-FA",
        paper="2308.03303",
        axes="adapter `lora_fa`: A frozen; an A for each expert",
        equation="y = W x + s B A_0 x; option: G_B <- (1 / s^2) (A A^T + 1e-8 I)^-1 G_B",
        differs="the option (peft's) acts where the gradient is formed, before clipping",
        params=formulas.lora_fa,
        own=("adapters/lora_fa.py",),
    ),
    "vera": Method(
        config="configs/vera.py",
        title="VeRA",
        paper="2310.11454",
        axes="adapter `vera`: A and B frozen, shared by all layers and experts; vectors d, b of each expert train",
        equation="y = W x + b * (B (d * (A x)))",
        differs="bases follow from `seed` by a counter, not from torch's generator",
        params=formulas.vera,
        own=("adapters/vera.py", "core/random_bases.py"),
    ),
    "ia3": Method(
        config="configs/ia3.py",
        title="(IA)3",
        paper="2205.05638",
        axes="adapter `ia3`: no product, a scaling vector of each expert",
        equation="y = l * (W x + b) at k and v, y = W (l * x) + b at down",
        params=formulas.ia3,
        own=("adapters/ia3.py",),
    ),
    "nola": Method(
        config="configs/nola.py",
        title="NOLA",
        paper="2310.02556",
        axes="adapter `nola`: bases made from a seed inside the step, shared by experts; coefficients of each train",
        equation="A = A_off + (1 / sqrt k) sum_i alpha_i A_i, B = (1 / sqrt l) sum_j beta_j B_j",
        differs="A_off and the roots as in the code (the paper's formula has neither); a check of the bases is saved",
        params=formulas.nola,
        own=("adapters/nola.py", "core/random_bases.py", "runs/bases.py"),
    ),
    "randlora": Method(
        config="configs/randlora.py",
        title="RandLoRA",
        paper="2502.00987",
        axes="adapter `randlora`: A, B_j frozen, shared by all layers and experts; diagonals of each expert train",
        equation="y = W x + (alpha / R) sum_j B_j diag(lambda_j) A diag(gamma_j) x, of full rank",
        differs="bases follow from `seed` by a counter, in float32 (peft: bfloat16); peft's pairing is `order=peft`",
        params=formulas.randlora,
        own=("adapters/randlora.py", "core/random_bases.py"),
    ),
    "hydralora": Method(
        config="configs/hydralora.py",
        title="HydraLoRA",
        paper="2404.19245",
        axes="adapter `lora_shared_a`, router `softmax_topk` with k=0 (dense)",
        equation="y = W x + s sum_i g_i B_i A x, g = softmax(W_g x)",
        differs="one dropout mask for all B's, padding is not routed",
        params=formulas.hydralora,
        own=("adapters/lora_shared_a.py",),
    ),
    "adamole": Method(
        config="configs/adamole.py",
        title="AdaMoLE",
        paper="2405.00361",
        axes="router `learned_threshold`, loss `balance` on p - tau",
        equation="y = W x + s sum_i g_i B_i A_i x, g = max(p - tau, 0) / sum max(p - tau, 0), "
        "tau = (1 / E) sigmoid(w x + b)",
        differs="padding is neither routed nor in the loss; one dropout mask for all experts",
        params=formulas.adamole,
        own=("routers/learned_threshold.py",),
    ),
    "flylora": Method(
        config="configs/flylora.py",
        title="FlyLoRA",
        paper="2510.08396",
        axes="adapter `lora_sparse_a`, router `sparse_projection`: one frozen matrix; a load bias as state",
        equation="y = W x + (alpha / r) sum_{i in I} h_i b_i, h = A x, I = top k of |h + d|",
        differs="the load is counted once a step, without padding; gradients reach x (`input_grad=False`: none)",
        params=formulas.flylora,
        own=("adapters/lora_sparse_a.py", "routers/sparse_projection.py", "core/sparse_projection.py"),
    ),
    "moa_hetero": Method(
        config="configs/moa_hetero.py",
        title="MoA (heterogeneous)",
        paper="2506.05928",
        axes="placement `block`: an expert a place, of several kinds (`adapters`); router `sigmoid_threshold`",
        equation="w = sigmoid(f(x)), once a block; y_j += w_j s B_j A_j x; o += w gate_h softmax(q K_P^T) V_P; "
        "FFN(h) += w U silu(V h); sparse: w_j [w_j >= tau(x)]",
        params=formulas.moa_hetero,
        differs="as its code, where the threshold does not learn (`sparse_weight=shifted` trains it); the loss is on "
        "answers; one expert of each kind at a place",
        own=("placements/block.py", "adapters/_mixed.py", "core/prompt.py", "routers/sigmoid_threshold.py"),
        zero_init=False,  # the parallel adapter starts near 1e-9
    ),
}


# What is their own is how training is organised: adapter and router are LoRA's and none, which the battery tests above.
ORGANISED = {
    "fedit": Method(
        config="configs/fedit.py",
        title="FedIT",
        paper="2305.05644",
        axes="regime `federated`",
        equation="A, B <- sum_k (n_k / n) A_k, sum_k (n_k / n) B_k",
        params=formulas.fedit,
        differs="a text classifier, plain SGD",
        own=("regimes/federated.py", "data/clients.py", "optim/sgd.py"),
    ),
    "ffa_lora": Method(
        config="configs/ffa_lora.py",
        title="FFA-LoRA",
        paper="2403.12313",
        axes='regime `federated` with `freeze="*/A"`, DP-SGD',
        equation="B <- sum_k (n_k / n) B_k, A = A_0; g = (sum_i clip_C(g_i) + N(0, s^2 C^2)) / b",
        params=formulas.ffa_lora,
        differs="Poisson samples as the accountant assumes them; experts may share A (adapter `lora_shared_a`)",
        own=("core/privacy.py", "core/accountant.py", "adapters/lora_shared_a.py"),
    ),
    "sequential_lora": Method(
        config="configs/sequential_lora.py",
        title="Sequential LoRA",
        paper="",
        axes="regime `continual`",
        equation="tasks one after the other; replay of k rows as an option",
        params=formulas.lora,
        own=("regimes/continual.py",),
    ),
    "ewc_lora": Method(
        config="configs/ewc_lora.py",
        title="EWC on LoRA",
        paper="1612.00796",
        axes="regime `continual`, loss `ewc`",
        equation="L + (w / 2) sum_j F_j (theta_j - a_j)^2",
        params=formulas.lora,
        differs="the tasks' parabolas as one (the same slope); theta are the factors",
        own=("losses/ewc.py", "training/examples.py"),
    ),
    "dmoerm": Method(
        config="configs/dmoerm.py",
        title="DMoERM",
        paper="2403.01197",
        axes="objective `reward_experts`, router `by_task`; stages: categories, capability points, their fusion",
        equation="r = w . PReLU(U [h_1; ...; h_n] + b) + a, h_p of expert p's own pass; "
        "L = mean of softplus(r_worse - r_better)",
        params=formulas.dmoerm,
        differs="phase 1 trains a LoRA a category; accuracy counts the better answer as right; points' heads train; no "
        "dropout in phase 3; 60 / 40 percent of the prompts",
        own=("objectives/reward_experts.py", "routers/by_task.py", "evaluation/rewards.py"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """A surgery: runs in, one run out. `takes`: which runs; `differs`: from the paper or its public code."""

    config: str
    title: str
    paper: str  # arXiv id; "" for none
    equation: str
    takes: str
    differs: str = ""


SURGERIES = {
    "lora_lego": Operation(
        config="configs/lora_lego.py",
        title="LoRA-LEGO",
        paper="2409.16167",
        equation="k-means of the units (a_i, s b_i) of all runs; the k centres get their members' mean norm; "
        "B A = sqrt(R / k) sum_c b_c a_c^T",
        takes="one or more of plain adapters, of any ranks",
        differs="units are balanced (a and b of one norm) before they are clustered; k-means++ with restarts; "
        "R is the runs' mean rank; null units stay out",
    ),
    "average": Operation(
        config="configs/average.py",
        title="Average",
        paper="2203.05482",
        equation="every leaf, or the changes: B A = svd_R(sum_j w_j s_j B_j A_j)",
        takes="two or more of one method, routed ones too; `of=product`: plain adapters of one rank",
    ),
    "ties": Operation(
        config="configs/ties.py",
        title="TIES",
        paper="2306.01708",
        equation="trim each change to its largest entries, elect signs by mass, mean over those that agree",
        takes="two or more of plain adapters; `of=factors`: of one rank",
        differs="trimmed by site; the merged change is brought to rank R by SVD (`of=factors`: A and B on their own)",
    ),
    "task_arithmetic": Operation(
        config="configs/task_arithmetic.py",
        title="Task arithmetic",
        paper="2212.04089",
        equation="B A = sum_j w_j s_j B_j A_j, exact (rank sum_j R_j), by SVD, or peft's `linear`",
        takes="one or more of plain adapters; `form=linear`: of one rank",
    ),
    "truncate": Operation(
        config="configs/truncate.py",
        title="Truncate",
        paper="2210.07558",
        equation="A_{1:b}, B_{1:b} of every pair; the scale is alpha / b after `dylora`, else what it was",
        takes="one whose adapters are pairs A, B, routed ones too",
    ),
    "merge_into_base": Operation(
        config="configs/merge_into_base.py",
        title="Merge into the base",
        paper="",
        equation="W' = W + s B A in OUT/base, a Hugging Face folder; DoRA's factors and trained copies too",
        takes="one without a router",
    ),
}


def surgeries_table() -> str:
    rows = ["| surgery | paper | what | takes runs | differs from the paper | config |", "|---|---|---|---|---|---|"]
    for row in SURGERIES.values():
        cells = [row.title, _paper(row), row.equation, row.takes, row.differs or "-", f"`--config={row.config}`"]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def methods_table() -> str:
    """The table of `docs/methods.md`, in Markdown."""
    head = ["method", "paper", "its own on the axes", "equation", "differs from the paper's code"]
    head += ["trained on SmolLM2-135M", "lines of its own", "config"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in (*METHODS.values(), *ORGANISED.values()):
        cells = [row.title, _paper(row), row.axes, row.equation, row.differs or "-"]
        cells += [f"{row.params.__doc__}: {row.params(SMOLLM2):,}", _lines(row), _command(row)]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def readme_table() -> str:
    """The table of the README: the same rows, fewer columns."""
    rows = ["| method | paper | its own on the axes | run it with |", "|---|---|---|---|"]
    for row in (*METHODS.values(), *ORGANISED.values()):
        axes = row.axes.replace("|", "\\|")
        rows.append(f"| {row.title} | {_paper(row)} | {axes} | {_command(row)} |")
    return "\n".join(rows) + "\n"


def _lines(row: Method) -> str:
    """Lines of the config (where it is not another row's with one option changed), then of each file of its own."""
    files = {} if row.overrides else {row.config: ROOT / row.config}
    files |= {name: ROOT / "molora_jax" / name for name in row.own}
    counts = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in files.items()}
    return ", ".join(f"`{name}` {count}" for name, count in counts.items())


def _paper(row: Method) -> str:
    return f"[{row.paper}](https://arxiv.org/abs/{row.paper})" if row.paper else "-"


def _command(row: Method) -> str:
    changes = "".join(f" --config.{field}={value}" for field, value in row.overrides.items())
    return f"`--config={row.config}{changes}`"


LEGEND = """
Trained parameters, of factors and routers in every stage: p(sites) is the sum of D_in + D_out over the sites of a
layer, d(sites) of D_in, o(sites) of D_out; L layers, D width; all: q, k, v, o, gate, up, down; attn: q, k, v, o; ffn:
gate, up, down. The formula's number is the count of the model's own leaves (`tests/battery/test_methods.py`). Lines
count docstrings; what a method needed elsewhere is in [design.md](design.md).
"""


def document() -> str:
    """docs/methods.md."""
    head = "\n## Surgeries\n\nRuns in, one run out, by `python -m launch.surgery` ([surgery.md](surgery.md)).\n\n"
    return "# Methods\n\nMade by `python -m launch.docs`.\n\n" + methods_table() + LEGEND + head + surgeries_table()

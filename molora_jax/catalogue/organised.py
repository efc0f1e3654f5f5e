"""Methods whose own part is how training is organised, or its objective: a row each.

Adapter and router are those of other rows, which the battery tests there.
"""

from molora_jax.catalogue import formulas
from molora_jax.catalogue.row import Method

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

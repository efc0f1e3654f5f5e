"""The surgeries: runs in, one run out. A row each."""

from molora_jax.catalogue.row import Operation

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

"""Claims of papers as orders of methods on the sandbox's leaderboard: best first, in one measure.

    nll           mean over all tasks                domains, facts, ...   over the tasks of a family
    forgotten     nats a token that the pretraining text is worse by than for the base
    experts       experts a token uses on easy tasks minus those on hard ones; of one method, against zero
    consistency   SRP of the same loads without memory, minus SRP: of 16 tokens, on the pretraining text

A claim holds where every step of its order does (`judged`); one step that goes the other way, and it does not.
"""

import dataclasses
import math
import statistics

from experiments.leaderboard import tasks, verdicts

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"


@dataclasses.dataclass(frozen=True)
class Claim:
    """`order`: methods, best first; `change`: what would change the verdict."""

    title: str
    paper: str
    says: str
    order: tuple[str, ...]
    measure: str
    change: str
    table: str = "params"


CLAIMS = {
    "dynmole": Claim(
        "DynMoLE is better than MoLA, and that than LoRA", "2504.00661",
        "Routing by entropy beats a fixed number of experts by layer, and that beats one adapter (table 1 there).",
        ("dynmole", "mola", "lora"), "nll", "Longer training, in which routers specialise; larger bases.",
    ),
    "mixlora": Claim(
        "MixLoRA is better than LoRA on many tasks at once", "2404.15159",
        "In multi-task learning MixLoRA is ahead of LoRA of about as many parameters (table 4 there).",
        ("mixlora", "lora"), "nll", "More tasks than ten, or tasks further apart.",
    ),
    "llava_mole": Claim(
        "A mixture keeps domains from conflicting", "2401.16160",
        "Where domains want different answers, a sparse mixture learns what one LoRA does not.",
        ("llava_mole", "lora"), "domains", "Domains that are told apart by more than one word of the prompt.",
    ),
    "llava_mole_twice": Claim(
        "A mixture keeps domains apart better than LoRA with twice the samples", "2401.16160",
        "The mixture is ahead even of one LoRA that is trained on twice as many samples (table 2 there).",
        ("llava_mole", "lora_twice"), "domains", "Tasks with fewer rows: here twice the steps are no new rows.",
    ),
    "mola": Claim(
        "More experts in higher layers are better than as many everywhere, and these than more in lower ones",
        "2402.08562",
        "At as many experts in all, the inverted triangle is ahead of the rectangle, that of the triangle (table 2).",
        ("mola", "mola_rectangle", "mola_triangle"), "nll", "A base of more layers than six.",
    ),
    "balance": Claim(
        "A mixture is better with its balance loss", "2404.15159",
        "Without the loss the router sends most tokens to few experts, and the others learn little.",
        ("mixlora", "mixlora_unbalanced"), "nll", "A router that does collapse: more experts, more steps.",
    ),
    "consistency": Claim(
        "The less a router is balanced, the longer consecutive tokens keep their experts", "2505.16056",
        "Without the balance loss local routing consistency is higher, with ten times of it lower (toy models there).",
        ("mixlora_unbalanced", "mixlora", "mixlora_balanced"), "consistency",
        "Experts of a pretrained mixture; text of topics that last longer than a row.",
    ),
    "dynamic_moe": Claim(
        "Easy tokens use fewer experts", "2403.07652",
        "With a threshold on probability in place of a number, harder tasks take more experts (table 2 there).",
        ("dynamic_moe",), "experts", "Tasks further apart in difficulty; a base whose own uncertainty is better known.",
    ),
    "smora": Claim(
        "Finer partition is better", "2501.15103",
        "A router over single ranks is ahead of one over experts of several ranks (figure 5 there).",
        ("smora", "mixlora"), "nll", "The same sites for both: MixLoRA routes the FFN alone.",
    ),
    "loramoe": Claim(
        "LoRAMoE forgets less than LoRA", "2312.09979",
        "Experts for world knowledge, kept apart by a loss, keep what the base knew.",
        ("loramoe", "lora"), "forgotten",
        "More steps, so that more is forgotten; the same sites: LoRAMoE leaves attention alone.",
    ),
    "randlora": Claim(
        "Full rank is better where the task needs it", "2502.00987",
        "At equal parameters a change of full rank remembers what a low rank cannot.",
        ("randlora", "lora"), "facts", "More facts than LoRA of rank 16 has room for.",
    ),
    "lora_pro": Claim(
        "LoRA-Pro comes nearer to full fine-tuning than LoRA", "2407.18242",
        "With its gradients corrected LoRA follows full fine-tuning (equation 4 there).",
        ("lora_pro", "lora"), "nll", "A task on which LoRA stays far behind full fine-tuning.",
    ),
    "lora_ga": Claim(
        "LoRA-GA comes nearer to full fine-tuning than LoRA", "2407.05000",
        "A start from the gradient's own directions closes most of the gap.",
        ("lora_ga", "lora"), "nll", "Fewer steps, where the start counts for more.",
    ),
    "lora_sb": Claim(
        "LoRA-SB is better than LoRA with a fraction of the parameters", "2411.19557",
        "A core between two frozen factors, started from the gradient, is ahead of LoRA of the same rank.",
        ("lora_sb", "lora"), "nll", "A higher rank: the core has the square of it.", table="rank",
    ),
}  # fmt: skip


def measured(run: dict, base: dict, measure: str) -> float:
    """A run's value in a measure; less is better."""
    if measure == "forgotten":
        return run["beside"][tasks.FORGOTTEN] - base["beside"][tasks.FORGOTTEN]
    if measure == "experts":
        mean = lambda names: statistics.fmean(run["experts_by_task"][name] for name in names)  # noqa: E731
        return mean(tasks.EASY) - mean(tasks.HARD)
    if measure == "consistency":
        return run["consistency"]["permuted"] - run["consistency"]["value"]
    names = tasks.FAMILIES.get(measure, run["nll"].keys())
    return statistics.fmean(run["nll"][name] for name in names)


def steps(claim: Claim, runs: dict[str, dict[int, dict]], base: dict) -> list[tuple]:
    """`(better, worse, Difference)` of every step of the order, paired by the seeds that both have; of one method alone
    `(method, "", Difference)` to zero.

    Args:
      runs: `{method: {seed: result}}`.
    """
    if len(claim.order) == 1:
        (method,) = claim.order
        values = [measured(run, base, claim.measure) for run in runs[method].values()]
        return [(method, "", verdicts.difference(values))]
    out = []
    for better, worse in zip(claim.order, claim.order[1:], strict=False):
        seeds = [seed for seed in runs[better] if seed in runs[worse]]
        values = [
            measured(runs[better][s], base, claim.measure) - measured(runs[worse][s], base, claim.measure)
            for s in seeds
        ]
        out.append((better, worse, verdicts.difference(values)))
    return out


def judged(found: list[tuple]) -> str:
    """Each step: Holm-corrected p below 0.05 and the right sign holds; an interval that leaves no advantage of MARGIN
    does not hold."""
    known = {i: d for i, (*_, d) in enumerate(found)}
    corrected = verdicts.holm({i: d.p if d else math.nan for i, d in known.items()})
    words = [_step(d, corrected[i]) for i, d in known.items()]
    return FAILS if FAILS in words else HOLDS if set(words) == {HOLDS} else OPEN


def _step(d, p: float) -> str:
    if d is None or math.isnan(p):
        return OPEN
    if p < verdicts.LEVEL and d.mean < 0:
        return HOLDS
    return FAILS if d.mean - d.width > -verdicts.MARGIN else OPEN

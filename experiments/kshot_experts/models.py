"""Which LoRAs of a bank: by what they say to K examples, then by how little they resemble each other (2408.15915).

    ppl_m = mean over the K examples of exp(NLL a token of rationale and answer)     the prompt has no part in it
    sim(m, n) = sum over tensors (each A, each B) of |cos(m's, n's)|                 least sum over the pairs of a group

The mean is of perplexities, as in the code, not of losses: an example that a LoRA finds absurd weighs more. A tensor's
sign does not matter; a rotation of the rank (A -> Q A, B -> B Q^T) does, although B A stays: so the measure is for
LoRAs of one recipe. m, n LoRAs, N of them; K examples.
"""

import itertools

import numpy as np

from molora_jax.errors import InputError


def solution(row: dict) -> str:
    """What a model should say: the rationale, where there is one, then the answer."""
    return f"{row['rationale']} {row['target']}" if row.get("rationale") else row["target"]


def reasoning_ppl(run, rows: list[dict]) -> float:
    """Of a loaded run; the end token counts as the answer's last.

    Raises:
      InputError: a run on plain text, which has no prompt to leave out.
    """
    if run.config.data.get("raw", False):
        raise InputError(
            "--bank", got=f"{run.workdir}, trained with data.raw=True", expected="LoRAs of prompts and answers",
            fix="Leave it out of the bank: on plain text a prompt would count too.",
        )  # fmt: skip
    return float(np.mean(np.exp(run.nll([row["prompt"] for row in rows], [solution(row) for row in rows]))))


def accuracy(run, rows: list[dict], *, max_new_tokens: int) -> float:
    """The fraction of generated texts whose end is the answer (case and closing marks aside)."""
    told = run.generate([row["prompt"] for row in rows], max_new_tokens=max_new_tokens)
    plain = lambda text: text.strip().rstrip(".!").lower()  # noqa: E731
    return float(np.mean([plain(text).endswith(plain(row["target"])) for text, row in zip(told, rows, strict=True)]))


def tensors(path: str, run) -> dict:
    """`{(layer, site, "A" | "B"): array}` of a run of one plain adapter a site; a scale changes no cosine.

    Raises:
      InputError: a mixture, or an adapter that is no product.
    """
    import jax

    from molora_jax.runs.products import products

    def refuse(got, expected, fix="Leave it out of the bank."):
        return InputError("--bank", got=f"{path}, {got}", expected=expected, fix=fix)

    found = {}
    for (_, layer, site), (A, B) in products(run.model, jax.device_get(run.adapters), refuse=refuse).items():
        if (layer, site, "A") in found:
            raise refuse(f"which has two rules on {site} of layer {layer}", "one adapter a site")
        found[layer, site, "A"], found[layer, site, "B"] = A, B
    return found


def similarity(one: dict, other: dict) -> float:
    """Of two LoRAs (`tensors`): the number of tensors where they are the same. A tensor of zeros is like nothing."""
    total = 0.0
    for key, a in one.items():
        a, b = (np.asarray(x, np.float64).ravel() for x in (a, other[key]))
        size = np.linalg.norm(a) * np.linalg.norm(b)
        total += abs(a @ b) / size if size else 0.0
    return total


def similarities(bank: list[dict], names) -> np.ndarray:
    """`[N, N]`, each pair computed once.

    Raises:
      InputError: LoRAs of other sites, layers or ranks than the first one's.
    """
    for name, one in zip(names, bank, strict=True):
        shapes = [{key: x.shape for key, x in lora.items()} for lora in (bank[0], one)]
        if shapes[0] != shapes[1]:
            raise InputError(
                "--bank", got=f"{name}, of other sites, layers or ranks than {names[0]}",
                expected="LoRAs of one recipe: their tensors are compared one by one",
            )  # fmt: skip
    out = np.zeros((len(bank), len(bank)))
    for i, j in itertools.combinations(range(len(bank)), 2):
        out[i, j] = out[j, i] = similarity(bank[i], bank[j])
    return out


def ranked(ppl, right, by: str) -> list[int]:
    """LoRAs, the best first. by: "ppl", "accuracy", or "both": the sum of the two ranks (ours: the code's is by hand).

    Equal ones go by perplexity, then in the bank's order.
    """
    ppl, right = np.asarray(ppl, np.float64), np.asarray(right, np.float64)
    rank = lambda values: np.searchsorted(np.sort(values), values)  # noqa: E731  (how many are better)
    score = {"ppl": rank(ppl), "accuracy": rank(-right), "both": rank(ppl) + rank(-right)}[by]
    return np.lexsort((np.arange(len(ppl)), ppl, score)).tolist()


def group(pairs: np.ndarray, candidates, size: int) -> tuple[tuple[int, ...], float]:
    """`(members, sum of their pairs)`: the group of `size` candidates that are least alike; the first of equal ones."""
    total = lambda members: float(sum(pairs[i, j] for i, j in itertools.combinations(members, 2)))  # noqa: E731
    best = min(itertools.combinations(candidates, size), key=total)
    return best, total(best)

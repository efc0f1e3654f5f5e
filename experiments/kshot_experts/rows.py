"""Which rows of open data: the nearest to the mean of the K examples, without near doubles (2408.15915).

    probe = mean of the K unit vectors;   the n rows at the least Euclidean distance |v - probe|
    from the last to the first: row i goes where an earlier one lies within cosine distance 0.1, kept itself or not

so of a chain a ~ b ~ c both b and c go. "Earlier" is by distance here; the reference takes the order of a partial sort,
which the order of the corpus changes (`order="partition"`). v `[N, D]` unit vectors of N rows.
"""

import json
import pathlib

import numpy as np

from molora_jax.errors import InputError

FIELDS = ("prompt", "target", "rationale")
PREFIX = "Represent this sentence for searching relevant passages: "  # of the embedder that the paper takes


def read(path) -> list[dict]:
    """K examples: a JSON object a line with `prompt`, `target` and perhaps `rationale`.

    Raises:
      InputError: no such file, a line that is none, or not one example.
    """
    rows, where = [], f"--rows={path}"
    try:
        lines = pathlib.Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(where, got=str(error), expected="a jsonl file that can be read") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}, row {number}", got=f"no JSON ({error})"[:200], expected="an object") from None
        texts = isinstance(row, dict) and all(isinstance(row.get(f, ""), str) for f in FIELDS)
        if not texts or not all(row.get(field, "").strip() for field in FIELDS[:2]):
            expected = 'an object with texts: {"prompt": ..., "target": ...} and perhaps "rationale"'
            raise InputError(f"{where}, row {number}", got=repr(row)[:80], expected=expected)
        rows.append({field: row[field] for field in FIELDS if row.get(field)})
    if len(rows) < 1:
        raise InputError(where, got="no row", expected="K labelled examples (the paper: 5 to 50)")
    return rows


def nearest(vectors: np.ndarray, probe: np.ndarray, n: int, *, order: str = "distance") -> np.ndarray:
    """Indices of the n nearest rows; "distance": the nearest first (the lower index wins a tie), "partition": as found.

    Raises:
      InputError: fewer rows than n.
    """
    if n > len(vectors):
        raise InputError(
            "--target_num", got=f"{n} rows to be picked", expected=f"at most {len(vectors)}, the rows of the pool",
            fix="Lower it, or name more tasks in --pool.",
        )  # fmt: skip
    distance = np.linalg.norm(vectors - probe, axis=1)
    if order == "partition":
        return np.argpartition(distance, n - 1)[:n] if n else np.zeros(0, int)
    return np.argsort(distance, kind="stable")[:n]


def distinct(vectors: np.ndarray, picked: np.ndarray, within: float = 0.1) -> np.ndarray:
    """Those of `picked`, in its order, to which no earlier one lies within that cosine distance."""
    v = np.asarray(vectors, np.float64)[picked]
    near = 1 - v @ v.T <= within
    return picked[~np.tril(near, -1).any(axis=1)]


def embedded(base, texts: list[str], *, length: int = 128, rows: int = 16) -> np.ndarray:
    """`[N, D]` unit vectors: the direction of a base's mean hidden state of each text (as MiniLM's are made).

    base: of `load_base`, an encoder or a decoder; longer texts are cut.
    """
    from configs.common import get_config
    from molora_jax.backbones.compile import compile_base
    from molora_jax.data.packing import empty_batch, write_segment
    from molora_jax.training.documents import embed

    model, out = compile_base(get_config(), base.config), []
    size = min(length, base.config.context)
    for first in range(0, len(texts), rows):
        batch = empty_batch(rows, size, pad_id=base.tokenizer.pad_id)
        for row, text in enumerate(texts[first : first + rows]):
            ids = [*base.tokenizer.encode(text)[:size], 0]  # the last one is a target alone
            write_segment(batch, row, 0, 1, ids=np.asarray(ids), mask=np.zeros(len(ids)), task_id=0, example_id=0)
        out.append(np.asarray(embed(base.params, batch, model=model))[: len(texts) - first])
    return np.concatenate(out).astype(np.float64)


def text_of(prompt: str, target: str) -> str:
    return f"{PREFIX}{prompt}\n{target}"

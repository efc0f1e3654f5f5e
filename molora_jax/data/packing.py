"""Several examples a row, and the batch arrays of the packed rows.

An example of n tokens takes n - 1 positions: its last token is predicted, and predicts nothing, so it is never an
input. The packer keeps three bounds a row: positions (`seq_len`), loss positions (`targets_per_row`, so that logits
need be computed at so many positions only) and segments. Two ways are tried, and the one with fewer rows is taken:

- best fit: longest first, each into the row with the least room that still holds it. Nearly tight when rows hold many.
- folding: where rows hold few examples of like length (a chat template makes all alike), what counts is how many rows
  hold one more than the others. The shortest examples are grouped k a row, as many as fit, long ones with short ones;
  then k - 1 a row, and so on; best fit places the rest. On the default tasks at 128 positions, with 46 a piece, this
  leaves 7.8 % padding where best fit leaves 10.2 %.

The number of rows depends on the lengths alone, not on the order that they come in. Axes: B rows, S positions.
"""

import numpy as np

CANDIDATES = 8  # rows tried among those with equal room, before more room is tried: bounds the work
MOST_FOLDED = 32  # with more examples a row than this, best fit is tight enough


def pack(lengths, targets, *, seq_len: int, targets_per_row: int, max_segments: int | None = None) -> list[list[int]]:
    """Rows as lists of indices into `lengths`. Every index occurs exactly once.

    Args:
      lengths: [N] positions of each example, each at most `seq_len`.
      targets: [N] loss positions of each, each at most `targets_per_row`.
    """
    lengths, targets = np.asarray(lengths, np.int64), np.asarray(targets, np.int64)
    if not len(lengths):
        return []
    limits = dict(seq_len=seq_len, targets_per_row=targets_per_row, max_segments=max_segments or seq_len)
    plain = _best_fit([], np.lexsort((-targets, -lengths)), lengths, targets, **limits)
    tight = len(plain) * seq_len <= 1.02 * lengths.sum() + seq_len
    if tight or seq_len // lengths.min() > MOST_FOLDED:
        return plain
    rows, rest = _fold(lengths, targets, **limits)
    rest = rest[np.lexsort((-targets[rest], -lengths[rest]))]
    folded = _best_fit(rows, rest, lengths, targets, **limits)
    return folded if len(folded) < len(plain) else plain


def _best_fit(rows, order, lengths, targets, *, seq_len, targets_per_row, max_segments) -> list[list[int]]:
    """Places the examples `order`, one after another, in `rows` (altered) or in new ones."""
    room = [[] for _ in range(seq_len + 1)]  # room -> rows
    open_rooms = 0  # bit r is set while room[r] is not empty
    loss = []  # of each row
    for number, row in enumerate(rows):
        loss.append(int(targets[row].sum()))
        space = seq_len - int(lengths[row].sum())
        if len(row) < max_segments:
            room[space].append(number)
            open_rooms |= 1 << space
    for i, length, target in zip(order.tolist(), lengths[order].tolist(), targets[order].tolist(), strict=True):
        chosen = None
        left = open_rooms >> length << length
        while left and chosen is None:
            lowest = left & -left
            left ^= lowest
            space = lowest.bit_length() - 1
            candidates = room[space]
            for k in range(len(candidates) - 1, max(len(candidates) - 1 - CANDIDATES, -1), -1):
                if loss[candidates[k]] + target <= targets_per_row:
                    chosen = candidates.pop(k)
                    if not candidates:
                        open_rooms ^= lowest
                    break
        if chosen is None:
            chosen, space = len(rows), seq_len
            rows.append([])
            loss.append(0)
        rows[chosen].append(i)
        loss[chosen] += target
        space -= length
        if space and len(rows[chosen]) < max_segments:
            room[space].append(chosen)
            open_rooms |= 1 << space
    return rows


def _fold(lengths, targets, *, seq_len, targets_per_row, max_segments):
    """(rows, the indices left over): the shortest examples k a row, for k from the most that fit down to 2."""
    order = np.lexsort((targets, lengths))
    rows, rest = [], []
    for k in range(min(seq_len // int(lengths.min()), max_segments), 1, -1):
        low, high = 0, len(order) // k  # the most rows of k: sums grow with longer examples, so halve
        while low < high:
            middle = (low + high + 1) // 2
            groups = _group(lengths, order[: k * middle], k)
            if lengths[groups].sum(1).max() <= seq_len:
                low = middle
            else:
                high = middle - 1
        if low:
            groups = _group(lengths, order[: k * low], k)
            good = targets[groups].sum(1) <= targets_per_row
            rows += groups[good].tolist()
            rest.append(groups[~good].ravel())
            order = order[k * low :]
    return rows, np.concatenate([*rest, order])


def _group(lengths, order, k: int) -> np.ndarray:
    """`[len(order) / k, k]`: groups of nearly equal sums out of examples in ascending order.

    The examples are cut into k runs; each run is dealt to the groups so far, its longest to the group that is shortest.
    """
    runs = order.reshape(k, -1)
    groups = runs[:1].T
    for run in runs[1:]:
        shortest_first = np.argsort(lengths[groups].sum(1), kind="stable")
        groups = np.concatenate([groups[shortest_first], run[::-1, None]], axis=1)
    return groups


def choose_targets_per_row(lengths, targets, *, seq_len: int, longest: int, slack: float = 0.005) -> int:
    """The smallest multiple of 8, at least `longest`, that costs at most `slack` more rows than no bound does.

    Never above `seq_len` (which need not be a multiple of 8).
    """
    free = len(pack(lengths, targets, seq_len=seq_len, targets_per_row=seq_len))
    low, high = -(-longest // 8), -(-seq_len // 8)
    while low < high:
        middle = (low + high) // 2
        if len(pack(lengths, targets, seq_len=seq_len, targets_per_row=8 * middle)) <= free * (1 + slack):
            high = middle
        else:
            low = middle + 1
    return min(8 * low, seq_len)


def empty_batch(num_rows: int, seq_len: int, *, pad_id: int) -> dict[str, np.ndarray]:
    """Batch arrays `[B, S]` of padding."""
    shape = (num_rows, seq_len)
    return dict(
        tokens=np.full(shape, pad_id, np.int32),
        targets=np.full(shape, pad_id, np.int32),
        loss_weight=np.zeros(shape, np.float32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        task_ids=np.zeros(shape, np.int32),
        example_ids=np.zeros(shape, np.int32),
    )


def write_segment(batch, row: int, at: int, segment: int, *, ids, mask, task_id: int, example_id: int):
    """Writes one example at `batch[...][row, at:]` as segment `segment`; returns where the next one starts.

    `targets[t]` is the example's token after `tokens[t]`; it counts in the loss where its entry of `mask` is 1.
    """
    end = at + len(ids) - 1
    batch["tokens"][row, at:end] = ids[:-1]
    batch["targets"][row, at:end] = ids[1:]
    batch["loss_weight"][row, at:end] = mask[1:]
    batch["segment_ids"][row, at:end] = segment
    batch["positions"][row, at:end] = np.arange(end - at)
    batch["task_ids"][row, at:end] = task_id
    batch["example_ids"][row, at:end] = example_id
    return end

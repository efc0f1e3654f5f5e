"""The training stream through grain: a random-access source whose element `i` is the batch of `start_step + i`.

A batch is a function of its step, so nothing but the step number has to be saved to resume. Grain is imported here
only: it brings jax along where that is installed.
"""

import sys

import grain


class Steps:
    """grain's random-access source over the steps from `start_step` on."""

    def __init__(self, stream, start_step: int, *, rows=None):
        self.stream, self.start_step, self.rows = stream, start_step, rows

    def __len__(self) -> int:
        return sys.maxsize - self.start_step

    def __getitem__(self, index: int):
        step = self.start_step + int(index)
        return step, self.stream.batch(step, rows=self.rows)

    def __repr__(self) -> str:
        return f"Steps(start_step={self.start_step}, rows={self.rows})"


def iterate(stream, start_step: int, *, rows=None, prefetch: int = 2):
    """Yields (step, batch) for ever; `prefetch` batches are made ahead in as many threads."""
    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(Steps(stream, start_step, rows=rows)).to_iter_dataset(options))

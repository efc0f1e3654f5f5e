"""Data: sources, splits, packing, and batches as a function of (seed, step)."""

from molora_jax.data.dataset import DataSet, build, parse_tasks
from molora_jax.data.example import Encoded, Example

__all__ = ["DataSet", "Encoded", "Example", "build", "parse_tasks"]

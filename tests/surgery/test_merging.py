"""average, ties, task_arithmetic on one site: against peft's numbers (`fixtures/make_merging.py`) and float64 numpy."""

import pathlib

import numpy as np
import pytest

from molora_jax.core import factorise
from molora_jax.runs.view import Key
from molora_jax.surgery import average, base, task_arithmetic
from molora_jax.surgery.ties import Ties, ties, trim

PEFT = np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "merging.npz")
AT = ("all", 0, "q")


class One:
    """A parent of one site."""

    def __init__(self, j):
        A, B, alpha = PEFT[f"A_{j}"], PEFT[f"B_{j}"].T, PEFT["alphas"][j]
        self.s = alpha / len(A)
        self.products = {AT: (A, self.s * B)}

    def scale(self, rule):
        return self.s


PARENTS = tuple(One(j) for j in range(3))
CHANGES = [factorise.update(*parent.products[AT]) for parent in PARENTS]


@pytest.fixture(autouse=True)
def no_config(monkeypatch):
    """What a config becomes is another test's."""
    monkeypatch.setattr(base, "plain_config", lambda parents, ranks: ranks)


def change(surgery):
    result = surgery.apply(PARENTS)
    A, B = (result.leaves[Key(*AT, name)][0] for name in "AB")
    assert A.dtype == np.float32 and result.config == {"all": len(A)}
    return factorise.update(A, B)


@pytest.mark.parametrize(
    ("case", "surgery"),
    [
        ("linear", task_arithmetic.TaskArithmetic(form="linear", weights="0.5,1.0,0.7")),
        ("linear_negative", task_arithmetic.TaskArithmetic(form="linear", weights="1.0,-0.5,0.7")),
        ("cat", task_arithmetic.TaskArithmetic(weights="0.5,1.0,0.7")),
        ("svd", task_arithmetic.TaskArithmetic(form="svd", weights="0.5,1.0,0.7")),
        ("mean_svd", average.Average(of="product")),
        ("ties", Ties(of="factors", density=0.4)),
        ("ties_weighted", Ties(of="factors", density=0.6, weights="0.5,1.0,0.7")),
        ("ties_svd", Ties(density=0.3)),
        ("ties_svd_weighted", Ties(density=0.5, weights="0.5,1.0,0.7")),
    ],
)
def test_it_is_pefts(case, surgery):
    np.testing.assert_allclose(change(surgery), PEFT[case], atol=2e-5)


def test_the_sum_is_exact_and_of_the_ranks_together():
    got = task_arithmetic.TaskArithmetic().apply(PARENTS)
    assert got.config == {"all": 9}
    np.testing.assert_allclose(change(task_arithmetic.TaskArithmetic()), sum(CHANGES), atol=1e-5)


def test_the_best_form_of_a_rank_is_the_truncated_svd():
    A, B = (np.concatenate([parent.products[AT][i] for parent in PARENTS]) for i in (0, 1))
    u, s, vt = np.linalg.svd(sum(CHANGES))
    for rank in (1, 3, 7):
        wanted = (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose(factorise.update(*factorise.truncated(A, B, rank)), wanted, atol=1e-9)
        np.testing.assert_allclose(factorise.update(*factorise.factors_of(sum(CHANGES), rank)), wanted, atol=1e-9)
        tall = factorise.update(*factorise.factors_of(sum(CHANGES).T, rank))
        np.testing.assert_allclose(tall, wanted.T, atol=1e-9)
    assert factorise.truncated(A, B, 12)[0].shape == (12, 10)
    low = factorise.factors_of(CHANGES[0], 5)  # of rank 3
    np.testing.assert_allclose(factorise.update(*low), CHANGES[0], atol=1e-7)
    assert all(np.isfinite(part).all() for part in (*low, *factorise.factors_of(np.zeros((4, 3)), 2)))


def test_ties_by_hand():
    """Four entries, half kept: signs are elected by mass, and the mean is over those that agree."""
    a, b, c = np.array([4.0, -3.0, 1.0, 0.5]), np.array([-1.0, -2.0, 0.5, 3.0]), np.array([5.0, 0.1, -0.2, -4.0])
    np.testing.assert_array_equal(trim(b, 0.5), [0.0, -2.0, 0.0, 3.0])
    np.testing.assert_allclose(ties([a, b, c], [1, 1, 1], 0.5), [4.5, -2.5, 0.0, -4.0])
    np.testing.assert_allclose(ties([a, b, c], [2, 1, 1], 0.5), [(8 + 5) / 2, (-6 - 2) / 2, 0.0, -4.0])


def test_weights():
    np.testing.assert_array_equal(base.weights_of("", 3, 0.5), [0.5] * 3)
    np.testing.assert_array_equal(base.weights_of("2", 2, 0.5), [2, 2])
    np.testing.assert_array_equal(base.weights_of("1, -1", 2, 0.5), [1, -1])
    for text in ("1,2,3", "a", "nan", "1,,2"):
        with pytest.raises(base.InputError, match="surgery.weights"):
            base.weights_of(text, 2, 1.0)

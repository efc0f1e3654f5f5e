"""The acceptance list of LoRA-LEGO (its eight items by number) and its traps, on one site, against float64 numpy."""

import numpy as np
import pytest

from molora_jax.core.clustering import kmeans
from molora_jax.surgery.lora_lego import LoraLego

D_IN, D_OUT = 12, 9


def lora(rank, seed, scale=1.0):
    """`(A [R, D_in], s B [R, D_out])`."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rank, D_IN)), scale * rng.standard_normal((rank, D_OUT))


def update(pair):
    A, B = pair
    return np.einsum("ro,ri->oi", B, A)


def merge(pairs, k, **options):
    return LoraLego(**options).merged(pairs, k)


def as_set(pair):
    """The units, in an order of their own."""
    rows = np.concatenate(pair, axis=1)
    return rows[np.lexsort(rows.round(9).T)]


def test_acceptance_1_the_order_of_units_changes_nothing():
    pairs, rng = [lora(4, 1), lora(6, 2), lora(5, 3)], np.random.default_rng(0)
    whole = merge(pairs, 4)
    mixed = [tuple(x[order] for x in pair) for pair in pairs for order in [rng.permutation(len(pair[0]))]]
    for other in (mixed, mixed[::-1]):
        again = merge(other, 4)
        np.testing.assert_allclose(as_set(again), as_set(whole), atol=1e-12)
        np.testing.assert_allclose(update(again), update(whole), atol=1e-12)
    for before, after in zip(pairs, mixed, strict=True):
        np.testing.assert_allclose(update(after), update(before), atol=1e-12)


@pytest.mark.parametrize("same", [False, True])
def test_acceptance_2_a_cluster_a_unit_is_the_sum(same):
    pairs = [lora(3, 1, 2.0), lora(3, 1 if same else 2, 2.0 if same else 0.5)]
    got = merge(pairs, 6, output=False)
    np.testing.assert_allclose(update(got), update(pairs[0]) + update(pairs[1]), atol=1e-12)


@pytest.mark.parametrize("options", [{}, dict(units="raw"), dict(cluster="directions"), dict(norm="linf")])
def test_acceptance_3_identical_loras_give_that_lora(options):
    one = lora(5, 1)
    got = merge([one, one, one], 5, **options)
    np.testing.assert_allclose(update(got), update(one), atol=1e-12)


def test_acceptance_4_one_lora_of_its_own_rank_is_itself():
    one = lora(4, 7, 3.0)
    np.testing.assert_allclose(update(merge([one], 4)), update(one), atol=1e-12)
    np.testing.assert_allclose(as_set(merge([one], 4, units="raw")), as_set(one), atol=1e-12)


@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("linf", np.inf)])
def test_acceptance_5_centres_have_their_members_norm_and_single_ones_stay(norm, order):
    members, own = np.random.default_rng(0).standard_normal((4, 21)), LoraLego(norm=norm)
    np.testing.assert_array_equal(own.centre(members[:1]), members[0])
    centre = own.centre(members)
    wanted = np.linalg.norm(members, order, axis=1).mean()
    assert np.linalg.norm(centre, order) == pytest.approx(wanted, rel=1e-12)
    mean = members.mean(axis=0)
    np.testing.assert_allclose(centre / np.linalg.norm(centre), mean / np.linalg.norm(mean), atol=1e-12)
    np.testing.assert_array_equal(LoraLego(norm="off").centre(members), mean)


def test_acceptance_6_the_output_factor():
    pairs = [lora(2, seed) for seed in range(4)]
    got, plain = merge(pairs, 8), merge(pairs, 8, output=False)
    np.testing.assert_allclose(update(got), 0.5 * update(plain), atol=1e-12)
    np.testing.assert_allclose(update(merge(pairs, 2)), update(merge(pairs, 2, output=False)), atol=1e-12)


def test_acceptance_7_different_ranks_and_padding_does_not_enter():
    pairs = [lora(4, 1), lora(8, 2), lora(16, 3)]
    padded = [tuple(np.pad(x, ((0, 16 - len(x)), (0, 0))) for x in pair) for pair in pairs]
    got, again = (merge(some, 8, output=False) for some in (pairs, padded))
    assert got[0].shape == (8, D_IN) and got[1].shape == (8, D_OUT)
    np.testing.assert_allclose(as_set(again), as_set(got), atol=1e-12)
    half = (pairs[0][0], np.where(np.arange(4)[:, None] < 2, pairs[0][1], 0.0))  # B of a unit that never trained
    np.testing.assert_allclose(update(merge([half], 2, output=False)), update(half), atol=1e-12)


def test_acceptance_8_a_scale_is_folded_once():
    A, B = lora(8, 1)
    for options in ({}, dict(units="raw")):
        stored = [merge([(A, alpha / 8 * factor * B), lora(8, 2)], 8, **options) for alpha, factor in ((16, 1), (8, 2))]
        np.testing.assert_allclose(update(stored[0]), update(stored[1]), atol=1e-12)


def test_trap_the_free_scale_of_a_unit_is_taken_out():
    pairs = [lora(4, 1), lora(4, 2)]
    t = np.exp(np.random.default_rng(0).uniform(-4, 4, (4, 1)))
    moved = [pairs[0], (t * pairs[1][0], pairs[1][1] / t)]
    np.testing.assert_allclose(update(merge(moved, 3)), update(merge(pairs, 3)), atol=1e-9)
    assert np.abs(update(merge(moved, 3, units="raw")) - update(merge(pairs, 3, units="raw"))).max() > 0.01


def test_trap_a_flipped_sign_cancels_unless_it_is_asked_for():
    A, B = lora(3, 1)
    pairs = [(A, B), (-A, -B)]
    near = merge(pairs, 3, signs=True)
    np.testing.assert_allclose(update(near), update((A, B)), atol=1e-12)
    assert np.abs(update(merge(pairs, 3)) - update((A, B))).max() > 0.01


def test_trap_pairs_stay_together():
    """Two units whose A are alike and whose B are opposite are no one cluster."""
    a, b = np.eye(D_IN)[:2], np.eye(D_OUT)[:2]
    pairs = [(np.stack([a[0], a[1]]), np.stack([b[0], b[1]])), (np.stack([a[0], a[1]]), np.stack([b[1], b[0]]))]
    got = merge(pairs, 4, output=False)
    np.testing.assert_allclose(update(got), update(pairs[0]) + update(pairs[1]), atol=1e-12)


def test_the_mean_of_aligned_units_is_not_their_sum():
    A, B = lora(2, 1)
    got = merge([(A, B), (A, 1.1 * B)], 2)
    assert np.linalg.norm(update(got)) == pytest.approx(1.05 * np.linalg.norm(update((A, B))), rel=1e-2)


def test_untrained_loras_give_nothing():
    A, B = lora(3, 1)
    for part in merge([(A, 0 * B)], 3):
        np.testing.assert_array_equal(part, 0.0)


def test_kmeans_against_all_partitions():
    """The best of several starts is the least of all ways to part six points in two."""
    x = np.random.default_rng(3).standard_normal((6, 2))

    def cost(labels):
        return sum(((x[labels == c] - x[labels == c].mean(0)) ** 2).sum() for c in set(labels.tolist()))

    best = min(cost(np.array([(i >> j) & 1 for j in range(6)])) for i in range(1, 63))
    labels, sign = kmeans(x, 2, starts=16)
    assert cost(labels) == pytest.approx(best) and (sign == 1).all()

"""Every form of every op against its float64 reference: values and all gradients, and the choice between them.

Kernels run in both interpreters, one of them over buffers full of NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels_pallas
from kernels_pallas import (
    grouped_expand,
    grouped_lora,
    grouped_shrink,
    low_rank_op,
    rank_gated,
    routed_ffn,
    tiles,
)
from kernels_pallas.grouped_lora import api as grouped_api
from kernels_pallas.grouped_lora import tpu as grouped_tpu
from kernels_pallas.rank_gated import api as gated_api
from kernels_pallas.rank_gated import tpu as gated_tpu
from kernels_pallas.routed_ffn import api as ffn_api
from kernels_pallas.routed_ffn import tiled as ffn_tiled
from kernels_pallas.routed_ffn import tpu as ffn_tpu
from tests.kernels.common import DECISIONS, INTERPRETERS, compare, compiled, decision, dense_gates, normal

# T E K R D F: fewer rows than a tile, one expert, T no multiple of a tile, rank 1, more experts than slots, high rank
SHAPES = {
    "small": (37, 5, 2, 3, 24, 40),
    "one": (5, 1, 1, 4, 16, 16),
    "many": (20, 70, 3, 1, 8, 24),
    "crowd": (9, 512, 2, 1, 8, 24),
    "deep": (40, 3, 2, 64, 24, 40),
}
KERNELS = {f"tpu-{name}": how for name, how in INTERPRETERS.items()}


@functools.cache
def form(op, name):
    """A function of the op's arrays: a kernel in an interpreter, or a form in plain XLA."""
    api, kernel, *_ = OPS[op]
    return functools.partial(kernel, interpret=KERNELS[name]) if name in KERNELS else api.IMPLEMENTATIONS[name]


def gated_inputs(rng, T, E, K, R, D, F, kind):
    idx, gates = decision(rng, T, E, K, kind)
    args = [normal(rng, T, D), normal(rng, E, R, D), normal(rng, E, R, F), dense_gates(idx, gates, E)]
    return args, normal(rng, T, F)


def grouped_inputs(rng, T, E, K, R, D, F, kind):
    idx, gates = decision(rng, T, E, K, kind)
    return [normal(rng, T, D), normal(rng, E, R, D), normal(rng, E, R, F), idx, gates], normal(rng, T, F)


def ffn_inputs(rng, T, E, K, R, D, F, kind):
    idx, gates = decision(rng, T, E, K, kind)
    wide, rank, factor = (T, F), (T, K, R), (E, R, F)
    args = [normal(rng, *shape) for shape in (wide, wide, rank, rank, factor, factor, factor)]
    return [*args, idx, gates, normal(rng, T)], (normal(rng, *wide), normal(rng, *rank))


OPS = {
    "rank_gated": (gated_api, gated_tpu.rank_gated, gated_inputs, ("dense",)),
    "grouped_lora": (grouped_api, grouped_tpu.grouped_lora, grouped_inputs, ("tiled",)),
    "routed_ffn": (ffn_api, ffn_tpu.routed_ffn, ffn_inputs, ("dense", "tiled")),
}
PAIRS = [(op, name) for op, (*_, names) in OPS.items() for name in (*names, *KERNELS)]


@pytest.mark.parametrize("kind", DECISIONS)
@pytest.mark.parametrize("op, name", PAIRS)
def test_against_float64(op, name, kind):
    inputs = OPS[op][2]
    args, cotangents = inputs(np.random.default_rng(1), *SHAPES["small"], kind)
    compare(form(op, name), form(op, "reference"), args, cotangents)


SHAPED = [
    pytest.param(op, name, shape, marks=[pytest.mark.slow] * (name == "tpu-nan" and shape in ("many", "crowd")))
    for op, name in PAIRS
    if name != "tpu-plain"
    for shape in ("one", "many", "crowd", "deep")
]  # the interpreter of the TPU kernels is slow


@pytest.mark.parametrize("op, name, shape", SHAPED)
def test_shapes(op, name, shape):
    inputs = OPS[op][2]
    args, cotangents = inputs(np.random.default_rng(2), *SHAPES[shape], "random")
    compare(form(op, name), form(op, "reference"), args, cotangents)


@pytest.mark.parametrize("op, name", [pair for pair in PAIRS if pair[1] != "tpu-plain"])
def test_bfloat16(op, name):
    inputs = OPS[op][2]
    args, cotangents = inputs(np.random.default_rng(3), *SHAPES["small"], "padded")
    compare(form(op, name), form(op, "reference"), args, cotangents, 3e-2, jnp.bfloat16)


@pytest.mark.parametrize("T, kind", [(37, "random"), (29, "padded")])
@pytest.mark.parametrize("op", OPS)
def test_kernels_over_several_tiles(op, T, kind, monkeypatch):
    """Rows in tiles of 8, the last one partial, and F in two blocks: what a kernel carries from step to step."""
    for kernel in (gated_tpu, grouped_tpu, ffn_tpu):
        monkeypatch.setattr(kernel, "ROWS", (8,))
    monkeypatch.setattr(ffn_tpu, "BLOCKS", (128,))
    args, cotangents = OPS[op][2](np.random.default_rng(T), T, 5, 2, 3, 9, 150, kind)
    kernel = functools.partial(OPS[op][1], interpret=INTERPRETERS["nan"])  # its own: `form` may be compiled already
    compare(kernel, form(op, "reference"), args, cotangents)


@pytest.mark.parametrize("name", ["dense", "tiled", "tpu-nan"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_routed_ffn_dropout_shared_A_and_activation(name, activation):
    rng = np.random.default_rng(4)
    args, cotangents = ffn_inputs(rng, 21, 4, 2, 3, 0, 24, "padded")
    args[6] = args[6][:1]  # one A_d for all experts
    mask = (rng.random((21, 24)) > 0.3).astype(np.float32) / 0.7
    compare(
        functools.partial(form("routed_ffn", name), activation=activation, mask=mask),
        functools.partial(ffn_api.IMPLEMENTATIONS["reference"], activation=activation, mask=mask),
        args, cotangents, 4e-6,  # the tanh of gelu is the platform's, to a few units in the last place
    )  # fmt: skip


@pytest.mark.parametrize("name", ["dense", "tiled"])
def test_routed_ffn_where_every_expert_has_a_slot(name):
    args, cotangents = ffn_inputs(np.random.default_rng(5), 19, 4, 4, 3, 0, 24, "padded")
    compare(ffn_api.IMPLEMENTATIONS[name], ffn_api.IMPLEMENTATIONS["reference"], args, cotangents)


@pytest.mark.parametrize("kind", ["random", "padded", "unused"])
@pytest.mark.parametrize("name", ["reference", "dense", "tiled", "tpu-nan"])
def test_routed_ffn_with_a_base_of_true_and_false(name, kind):
    """As with 1 and 0; rows without experts take h_0, a whole block of 32 of them and rows across blocks."""
    args, cotangents = ffn_inputs(np.random.default_rng(14), 75, 4, 2, 3, 0, 24, kind)
    args[7][30:35] = 4
    base = (args[7] == 4).all(axis=1)
    args[9] = base.astype(np.float32)
    wanted = compiled(form("routed_ffn", "reference"))(args, cotangents)
    del wanted[-1]  # dbase_gate
    compare(form("routed_ffn", name), form("routed_ffn", "reference"), [*args[:9], base], cotangents)
    got = compiled(form("routed_ffn", name))([*args[:9], base], cotangents)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-6 * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    "T, need, done", [(75, [40], range(32, 64)), (75, [70], range(43, 75)), (9, [], []), (9, [8], range(9))]
)
def test_rows_where_forms_the_blocks_that_are_needed(T, need, done):
    mask = np.isin(np.arange(T), need)
    (got,) = jax.jit(tiles.rows_where, static_argnums=1)(
        mask, lambda x: (x + 1,), (np.arange(T),), (jnp.zeros(T, int),)
    )
    np.testing.assert_array_equal(got, np.where(np.isin(np.arange(T), done), np.arange(T) + 1, 0))


@settings(max_examples=4, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("op", OPS)
def test_random_shapes(op, data):
    *_, inputs, names = OPS[op]
    T, E, R = (data.draw(st.integers(1, high), label) for label, high in (("T", 70), ("E", 9), ("R", 9)))
    K = data.draw(st.integers(1, min(E, 3)), "K")
    D, F = data.draw(st.sampled_from([8, 24, 130]), "D"), data.draw(st.sampled_from([16, 40, 136]), "F")
    kind = data.draw(st.sampled_from([k for k in DECISIONS if k != "empty" or E > 1]), "kind")
    args, cotangents = inputs(np.random.default_rng(T), T, E, K, R, D, F, kind)
    name = data.draw(st.sampled_from([*names, "tpu-nan"]), "form")
    compare(form(op, name), form(op, "reference"), args, cotangents)


@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("kind", DECISIONS)
def test_a_plan_visits_every_used_slot_once(kind, rows):
    T, E, K = 33, 6, 2
    idx, _ = decision(np.random.default_rng(6), T, E, K, kind)
    plan = jax.tree.map(np.asarray, jax.jit(tiles.plan, static_argnums=(1, 2))(idx, E, rows))
    valid = plan.valid[..., 0]
    assert not valid[int(plan.count) :].any()
    slots = plan.slot[valid]
    assert sorted(slots) == sorted(np.flatnonzero(idx.reshape(-1) < E))
    np.testing.assert_array_equal(plan.token[valid], slots // K)
    np.testing.assert_array_equal(np.repeat(plan.expert[:, None], rows, 1)[valid], idx.reshape(-1)[slots])
    assert (np.diff(plan.to_token, axis=1) > 0).all() and (plan.to_token[~valid] >= T).all()


def test_rows_that_nobody_routes_may_hold_nan():
    args, cotangents = ffn_inputs(np.random.default_rng(7), 30, 5, 2, 3, 0, 24, "random")
    args[7][3] = 5
    for i in (2, 3):
        args[i][3] = np.nan  # rank activations of an unused slot
    moving = [i for i in range(len(args)) if i != 7]  # all but idx
    for name in ("dense", "tiled"):
        gradients = compiled(functools.partial(routed_ffn, implementation=name))(args, cotangents)[-len(moving) :]
        for i, gradient in zip(moving, gradients, strict=True):
            assert np.isfinite(gradient).all(), (name, i)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["dense", "tpu-nan"])
def test_rank_gated_rows_without_a_gate_may_hold_anything(name, shared, bad):
    """Everything but the row's own dgates is as with a row of zeros; that is finite."""
    args, dy = gated_inputs(np.random.default_rng(13), 20, 4, 2, 3, 8, 8, "random")
    args[3][5] = 0
    args[1] = args[1][: 1 if shared else None]
    got = []
    for value in (0, bad):
        args[0][5] = value
        got.append(jax.device_get(compiled(form("rank_gated", name))(args, dy)))  # before the arrays change
    for clean, dirty in zip(*got, strict=True):
        np.testing.assert_array_equal(dirty, clean)  # dgates of a row of zeros are 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["reference", "tiled", "tpu-nan"])
def test_grouped_lora_does_not_read_what_is_not_used(name, shared, bad):
    args, dy = grouped_inputs(np.random.default_rng(13), 20, 4, 2, 3, 8, 8, "padded")
    args[3][5] = 4
    args[1] = args[1][: 1 if shared else None]
    got = []
    for value in (0, bad):
        args[0][5] = value
        args[4][args[3] == 4] = value
        got.append(jax.device_get(compiled(form("grouped_lora", name))(args, dy)))  # before the arrays change
    for clean, dirty in zip(*got, strict=True):
        np.testing.assert_array_equal(dirty, clean)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["reference", "dense", "tiled", "tpu-nan"])
def test_routed_ffn_does_not_read_what_is_not_used(name, bad):
    """Unused slots, and g and u of a row without experts and without a base; not so for the reference's g."""
    args, cotangents = ffn_inputs(np.random.default_rng(13), 20, 4, 2, 3, 0, 24, "padded")
    args[7][5], args[9][5] = 4, 0
    unused = args[7] == 4
    got = []
    for value in (0, bad):
        for part in (args[2], args[3], args[8], cotangents[1]):
            part[unused] = value
        if name != "reference":
            args[0][5], args[1][5] = value, value
        got.append(jax.device_get(compiled(form("routed_ffn", name))(args, cotangents)))  # before the arrays change
    for clean, dirty in zip(*got, strict=True):
        np.testing.assert_array_equal(dirty, clean)


@pytest.mark.parametrize("op", OPS)
def test_every_form_returns_the_dtype_of_x(op):
    args, _ = OPS[op][2](np.random.default_rng(13), 6, 4, 2, 3, 8, 8, "random")
    wide = 4 if op == "routed_ffn" else 1
    args = [jnp.asarray(a, jnp.bfloat16) if i < wide else jnp.asarray(a) for i, a in enumerate(args)]
    for name in ("reference", *OPS[op][3], "tpu-plain"):
        for out in jax.tree.leaves(jax.eval_shape(form(op, name), *args)):
            assert out.dtype == jnp.bfloat16, name


@pytest.mark.parametrize("op, name", [pair for pair in PAIRS if pair[1] != "tpu-plain"])
def test_an_expert_without_tokens_has_a_gradient_of_exactly_zero(op, name):
    args, cotangents = OPS[op][2](np.random.default_rng(8), 40, 6, 2, 3, 8, 8, "empty")  # nobody picks expert 3
    factors = (4, 5, 6) if op == "routed_ffn" else (1, 2)

    moving = [i for i, a in enumerate(args) if np.issubdtype(a.dtype, np.floating)]
    gradients = compiled(form(op, name))(args, cotangents)[-len(moving) :]
    for gradient in (np.asarray(g) for i, g in zip(moving, gradients, strict=True) if i in factors):
        assert (gradient[3] == 0).all() and (gradient[2] != 0).any()


def test_cost_of_tiles_follows_k_and_not_e():
    """The loop's trips: slots in use over rows of a tile, and at most one more an expert that has any."""
    idx, _ = decision(np.random.default_rng(9), 512, 128, 2, "random")
    rows = tiles.rows_per_tile(1024, 128)
    plan = jax.jit(tiles.plan, static_argnums=1)
    assert rows == 8 and int(plan(idx, 128).count) <= 1024 // rows + 128
    assert tiles.rows_per_tile(1024, 8) == 32 and tiles.rows_per_tile(2, 8) == 1


def test_no_f_wide_array_of_all_slots():
    """Neither `[T, K, F]` nor `[T*K, F]` in the program of the routed FFN, forward or backward."""
    T, K, F = 64, 2, 48
    args, cotangents = ffn_inputs(np.random.default_rng(10), T, 8, K, 4, 0, F, "random")
    for function in (routed_ffn, functools.partial(ffn_tiled.routed_ffn, rows=8)):
        pull = lambda *a, f=function: jax.vjp(lambda g, *r: f(g, *a[1:7], *a[7:]), *a[:1])[1](cotangents)  # noqa: E731
        text = jax.jit(pull).lower(*args).as_text()
        assert f"tensor<{T}x{K}x{F}x" not in text and f"tensor<{T * K}x{F}x" not in text


def test_the_choice_and_its_reason():
    shape = jax.ShapeDtypeStruct
    g, B, idx = shape((512, 1536), jnp.float32), shape((8, 16, 1536), jnp.float32), shape((512, 2), jnp.int32)
    name, why = ffn_api.choose(g, B, idx, platform="cpu")
    assert name == "tiled" and "128 columns" in why
    assert ffn_api.choose(g, B, shape((512, 8), jnp.int32), platform="cpu")[0] == "tiled"
    assert ffn_api.choose(g, shape((1, 64, 1536), jnp.float32), idx, platform="cpu")[0] == "dense"
    assert ffn_api.choose(g, B, idx, platform="cuda")[0] == "dense"
    name, why = low_rank_op(8, 16, 2, platform="cpu")
    assert name == "grouped_lora" and "128" in why
    assert low_rank_op(8, 8, 2, platform="cpu")[0] == "rank_gated"
    assert low_rank_op(8, 16, None)[0] == low_rank_op(8, 16, 8)[0] == "rank_gated"
    for kind, threshold in {"TPU v5 lite": 1321, "TPU v6 lite": 3079, "TPU v5": 911}.items():
        for columns, expected in ((threshold - 9, "rank_gated"), (threshold + 9, "grouped_lora")):
            name, why = low_rank_op(columns, 1, 2, platform="tpu", device_kind=kind)
            assert name == expected, why
    name, why = low_rank_op(128, 16, 2, platform="cuda")
    assert name == "rank_gated" and "measured" in why
    for platform in ("tpu", "gpu"):
        assert low_rank_op(8, 16, 2, platform=platform, threshold=100)[0] == "grouped_lora"


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x, A, i, w: rank_gated(x, A, A, w, implementation="tiled"), "grouped_lora"),
        (lambda x, A, i, w: rank_gated(x, A, A, w, implementation="tpu"), "program is for cpu"),
        (lambda x, A, i, w: grouped_lora(x, A, A, i, w, implementation="dense"), "rank_gated"),
        (lambda x, A, i, w: grouped_lora(x, A, A, i, w, implementation="fast"), "no implementation 'fast'"),
        (lambda x, A, i, w: grouped_lora(x, A, A, i, w, implementation=""), "no implementation ''"),
        (lambda x, A, i, w: grouped_lora(x, A, A, i, w, platform="xpu"), "platform 'xpu' is not known.*tpu"),
        (
            lambda x, A, i, w: grouped_lora(x, A, A, i, w, platform="tpu", implementation="tpu"),
            "grouped_lora.*this program is for cpu.*tiled",
        ),
        (
            lambda x, A, i, w: rank_gated(x, A, A, w, platform="tpu", implementation="tpu"),
            "rank_gated.*this program is for cpu.*dense",
        ),
    ],
)
def test_a_form_that_an_op_lacks_is_refused_with_the_reason(call, words):
    x, A = jnp.ones((4, 8)), jnp.ones((2, 3, 8))
    with pytest.raises(ValueError, match=words):
        call(x, A, jnp.zeros((4, 2), jnp.int32), jnp.ones((4, 2)))


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(implementation="fast"), "no implementation 'fast'.*dense, tiled, tpu"),
        (dict(implementation=""), "no implementation ''"),
        (dict(implementation="tpu"), "this program is for cpu.*dense"),
        (dict(implementation="tpu", platform="tpu"), "this program is for cpu.*jax.set_mesh"),
        (dict(platform="xpu", implementation="dense"), "platform 'xpu' is not known.*cpu"),
        (dict(activation="mish"), "activation 'mish'.*silu, gelu"),
    ],
)
def test_routed_ffn_refuses_with_the_reason(how, words):
    args, _ = ffn_inputs(np.random.default_rng(12), 6, 4, 2, 3, 0, 8, "random")
    with pytest.raises(ValueError, match=f"{'' if 'platform' in words else 'routed_ffn.*'}{words}"):
        routed_ffn(*args, **how)


@pytest.mark.parametrize("op", OPS)
def test_an_explicit_kernel_that_cannot_serve_is_refused_with_that_reason(op, monkeypatch):
    monkeypatch.setattr("kernels_pallas.pick.platform_of", lambda platform=None: "tpu")  # eight devices, no mesh
    args, _ = OPS[op][2](np.random.default_rng(12), 6, 4, 2, 3, 8, 8, "random")
    with pytest.raises(
        ValueError, match=f"{op}.*'tpu' cannot serve here.*only shard_map splits a kernel.*Use reference"
    ):
        getattr(kernels_pallas, op)(*args, implementation="tpu")


# By position: what an op is given instead of the right array, and what the error names. T 6, E 4, K 2, R 3, widths 8.
WRONG = {
    "rank_gated": [
        (0, (7, 8), "gates has shape .6, 4., expected .T, E.: its T is 6, but x's is 7"),
        (1, (2, 3, 8), "A has shape .2, 3, 8.*its E is 2, but B's is 4"),
        (1, (4, 2, 8), "its R is 2"),
        (1, (4, 3, 9), "its D_in is 9, but x's is 8"),
        (3, (6, 1), "gates.*its E is 1, but B's is 4"),
        (0, (2, 3, 8), "x has shape .2, 3, 8., expected .T, D_in.. Reshape"),
    ],
    "grouped_lora": [
        (1, (2, 3, 8), "A.*its E is 2, but B's is 4.*or one A for all"),
        (2, (2, 3, 8), "A.*its E is 4, but B's is 2"),
        (2, (4, 2, 8), "its R is 3, but B's is 2"),
        (3, (5, 2), "idx.*its T is 5, but x's is 6"),
        (3, (6, 2), "idx is float32, expected integers"),
        (3, (6, 0), "its K is 0"),
        (4, (6, 4), "gates.*its K is 4, but idx's is 2"),
    ],
    "routed_ffn": [
        (1, (6, 9), "u.*its F is 9"),
        (2, (6, 1, 3), "z_g.*its K is 1, but idx's is 2"),
        (3, (6, 2, 2), "z_u.*its R is 2, but z_g's is 3"),
        (5, (2, 3, 8), "B_u.*its E is 2, but B_g's is 4"),
        (6, (2, 3, 8), "A_d.*its E is 2"),
        (7, (6, 2), "idx is float32"),
        (8, (6, 4), "gates.*its K is 4, but idx's is 2"),
        (9, (1,), "base.*its T is 1, but g's is 6"),
    ],
}


@pytest.mark.parametrize("op, at, shape, words", [(op, *case) for op, cases in WRONG.items() for case in cases])
def test_arrays_that_do_not_agree_are_refused(op, at, shape, words):
    args, _ = OPS[op][2](np.random.default_rng(12), 6, 4, 2, 3, 8, 8, "random")
    args[at] = np.ones(shape, np.float32)
    with pytest.raises(ValueError, match=f"^{op}: .*{words}"):
        getattr(kernels_pallas, op)(*args)


@pytest.mark.parametrize("op", OPS)
def test_no_rows_give_no_rows_and_gradients_of_zero(op):
    args, cotangents = OPS[op][2](np.random.default_rng(12), 0, 4, 2, 3, 8, 8, "random")
    for name in (None, *OPS[op][3], "reference"):
        function = functools.partial(getattr(kernels_pallas, op), implementation=name)
        got = compiled(function)(args, cotangents)
        wanted = compiled(form(op, "reference"))(args, cotangents)
        for a, b in zip(got, wanted, strict=True):
            assert a.shape == b.shape and not np.any(a)


def test_the_halves_of_grouped_lora_check_too():
    z, A, idx, w = jnp.ones((6, 2, 3)), jnp.ones((4, 3, 8)), jnp.zeros((6, 2), jnp.int32), jnp.ones((6, 2))
    with pytest.raises(ValueError, match="grouped_shrink: A.*its D is 8, but x's is 9"):
        grouped_shrink(jnp.ones((6, 9)), A, idx)
    with pytest.raises(ValueError, match="grouped_expand: gates.*its K is 1"):
        grouped_expand(z, A, idx, w[:, :1], dtype=z.dtype)
    assert grouped_shrink(jnp.ones((0, 8)), A, idx[:0]).shape == (0, 2, 3)
    assert grouped_expand(z[:0], A, idx[:0], w[:0], dtype=z.dtype).shape == (0, 8)


def test_a_kernel_that_does_not_fit_says_so():
    with pytest.raises(ValueError, match="MiB of VMEM"):
        gated_tpu.rows_that_fit(512, 1 << 16, 512, 4096, 4096, 2, True, "TPU v5 lite")


def test_on_eight_devices_the_compiler_may_split_the_rows():
    """Rows sharded by the compiler, no mesh in context: slower, but the same value."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    args, _ = grouped_inputs(np.random.default_rng(11), 64, 8, 2, 4, 16, 24, "random")
    wanted = np.asarray(jax.jit(grouped_lora)(*args))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    split = [jax.device_put(a, rows) for a in args]
    np.testing.assert_allclose(jax.jit(grouped_lora)(*split), wanted, rtol=1e-5, atol=1e-5)
    with jax.set_mesh(mesh):
        assert low_rank_op(8, 16, 2)[0] == "rank_gated"


def test_public_names():
    assert set(kernels_pallas.__all__) >= {"grouped_lora", "rank_gated", "routed_ffn", "low_rank_op"}

"""The TPU kernels through the real Mosaic compiler, forward and backward, for chips that this machine does not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.grouped_lora import shapes as grouped_shapes
from kernels_pallas.grouped_lora import tpu as grouped
from kernels_pallas.moe_ffn import ragged
from kernels_pallas.mosaic import MIB, vmem_bytes
from kernels_pallas.rank_gated import shapes as gated_shapes
from kernels_pallas.rank_gated import tpu as gated
from kernels_pallas.routed_ffn import shapes as ffn_shapes
from kernels_pallas.routed_ffn import tpu as ffn
from tests import tpu

pytestmark = pytest.mark.slow


@pytest.fixture(params=tpu.TOPOLOGIES)
def chip(request, without_cache):
    return tpu.devices(request.param)[0]


def compiled(chip, function, arguments, wide):
    """Compiles value and gradients for one device of the topology; returns the executable."""
    sharding = NamedSharding(Mesh(np.array([chip]), ("x",)), PartitionSpec())
    structs = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in arguments]

    def both(*args):
        value, pull = jax.vjp(lambda *some: function(*some, *args[wide:]), *args[:wide])
        return value, pull(jax.tree.map(jnp.ones_like, value))

    return jax.jit(both).lower(*structs).compile()


TOO_LARGE = "llama-3-8b gate, 16 experts"  # the sums of dA and dB alone are 38 MiB: refused on chips with 64
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def cases(shapes):
    """Every shape in bfloat16; float32, whose exact products take the compiler a minute, at two of them."""
    return [(name, dtype) for i, name in enumerate(shapes) for dtype in DTYPES if dtype == "bfloat16" or i in (0, 5)]


@pytest.mark.parametrize("name, dtype", cases(gated_shapes.SHAPES))
def test_rank_gated(chip, name, dtype):
    s, dtype = gated_shapes.SHAPES[name], DTYPES[dtype]
    T, E, R = s["T"], s["E"], s["R"]
    arguments = [((T, s["D_in"]), dtype), ((E, R, s["D_in"]), jnp.float32), ((E, R, s["D_out"]), jnp.float32)]
    arguments += [((T, E), jnp.float32)]
    compile_it = lambda: compiled(  # noqa: E731
        chip, lambda *a: gated.rank_gated(*a, device_kind=chip.device_kind), arguments, 4
    )
    if name == TOO_LARGE and vmem_bytes(chip.device_kind) == 64 * MIB:
        with pytest.raises(ValueError, match="MiB of VMEM"):
            compile_it()
    else:
        compile_it()


@pytest.mark.parametrize("name, dtype", cases(grouped_shapes.SHAPES))
def test_grouped_lora(chip, name, dtype):
    s, dtype = grouped_shapes.SHAPES[name], DTYPES[dtype]
    T, E, R, K = s["T"], s["E"], s["R"], s["K"]
    arguments = [((T, s["D_in"]), dtype), ((E, R, s["D_in"]), jnp.float32), ((E, R, s["D_out"]), jnp.float32)]
    arguments += [((T, K), jnp.float32), ((T, K), jnp.int32)]

    def op(x, A, B, gates, idx):
        return grouped.grouped_lora(x, A, B, idx, gates, device_kind=chip.device_kind)

    compiled(chip, op, arguments, 4)


@pytest.mark.parametrize("name, dtype", cases(ffn_shapes.SHAPES))
def test_routed_ffn(chip, name, dtype):
    s, dtype = ffn_shapes.SHAPES[name], DTYPES[dtype]
    T, F, E, R, K = s["T"], s["F"], s["E"], s["R"], s["K"]
    arguments = [((T, F), dtype)] * 2 + [((T, K, R), dtype)] * 2 + [((E, R, F), jnp.float32)] * 3
    arguments += [((T, K), jnp.float32), ((T,), jnp.float32), ((T, K), jnp.int32)]

    def op(g, u, z_g, z_u, B_g, B_u, A_d, gates, base, idx):
        return ffn.routed_ffn(g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base, device_kind=chip.device_kind)

    compiled(chip, op, arguments, 9)


def test_moe_ffn_multiplies_a_slot_with_its_own_expert_only(chip):
    """`jax.lax.ragged_dot` written out would cost E products a slot; the hidden states are formed twice, no more."""
    T, D, F, E, K, R, half = 512, 256, 512, 16, 2, 8, jnp.bfloat16
    arguments = [((T, D), half), ((T, K), jnp.float32), *[((T, K, R), half)] * 2, *[((E, R, F), jnp.float32)] * 3]
    arguments += [((E, D, F), half), ((E, D, F), half), ((E, F, D), half), ((T, K), jnp.int32)]

    def op(x, gates, z_g, z_u, B_g, B_u, A_d, *frozen):
        *kernels, idx = frozen
        return ragged.moe_ffn(x, *kernels, (z_g, z_u, B_g, B_u, A_d), idx, gates)

    flops = compiled(chip, op, arguments, 7).cost_analysis()["flops"]
    assert 9 <= flops / (2 * T * K * D * F) <= 14  # forward, again, and for x: three products each

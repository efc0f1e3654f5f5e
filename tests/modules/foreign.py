"""Models that are not ours: attention and Dense layers, a scanned and a checkpointed stack, kernels of other kinds."""

import flax.linen as nn
import jax.numpy as jnp

import molora_jax as mj

AXES = dict(params=0, adapters=0, router_state=0, frozen=0, routing=0)


class Block(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        h = nn.relu(nn.Dense(12, name="up")(x))
        return x + nn.Dense(self.width, name="down", use_bias=False)(h), None


class Stacked(nn.Module):
    """`layers` blocks: called one by one, or in an nn.scan with these `variable_axes`."""

    axes: dict | None = None
    remat: bool = False
    layers: int = 2
    split: tuple = ("params", "dropout")

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        if self.axes is None:
            for i in range(self.layers):
                x, _ = block(name=f"layers_{i}")(x, None)
            return nn.Dense(4, name="head")(x)
        split = {name: True for name in self.split}
        x, _ = nn.scan(block, variable_axes=dict(self.axes), split_rngs=split, length=self.layers)(name="layers")(
            x, None
        )
        return nn.Dense(4, name="head")(x)


class Odd(nn.Module):
    """Kernels that attach cannot reach, a Dense that is called twice, a Dense in a lifted transform of its own."""

    def setup(self):
        self.twice = nn.Dense(8)
        self.lifted = nn.remat(nn.Dense)(8)
        self.mixed = nn.Einsum((8, 8), "...d,de->...e")
        self.raw = self.param("raw", nn.initializers.lecun_normal(), (8, 8))

    def __call__(self, x):
        return self.encode(self.twice(self.lifted(x)))

    def encode(self, x):
        return self.mixed(self.twice(x)) + x @ self.raw


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(nn.Dense)(8, name="up")(x)


class Masked(nn.Module):
    """Its call has a padding mask and a switch of its own."""

    @nn.compact
    def __call__(self, x, mask, deterministic=True):
        x = nn.Dense(8, name="up")(x)
        return jnp.where(mask[..., None], nn.Dropout(0.5)(x, deterministic=deterministic), 0.0)


class OwnBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        W = self.param("W", nn.initializers.lecun_normal(), (8, 8))
        return x + mj.RoutedLoRA(8, 4, mj.Lora(rank=2), mj.SoftmaxTopK(k=2))(x, kernel=W), None


class Own(nn.Module):
    """A model that was written with a layer of the library in it."""

    axes: tuple

    @nn.compact
    def __call__(self, x):
        axes = dict.fromkeys(self.axes, 0)
        scan = nn.scan(OwnBlock, variable_axes=axes, split_rngs={"params": True}, length=2)
        return scan(name="layers")(x, None)[0]

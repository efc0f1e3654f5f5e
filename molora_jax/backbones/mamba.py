"""Mamba: a decoder of selective state-space blocks, without attention, positions or a feed-forward part.

    x <- x + out_proj(y silu(z)),     [u; z] = in_proj norm(x),     u <- silu(conv(u))
    [r; B; C] = x_proj u,   dt = softplus(dt_proj r),   A = -exp(A_log)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,    y_t = C_t h_t + D u_t              h [I, N], 0 where an example begins

    embed [V, D]   final_norm [D]   head [D, V] (absent when tied)   blocks/norm [L, D]
    blocks/{in_proj, x_proj, dt_proj, out_proj}/kernel [L, D_in, D_out]   and /bias [L, D_out] of dt_proj (and others)
    blocks/conv/{kernel [L, I, 1, K], bias [L, I]}   blocks/A_log [L, I, N]   blocks/skip [L, I] (D)

The four projections are the sites; that of in_proj is the fused u and z. `share="attn"` is the normed input of a block.
The convolution (of K tokens, each channel by itself) and the state begin anew with each example of a packed row;
padding leaves both as they are. A cache holds the last K - 1 inputs of the convolution and the state, whatever the
text's length. Falcon-Mamba norms r, B and C (`inner_eps`).
Gu & Dao 2023, arXiv 2312.00752; Zuo et al. 2024, arXiv 2410.05355.
B rows, S positions, D width, I inner width, N size of the state, K taps of the convolution, L layers, V vocabulary.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from molora_jax.backbones import hf_fields
from molora_jax.backbones.attention import rms_norm
from molora_jax.backbones.base import TABLES, WHOLE, Backbone, Leaf, Stack, projection
from molora_jax.backbones.llama import weights_of
from molora_jax.config.fields import SSM
from molora_jax.core.types import Array
from molora_jax.errors import InputError

AT = "backbone.layers.{}."
CHUNK = 16  # positions whose states are in memory at a time: the backward pass forms them anew from each chunk's first
UNLIMITED = 1 << 20  # tokens: no position is learnt, and the cache does not grow
NO_ATTENTION = f"This base has no attention and no feed-forward part: name {', '.join(SSM)}."


@dataclasses.dataclass(frozen=True)
class Mamba(Backbone):
    """`D = width`, `I = inner`, `N = state`, `K = taps`; `rank` is the inner width of dt.

    `inner_eps`: of the norms of r, B and C, 0 for none. `residual32`: x is float32 whatever the weights are.
    """

    family: str
    layers: int
    width: int
    inner: int
    state: int
    rank: int
    taps: int
    vocab: int
    context: int
    norm_eps: float
    tied: bool
    inner_eps: float = 0.0
    residual32: bool = True
    bias: bool = False  # of in_proj and out_proj
    conv_bias: bool = True

    ABSENT: ClassVar[dict[str, str]] = {
        "experts": Backbone.ABSENT["experts"],
        **dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down", "ffn"), NO_ATTENTION),
    }
    IGNORED: ClassVar[tuple[str, ...]] = ()

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return (Stack("blocks", 0, self.layers, SSM),)

    def dims(self, site: str) -> tuple[int, int]:
        d, i, r = self.width, self.inner, self.rank
        return dict(in_proj=(d, 2 * i), x_proj=(i, r + 2 * self.state), dt_proj=(r, i), out_proj=(i, d))[site]

    def biased(self, site: str) -> bool:
        return site == "dt_proj" or self.bias and site in ("in_proj", "out_proj")

    def shapes(self) -> dict[str, Leaf]:
        L, table = self.layers, (self.vocab, self.width)
        out = {"embed": Leaf(table, tuple(P(v, d) for v, d in TABLES), "backbone.embeddings.weight", scale=0.02)}
        out["final_norm"] = Leaf((self.width,), WHOLE, "backbone.norm_f.weight")
        if not self.tied:
            specs = tuple(P(d, v) for v, d in TABLES)
            out["head"] = Leaf(table[::-1], specs, "lm_head.weight", turned=True, scale=0.02)
        out["blocks/norm"] = Leaf((L, self.width), WHOLE, f"{AT}norm.weight", 1)
        for site in self.sites:
            (d_in, d_out), name, inward = self.dims(site), f"{AT}mixer.{site}", site in ("x_proj", "out_proj")
            kernel = projection(L, d_in, d_out, name, inward=site == "out_proj")
            # the narrow width, of dt's rank and the states, divides by nothing in particular
            narrow = {"x_proj": P(None, "tensor", None), "dt_proj": P(None, None, "tensor")}
            wide = P(None, "tensor", "fsdp") if inward else P(None, "fsdp", "tensor")
            specs = (wide, narrow[site]) if site in narrow else (wide,)
            out[f"blocks/{site}/kernel"] = dataclasses.replace(kernel, specs=specs)
            if self.biased(site):  # of dt: softplus(-2) = 0.13
                specs, fill = WHOLE if inward else (P(None, "tensor"),), -2.0 if site == "dt_proj" else 0.0
                out[f"blocks/{site}/bias"] = Leaf((L, d_out), specs, f"{name}.bias", 1, fill=fill)
        of = lambda shape, name, **values: Leaf((L, *shape), WHOLE, f"{AT}mixer.{name}", 1, **values)  # noqa: E731
        out["blocks/conv/kernel"] = of((self.inner, 1, self.taps), "conv1d.weight", scale=self.taps**-0.5)
        if self.conv_bias:
            out["blocks/conv/bias"] = of((self.inner,), "conv1d.bias", fill=0.0)
        out["blocks/A_log"] = of((self.inner, self.state), "A_log", scale=1.0)
        out["blocks/skip"] = of((self.inner,), "D")
        return out

    def embed(self, params, batch):
        x = super().embed(params, batch)
        return x.astype(jnp.float32) if self.residual32 else x

    def norm(self, params, x):
        return rms_norm(x.astype(params["final_norm"].dtype), params["final_norm"], self.norm_eps)

    def mask(self, segment_ids):
        """Where an example begins, `[B, 1, S, 1]`: nothing sees another token but by the state."""
        before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
        return (segment_ids != before)[:, None, :, None]

    def once(self, positions, mask, *, cached, segment_ids=None):
        """A cache holds one text a row, whose state is 0 at first."""
        return {"begins": jnp.zeros(positions.shape, bool) if cached else mask[:, 0, :, 0]}

    def block(self, p, x, at, adapt, cache):
        weights, begins = weights_of(p, self.sites), at.once["begins"]
        tail, state = self._empty(len(x), x.dtype) if cache is None else cache.state
        with jax.named_scope("mixer"):
            h = rms_norm(x.astype(weights["in_proj"][0].dtype), p["norm"], self.norm_eps)
            adapt.enter("attn", h)
            u, z = jnp.split(adapt.project("in_proj", *weights["in_proj"], h), 2, axis=-1)
            with jax.named_scope("conv"):
                inputs = jnp.concatenate([tail.astype(u.dtype), u], axis=1)
                u = jax.nn.silu(convolved(inputs, p["conv"]["kernel"], p["conv"].get("bias"), begins))
            low, B, C = jnp.split(
                adapt.project("x_proj", *weights["x_proj"], u), (self.rank, self.rank + self.state), axis=-1
            )
            low, B, C = (self._normed(y) for y in (low, B, C))
            dt = jax.nn.softplus(adapt.project("dt_proj", *weights["dt_proj"], low).astype(jnp.float32))
            with jax.named_scope("scan"):
                u, dt, B, C = (jnp.where(at.valid[..., None], value, 0) for value in (u, dt, B, C))  # dt 0: h stays
                y, state = scanned(u, dt, p["A_log"], B, C, begins, state)
                y = (y + p["skip"].astype(jnp.float32) * u) * jax.nn.silu(z.astype(jnp.float32))
            if cache is not None:
                cache = cache.replaced(latest(inputs, at.valid, self.taps - 1), state)
            change = adapt.project("out_proj", *weights["out_proj"], y.astype(h.dtype))
        return x + change.astype(x.dtype), cache

    def _normed(self, y):
        return rms_norm(y, jnp.ones(y.shape[-1:]), self.inner_eps) if self.inner_eps else y

    def _empty(self, rows, dtype):
        tail = jnp.zeros((rows, self.taps - 1, self.inner), dtype)
        return tail, jnp.zeros((rows, self.inner, self.state), jnp.float32)

    def init_cache(self, rows, slots, dtype):
        """Inputs of the convolution `[L, rows, K - 1, I]` and states `[L, rows, I, N]`; `slots` are not needed."""
        return tuple(jnp.broadcast_to(x, (self.layers, *x.shape)) for x in self._empty(rows, dtype))


def convolved(inputs: Array, kernel: Array, bias: Array | None, begins: Array) -> Array:
    """A causal convolution of each channel that reads no other example.

    `inputs [B, K - 1 + S, I]`, the first of them from before; `kernel [I, 1, K]`; `begins [B, S]` -> `[B, S, I]`.
    """
    K, S = kernel.shape[-1], begins.shape[1]
    example = jnp.cumsum(begins, axis=1)
    before = jnp.pad(example, ((0, 0), (K - 1, 0)))  # nothing has begun: what a cache holds is the same text
    out = 0.0 if bias is None else bias.astype(jnp.float32)
    for back in range(K):
        here = slice(K - 1 - back, K - 1 - back + S)
        own = (before[:, here] == example)[..., None]
        out = out + jnp.where(own, inputs[:, here], 0) * kernel[:, 0, K - 1 - back].astype(jnp.float32)
    return out.astype(inputs.dtype)


def scanned(u: Array, dt: Array, A_log: Array, B: Array, C: Array, begins: Array, state: Array):
    """The selective scan, in float32: `(y [B, S, I], the state after the last position [B, I, N])`.

    `u, dt [B, S, I]`, dt 0 where the state stays as it is; `A_log [I, N]`; `B, C [B, S, N]`; `begins [B, S]`;
    `state [B, I, N]` before the first position.
    """
    S, A = u.shape[1], -jnp.exp(A_log.astype(jnp.float32))
    size = min(CHUNK, S)
    extra = -S % size

    def chunks(x):
        x = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(state, xs):
        u, dt, B, C, begins = xs
        keep = jnp.where(begins[..., None, None], 0.0, jnp.exp(dt[..., None] * A))  # [B, size, I, N]
        add = (dt * u)[..., None] * B[:, :, None]
        keep, add = jax.lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (keep, add), axis=1)
        states = keep * state[:, None] + add
        return states[:, -1], jnp.sum(states * C[:, :, None], axis=-1)  # a product would be rounded on a GPU or TPU

    wide = (x.astype(jnp.float32) for x in (u, dt, B, C))
    state, y = jax.lax.scan(chunk, state, tuple(chunks(x) for x in (*wide, begins)))
    return jnp.moveaxis(y, 0, 1).reshape(len(u), -1, u.shape[-1])[:, :S], state


def latest(inputs: Array, valid: Array, count: int) -> Array:
    """The last `count` of `inputs [B, count + S, I]` up to each row's last valid position: `[B, count, I]`.

    `valid [B, S]`: valid positions come first.
    """
    at = jnp.sum(valid, axis=1)[:, None] + jnp.arange(count)
    return jnp.take_along_axis(inputs, at[..., None], axis=1)


READS = (
    "state_size", "layer_norm_epsilon", "expand", "conv_kernel", "use_bias", "use_conv_bias", "residual_in_fp32",
    "time_step_rank", "mixer_rms_eps",
    # of a start, of a way to compute, or of the authors' own code: nothing here depends on them
    "time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme", "time_step_floor",
    "rescale_prenorm_residual", "use_mambapy", "use_falcon_mambapy", "use_associative_scan", "fused_add_norm",
    "rms_norm", "ssm_cfg", "d_model", "d_inner", "n_layer", "pad_vocab_size_multiple",
)  # fmt: skip


def read(config: dict, *, family: str, where: str, number, activation: str) -> Mamba:
    """From a Hugging Face `config.json` of `model_type` `family`; `number` as in `hf_config`."""
    width, rank = number("hidden_size"), config.get("time_step_rank", "auto")
    flags = dict(use_bias=False, use_conv_bias=True, residual_in_fp32=True, tie_word_embeddings=True)
    flags = {name: config.get(name, default) for name, default in flags.items()}
    inner = number("intermediate_size", number("expand", 2) * width)
    wrong = {
        "hidden_act": (activation, "silu", activation == "silu"),
        **{name: (value, "true or false", isinstance(value, bool)) for name, value in flags.items()},
    }
    for name, (got, expected, fine) in wrong.items():
        if not fine:
            raise InputError(f"{where}: {name}", got=hf_fields.shown(got), expected=expected)
    return Mamba(
        family=family, layers=number("num_hidden_layers"), width=width, inner=inner,
        state=number("state_size", 16), rank=-(-width // 16) if rank == "auto" else number("time_step_rank"),
        taps=number("conv_kernel", 4), vocab=number("vocab_size"),
        context=number("max_position_embeddings", UNLIMITED), tied=flags["tie_word_embeddings"],
        norm_eps=number("layer_norm_epsilon", 1e-5, kind=float), bias=flags["use_bias"],
        inner_eps=number("mixer_rms_eps", 1e-6, kind=float) if family == "falcon_mamba" else 0.0,
        residual32=flags["residual_in_fp32"], conv_bias=flags["use_conv_bias"],
    )  # fmt: skip


def written(backbone: Mamba) -> dict:
    """The `config.json` that `read` and transformers read as this backbone."""
    out = {
        "model_type": backbone.family, "num_hidden_layers": backbone.layers, "hidden_size": backbone.width,
        "intermediate_size": backbone.inner, "state_size": backbone.state, "time_step_rank": backbone.rank,
        "conv_kernel": backbone.taps, "vocab_size": backbone.vocab, "layer_norm_epsilon": backbone.norm_eps,
        "tie_word_embeddings": backbone.tied, "use_bias": backbone.bias, "use_conv_bias": backbone.conv_bias,
        "residual_in_fp32": backbone.residual32, "max_position_embeddings": backbone.context, "hidden_act": "silu",
        "architectures": ["FalconMambaForCausalLM" if backbone.inner_eps else "MambaForCausalLM"],
    }  # fmt: skip
    if backbone.inner % backbone.width == 0:
        out["expand"] = backbone.inner // backbone.width
    return out | ({"mixer_rms_eps": backbone.inner_eps} if backbone.inner_eps else {})

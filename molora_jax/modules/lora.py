"""`RoutedLoRA`: experts of one linear layer, over a kernel that is the caller's.

    y = W x + b + s sum_e g_e B_e A_e x            (the placement `projection`)

    adapters/{A [E, R, D_in], B [E, R, D_out]}   adapters/router/W [E, D_in]   router_state/...   routing/experts

B batch, S sequence, D width, E experts, R rank.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from molora_jax import engines
from molora_jax.adapters import Lora
from molora_jax.config.fields import wrong
from molora_jax.core import lowrank
from molora_jax.core.types import Array, Site
from molora_jax.engines import ALONE
from molora_jax.modules.members import Made, made
from molora_jax.modules.routed import Routed, batched, batched_valid, check_arrays, floating, serves
from molora_jax.placements import Projection, projection

SITE = "dense"


@dataclasses.dataclass(frozen=True)
class Given(projection.Linear):
    """A projection whose frozen product `y [T, D_out]` (with its `bias`) is there: the caller's layer made it.

    `W` is there only where experts scale the input, for the product of what they change.
    """

    def axes(self):
        return super().axes() | {"y": projection.Axes(("tokens", "out"), self.site)}

    def start(self, arrays, parts, at):
        y, bias = arrays["y"], arrays.get("bias")
        for change in (part.scales(arrays["x"]) for part in parts):
            y = y if change is None else y + lowrank.frozen_linear(arrays["W"], change)
        return arrays | {"base": y if bias is None else y - bias.astype(y.dtype)}, y

    def end(self, arrays, y):
        return y


class RoutedLoRA(Routed):
    """A linear layer `[..., D_in] -> [..., features]` with a mixture of LoRA experts over the caller's kernel.

    Called as `layer.apply(variables, x, kernel=W)`; gives y alone, or with `mutable=["routing"]` `(y, sown)`. With
    B = 0, as it starts, y is `x @ W + bias`.

    Attributes:
      features: D_out.
      experts: E; 1 without a router.
      adapter, router: members (`mj.Lora(rank=8)`), names, or dicts as in a config; `router=None` is plain LoRA.
      engine: `replicate`, or with a mesh `gather`, `all_to_all`, `ragged_all_to_all`; or an `mj.Engine`.
      mesh: with axes among data, fsdp, expert and tensor.

    Raises:
      InputError: members or shapes that do not go together.

    >>> import jax, molora_jax as mj
    >>> layer = mj.RoutedLoRA(16, experts=4, adapter=mj.Lora(rank=2), router=mj.SoftmaxTopK(k=2))
    >>> x, W = jax.random.normal(jax.random.key(0), (2, 5, 8)), jax.numpy.ones((8, 16))
    >>> variables = layer.init(jax.random.key(1), x, kernel=W)
    >>> sorted(variables["adapters"])
    ['A', 'B', 'router']
    >>> y, sown = layer.apply(variables, x, kernel=W, mutable=["routing"])
    >>> bool((y == x @ W).all()), sown["routing"]["experts"][0].decision.gates.shape
    (True, (2, 5, 4))
    """

    features: int
    experts: int = 1
    adapter: Any = Lora()
    router: Any = None
    engine: Any = "replicate"
    mesh: Any = None

    def __post_init__(self):
        super().__post_init__()
        self.made()

    @nn.nowrap
    def made(self) -> Made:
        where = self.name or "RoutedLoRA"
        return made(where, "projection", (SITE,), self.experts, self.adapter, self.router, self.engine, self.mesh)

    def __call__(self, x: Array, *, kernel: Array, bias: Array | None = None, valid=None, train: bool = False) -> Array:
        """Args:
        x: `[..., D_in]`; a router sees it as `[B, S, D_in]`.
        kernel: `[D_in, features]`; bias: `[features]`.
        valid: bool, of x's leading axes: False at padding, which is not routed and not counted.
        train: dropout and noise are on; needs `rngs={"dropout": key}` where there is any.
        """
        check_arrays(self.module_path(), x=x, kernel=kernel, bias=bias)
        if jnp.shape(kernel) != (x.shape[-1], self.features):
            raise wrong(
                f"{self.module_path()}, kernel", f"shape {jnp.shape(kernel)}",
                f"{(x.shape[-1], self.features)}, the width of x and features",
            )  # fmt: skip
        x = floating(x, kernel)
        part, put = self.part(x, kernel=kernel, valid=valid, train=train)
        flat = x.reshape(-1, x.shape[-1])
        here = self.engine_now() if len(flat) else ALONE
        with jax.named_scope(SITE):
            y, counts = engines.project(here, SITE, kernel, bias, flat, [part] if len(flat) else [])
        put(*counts or [None])
        return y.reshape(*x.shape[:-1], self.features)

    @nn.compact
    def part(self, x: Array, *, kernel: Array, valid=None, train: bool = False):
        """The experts at this input, for `engines.meet`; and what is to be called with the counts that it gives."""
        made, x = self.made(), floating(x, kernel)
        self.reached(made)
        site = Site(SITE, x.shape[-1], self.features, (0,), made.experts, (made.experts,))
        made.adapter.check(f"{self.module_path()}.adapter", (site,))
        leaves, shared = self.leaves(made, {SITE: site}, {SITE: kernel})
        ctx = self.context(made, batched(x), batched_valid(valid, x, self.module_path()), train).replace(site=site)
        routed = self.route(made, site, batched(x), ctx)
        decision = None if routed is None else routed[0]
        placement = Projection()
        part = projection.part(
            made.rule, leaves[SITE], shared, decision, ctx.replace(base=kernel), x.reshape(-1, x.shape[-1]),
            placement=placement,
        )  # fmt: skip
        serves(made.engine, placement, part.factors, self.module_path())
        return part, lambda counts: self.put(made, routed, counts)

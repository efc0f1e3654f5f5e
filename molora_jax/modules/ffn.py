"""`RoutedFFN`: experts that are each a whole gated feed-forward block, over kernels that are the caller's.

    y = W_d [c h_0 + sum_k w_k h_k] + s sum_k w_k B_d A_d h_k            (the placement `ffn`, which says the rest)

    adapters/{gate, up, down}/{A [E, R, D_in], B [E, R, D_out]}   adapters/router/W [E, D]   routing/experts

B batch, S sequence, D width, F FFN width, E experts, R rank.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from molora_jax import engines
from molora_jax.adapters import Lora
from molora_jax.config.fields import did_you_mean, one_of, wrong
from molora_jax.core import rules as rules_lib
from molora_jax.core.types import Array, Site
from molora_jax.modules.members import Made, made
from molora_jax.modules.routed import Routed, batched, batched_valid, check_arrays, floating
from molora_jax.placements import FFN
from molora_jax.placements.ffn import ACTIVATIONS, SITES


class RoutedFFN(Routed):
    """A gated feed-forward block `down(act(gate x) * up x)` with a mixture of experts over the caller's kernels.

    Attributes:
      experts, adapter, router, engine, mesh: as of `RoutedLoRA`.
      activation: `silu`, `gelu`, ... of the block.
      down, shrink: as in a config's rule: `per_expert` for adapters with row factors (DoRA); whether gates that do not
        sum to 1 scale the frozen block too.

    >>> import jax, jax.numpy as jnp, molora_jax as mj
    >>> layer = mj.RoutedFFN(experts=4, adapter=mj.Lora(rank=2), router=mj.SoftmaxTopK(k=2))
    >>> x, W, W_down = jnp.ones((2, 5, 8)), jnp.ones((8, 32)) / 8, jnp.ones((32, 8)) / 32
    >>> variables = layer.init(jax.random.key(0), x, gate=W, up=W, down=W_down)
    >>> y = layer.apply(variables, x, gate=W, up=W, down=W_down)
    >>> bool(jnp.allclose(y, (jax.nn.silu(x @ W) * (x @ W)) @ W_down))
    True
    """

    experts: int = 1
    adapter: Any = Lora()
    router: Any = None
    engine: Any = "replicate"
    mesh: Any = None
    activation: str = "silu"
    down: str = "once"
    shrink: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.made()
        if self.activation not in ACTIVATIONS:
            near = did_you_mean(self.activation, ACTIVATIONS)
            raise wrong(f"{self.name or 'RoutedFFN'}.activation", repr(self.activation), one_of(ACTIVATIONS), near)

    @nn.nowrap
    def made(self) -> Made:
        return made(
            self.name or "RoutedFFN", "ffn", ("ffn",), self.experts, self.adapter, self.router, self.engine, self.mesh,
            self.down, self.shrink,
        )  # fmt: skip

    @nn.compact
    def __call__(
        self, x, *, gate: Array, up: Array, down: Array, biases=None, valid=None, train: bool = False
    ) -> Array:
        """Args:
        x: `[..., D]`; gate, up: `[D, F]`; down: `[F, D]`; biases: `{site: [D_out]}` of those that have one.
        valid, train: as of `RoutedLoRA`.
        """
        made, kernels, biases = self.made(), {"gate": gate, "up": up, "down": down}, dict(biases or {})
        check_arrays(self.module_path(), x=x, **kernels, **{f"biases[{name!r}]": b for name, b in biases.items()})
        x = floating(x, gate)
        self.reached(made)
        sites = self._sites(made, x, kernels)
        leaves, shared = self.leaves(made, sites, kernels)
        ctx = self.context(made, batched(x), batched_valid(valid, x, self.module_path()), train)
        routed = self.route(made, Site("ffn", *[x.shape[-1]] * 2, (0,), made.experts, (made.experts,)), batched(x), ctx)

        def context(name):
            key = ctx.keyed(rules_lib.site_tag(name))
            return ctx.replace(site=sites[name], base=kernels[name], key=key)

        flat, on = x.reshape(-1, x.shape[-1]), self.engine_now()
        if not len(flat):  # no token, nothing to be changed
            self.put(made, routed, None)
            return x
        part = FFN().part(made.rule, "ffn", leaves, shared, None if routed is None else routed[0], context, flat)
        g, u = (engines.project(on, site, kernels[site], biases.get(site), flat, [])[0] for site in ("gate", "up"))
        with jax.named_scope("experts"):
            mix, rest, (counts,) = engines.feed_forward(on, flat, g, u, kernels, [part], self.activation)
        y, _ = engines.project(on, "down", down, biases.get("down"), mix, [], rest)
        self.put(made, routed, counts)
        return y.reshape(x.shape)

    def _sites(self, made, x, kernels) -> dict[str, Site]:
        D, shapes = x.shape[-1], {name: jnp.shape(kernel) for name, kernel in kernels.items()}
        F = shapes["gate"][-1]
        for name, wanted in zip(SITES, ((D, F), (D, F), (F, D)), strict=True):
            if shapes[name] != wanted:
                raise wrong(f"{self.module_path()}, {name}", f"shape {shapes[name]}", f"{wanted} for x of width {D}")
        sites = {name: Site(name, *shapes[name], (0,), made.experts, (made.experts,)) for name in SITES}
        made.adapter.check(f"{self.module_path()}.adapter", tuple(sites.values()))
        return sites

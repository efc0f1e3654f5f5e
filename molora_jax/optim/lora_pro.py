"""LoRA-Pro (Wang et al. 2024, arXiv 2407.18242): A and B move so that s B A follows the whole weight's gradient.

    g~ = s (B a' + b' A)                       the projection of dL/dW on what a step of A and B can do (core/tangent)
    full        u = Adam's direction of g~;  (A, B) step along the pair that moves the weight nearest to u
    efficient   (A, B) step along Adam's direction of (a', b')

Of every layer and expert by itself: A [L, E, R, D_in], B [L, E, R, D_out], s the adapter's scale. `full` is the paper's
method; its moments are as large as the adapted weights, [L, E, D_in, D_out], and lie in shards as those do; `efficient`
has LoRA's memory. Where B is 0 (the first step) a' is 0 and s b' A is g~. Weight decay shrinks s B A, to first order
by `learning_rate * weight_decay`: half of it goes to each factor.

Leaves that are in no pair (routers, heads, DoRA's m, factors of a pair that is frozen in part) move by AdamW. An expert
that no token chose has gradient 0: its moments decay and it goes on by them, as under AdamW. The step clips the
gradients of A and B before they come here. A gradient formed on dropped inputs is followed as it is: it is that of the
weight behind the mask.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from molora_jax.core import tangent
from molora_jax.errors import InputError
from molora_jax.optim.adamw import AdamW
from molora_jax.sharding import CHANGE


@dataclasses.dataclass(frozen=True)
class LoraPro(AdamW):
    """`ridge`: of the inverses of B^T B and A A^T, as a part of their largest eigenvalue."""

    form: Literal["full", "efficient"] = "full"
    ridge: float = 1e-6

    LIMITS: ClassVar = {"ridge": (0, 1e-2, "()")}

    def make(self, total_steps, pairs):
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return optax.chain(self._follow(pairs, adam), optax.scale_by_learning_rate(self.schedule(total_steps)))

    def _follow(self, pairs, adam) -> optax.GradientTransformation:
        """Directions of all leaves from their gradients; `adam` has the moments of g~ or of the new gradients."""

        def init(params):
            params = flatten_dict(params, sep="/")
            own = whole(pairs, params)
            shapes = jax.eval_shape(lambda p: self._seen(p, p, own, spectra_of(p, own)), params)
            return adam.init(unflatten_dict({n: jnp.zeros(x.shape, x.dtype) for n, x in shapes.items()}, sep="/"))

        def update(grads, state, params):
            grads, params = flatten_dict(grads, sep="/"), flatten_dict(params, sep="/")
            own = whole(pairs, params)
            spectra = spectra_of(params, own)
            seen = unflatten_dict(self._seen(grads, params, own, spectra), sep="/")
            made, state = adam.update(seen, state)
            out = flatten_dict(made, sep="/")
            for (A, B), s in own.items() if self.form == "full" else ():
                towards = tangent.gradients(params[A], params[B], out.pop(change_of(A)), s)
                out[A], out[B] = tangent.nearest(params[A], params[B], *towards, s, self.ridge, of=spectra[A, B])
            halves = {leaf for pair in own for leaf in pair}
            decay = {path: self.weight_decay * (0.5 if path in halves else 1.0) for path in out}
            out = {path: u + decay[path] * params[path] if self.weight_decay else u for path, u in out.items()}
            return unflatten_dict({path: out[path] for path in grads}, sep="/"), state

        return optax.GradientTransformation(init, update)

    def _seen(self, grads: dict, params: dict, own: dict, spectra: dict) -> dict:
        """What Adam is given, by path: g~ in the place of a pair, or a' and b'."""
        seen = dict(grads)
        for (A, B), s in own.items():
            X = self._any_X(params[A])
            found = tangent.nearest(params[A], params[B], grads[A], grads[B], s, self.ridge, X, of=spectra[A, B])
            if self.form == "full":
                del seen[A], seen[B]
                seen[change_of(A)] = tangent.moved(params[A], params[B], *found, s)
            else:
                seen[A], seen[B] = found
        return seen

    def _any_X(self, A):
        """g~ is the same for every X; the gradients themselves are not."""
        return jnp.zeros((*A.shape[:-1], A.shape[-2]), jnp.float32) if self.form == "full" else None


def spectra_of(params: dict, own: dict) -> dict:
    """Of every pair, once a step."""
    return {(A, B): tangent.spectra(params[A], params[B]) for A, B in own}


def change_of(A: str) -> str:
    """The path under which the moments of a pair's weight change lie."""
    return f"{A.rpartition('/')[0]}/{CHANGE}"


def whole(pairs: dict, params: dict[str, jax.Array]) -> dict[tuple[str, str], float]:
    """The pairs of which both factors train.

    Raises:
      InputError: there is none, or one whose factors are of other numbers of experts.
    """
    own = {(A, B): s for (A, B), s in pairs.items() if A in params and B in params}
    if not own:
        raise InputError(
            "optim.name", got="'lora_pro' where no A and B of one product both train",
            expected="a rule whose adapter has both", fix="Train both factors, or choose adamw.",
        )  # fmt: skip
    for A, B in own:
        if params[A].shape[:-1] != params[B].shape[:-1]:
            raise InputError(
                "optim.name", got=f"'lora_pro' with {A} {list(params[A].shape)} and {B} {list(params[B].shape)}",
                expected="a pair of its own for every expert", fix="Do not share a factor, or choose adamw.",
            )  # fmt: skip
    return own

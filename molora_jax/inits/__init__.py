"""Where the factors start. The contract is `inits/base.py`."""

from molora_jax.config import outside
from molora_jax.inits import kaiming, pissa
from molora_jax.inits.base import Start
from molora_jax.inits.gaussian import Gaussian
from molora_jax.inits.goat import GoatStart
from molora_jax.inits.lora_ga import GaStart
from molora_jax.inits.lora_sb import SbStart
from molora_jax.inits.lora_xs import XsStart
from molora_jax.inits.orthonormal import Orthonormal

INITS = {
    "kaiming": kaiming.init,
    "pissa": pissa.init,
    "lora_ga": GaStart,
    "lora_xs": XsStart,
    "lora_sb": SbStart,
    "orthonormal": Orthonormal,
    "goat": GoatStart,
    "gaussian": Gaussian,
}


def made(value):
    """A start, to be called: of a name, of `dict(name=..., options)`, or the start itself."""
    if isinstance(value, Start):
        return value
    options = {"name": value} if isinstance(value, str) else dict(value)
    member = outside.member("inits", INITS, options.pop("name"))
    return member(**options) if isinstance(member, type) else member


def needs(start) -> tuple[str, ...]:
    """What a start reads: "base", "base_grad"."""
    return outside.attribute(start, "NEEDS") or ()


def name_of(start: Start) -> str:
    """Of a start with options, as a config calls it."""
    kind = type(start)
    return next((name for name, member in INITS.items() if member is kind), f"{kind.__module__}:{kind.__qualname__}")

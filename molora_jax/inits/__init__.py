"""Where the factors start: `init(key, site, rank, *, scale, base, base_grad) -> {A, B[, A0, B0]}` of one layer."""

from molora_jax.inits import kaiming, pissa

INITS = {"kaiming": kaiming.init, "pissa": pissa.init}

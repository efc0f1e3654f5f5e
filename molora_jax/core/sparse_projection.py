"""A frozen sparse random matrix that follows from a seed, a site and a layer (FlyLoRA, arXiv 2510.08396).

R rows, D width, p entries a row.
"""

import zlib

import jax
import jax.numpy as jnp

from molora_jax.core.types import Array, Site


def rows(seed: int, site: Site, layer: Array | int, number: int, density: float) -> Array:
    """`[R, D_in]` float32, R = `number`: each row has p = max(1, round(density D_in)) entries of N(0, 1 / R^2).

    Their places are uniform. The same at a router and an adapter that ask for as many rows.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(site.name.encode()) & 0x7FFFFFFF)
    places, values = jax.random.split(jax.random.fold_in(key, layer))
    p = max(1, round(density * site.d_in))
    _, at = jax.lax.top_k(jax.random.uniform(places, (number, site.d_in)), p)
    entries = jax.random.normal(values, (number, p)) / number
    return jnp.zeros((number, site.d_in)).at[jnp.arange(number)[:, None], at].set(entries)

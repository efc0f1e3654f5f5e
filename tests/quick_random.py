"""Random draws that compile fast: a mixer of a dozen operations in the place of threefry's twenty rounds.

A threefry takes 70 ms of compiling on a CPU, and a tiny run has dozens of them: a draw a leaf, a site, a mask. A test
cares that draws look random, that a key gives the same ones again, and that they depend on no device; not which they
are. Those that do are marked `threefry`; with `--all` every test has it, and processes that tests start always do.
"""

import jax
from jax.extend.random import threefry2x32_p
from jax.interpreters import mlir

RULES = mlir._platform_specific_lowerings["cpu"]  # private: jax has no public way to read a rule back
THREEFRY = RULES[threefry2x32_p]


def mixed(k1, k2, x1, x2):
    """Two words of a key and two of a counter (uint32, any shapes) -> two words: murmur's finaliser, twice."""
    word = jax.numpy.uint32
    h = (x1 ^ k1) * word(0x9E3779B1)
    h = (h ^ (h >> 16)) + (x2 ^ k2)
    h = h * word(0x85EBCA6B)
    h = (h ^ (h >> 13)) * word(0xC2B2AE35) + k1
    first = h ^ (h >> 16)
    h = (first + k2) * word(0x27D4EB2F)
    h = (h ^ (h >> 15)) * word(0x165667B1)
    return first, h ^ (h >> 16)


mlir.register_lowering(
    threefry2x32_p, mlir.lower_fun(lambda *words: list(mixed(*words)), multiple_results=True), platform="cpu"
)
MIXER = RULES[threefry2x32_p]


def use(rule):
    """MIXER or THREEFRY, in all programs from now on; those that have the other one go."""
    if RULES[threefry2x32_p] is not rule:
        RULES[threefry2x32_p] = rule
        jax.clear_caches()

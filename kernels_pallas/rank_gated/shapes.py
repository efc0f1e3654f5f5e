"""Named shapes of `rank_gated`, from real models; tests compile them, `bench` measures those that fit a CPU."""

SHAPES = {
    "smollm2-135m q, 8 experts": dict(T=512, D_in=576, D_out=576, E=8, R=16),
    "smollm2-135m gate, 8 experts": dict(T=512, D_in=576, D_out=1536, E=8, R=16),
    "smollm2-135m down, 8 experts": dict(T=512, D_in=1536, D_out=576, E=8, R=16),
    "smollm2-135m q, 1 expert": dict(T=512, D_in=576, D_out=576, E=1, R=16),
    "llama-3.2-1b q, 64 experts": dict(T=4096, D_in=2048, D_out=2048, E=64, R=8),
    "llama-3-8b q, 8 experts": dict(T=8192, D_in=4096, D_out=4096, E=8, R=16),
    "llama-3-8b gate, 16 experts": dict(T=8192, D_in=4096, D_out=14336, E=16, R=16),
}

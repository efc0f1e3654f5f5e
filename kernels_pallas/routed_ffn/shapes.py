"""Named shapes of `routed_ffn`, from real models; tests compile them, `bench` measures those that fit a CPU."""

SHAPES = {
    "smollm2-135m, 8 experts": dict(T=512, F=1536, E=8, K=2, R=16),
    "smollm2-135m, 8 experts of 8": dict(T=512, F=1536, E=8, K=8, R=16),
    "smollm2-135m, 128 experts": dict(T=512, F=1536, E=128, K=2, R=16),
    "llama-3.2-1b, 8 experts": dict(T=4096, F=8192, E=8, K=2, R=16),
    "llama-3-8b, 8 experts": dict(T=8192, F=14336, E=8, K=2, R=16),
    "llama-3-8b, 64 experts": dict(T=8192, F=14336, E=64, K=2, R=8),
}

"""Named shapes of `grouped_lora`, from real models; tests compile them, `bench` measures those that fit a CPU."""

SHAPES = {
    "smollm2-135m q, 8 experts": dict(T=512, D_in=576, D_out=576, E=8, K=2, R=16),
    "smollm2-135m gate, 8 experts": dict(T=512, D_in=576, D_out=1536, E=8, K=2, R=16),
    "smollm2-135m down, 8 experts": dict(T=512, D_in=1536, D_out=576, E=8, K=2, R=16),
    "smollm2-135m gate, 128 experts": dict(T=512, D_in=576, D_out=1536, E=128, K=2, R=16),
    "llama-3.2-1b q, 64 experts": dict(T=4096, D_in=2048, D_out=2048, E=64, K=2, R=8),
    "llama-3-8b gate, 64 experts": dict(T=8192, D_in=4096, D_out=14336, E=64, K=2, R=16),
    "llama-3-8b down, 512 experts of rank 1": dict(T=8192, D_in=14336, D_out=4096, E=512, K=4, R=1),
    "llama-3-8b q, 16 experts of rank 64": dict(T=8192, D_in=4096, D_out=4096, E=16, K=2, R=64),
}

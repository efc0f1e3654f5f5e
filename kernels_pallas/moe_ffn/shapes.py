"""Named shapes of `moe_ffn`, a layer of real models; `bench` measures those that fit a CPU."""

SHAPES = {
    "olmoe-1b-7b": dict(T=512, D=2048, F=1024, E=64, K=8, R=16),
    "qwen1.5-moe-a2.7b": dict(T=512, D=2048, F=1408, E=60, K=4, R=16),
    "qwen3-30b-a3b": dict(T=4096, D=2048, F=768, E=128, K=8, R=16),
    "mixtral-8x7b": dict(T=8192, D=4096, F=14336, E=8, K=2, R=16),
}

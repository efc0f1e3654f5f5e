"""Which of two exact forms a routed low-rank product takes: all experts at once, or grouped by expert.

`rank_gated` multiplies all E*R rank columns and zeroes what is not selected: no sort, no gather, cost ~ E*R.
`grouped_lora` touches only the K experts of a token, at the price of gathering rows: cost ~ K*R and some bandwidth.

On a TPU both sides of the balance are known: with P matrix FLOP/s and BW bytes/s, masked wins while

    E * R < c * P / BW,    c = (5 K + 1) / 2         (sorted rows in and out; T and D cancel)

On a CPU the threshold is measured. On a GPU the one grouped form there is, a loop over tiles, loses at every number of
columns that was measured (docs/performance.md). E experts, K of them a token, R rank.
"""

import dataclasses

from kernels_pallas.platform import device_kind_of, is_split, platform_of


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak bfloat16 matrix FLOP/s and memory bytes/s of one chip."""

    flops_per_second: float
    bytes_per_second: float


# Nominal, rounded; override what you have measured. The key is found in the lower-case device kind, first match.
DEVICES = {
    "v5 lite": Device(197e12, 0.82e12),
    "v5e": Device(197e12, 0.82e12),
    "v6": Device(918e12, 1.64e12),
    "v5p": Device(459e12, 2.77e12),
    "v5": Device(459e12, 2.77e12),
    "tpu7x": Device(2307e12, 7.4e12),
    "a100": Device(312e12, 2.0e12),
    "h100": Device(989e12, 3.35e12),
    "h200": Device(989e12, 4.8e12),
    "b200": Device(2250e12, 8.0e12),
}
UNKNOWN = Device(400e12, 2.0e12)

CPU_COLUMNS_PER_SLOT = 32  # E * R above 32 K: grouped


def low_rank_op(
    E: int,
    R: int,
    K: int | None,
    *,
    platform: str | None = None,
    device_kind: str | None = None,
    devices: dict[str, Device] = DEVICES,
    threshold: float | None = None,
) -> tuple[str, str]:
    """`("rank_gated" | "grouped_lora", reason)`.

    Args:
      E, R: experts and rank. K: active experts a token, None where every expert may have a gate.
      platform, device_kind: what to choose for; by default the mesh in context, else the default backend.
      devices: P and BW by device kind of a TPU. threshold: E*R above which to group, instead of the formula.

    >>> import molora_jax as mj
    >>> mj.low_rank_op(8, 16, 2, platform="cpu")[0], mj.low_rank_op(8, 4, 2, platform="cpu")[0]
    ('grouped_lora', 'rank_gated')
    """
    if K is None or K >= E:
        return "rank_gated", "every expert may have a gate: all of them are computed anyway"
    if is_split():
        return "rank_gated", "the compiler spreads the rows over a mesh: grouping would gather them"
    columns, platform = E * R, platform_of(platform)
    if threshold is not None:
        why = f"the given threshold of {threshold:g}"
    elif platform == "cpu":
        threshold = CPU_COLUMNS_PER_SLOT * K
        why = f"{CPU_COLUMNS_PER_SLOT} K = {threshold} (measured on a CPU)"
    elif platform == "gpu":
        # 35 to 1,000 times slower at 64 to 2,048 columns: a tile takes 90 us, however few its rows (an H200)
        return "rank_gated", "gpu: grouping loops over tiles, which leaves the device idle (measured to 2,048 columns)"
    else:
        kind = (device_kind or device_kind_of() or "").lower()
        key = next((key for key in devices if key in kind), None)
        chip = devices[key] if key else UNKNOWN
        balance = chip.flops_per_second / chip.bytes_per_second
        threshold = (5 * K + 1) / 2 * balance
        why = f"(5 K + 1) / 2 * P / BW = {threshold:.0f} ({key or 'unknown chip'}: P / BW = {balance:.0f} FLOP a byte)"
    if columns > threshold:
        return "grouped_lora", f"{platform}: E*R = {columns} columns exceed {why}"
    return "rank_gated", f"{platform}: E*R = {columns} columns do not exceed {why}"

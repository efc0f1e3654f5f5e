"""Collectives of a compiled program: kind, bytes of the buffers, devices that take part, times it runs.

    bytes that one device sends: all-gather (n-1)/n of the result, reduce-scatter (n-1) times the result,
    all-reduce 2 (n-1)/n, all-to-all (n-1)/n, collective-permute 1           n devices in a group

A ragged-all-to-all has a buffer for the worst case on one side, so the smaller of its operand and result counts.
Loops count with their trip count (`known_trip_count`, written by XLA), so a collective inside the layer scan counts L
times. The tables of `auto.py` are held against this in the tests.
"""

import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
         "s64": 8, "u64": 8}  # fmt: skip
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
CALL = re.compile(r"(?:body|to_apply|calls|condition)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"\}')
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
LINE = re.compile(r"= (.*?) (" + "|".join(KINDS) + r")(-start)?\(%?([\w.\-]*)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """`shapes` of the result on one device, `devices` in a group, `times` it runs, `loop`: inside a loop."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    devices: int
    times: int
    loop: bool

    @property
    def bytes_moved(self) -> float:
        n = self.devices
        each = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1.0}
        return self.times * self.bytes * each.get(self.kind, (n - 1) / n)


def collectives(text: str, num_devices: int) -> list[Collective]:
    """From `compiled.as_text()`. A group of all devices may be written as an empty list, hence `num_devices`."""
    bodies, entry, name = {}, None, None
    for line in text.splitlines():
        head = HEAD.match(line)
        if head:
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name is not None:
            bodies[name].append(line)
    out = []

    def walk(name, times, loop):
        for line in bodies[name]:
            found = LINE.search(line)
            if found:
                collective = _collective(line, found[1], found, num_devices, times, loop)
                if collective.kind == "ragged-all-to-all":
                    operand = next(text for text in bodies[name] if f"%{found[4]} = " in text).split(" = ")[1]
                    sent = _collective(line, operand.split(" ")[0], found, num_devices, times, loop)
                    collective = min(collective, sent, key=lambda c: c.bytes)
                out.append(collective)
            elif "calls=" in line and " fusion(" in line:
                continue  # no collective inside
            else:
                inside = " while(" in line
                trips = TRIPS.search(line)
                repeats = int(trips[1]) if inside and trips else 1
                called = CALL.findall(line) + [b.strip(" %") for g in BRANCHES.findall(line) for b in g.split(",")]
                for callee in called:
                    if callee in bodies:
                        walk(callee, times * repeats, loop or inside)

    walk(entry, 1, False)
    return out


def _collective(line, result, found, num_devices, times, loop):
    kind, start = found[2], bool(found[3])
    shapes = [(SIZES.get(t, 4), tuple(int(n) for n in dims.split(",") if n)) for t, dims in SHAPE.findall(result)]
    if start and kind == "collective-permute":  # operand, result, and what some compilers add
        shapes = shapes[1:2]
    elif start and kind != "all-reduce":  # an asynchronous form's result holds its operands too, but for a sum
        shapes = shapes[len(shapes) // 2 :]
    total = 0
    for size, dims in shapes:
        count = size
        for n in dims:
            count *= n
        total += count
    return Collective(kind, tuple(d for _, d in shapes), total, _devices(line, num_devices), times, loop)


def _devices(line, num_devices):
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return listed[1].count(",") + 1
    # axes of a mesh by name, from jax 0.12 on (before, where its devices are in another order: `device_ids`)
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}", line)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])  # 'a':(2)4 is a part of 4 of the axis
        return math.prod(int(part or sizes[name]) for name, part in axes)
    pairs = re.search(r"source_target_pairs=\{([\d,{}]*)\}", line)
    if pairs:
        return _ring({int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])})
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    return int(iota[2]) if iota else num_devices


def _ring(sends: dict[int, int]) -> int:
    """Devices of the longest chain from one to the next."""
    longest = 0
    for start in sends:
        chain = [start]
        while (following := sends.get(chain[-1])) is not None and following not in chain:
            chain.append(following)
        longest = max(longest, len(chain))
    return longest

"""The small languages inside a config: `sites`, `layers`, `experts`, `mesh`, `data.*`, each read into plain values."""

import fnmatch
import json
import math
import re

from molora_jax.config.fields import MESH_AXES, PROJECTIONS, did_you_mean, one_of, wrong

SITES = (*PROJECTIONS, "ffn")
ROW_FIELDS = (
    "task", "system", "prompt", "target", "messages", "text", "tools", "history", "instruction", "input", "output",
    "conversations", "completion", "weight", "label", "chosen", "rejected",
)  # fmt: skip
LAYERS = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
ROWS = ("data", "fsdp", "expert")  # the axes that split a batch
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token")
MOST = 100_000  # layers or experts: more is a typing mistake, and would only fill memory


def resolve_sites(spec, *, where="sites", absent=()):
    """`"q,k,v,o"`, `"ffn"` or patterns (`"*"`: all projections) -> names in the decoder's order.

    `absent`: projections that the base does not have, so that no pattern means them.
    """
    found = set()
    for part in _parts(spec, ",", where, f"a comma list of {', '.join(SITES)}"):
        if part == "attn":
            fix = "The site attn (whole attentions) is not available yet: name q,k,v,o."
            raise wrong(where, "'attn'", one_of(SITES), fix)
        matched = {"ffn"} if part == "ffn" else set(fnmatch.filter(PROJECTIONS, part))
        matched -= set() if part in SITES else set(absent)
        if not matched and re.search(r"[*?\[]", part):
            raise wrong(where, f"{part!r}, which matches nothing", f"a pattern that matches {one_of(PROJECTIONS)}")
        if not matched:
            raise wrong(where, repr(part), one_of(SITES), did_you_mean(part, SITES))
        found |= matched
    if "ffn" in found and len(found) > 1:
        raise wrong(where, repr(spec), "either ffn or projections", "Write two rules.")
    return tuple(site for site in SITES if site in found)


def resolve_layers(spec, num_layers, *, where="layers"):
    """`"all"` or `"0-7,12"` -> sorted layer indices. `num_layers=None` checks the syntax alone."""
    if spec == "all":
        return tuple(range(num_layers or 0))
    expected = '"all", or layers and rising ranges such as "0-7,12"'
    found = []
    for part in _parts(spec, ",", where, expected):
        match = LAYERS.fullmatch(part)
        low, high = (_small(match[1]), _small(match[2] or match[1])) if match else (1, 0)
        if low > high or high > MOST:
            raise wrong(where, repr(part), expected)
        if num_layers is not None and high >= num_layers:
            raise wrong(where, repr(part), f"layers 0 to {num_layers - 1}", f"The model has {num_layers} layers.")
        found += range(low, high + 1)
    if len(found) != len(set(found)):
        raise wrong(where, repr(spec), "every layer once")
    return tuple(sorted(found))


def expert_counts(spec, *, where="experts"):
    """`((experts, layers), ...)` in order of depth; `layers` is None where the spec leaves it to the model."""
    expected = 'a count "8", groups of depth "2|4|6|8" or counts times layers "2*8,4*22", each >= 1'
    exact = isinstance(spec, str) and ("*" in spec or "," in spec)
    found = []
    for part in _parts(spec, "," if exact else "|", where, expected):
        numbers = [text.strip() for text in part.split("*")] if exact else [part, "1"]
        if len(numbers) != 2 or not all(re.fullmatch(r"[0-9]+", n) and 1 <= _small(n) <= MOST for n in numbers):
            raise wrong(where, repr(spec), expected)
        found.append((_small(numbers[0]), _small(numbers[1]) if exact else None))
    return tuple(found)


def resolve_experts(spec, num_layers, *, where="experts"):
    """Experts of each of the `num_layers` layers that a rule covers, lowest first.

    `"8"`: everywhere; `"2|4|6|8"`: equal groups of depth (30 layers: 8, 8, 7, 7); `"2*8,4*22"`: exact.
    """
    counts = expert_counts(spec, where=where)
    if counts[0][1] is not None:
        total = sum(times for _, times in counts)
        if total != num_layers:
            fix = "Let the numbers after * sum to that."
            raise wrong(where, f"{spec!r} ({total} layers)", f"counts for {num_layers} layers", fix)
        return tuple(count for count, times in counts for _ in range(times))
    if len(counts) > num_layers:
        raise wrong(where, repr(spec), f"at most {num_layers} groups, one for each layer")
    small, larger = divmod(num_layers, len(counts))
    return tuple(count for i, (count, _) in enumerate(counts) for _ in range(small + (i < larger)))


def resolve_mesh(mesh, num_devices, *, rows=None, unit=1):
    """`{data, fsdp, expert, tensor}` with -1 filled in; `data` over all slices (`dcn` times that of the config).

    `rows`, if given: the rows of a micro-step, to be divided by `unit` rows that belong together.
    """
    sizes, slices = {axis: int(mesh[axis]) for axis in MESH_AXES}, int(mesh.get("dcn", 1))
    if slices < 1 or num_devices % slices:
        raise wrong("mesh.dcn", slices, f"a divisor of the {num_devices} devices", "Give the number of slices.")
    for axis, size in sizes.items():
        if size < 1 and not (axis == "data" and size == -1):
            raise wrong(f"mesh.{axis}", size, ">= 1, or -1 for data alone")
    others = [axis for axis in MESH_AXES if axis != "data"]
    rest = slices * math.prod(sizes[axis] for axis in others)
    if num_devices % rest:
        expected = f"axes whose product divides the {num_devices} devices"
        raise wrong("mesh", _text(sizes), expected, f"Change {at_fault(sizes, others, num_devices)}.")
    if sizes["data"] == -1:
        sizes["data"] = num_devices // rest
    sizes["data"] *= slices
    if math.prod(sizes.values()) != num_devices:
        expected = f"a product of {num_devices}, the number of devices"
        fix = f"Let mesh.data be -1, or {num_devices // rest}."
        raise wrong("mesh", f"{_text(sizes)} (product {math.prod(sizes.values())})", expected, fix)
    split = math.prod(sizes[axis] for axis in ROWS)
    if rows is not None and rows % (split * unit):
        what = f"{rows} rows" if unit == 1 else f"{rows} rows (units of {unit} rows)"
        expected = f"data * fsdp * expert = {split} to divide the {what} of a micro-step"
        fix = f"Change {at_fault(sizes, ROWS, rows // unit)} or train.batch_size (rows are batch_size / accumulate)."
        raise wrong("mesh", f"{_text(sizes)} on {num_devices} devices", expected, fix)
    return sizes


def at_fault(sizes, axes, total) -> str:
    """The names of the axes that do not divide `total`: each that alone does not, else all that are more than 1."""
    split = [axis for axis in axes if sizes[axis] > 1]
    alone = [axis for axis in split if total % sizes[axis]]
    return " or ".join(f"mesh.{axis}" for axis in alone or split or axes[:1])


def scaled(counts, before, after):
    """Steps of stages (0: an open one, which takes what is left) of a budget of `before` steps, in one of `after`.

    Where the stages end is rounded; none that had steps is left without one, as long as `after` holds them all.

    >>> scaled([100, 300, 0], 800, 8), scaled([190, 10], 200, 3)
    ([1, 3, 0], [2, 1])
    """
    ends, total = [0], 0
    for count in counts:
        total += count
        ends.append((2 * total * after + before) // (2 * before))  # to the nearest
    out = [max(stop - start, 1 if count else 0) for count, start, stop in zip(counts, ends, ends[1:], strict=False)]
    room = after - sum(count == 0 for count in counts)
    while sum(out) > room and max(out) > 1:
        out[out.index(max(out))] -= 1
    return out


def split_commas(text):
    r"""The parts of a comma list; `\,` is a comma inside a part (a path)."""
    parts = re.split(r"(?<!\\),", text)
    return tuple(part.strip().replace("\\,", ",") for part in parts if part.strip())


FILES = ("jsonl:", "parquet:")  # entries of `data.tasks` that are files


def file_of(entry: str) -> str:
    """The path of `jsonl:PATH` or `parquet:PATH`; "" of the name of a task."""
    return next((entry.removeprefix(form) for form in FILES if entry.startswith(form)), "")


FOREIGN = ("peft", "molora")  # adapters that no run of ours holds, in `load`


def adapter_source(text: str) -> tuple[str, str]:
    """`("peft", PATH)` of `"peft:PATH"`, likewise `molora`; of any other text `("run", text)`."""
    kind, colon, path = text.partition(":")
    return (kind, path) if colon and kind in FOREIGN else ("run", text)


def resolve_template_args(text, *, where="data.template_args"):
    """`"enable_thinking=false,names=[1, 2]"` -> `{"enable_thinking": False, "names": [1, 2]}`: values are JSON."""
    expected, found, at = 'NAME=VALUE, ..., each value JSON: enable_thinking=false, mode="short"', {}, 0
    while text[at:].strip():
        match = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*", re.ASCII).match(text, at)
        if not match:
            raise wrong(where, repr(text[at : at + 60]), expected)
        try:
            value, at = json.JSONDecoder(parse_constant=_no_constant).raw_decode(text, match.end())
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair has no UTF-8
        except (ValueError, RecursionError):
            fix = f'Put text in double quotes, as in {match[1]}="...".'
            raise wrong(where, repr(text[match.start() : match.start() + 60].strip()), expected, fix) from None
        if match[1] in found:
            raise wrong(where, f"{match[1]!r} twice", "each argument once", "Drop one.")
        if match[1] in RESERVED:
            raise wrong(where, repr(match[1]), f"no name that the rows or the tokenizer set: {', '.join(RESERVED)}")
        found[match[1]] = value
        comma = re.compile(r"\s*(,|$)").match(text, at)
        if not comma:
            raise wrong(where, repr(text[at : at + 60]), expected, "Separate arguments by commas.")
        at = comma.end()
    return found


def resolve_fields(text, *, where="data.fields"):
    """`"prompt=question,target=answer,drop=label"` -> `{"question": "prompt", "answer": "target", "label": ""}`.

    A file's names for our fields; "" is a field that the user says to leave out.
    """
    found = {}
    for part in split_commas(text):
        name, equals, own = (piece.strip() for piece in part.partition("="))
        if not equals or not own:
            raise wrong(where, repr(part), "NAME=FIELD, ..., as in prompt=question,target=answer")
        name = "" if name == "drop" else name
        if name and name not in ROW_FIELDS:
            raise wrong(where, repr(name), one_of((*ROW_FIELDS, "drop")), did_you_mean(name, ROW_FIELDS))
        if own in found or (name and name in found.values()):
            raise wrong(where, f"{own if own in found else name!r} twice", "each name once", "Drop one.")
        found[own] = name
    return found


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


def _text(sizes):
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def _small(digits):
    """The number, or one too large to be accepted (int() itself refuses thousands of digits)."""
    return int(digits) if len(digits) < 10 else MOST + 1


def _parts(spec, separator, where, expected):
    parts = [part.strip() for part in spec.split(separator)] if isinstance(spec, str) else []
    if not parts or not all(parts):
        raise wrong(where, repr(spec), expected)
    return parts

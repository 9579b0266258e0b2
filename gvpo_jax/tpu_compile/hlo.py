"""What a compiled XLA program's text tells: loops, collectives, and what its memory holds."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply|(?:true|false)_computation)=%?([\w.\-]+)")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r" = [su]32\[\]\S* constant\((\d+)\)")
# What XLA:TPU makes of a collective's part between slices: its hosts send and receive it.
_BETWEEN_SLICES = re.compile(
    r'_xla_megascale_target="\{([\d,:]+)\}.*_xla_megascale_transfer_type="(\w+)"'
)
_NAMED = 8  # of the largest buffers
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Collective:
    """One kind of communication in a program, over one kind of device group."""

    kind: str  # "all-gather", ...
    devices: int  # in each group that communicates
    between_slices: bool  # whether a group reaches over several slices
    count: int  # how often it runs
    bytes: float  # of its results on one device, over all runs
    wire_bytes: float  # received by each device, over all runs, by the usual ring algorithms


class Transfer(NamedTuple):
    """One run of one collective operation, or of a part of it."""

    name: str  # of the instruction
    channel: str  # which all its parts share
    kind: str
    devices: int
    between_slices: bool
    bytes: float
    wire_bytes: float


@dataclass(frozen=True)
class Buffer:
    """Something in memory: bytes of one, how many alike, its shape and where it comes from."""

    bytes: int
    count: int
    shape: str
    origin: str


def collectives(hlo: str, *, devices: int, slices: int = 1, trips: int = 1) -> list[Collective]:
    """The collectives of an optimized program, largest traffic first.

    Loops count as often as they run. Operations that share a channel are one, cut up to overlap
    with computation.

    Args:
        hlo: text of the optimized module.
        devices: in all.
        slices: that the devices lie in, in order.
        trips: of a loop whose number of rounds the text does not tell.
    """
    computations = computations_of(hlo)
    runs = _runs(computations, trips)
    seen: dict[str, tuple[float, Transfer]] = {}
    for name, lines in computations.items():
        count = runs.get(name, 0.0)
        for line in lines:
            found = transfer_of(name, line, devices, slices)
            if found and seen.get(found.channel, (0.0,))[0] < count:
                seen[found.channel] = (count, found)
    totals: dict[tuple[str, int, bool], Any] = defaultdict(lambda: np.zeros(3))
    for count, one in seen.values():
        key = one.kind, one.devices, one.between_slices
        totals[key] += count * np.array([1, one.bytes, one.wire_bytes])
    rows = [Collective(*key, int(n), size, wire) for key, (n, size, wire) in totals.items()]
    return sorted(rows, key=lambda row: -row.wire_bytes)


def loops(hlo: str) -> dict[str, int | None]:
    """Name of each loop's body -> how often it runs there, None where the text does not tell."""
    computations = computations_of(hlo)
    return {
        body[1]: trips_of(line, computations)
        for lines in computations.values()
        for line in lines
        if " while(" in line and (body := _BODY.search(line))
    }


def memory(assignment: str, hlo: str) -> tuple[dict[str, int], list[Buffer]]:
    """Bytes of HBM on one device, by kind, and the largest buffers, from XLA's buffer assignment.

    `memory_analysis()` of the compiled program can't take its place: there is none where a program
    does not fit, it has no total, and on TPU its temporaries are more than what HBM holds of them.

    Args:
        assignment: text of XLA's "buffer-assignment" dump.
        hlo: text of the optimized module, to say where buffers come from.

    Returns:
        Sums for "arguments", "outputs", "aliased" (both of these), "temporaries" and "constants",
        and "total", which has to fit; and the largest buffers.
    """
    allocations = list(_allocations(assignment))

    def held(*words: str) -> int:
        return sum(size for size, kind, _ in allocations if all(word in kind for word in words))

    sums = {
        "arguments": held("parameter"),
        "outputs": held("maybe-live-out"),
        "aliased": held("parameter", "maybe-live-out"),
        "temporaries": held("temp"),
        "constants": held("constant"),
        "total": held(),
    }
    return sums, _largest(allocations, _origins(hlo))


def computations_of(hlo: str) -> dict[str, list[str]]:
    """Name -> lines; the entry is also there as "ENTRY"."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if line.startswith(" "):
            lines.append(line)
        elif head := _COMPUTATION.match(line):
            lines = found.setdefault(head[2], [])
            if head[1]:
                found["ENTRY"] = lines
    return found


def _runs(computations: dict[str, list[str]], trips: int) -> dict[str, float]:
    """How often each computation runs in one run of the program; branches count as taken."""
    runs: dict[str, float] = {}
    todo = [("ENTRY", 1.0)]
    while todo:
        name, times = todo.pop()
        if runs.get(name, 0.0) >= times or name not in computations:
            continue
        runs[name] = times
        for line in computations[name]:
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [part.strip().lstrip("%") for part in branches.split(",")]
            rounds = (trips_of(line, computations) or trips) if " while(" in line else 1
            todo += [(target, times * rounds) for target in called]
    return runs


def trips_of(line: str, computations: dict[str, list[str]]) -> int | None:
    """How often the loop of this line runs; None: the text does not tell."""
    if known := _TRIPS.search(line):
        return int(known[1])
    # On TPU the count is gone from the text; a loop runs until its counter reaches a constant.
    bounds, todo = [0], re.findall(r"\bcondition=%?([\w.\-]+)", line)
    while todo:
        for inner in computations.get(todo.pop(), []):
            bounds += map(int, _CONSTANT.findall(inner))
            todo += re.findall(r"\bcalls=%?([\w.\-]+)", inner)
    return max(bounds) or None


def transfer_of(computation: str, line: str, devices: int, slices: int) -> Transfer | None:
    """The communication that a line of this computation is; None: it is none."""
    found = INSTRUCTION.match(line)
    if not found:
        return None
    name, shape, opcode, _ = found.groups()
    arrays = [array_bytes(*array) for array in arrays_of(shape)]
    kind = opcode.removesuffix("-start")
    if opcode == "recv" and (over := _BETWEEN_SLICES.search(line)):
        kind, size = over[2].lower().replace("_", "-"), arrays[0]  # (result, ...)
        group, between = _count(over[1]), True
    elif kind in _COLLECTIVES:
        if opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
            arrays = arrays[1:2]  # (operand, result, ...)
        size = sum(arrays)
        group, between = _groups(line, devices, slices)
        if kind == "collective-permute":
            group = devices
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind, size = "reduce-scatter", size / group
    else:
        return None
    share = (group - 1) / group
    received = {"all-reduce": 2 * share, "reduce-scatter": group - 1}
    received |= {"all-gather": share, "all-to-all": share}
    wire = size * received.get(kind, 1)
    # Channels of sends and receives are counted by themselves.
    channel = None if opcode == "recv" else re.search(r"channel_id=(\d+)", line)
    return Transfer(name, channel[1] if channel else name, kind, group, between, size, wire)


def _count(ranges: str) -> int:
    """How many numbers "1,4:6" names: 4."""
    ends = [[int(end) for end in part.split(":")] for part in ranges.split(",")]
    return sum(end[-1] - end[0] + 1 for end in ends)


def _groups(line: str, devices: int, slices: int) -> tuple[int, bool]:
    """Devices in a group, and whether one group has devices of several slices."""
    groups = _replica_groups(line, devices)
    slice_of = groups * slices // devices
    return groups.shape[1], bool((slice_of != slice_of[:, :1]).any())


def _replica_groups(line: str, devices: int) -> np.ndarray:
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line)
    if found := pairs or re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", line):
        rows = [_ints(row) for row in re.findall(r"\{([\d,]+)\}", found[1])]
        return np.array(rows or [[0]])
    if found := re.search(r"replica_groups=\[(\d+,\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = np.arange(devices).reshape(_ints(found[2]))
        return (ids.transpose(_ints(found[3])) if found[3] else ids).reshape(_ints(found[1]))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) ?\{([^}]*)\}", line):
        return _mesh_groups(found, devices)
    return np.arange(devices)[None]


def _mesh_groups(found: re.Match[str], devices: int) -> np.ndarray:
    """`mesh['a'=2,'b'=4] {'b'}`: groups along axis b, one for each place along a."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
    ids = np.arange(devices)
    if given := re.search(r"\[(\d+(?:,\d+)*)\]", found[2]):
        listed = np.array(_ints(given[1]))
        ids = listed if len(listed) == devices else ids
    along = [name for name in re.findall(r"'([^']+)'", found[3]) if name in sizes]
    order = [name for name in sizes if name not in along] + along
    grid = ids.reshape(list(sizes.values())).transpose([list(sizes).index(name) for name in order])
    return grid.reshape(-1, math.prod(sizes[name] for name in along))


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def arrays_of(text: str) -> list[tuple[str, list[int]]]:
    """Dtype and shape of each array that a text names."""
    return [(dtype, _ints(dims)) for dtype, dims in _ARRAY.findall(text)]


def array_bytes(dtype: str, shape: list[int]) -> float:
    """Bytes of an array; a type's first number is its bits: bf16, f8e4m3fn, s4."""
    digits = re.search(r"\d+", dtype)
    bits = 8 if dtype == "pred" else int(digits[0]) if digits else 0
    return bits / 8 * math.prod(shape)


def _origins(hlo: str) -> dict[str, str]:
    """Instruction -> the JAX operation or the argument that it comes from."""
    found = {}
    for line in hlo.splitlines():
        if (head := INSTRUCTION.match(line)) and (origin := _OP_NAME.search(line)):
            found[head[1]] = origin[1].replace("\\'", "'")
    return found


def _allocations(text: str) -> Iterable[tuple[int, str, list[str]]]:
    """Size, kind and the lines of the values of each allocation in HBM: no color, or color 0."""
    for block in re.split(r"^allocation ", text, flags=re.MULTILINE)[1:]:
        head, *lines = block.splitlines()
        found = re.match(r"\d+: size (\d+),(?: color (\d+),)?(.*)$", head)
        if found is not None and found[2] in (None, "0"):
            yield int(found[1]), found[3], [line for line in lines if line.startswith(" value:")]


def _largest(
    allocations: Iterable[tuple[int, str, list[str]]], origins: dict[str, str]
) -> list[Buffer]:
    """Values of one shape and origin are one row; those at one place in memory count once."""
    places = defaultdict(set)
    for number, (_, kind, values) in enumerate(allocations):
        what = "argument " if "parameter" in kind else "result " if "live-out" in kind else ""
        for line in values if "temp" in kind else values[:1]:
            if found := re.search(r"<\d+ (\S+) .*\(size=(\d+),offset=(\d+)\): (.*)$", line):
                name, shape = found[1].split("{")[0], re.sub(r"\{[^}]*\}", "", found[4])
                origin = re.sub(r"\d+", "N", what + origins.get(name, name))
                # Arguments and results lie apart; small thread-local values would fill the list.
                place = (number if what else None, found[3])
                places[int(found[2]), shape, origin].add(place)
    buffers = [Buffer(size, len(at), shape, origin) for (size, shape, origin), at in places.items()]
    return sorted(buffers, key=lambda b: -b.bytes * b.count)[:_NAMED]

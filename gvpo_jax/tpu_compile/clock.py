"""How long XLA's TPU compiler expects a program to take, and where the time goes.

The text of a TPU executable says of every fusion, product and copy how many cycles the compiler
expects it to take, `estimated_cycles`. They are added up in the order of the schedule: a loop as
often as it runs, of branches the dearest. Two things have no cycles there, and get a model of ours:
Pallas kernels, and collectives, of which only what the schedule does not hide counts.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from gvpo_jax.tpu_compile.hlo import INSTRUCTION, Transfer, computations_of, transfer_of, trips_of
from gvpo_jax.tpu_compile.kernels import kernel_seconds
from gvpo_jax.tpu_compile.roofline import Chip

PARTS = ("products", "attention", "logits", "layout", "optimizer", "collectives", "rest")
_LINES = 10  # of the program's source that are listed, the dearest

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
# A kernel's own attributes stand on lines of their own, in the middle of its instruction.
_BROKEN = re.compile(r'\n+(?="xprof|\}\}, )')
# What only moves numbers, or writes them in another type.
_MOVES = {
    "bitcast", "bitcast-convert", "broadcast", "concatenate", "constant", "convert", "copy",
    "dynamic-slice", "dynamic-update-slice", "fusion", "get-tuple-element", "iota", "pad",
    "parameter", "reshape", "reverse", "slice", "transpose", "tuple",
}  # fmt: skip
_PRODUCTS = {"convolution", "dot"}
# Files through which all products go: who asked for one is a call further out.
_HAND_ON = {"models/quantized.py", "ops/cpu.py", "precision.py"}
# By the file of any frame of an instruction's stack.
_PLACES = (
    # Not the loop over micro-batches, in which all the rest is.
    ("optimizer", re.compile(r"\boptax/(?!microbatching/)|\btraining/optimizer\.py$")),
    ("logits", re.compile(r"^logprobs\.py$")),
    ("attention", re.compile(r"^ops/(?:attention|kernels)\.py$|splash_attention|flash_attention")),
)


class Where(NamedTuple):
    """What an instruction counts for, and the line of source that asked for it."""

    part: str
    source: str


class Frame(NamedTuple):
    """A call in Python: its file, inside the package, and whether that is this package."""

    file: str
    line: int
    function: str
    ours: bool


@dataclass(frozen=True)
class Clock:
    """What a program is expected to take on one chip, in seconds.

    Attributes:
        cycles: the sum of the compiler's own, without kernels and collectives.
        seconds: those at the chip's clock, kernels, and what collectives keep it waiting.
        parts: seconds of each of `PARTS`.
        sources: the dearest lines of source, and their seconds.
        kernels: Pallas kernels by name: how often they run, and seconds of all runs.
    """

    cycles: int
    seconds: float
    parts: dict[str, float]
    sources: dict[str, float]
    kernels: dict[str, tuple[int, float]]


def clock_of(
    hlo: str, chip: Chip, *, devices: int = 1, slices: int = 1, trips: int = 1
) -> Clock | None:
    """The compiler's time of a program; None: its text has no cycles.

    Args:
        hlo: text of the optimized, scheduled module.
        chip: that it was compiled for.
        devices: in all.
        slices: that the devices lie in.
        trips: of a loop whose number of rounds the text does not tell.
    """
    if not _CYCLES.search(hlo):
        return None
    program = _Program(_BROKEN.sub(" ", hlo), chip, (devices, slices), trips)
    spent = program.run("ENTRY")
    parts: dict[str, float] = {part: 0.0 for part in PARTS}
    sources: dict[str, float] = defaultdict(float)
    for where, seconds in spent.seconds.items():
        parts[where.part] += seconds
        sources[where.source] += seconds
    return Clock(
        cycles=round(spent.cycles),
        seconds=sum(parts.values()),
        parts=parts,
        sources=dict(sorted(sources.items(), key=lambda line: -line[1])[:_LINES]),
        kernels={name: (round(n), spent.kernel_seconds[name]) for name, n in spent.kernels.items()},
    )


class _Spent:
    """Sums over a computation, or over several."""

    def __init__(self) -> None:
        self.cycles = 0.0
        self.seconds: dict[Where, float] = defaultdict(float)
        self.kernels: dict[str, float] = defaultdict(float)
        self.kernel_seconds: dict[str, float] = defaultdict(float)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def add(self, other: "_Spent", times: int = 1) -> None:
        self.cycles += times * other.cycles
        for name in ("seconds", "kernels", "kernel_seconds"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for key, value in theirs.items():
                mine[key] += times * value


class _Program:
    def __init__(self, hlo: str, chip: Chip, devices: tuple[int, int], trips: int):
        self.computations = computations_of(hlo)
        self.chip, self.devices, self.trips = chip, devices, trips
        self.sources = _sources(hlo)
        self.done: dict[str, _Spent] = {}
        self.inside: dict[str, _Inside] = {}

    def run(self, name: str) -> _Spent:
        """One run of a computation, in its order, with one link that transfers queue for."""
        if name in self.done:
            return self.done[name]
        spent = self.done[name] = _Spent()
        lines = self.computations.get(name, [])
        begins, ends = self._transfers(name, lines)
        now, free, arrives = 0.0, 0.0, {}
        for number, line in enumerate(lines):
            for key, seconds in begins.get(number, {}).items():
                free = arrives[key] = max(now, free) + seconds
            before = spent.total
            self._instruction(line, spent)
            now += spent.total - before
            for key in ends.get(number, ()):
                if (late := arrives.pop(key, now) - now) > 0:
                    spent.seconds[Where("collectives", self._source(line))] += late
                    now += late
        return spent

    def _instruction(self, line: str, spent: _Spent) -> None:
        found = INSTRUCTION.match(line)
        if found is None:
            return
        name, shape, opcode, rest = found.groups()
        if opcode == "while" and (body := _BODY.search(line)):
            spent.add(self.run(body[1]), trips_of(line, self.computations) or self.trips)
        elif opcode == "conditional":
            branches = [part for pair in _BRANCHES.findall(line) for part in pair if part]
            names = [x.strip().lstrip("%") for part in branches for x in part.split(",")]
            spent.add(max(map(self.run, names), key=lambda branch: branch.total))
        elif opcode == "call" and (called := _CALLED.search(line)):
            spent.add(self.run(called[1]))
        elif opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in line:
            kernel = re.sub(r"[.\d]+$", "", name)
            seconds = kernel_seconds(kernel, shape, rest, self.chip)
            spent.kernels[kernel] += 1
            spent.kernel_seconds[kernel] += seconds
            spent.seconds[self._where(line, opcode)] += seconds
        elif cycles := _CYCLES.search(line):
            spent.cycles += int(cycles[1])
            spent.seconds[self._where(line, opcode)] += int(cycles[1]) / self.chip.clock

    def _where(self, line: str, opcode: str) -> Where:
        inside = self._inside(line)
        frame = _FRAME.search(line)
        stack = self.sources.get(int(frame[1]) if frame else inside.frame, ())
        asking = (call for call in stack if call.ours and call.file not in _HAND_ON)
        place = next(asking, stack[0] if stack else None)
        source = f"{place.file}:{place.line} {place.function}" if place else "no source"
        opcodes = inside.opcodes | {opcode}
        if opcodes <= _MOVES:
            return Where("layout", source)
        for part, files in _PLACES:
            if any(files.search(call.file) for call in stack):
                return Where(part, source)
        return Where("products" if opcodes & _PRODUCTS else "rest", source)

    def _source(self, line: str) -> str:
        return self._where(line, "").source

    def _inside(self, line: str) -> "_Inside":
        """What the computations are made of that an instruction stands for."""
        both = _Inside(frozenset(), -1)
        for called in _CALLED.findall(line):
            if called not in self.inside:
                self.inside[called] = self._made_of(called)
            part = self.inside[called]
            both = _Inside(both.opcodes | part.opcodes, max(both.frame, part.frame))
        return both

    def _made_of(self, name: str) -> "_Inside":
        opcodes, frame = set(), -1
        for line in self.computations.get(name, []):
            if found := INSTRUCTION.match(line):
                opcodes.add(found[3])
            if (at := _FRAME.search(line)) and (frame < 0 or (found and found[3] in _PRODUCTS)):
                frame = int(at[1])
            deeper = self._inside(line)
            opcodes |= deeper.opcodes
            frame = frame if frame >= 0 else deeper.frame
        return _Inside(frozenset(opcodes), frame)

    def _transfers(self, name: str, lines: list[str]) -> tuple[dict[int, Any], dict[int, list]]:
        """At which lines transfers begin, with their seconds, and at which they must be over."""
        begin: dict[str, tuple[int, float]] = {}
        end: dict[str, int] = {}
        started: dict[str, str] = {}
        for number, line in enumerate(lines):
            for transfer in self._transfers_in(name, line):
                key = transfer.channel
                seconds = transfer.wire_bytes / self._bandwidth(transfer)
                if key not in begin:
                    begin[key] = number, seconds
                end[key] = number
                started[transfer.name] = key
            for operand in re.findall(r"-done\(.*?%([\w.\-]+)\)", line):
                if operand in started:
                    end[started[operand]] = number
        begins: dict[int, dict[str, float]] = {}
        ends: dict[int, list[str]] = {}
        for key, (number, seconds) in begin.items():
            begins.setdefault(number, {})[key] = seconds
            ends.setdefault(end[key], []).append(key)
        return begins, ends

    def _transfers_in(self, name: str, line: str) -> Iterator[Transfer]:
        """Those of an instruction, or of the computations that it is fused from."""
        if found := transfer_of(name, line, *self.devices):
            yield found
        head = INSTRUCTION.match(line)
        if head and head[3] in ("fusion", "async-start"):
            for called in _CALLED.findall(line):
                for inner in self.computations.get(called, []):
                    for transfer in self._transfers_in(called, inner):
                        yield transfer._replace(name=head[1])

    def _bandwidth(self, transfer: Transfer) -> float:
        between = transfer.between_slices
        return self.chip.dcn_bandwidth if between else self.chip.ici_bandwidth


class _Inside(NamedTuple):
    """Opcodes of a computation, and the stack frame of its product, or else of its first line."""

    opcodes: frozenset[str]
    frame: int


def _sources(hlo: str) -> dict[int, tuple[Frame, ...]]:
    """Stack frame -> the calls that led to it, the innermost first."""

    def table(title: str, row: str) -> dict[int, tuple[str, ...]]:
        found = re.search(rf"^{title}\n((?:\d+ .*\n)*)", hlo, re.MULTILINE)
        rows = re.finditer(rf"^(\d+) {row}", found[1], re.MULTILINE) if found else ()
        return {int(match[1]): match.groups()[1:] for match in rows}

    files, functions = table("FileNames", '"(.*)"'), table("FunctionNames", '"(.*)"')
    location = r"\{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)"
    locations = table("FileLocations", location)
    frames = table("StackFrames", r"\{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
    # Parents are counted from 1 behind none, and frames from 1: the outermost seems its own.
    shift = 1 if frames.get(1, ("", ""))[1] == "1" else 0

    def stack(number: int) -> Iterator[Frame]:
        while number in frames:
            location, parent = frames[number]
            file, function, line = locations[int(location)]
            path, ours = _short(files[int(file)][0])
            yield Frame(path, int(line), functions[int(function)][0], ours)
            number = int(parent or 0) - shift

    return {number: tuple(stack(number)) for number in frames}


def _short(path: str) -> tuple[str, bool]:
    """A file's path inside its package, and whether the package is this one."""
    _, ours, inside = path.rpartition("/gvpo_jax/")
    return (inside, True) if ours else (path.rpartition("/site-packages/")[2], False)

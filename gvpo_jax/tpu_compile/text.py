"""A compile report as a person reads it."""

from pathlib import Path
from typing import Any

from gvpo_jax.errors import UserError
from gvpo_jax.models.hf_files import read_json


def as_text(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    slices = f"{report['slices']} slices of " if report["slices"] > 1 else ""
    lines = [
        f"{report['model']} ({report['parameters'] / 1e6:,.0f} M parameters) on "
        f"{slices}{report['topology']}: {report['devices']} chips, mesh {mesh}"
    ]
    for row in report["programs"]:
        lines += ["", *_program_lines(row)]
    lines += ["", "Assumptions:", *(f"- {line}" for line in report["assumptions"])]
    if not report["fits"]:
        misfits = ", ".join(row["name"] for row in report["programs"] if not row["fits"])
        lines += ["", f"DOES NOT FIT: {misfits}. To change, the cheapest first:"]
    elif report["advice"]:
        lines += ["", "To make it faster:"]
    lines += [f"- {line}" for line in report["advice"]]
    return "\n".join(lines)


def _program_lines(row: dict[str, Any]) -> list[str]:
    h, s = {name: _gib(size) for name, size in row["hbm"].items()}, row["seconds"]
    verdict = "fits" if row["fits"] else "DOES NOT FIT"
    lines = [
        f"{row['name']}: {verdict}, {h['peak']} of {h['usable']} GiB a chip "
        f"(compiled in {row['compile_seconds']} s)",
        f"  HBM, GiB: arguments {h['arguments']}, outputs {h['outputs']} (of these in place "
        f"{h['aliased']}), temporaries {h['temporaries']}, beside it {h['beside']}",
        f"  FLOP: {row['flops']['model']:.3g} of the model, {row['flops']['executed']:.3g} done",
        f"  at least {s['estimate']:.3g} s, bound by {row['bound']} (compute {s['compute']:.3g}, "
        f"hbm {s['hbm']:.3g}, ici {s['ici']:.3g}, dcn {s['dcn']:.3g}); MFU at most "
        f"{100 * (row['mfu'] or 0):.1f}%",
    ]
    lines += _clock_lines(row.get("clock"))
    for c in row["collectives"][:6]:
        where = ", between slices" if c["between_slices"] else ""
        lines.append(
            f"  {c['count']:>6} {c['kind']} over {c['devices']}{where}: results "
            f"{_gib(c['bytes'])} GiB, received {_gib(c['wire_bytes'])} GiB a chip"
        )
    if not row["fits"]:
        lines += [f"  {row['error']}"] if row["error"] else []
        lines.append("  largest buffers:")
        lines += [
            f"    {b['count']} x {_gib(b['bytes'])} GiB {b['shape'][:60]} {b['origin'][-100:]}"
            for b in row["largest"]
        ]
    return lines


def read_report(file: str) -> dict[str, Any]:
    """A report that `--out` wrote.

    Raises:
        UserError: the file is none.
    """
    report = read_json(Path(file))
    if report is None:
        raise UserError(f"there is no file {file}")
    try:
        for row in report["programs"]:
            _numbers(row)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file} is no report of gvpo-jax compile --out") from error
    return report


def diff(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Two reports beside each other: memory, times and the dearest lines of each program."""
    lines = [f"{'':60} {'A':>10} {'B':>10} {'B / A':>7}"]
    others = {row["name"]: row for row in b["programs"]}
    for row in a["programs"]:
        if (other := others.get(row["name"])) is None:
            continue
        lines.append(row["name"])
        first, second = _numbers(row), _numbers(other)
        for name in dict.fromkeys([*first, *second]):
            lines.append(_diff_line(name, first.get(name), second.get(name)))
    alone = others.keys() ^ {row["name"] for row in a["programs"]}
    lines += [f"only in one of them: {', '.join(sorted(alone))}"] if alone else []
    return "\n".join(lines)


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    numbers = {
        "GiB a chip": row["hbm"]["peak"] / (1 << 30),
        "compiled in, s": row["compile_seconds"],
        "at least, ms": 1e3 * row["seconds"]["estimate"],
    }
    if clock := row.get("clock"):
        numbers["by the compiler's clock, ms"] = 1e3 * clock["seconds"]
        numbers["MFU by it, %"] = 100 * (clock["mfu"] or 0)
        numbers |= {f"  {name}, ms": 1e3 * s for name, s in clock["parts"].items()}
        numbers |= {f"    {source}, ms": 1e3 * s for source, s in clock["sources"].items()}
    return numbers


def _diff_line(name: str, a: float | None, b: float | None) -> str:
    ratio = f"{b / a:7.2f}" if a and b is not None else ""
    shown = ["-" if x is None else f"{x:.4g}" for x in (a, b)]
    return f"  {name[:58]:58} {shown[0]:>10} {shown[1]:>10} {ratio}".rstrip()


def _clock_lines(clock: dict[str, Any] | None) -> list[str]:
    """Of the compiler's own time; of reports without one, that there is none."""
    if clock is None:
        return ["  the compiler's own time: this libtpu gives no cycles, so the bounds are all"]
    whole = clock["seconds"]
    parts = sorted(clock["parts"].items(), key=lambda part: -part[1])
    shares = ", ".join(f"{name} {100 * s / whole:.0f}%" for name, s in parts if s)
    lines = [
        f"  by the compiler's clock {whole:.3g} s, MFU {100 * (clock['mfu'] or 0):.1f}%: {shares}"
    ]
    for name, (count, seconds) in clock["kernels"].items():
        lines.append(f"    of these {seconds:.3g} s in {count} x {name}, by a model")
    lines += [
        f"    {100 * seconds / whole:4.1f}% {source}"
        for source, seconds in clock["sources"].items()
    ]
    return lines


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.2f}"

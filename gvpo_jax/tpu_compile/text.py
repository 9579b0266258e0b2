"""A compile report as a person reads it."""

from typing import Any


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


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.2f}"

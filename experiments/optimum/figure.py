"""The picture of results.json: KL over updates on a logarithmic axis, a panel for each outcome."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from pictures import panels, save

PANELS = (  # title, kinds of conditions, ends of the axis
    ("GVPO, whoever wrote the samples", ("samples",), (1e-15, 1)),
    ("Support cut, and other objectives", ("support cut", "control"), (1e-4, 1e2)),
)


def draw(report: dict, path: Path) -> None:
    """Panels side by side, each with its legend below: where the lines end, highest first."""
    rows = sorted(report["conditions"].items(), key=lambda item: -item[1]["worst"])
    steps, seeds = report["settings"]["steps"], report["settings"]["seeds"]
    figure, places = panels(1, len(PANELS), height=5.4)
    for panel, (title, kinds, ends) in zip(places, PANELS, strict=True):
        for name, row in rows:
            if row["kind"] in kinds:
                curve = row["curve"]
                updates = [steps * n / (len(curve) - 1) for n in range(len(curve))]
                # It ends where it leaves the frame.
                shown = [kl if kl >= ends[0] else float("nan") for kl in curve]
                panel.semilogy(updates, shown, label=f"{number(row['worst'])}: {name}")
        note = f"KL(pi* || pi) over the updates, worst of {seeds} seeds"
        panel.set(title=title, xlabel=note, xlim=(0, steps), ylim=ends)
        panel.legend(loc="upper left", bbox_to_anchor=(0, -0.18))
    save(figure, path, "KL(pi* || pi) over the updates")


def number(kl: float) -> str:
    return "< 1e-16" if kl < 1e-16 else f"{kl:.1e}" if kl < 0.01 else f"{kl:.2g}"

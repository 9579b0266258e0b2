"""The README's tables and the picture, from results.json."""

import re
from collections.abc import Iterable

from gvpo_jax.report.charts import escape

TITLES = {"train": "training step", "rollout": "rollout"}
STYLE = """
text { fill: #7a818a; font: 12px system-ui, sans-serif; }
.one { stroke: #868d96; stroke-dasharray: 3 3; }
.ours { fill: #14998c; }
.peer { fill: #868d96; opacity: .5; }
"""
BAR, GAP, LEFT, SCALE, WIDTH = 13, 14, 130, 60, 400  # pixels; SCALE: of the best peer's bar


def with_tables(page: str, results: dict) -> str:
    """The README with tables of these results between its marks."""
    for task in TITLES:
        text = _table(task, list(_rows(task, results)))
        page = re.sub(
            rf"(<!-- {task} -->\n).*?(<!-- /{task} -->)",
            lambda found, text=text: found[1] + text + found[2],
            page,
            flags=re.DOTALL,
        )
    return page


def picture(results: dict) -> str:
    """Bars: tokens a second of each contestant, as a multiple of the best peer's."""
    parts, height = [], 0
    for column, task in enumerate(TITLES):
        left, y = column * (LEFT + WIDTH), 34
        parts.append(
            f'<text x="{left + LEFT}" y="16">{TITLES[task]}, tokens/s: best peer = 1</text>'
        )
        for workload, row in _rows(task, results):
            rates = _rates(row)
            best = max((rate for who, rate in rates.items() if who != "ours"), default=0) or 1
            parts.append(f'<text x="{left}" y="{y + BAR - 2}">{escape(workload)}</text>')
            for who, rate in rates.items():
                times, bottom = rate / best, y + BAR - 3
                end = left + LEFT + SCALE * times
                kind = "ours" if who == "ours" else "peer"
                parts.append(
                    f'<rect class="{kind}" x="{left + LEFT}" y="{y}" width="{SCALE * times:.1f}" '
                    f'height="{BAR - 2}"/><text x="{end + 5:.1f}" y="{bottom}">{times:.2f} '
                    f"{who.replace('_', ' ')}</text>"
                )
                y += BAR
            y += GAP
        x = left + LEFT + SCALE
        parts.append(f'<line class="one" x1="{x}" x2="{x}" y1="26" y2="{y}"/>')
        height = max(height, y)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * (LEFT + WIDTH)} {height + 8}" '
        f'role="img" aria-label="tokens a second, best peer = 1"><style>{STYLE}</style>'
        + "".join(parts)
        + "</svg>\n"
    )


def _rows(task: str, results: dict) -> Iterable[tuple[str, dict]]:
    for key, row in results.items():
        workload, its_task, device = key.split("/")
        if its_task == task:
            yield workload if device == "cpu" else f"{workload}, {row['machine']}", row


def _rates(row: dict) -> dict[str, float]:
    ran = {who: x for who, x in row["contestants"].items() if "error" not in x}
    return {who: figures["tokens_per_second"] for who, figures in ran.items()}


def _table(task: str, rows: list[tuple[str, dict]]) -> str:
    if not rows:
        return ""
    who = list(dict.fromkeys(x for _, row in rows for x in row["contestants"]))
    ideal = ["ideal"] if task == "train" else []
    lines = [[TITLES[task], *who, "ours / best peer", *ideal, "memory, ours / best peer"]]
    lines.append(["---"] * len(lines[0]))
    for workload, row in rows:
        ran = {x: y for x, y in row["contestants"].items() if "error" not in y}
        peers = [y for x, y in ran.items() if x != "ours"]
        speed = ran["ours"]["tokens_per_second"] / max(y["tokens_per_second"] for y in peers)
        memory = ran["ours"]["peak_gib"] / min(y["peak_gib"] for y in peers)
        cells = [_cell(row["contestants"].get(x)) for x in who]
        times = [f"{row['ideal']:.2f}"] if ideal else []
        lines.append([workload, *cells, f"**{speed:.2f}**", *times, f"{memory:.2f}"])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(figures: dict | None) -> str:
    if not figures or "error" in figures:
        return "did not run"
    rates = (figures[x] for x in ("tokens_per_second", "slowest", "fastest"))
    return "{:.0f} ({:.0f} to {:.0f})".format(*rates) + f", {figures['peak_gib']:.1f} GiB"

"""The README's tables and the picture, from results.json."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from pictures import GREEN, GREY, panels, save

TITLES = {"train": "training step", "rollout": "rollout"}


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


def draw(results: dict, path: Path) -> None:
    """Bars: tokens a second of each contestant, as a multiple of the best peer's."""
    bars = sum(len(_rates(row)) + 1 for row in results.values())
    figure, places = panels(1, len(TITLES), width=5.3, height=0.6 + 0.17 * bars / len(TITLES))
    for panel, (task, title) in zip(places, TITLES.items(), strict=True):
        y, names = 0, {}
        for workload, row in _rows(task, results):
            rates = _rates(row)
            best = max((rate for who, rate in rates.items() if who != "ours"), default=0) or 1
            names[y + (len(rates) - 1) / 2] = workload
            for who, rate in rates.items():
                look = {"color": GREEN} if who == "ours" else {"color": GREY, "alpha": 0.5}
                bar = panel.barh(y, rate / best, height=0.85, **look)
                panel.bar_label(bar, [f"{rate / best:.2f} {who.replace('_', ' ')}"], padding=4)
                y += 1
            y += 1
        panel.axvline(1, color=GREY, linestyle=":", linewidth=0.8, zorder=0)
        panel.set(title=f"{title}, tokens/s: best peer = 1", yticks=list(names))
        panel.set_yticklabels(list(names.values()))
        panel.invert_yaxis()
        panel.margins(x=0.35)
        panel.grid(visible=False)
    save(figure, path, "Tokens a second, best peer = 1")


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

"""A run in a notebook: curves, samples and the report shown in a cell, and a curve that grows.

Nothing else needs to be installed; outside of a notebook these say what there is in words.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gvpo_jax.callbacks import Callback
from gvpo_jax.errors import UserError
from gvpo_jax.report import write_report
from gvpo_jax.report.answers import latest_groups
from gvpo_jax.report.curves import main_figures, metric_figures
from gvpo_jax.report.html import render
from gvpo_jax.rundir.files import read_evaluations, read_latest_completions

Rows = Sequence[Mapping[str, Any]]
_FRAME = '<iframe srcdoc="{page}" style="width:100%;height:{height}px;border:0" sandbox></iframe>'


class Shown:
    """What a notebook shows of a page; `print` gives words."""

    def __init__(self, page: str, words: str, height: int):
        self._page, self._words, self._height = page, words, height

    def _repr_html_(self) -> str:
        # In a frame: neither the page's style nor a model's text gets out of it.
        return _FRAME.format(page=escape(self._page), height=self._height)

    def __repr__(self) -> str:
        return self._words


def plot(history: Rows, run_dir: Path | str | None = None) -> Shown:
    """The curves of a run.

    Args:
        history: as `Trainer.history`.
        run_dir: its folder, for the intervals of held-out scores; None: they are left out.

    Raises:
        UserError: there is nothing to draw yet.
    """
    if not any("step" in row for row in history):
        raise UserError("there is nothing to plot yet: train first")
    last = max(int(row.get("step", 0)) for row in history)
    evaluations = [] if run_dir is None else read_evaluations(Path(run_dir), last)
    large, small = main_figures(history, evaluations), metric_figures(history)
    page = render("curves.html", {"large": large, "small": small[:6]})
    told = [f"{figure.title} {figure.last}" for figure in large if figure.last]
    height = 420 * -(-len(large) // 2) + 300 * -(-len(small[:6]) // 3)
    return Shown(page, f"step {last}: {', '.join(told) or 'no curves'}", height)


def samples(run_dir: Path | str) -> Shown:
    """The newest completions of a run, group by group, with their rewards.

    Raises:
        UserError: there are none yet.
    """
    step, rows = read_latest_completions(Path(run_dir))
    if not rows:
        raise UserError(
            f"{run_dir} has no samples yet: they are written every log.completions_every updates"
        )
    page = render("samples.html", {"groups": latest_groups(step, rows)})
    words = "\n".join(f"{row.get('reward')}  {row.get('completion')!r}" for row in rows[:8])
    return Shown(page, words, 640)


def report(run_dir: Path | str) -> Shown:
    """The whole report of a run, drawn anew. Raises UserError where the folder holds no run."""
    if not Path(run_dir).is_dir():
        raise UserError("there is no report yet: train first")
    path = write_report(run_dir)
    return Shown(path.read_text("utf-8"), str(path), 900)


class LiveCurve(Callback):
    """A callback that draws the curves of a run below a notebook's cell, while it trains.

    every: updates from one drawing to the next.

    Raises:
        UserError: IPython is not installed, so this is no notebook.
    """

    def __init__(self, every: int = 1):
        try:
            from IPython.display import display
        except ImportError:
            raise UserError("LiveCurve is for notebooks: IPython is not installed") from None
        if every < 1:
            raise UserError(f"LiveCurve(every={every}): give 1 or more updates")
        self._display, self._every, self._handle = display, every, None
        self._rows: list[Mapping[str, Any]] = []

    def on_step_end(self, step: int, metrics: Mapping[str, float]) -> None:
        """Draws."""
        self._rows.append({"step": step, **metrics})
        if step % self._every == 0:
            self._draw()

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Draws."""
        self._rows.append({"step": step, **metrics})
        self._draw()

    def _draw(self) -> None:
        shown = plot(self._rows)
        if self._handle is None:
            self._handle = self._display(shown, display_id=True)
        else:
            self._handle.update(shown)

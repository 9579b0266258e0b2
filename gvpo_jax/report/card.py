"""The card of a trained model, README.md: what it is, and what the run's files tell of it."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from gvpo_jax.errors import hide, one_line
from gvpo_jax.report.curves import Rows, is_number, main_figures, metric_figures
from gvpo_jax.report.intervals import Interval, mean_interval
from gvpo_jax.report.scores import column, compare, scores_by_question, span, task_names
from gvpo_jax.rundir.files import Evaluation, read_evaluations, read_metrics, read_summary
from gvpo_jax.rundir.formats import compact, percent

CURVES = "curves.svg"
_PAPER = "https://arxiv.org/abs/2504.19599"
_SITE = "https://github.com/gvpo-jax/gvpo-jax"
_STRETCHES = 8
_COLUMNS = {
    "reward": "reward",
    "loss": "loss",
    "gvpo_mse": "gvpo\\_mse",
    "kl": "KL to the reference, nats per token",
    "completions/mean_length": "tokens per completion",
}
_METHOD = """GVPO (Group Variance Policy Optimization, [arXiv 2504.19599]({paper})) samples a group
of completions for each prompt and compares their rewards. The policy's implicit reward is
β·log(π/π_ref). It is trained until that, less its mean over the group, is the real reward R, less
its own mean. There is one optimum, π ∝ π_ref·exp(R/β)."""
_CITATION = """```bibtex
@article{zhang2025gvpo,
  title   = {GVPO: Group Variance Policy Optimization for Large Language Model Post-Training},
  author  = {Zhang, Kaichen and Hong, Yuzhong and Bao, Junwei and Jiang, Hongfei and Song, Yang
             and Hong, Dingqian and Xiong, Hui},
  journal = {arXiv preprint arXiv:2504.19599},
  year    = {2025}
}
```"""


@dataclass(frozen=True)
class About:
    """What the settings tell of a model.

    Attributes:
        name: of the model; with an owner it is that of its repository.
        base: what training began with.
        base_on_hub: whether that is a name of the hub.
        adapter: whether the files are an adapter alone.
        loss: what was minimised, as `loss.name`.
        data: what the prompts were.
        datasets: those of them that are names of the hub.
        rewards: names of the reward functions, as far as they are settings.
        settings: those that differ from their defaults.
        license: `license`, and maybe `license_name` and `license_link`, of the base.
    """

    name: str
    base: str
    base_on_hub: bool
    adapter: bool
    loss: str
    data: Sequence[str] = ()
    datasets: Sequence[str] = ()
    rewards: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    license: Mapping[str, str] = field(default_factory=dict)


def model_card(about: About, run_dir: Path | None, step: int) -> dict[str, str]:
    """The files of a card by name: README.md, and the picture in it where there are curves.

    Args:
        about: the model.
        run_dir: the folder of the run that it comes from; None: of none.
        step: updates of that run; later ones are left out.

    Raises:
        UserError: a file of the run is broken.
    """
    rows: Rows = []
    evaluations: list[Evaluation] = []
    if run_dir is not None:
        rows = [row for row in read_metrics(run_dir) if row["step"] <= step]
        end = read_summary(run_dir).get("steps")
        end = end if isinstance(end, int) else step + 1  # unknown: what is called after is left out
        evaluations = [e for e in read_evaluations(run_dir, end) if e.step <= step]
    picture = _picture(rows, evaluations)
    results = [*_scores(rows, evaluations), *_curves(rows, bool(picture))]
    sections = {
        "Use": _use(about),
        "Method": _method(about, step if run_dir else None),
        "Data and rewards": _data(about, rows),
        "Results": "\n\n".join(results),
        "Settings": _settings(about),
        "Versions": _versions(),
        "Citation": _CITATION if about.loss == "gvpo" else "",
    }
    parts = [_front_matter(about), f"# {plain(about.name)}", _first_words(about)]
    parts += [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    card = {"README.md": "\n\n".join(parts) + "\n"}
    return card | ({CURVES: picture} if picture else {})


def plain(text: Any) -> str:
    """A text that Markdown and HTML leave as it is, on one line, without secrets."""
    text = one_line(hide(str(text)))
    text = re.sub(r"([\\`*_\[\]#|~$!])", r"\\\1", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("://", "&#58;//").replace("@", "&#64;")


def _front_matter(about: About) -> str:
    """What the hub reads."""
    method = about.loss.replace("_", "-")
    values: dict[str, Any] = {}
    if about.base_on_hub:
        values["base_model"] = about.base
        values["base_model_relation"] = "adapter" if about.adapter else "finetune"
    values["library_name"] = "peft" if about.adapter else "transformers"
    values["pipeline_tag"] = "text-generation"
    values |= about.license
    values |= {"datasets": list(about.datasets)} if about.datasets else {}
    values["tags"] = [*dict.fromkeys((method, "gvpo-jax", "generated_from_trainer"))]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _first_words(about: About) -> str:
    base = plain(about.base)
    base = f"[{base}](https://huggingface.co/{about.base})" if about.base_on_hub else base
    what = f"An adapter for {base}" if about.adapter else f"This is {base}"
    return f"{what}, trained with [gvpo-jax]({_SITE})."


def _use(about: About) -> str:
    name = about.name if re.fullmatch(r"[\w.-]+/[\w.-]+", about.name) else "PATH_OF_THIS_FOLDER"
    if about.adapter:
        load = "from peft import AutoPeftModelForCausalLM\n"
        made = f'AutoPeftModelForCausalLM.from_pretrained("{name}")'
        tokenizer = "from transformers import AutoTokenizer\n"
    else:
        load, tokenizer = "", "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        made = f'AutoModelForCausalLM.from_pretrained("{name}")'
    return (
        f"```python\n{load}{tokenizer}\nmodel = {made}\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```'
    )


def _method(about: About, step: int | None) -> str:
    if about.loss == "gvpo":
        text = _METHOD.format(paper=_PAPER)
    elif about.loss == "sft":
        text = "Supervised fine-tuning on texts of the rows."
    else:
        text = f"Trained with the loss {plain(about.loss)} of gvpo-jax."
    return text if step is None else f"{text}\n\nThese are the weights after {step} updates."


def _data(about: About, rows: Rows) -> str:
    links = {
        name: f"[{plain(name)}](https://huggingface.co/datasets/{name})" for name in _named(about)
    }
    lines = [f"- Prompts: {links.get(what) or plain(what)}" for what in about.data]
    counted = ("rewards/abstained", "rewards/failed")
    logged = {
        key[8:] for row in rows for key in row if key[:8] == "rewards/" and key not in counted
    }
    rewards = about.rewards or sorted(logged)
    lines += [f"- Reward: {', '.join(map(plain, rewards))}"] if rewards else []
    return "\n".join(lines)


def _named(about: About) -> list[str]:
    return [name for name in about.datasets if re.fullmatch(r"[\w.-]+/[\w.-]+", name)]


def _scores(rows: Rows, evaluations: Sequence[Evaluation]) -> list[str]:
    """Held-out scores: of all questions, of each task, and those that only the metrics tell."""
    compared = compare(evaluations)
    if compared is None:
        return []
    scale, ends = compared.scale, compared.evaluations
    lines = []
    tasks = task_names(ends[-1].rows)
    for task in ["", *tasks]:
        cells = []
        for evaluation in ends:
            of_task = [r for r in evaluation.rows if not task or column(r, "task") == task]
            scores = scores_by_question(of_task, scale)
            cells.append(_score(mean_interval(scores.values()), scale.show) if scores else "")
            count = len(scores)
        lines.append([plain(task) or scale.title, str(count), *cells])
    lines += [[plain(key), "", *cells] for key, cells in _told(rows, len(ends)).items()]
    head = ["", "questions", *(evaluation.label for evaluation in ends)]
    return [_table(head, lines), "Intervals are of 95%, over the held-out questions."]


def _told(rows: Rows, count: int) -> dict[str, list[str]]:
    """pass@k and maj@k of the first and the last evaluation, as the metrics have them."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for key, value in row.items():
            if re.fullmatch(r"eval/(pass|maj)@\d+", key) and is_number(value):
                low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
                known = is_number(low) and is_number(high)
                ends: Any = (low, high) if known else (math.nan, math.nan)
                told = _score(Interval(value, *map(float, ends)), percent)
                found.setdefault(key.removeprefix("eval/"), []).append(told)
    return {
        name: [*cells[: count - 1], cells[-1]]
        for name, cells in found.items()
        if len(cells) >= count
    }


def _score(interval: Interval, show: Any) -> str:
    return f"{show(interval.mean)} {span(interval, show)}".strip()


def _curves(rows: Rows, picture: bool) -> list[str]:
    """The picture, and the means over stretches of steps."""
    trained = [row for row in rows if is_number(row.get("loss"))]
    names = [name for name in _COLUMNS if any(is_number(row.get(name)) for row in trained)]
    if "reward" in names and "loss" in names:
        names.remove("loss")  # whose value tells little, beside gvpo_mse
    if not names:
        return []
    size = -(-len(trained) // _STRETCHES)
    lines = []
    for start in range(0, len(trained), size):
        part = trained[start : start + size]
        first, last = part[0]["step"], part[-1]["step"]
        cells = [[row[name] for row in part if is_number(row.get(name))] for name in names]
        steps = str(first) if first == last else f"{first} to {last}"
        lines.append([steps, *(compact(fmean(values)) if values else "" for values in cells)])
    table = _table(["updates", *(_COLUMNS[name] for name in names)], lines)
    image = [f"![Curves of the run]({CURVES})"] if picture else []
    return [*image, table, *(["Means over these updates."] if size > 1 else [])]


def _settings(about: About) -> str:
    if not about.settings:
        return ""
    lines = [[plain(key), plain(value)] for key, value in about.settings.items()]
    told = "All others have the values that gvpo-jax gives them."
    return f"{_table(['setting', 'value'], lines)}\n\n{told}"


def _versions() -> str:
    found = []
    for package in ("gvpo-jax", "jax", "flax", "optax", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # run from its source
            continue
    return ", ".join(found)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


_STYLE = """
svg { font: 11px system-ui, sans-serif; } text { fill: #5c6470; } .title { font-size: 13px; }
.grid { stroke: #ecece7; } .line { fill: none; stroke-width: 2; stroke-linecap: round; }
.faint { stroke-width: 1.2; opacity: .35; } .band { opacity: .16; stroke: none; }
.train { fill: #0f766e; stroke: none; } .train .line { stroke: #0f766e; }
.eval { fill: #b4490f; } .eval .line, .eval .whisker { stroke: #b4490f; }
.whisker { stroke-width: 5; opacity: .25; }
"""


def _picture(rows: Rows, evaluations: Sequence[Evaluation]) -> str:
    """The charts side by side, as an SVG file; empty where there are none."""
    only_kl = [{k: v for k, v in row.items() if k in ("step", "kl")} for row in rows]
    figures = [*main_figures(rows, evaluations), *metric_figures(only_kl)]
    parts, x, height = [], 20, 240
    for figure in figures:
        chart = re.sub(r'<g class="hit">.*?</g>', "", figure.chart)  # nothing points at an image
        _, _, wide, high = re.findall(r'viewBox="(\S+) (\S+) (\S+) (\S+)"', chart)[0]
        width = round(height * int(wide) / int(high))
        place = f'<svg x="{x}" y="34" width="{width}" height="{height}" '
        parts.append(f'<text class="title" x="{x + 10}" y="24">{figure.title}</text>')
        parts.append(chart.replace("<svg ", place, 1))
        x += width + 20
    size = f'width="{x}" height="{height + 44}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x} {height + 44}" {size}>'
        f'<style>{_STYLE}</style><rect {size} fill="#fff"/>{"".join(parts)}</svg>\n'
        if figures
        else ""
    )

"""Make the notebooks of their sources: python experiments/notebooks/build_notebooks.py

The sources are Python with cells marked `# %%`, as jupytext and editors read them. Notebooks have no outputs.
"""

from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).parent
SOURCES = sorted(file for file in HERE.glob("*.py") if file.name != Path(__file__).name)
WHERE = "gvpo-jax/gvpo-jax/blob/main/experiments/notebooks"


def notebook(source: Path) -> nbformat.NotebookNode:
    """A notebook, with a line of badges on top; the same bytes for the same source."""
    made = jupytext.read(source)
    name = f"{source.stem}.ipynb"
    badges = (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{WHERE}/{name}) "
        "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
        f"(https://kaggle.com/kernels/welcome?src=https://github.com/{WHERE}/{name})"
    )
    made.cells.insert(0, nbformat.v4.new_markdown_cell(badges))
    for number, cell in enumerate(made.cells):
        cell["id"] = f"cell-{number}"
    made.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    return made


if __name__ == "__main__":
    for source in SOURCES:
        nbformat.write(notebook(source), source.with_suffix(".ipynb"))

"""The notebooks: made of their sources, without outputs, and every cell runs, on small models."""

import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "notebooks"
sys.path.append(str(FOLDER))
import build_notebooks as build  # noqa: E402

# In place of the cell of parameters, and what the notebook has to print.
SHORT = {
    "loss": ("BETA, K, STEPS = 0.5, 8, 300", "the same from foreign samples: 0.00"),
    "own_reward": (
        "MODEL, STEPS, RUN = 'debug', 2, 'runs/brief'",
        "2 updates; the model is in brief-model",
    ),
    "gemma3_lora_tpu": (
        "MODEL, RUN, NEEDS_TPU = 'debug', 'runs/gemma3', False\n"
        "SETTINGS = {'train__steps': 2, 'train__batch_size': 4, 'train__micro_batches': 1,"
        " 'data__eval_size': 4, 'model__dtype': 'float32', 'data__train_size': 16}",
        "'adapter_config.json', 'adapter_model.safetensors'",
    ),
    "offline": (
        "MODEL, STEPS = 'debug', 2",
        "2 updates, 25% of the completions were demonstrations",
    ),
    "kaggle_tpu": (
        "MODEL, RUN, CHIPS = 'debug', 'runs/qwen3', 1\n"
        "SETTINGS = {'train__steps': 2, 'data__eval_size': 4, 'model__dtype': 'float32',"
        " 'data__train_size': 16, 'data__template_arguments': {}}",
        "saved in qwen3-sums",
    ),
}


@pytest.mark.parametrize("source", build.SOURCES, ids=lambda file: file.stem)
def test_a_notebook_is_what_its_source_says(source):
    made = build.notebook(source)
    saved = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(saved)
    assert saved == made, "run experiments/notebooks/build_notebooks.py"
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert "install" in code[0].metadata.tags
    assert "parameters" in code[1].metadata.tags
    assert f"[{source.stem}.ipynb]" in (FOLDER / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Jupyter's
@pytest.mark.parametrize("source", build.SOURCES, ids=lambda file: file.stem)
def test_every_cell_runs(source, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    parameters, said = SHORT[source.stem]
    made = build.notebook(source)
    made.cells = [c for c in made.cells if "install" not in c.metadata.get("tags", ())]
    for cell in made.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = parameters
    client = nbclient.NotebookClient(
        made, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in made.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert said in printed, printed

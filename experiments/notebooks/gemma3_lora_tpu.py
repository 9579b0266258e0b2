# %% [markdown]
# # Gemma 3 1B with LoRA on a free TPU
#
# For a Colab runtime with one TPU chip (v5e-1). The model learns to add two numbers. Only an adapter is trained.
# Compiled for that chip, and not yet run on it: 5.4 of its 15.75 GiB are needed, and how much the model learns is not known.
#
# Gemma is gated: accept its licence at https://huggingface.co/google/gemma-3-1b-it, then put a token of yours into Colab's secrets as `HF_TOKEN`.
#
# Run the first cell before anything else: it brings a newer JAX than the image has, and JAX can't be replaced once it is loaded.

# %% tags=["install"]
import sys

if "jax" in sys.modules:
    raise SystemExit("JAX is loaded already: restart the session, and run this cell first")
# %pip install -q -U "gvpo-jax[train,tasks] @ git+https://github.com/gvpo-jax/gvpo-jax" "jax[tpu]"

# %% tags=["parameters"]
MODEL = "google/gemma-3-1b-it"
RUN = (
    "runs/gemma3"  # or a folder of Drive, which outlives the session: /content/drive/MyDrive/gemma3
)
SETTINGS = {}  # such as {"train__steps": 50, "loss__beta": 0.05}
NEEDS_TPU = True

# %%
import jax

devices = jax.devices()
print(jax.__version__, devices)
if NEEDS_TPU and devices[0].platform != "tpu":
    raise SystemExit("there is no TPU here: choose a TPU under Runtime > Change runtime type")

# %% [markdown]
# ## The recipe
#
# It comes with the package. Any setting may be changed.

# %%
from gvpo_jax.config_file import load_config, override
from gvpo_jax.trainer import Trainer

config = override(load_config("colab_gemma3_1b_lora"), model__name=MODEL, run__dir=RUN, **SETTINGS)
rows, held_out = config.data.load(config.run.seed)
print(f"{len(rows)} rows to train on, such as {rows[0]['prompt']!r}; {len(held_out)} are held out")

# %% [markdown]
# ## Train
#
# The first update compiles, which takes minutes. Held-out questions are answered before and after.
# If the session ends, run the cells again: the run goes on from its last checkpoint.

# %%
trainer = Trainer(config)
summary = trainer.train(rows, config.rewards.functions(), eval_dataset=held_out)
print(
    f"right before: {summary['eval/accuracy_before']:.1%}, after: {summary['eval/accuracy_after']:.1%}"
)

# %% [markdown]
# ## The whole report: curves, answers before and after, settings

# %%
trainer.report()

# %% [markdown]
# ## Keep the adapter
#
# PEFT loads it beside the model, and so does vLLM: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), "adapter")`.

# %%
from pathlib import Path

trainer.save_adapter("adapter")
print(sorted(path.name for path in Path("adapter").iterdir()))

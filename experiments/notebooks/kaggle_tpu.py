# %% [markdown]
# # Qwen3 1.7B on Kaggle's eight TPU chips
#
# For a Kaggle notebook with the accelerator TPU v5e-8. All of the model is trained, and it learns to add two numbers.
# Compiled for such chips, and not yet run on them: 6.0 of 15.75 GiB are needed on each, and how much the model learns is not known.
#
# Switch the internet on in the notebook's settings. Run the first cell before anything else: it brings a newer JAX than the image has.

# %% tags=["install"]
import sys

if "jax" in sys.modules:
    raise SystemExit("JAX is loaded already: restart the session, and run this cell first")
# %pip install -q -U "gvpo-jax[train,tasks] @ git+https://github.com/gvpo-jax/gvpo-jax" "jax[tpu]"

# %% tags=["parameters"]
MODEL = "Qwen/Qwen3-1.7B"
RUN = "/kaggle/working/qwen3"  # what lies under /kaggle/working is kept with the notebook's version
SETTINGS = {}  # such as {"train__steps": 50, "loss__beta": 0.05}
CHIPS = 8

# %%
import jax

devices = jax.devices()
print(jax.__version__, devices)
if len(devices) < CHIPS:
    raise SystemExit(
        f"{len(devices)} chips are here, not {CHIPS}: choose TPU v5e-8 under Settings > Accelerator"
    )

# %% [markdown]
# ## The settings
#
# A recipe that comes with the package trains an adapter on one chip. Eight chips have room for the whole model: `mesh__fsdp=8` cuts its weights and moments over them.
# Eight prompts with eight completions make a batch, one prompt for each chip.

# %%
from gvpo_jax.config_file import load_config, override
from gvpo_jax.notebook import LiveCurve
from gvpo_jax.trainer import Trainer

settings = {
    "model__name": MODEL,
    "model__quantization": "none",
    "model__lora__rank": None,
    "optimizer__learning_rate": 1e-6,
    "mesh__fsdp": CHIPS,
    "train__batch_size": 8,
    "train__micro_batches": 1,
    "rollout__num_generations": 8,
    "run__dir": RUN,
}
config = override(load_config("colab_qwen3_1.7b_qlora"), **settings | SETTINGS)
rows, held_out = config.data.load(config.run.seed)
print(f"{len(rows)} rows to train on, such as {rows[0]['prompt']!r}; {len(held_out)} are held out")

# %% [markdown]
# ## Train
#
# The first update compiles, which takes minutes. If the session ends, run the cells again: the run goes on from its last checkpoint.

# %%
trainer = Trainer(config, callbacks=[LiveCurve()])
summary = trainer.train(rows, config.rewards.functions(), eval_dataset=held_out)
print(
    f"right before: {summary['eval/accuracy_before']:.1%}, after: {summary['eval/accuracy_after']:.1%}"
)

# %%
trainer.report()

# %% [markdown]
# ## Keep the model
#
# transformers and vLLM load this folder. Save a version of the notebook to keep it.

# %%
trainer.save_pretrained("qwen3-sums")
print("saved in qwen3-sums")

# %% [markdown]
# # Your own data and reward
#
# Fifty prompts and a reward of a few lines: a small model learns to answer briefly.
# It runs on whatever device JAX finds: CPU, GPU or TPU.
#
# Run the first cell before anything else. It brings newer packages than Colab and Kaggle have.

# %% tags=["install"]
import sys

if "jax" in sys.modules:
    raise SystemExit("JAX is loaded already: restart the session, and run this cell first")
# %pip install -q -U "gvpo-jax[train] @ git+https://github.com/gvpo-jax/gvpo-jax"

# %% tags=["parameters"]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
STEPS = 30
RUN = "runs/brief"  # on Colab a folder of Drive outlives the session

# %%
import jax

print(jax.__version__, jax.devices())

# %% [markdown]
# ## The prompts and the reward
#
# A reward function gets a prompt and a completion, and gives a number. Other columns of the rows would come by their names.

# %%
stuff = (
    "rain snow wind fire ice salt sugar bread milk tea coffee paper glass iron gold silver".split()
)
things = "dog cat horse bee fish tree river lake hill city road bridge clock lamp chair table door".split()
things += "book pen coin key cup shoe hat ship train plane bicycle bell drum wall roof garden lemon".split()
rows = [{"prompt": f"What is {name}?"} for name in [*stuff, *(f"a {thing}" for thing in things)]]


def brief(prompt, completion):
    """1 for an answer of one to ten words that ends in a full stop, else less."""
    words = len(completion.split())
    ends = completion.strip().endswith(".")
    return float(ends and words > 0) * min(1.0, 10 / max(words, 1))


# %%
from gvpo_jax.notebook import LiveCurve
from gvpo_jax.trainer import Trainer

trainer = Trainer.from_pretrained(
    MODEL,
    beta=0.05,
    num_generations=8,
    max_completion_length=48,
    learning_rate=2e-5,
    data__chat_template="always",
    train__steps=STEPS,
    train__batch_size=8,
    run__dir=RUN,
    callbacks=[LiveCurve()],
)
question = [{"role": "user", "content": "What is the moon?"}]
before = trainer.generate([question], num_generations=3)[0]

# %% [markdown]
# The curves below grow with every update.

# %%
summary = trainer.train(rows, brief)

# %% [markdown]
# ## What it learned
#
# `trainer.plot()` draws the metrics, and `pandas.DataFrame(trainer.history)` is a table of them. The reward should rise. These are the questions that it learned from: a fair test would hold some out. The log-ratio says how far the policy has moved from the model that it was.

# %%
trainer.plot()

# %%
trainer.samples()

# %%
after = trainer.generate([question], num_generations=3)[0]
for title, texts in (("before", before), ("after", after)):
    print(title)
    for text in texts:
        print("  ", text)

# %% [markdown]
# ## Keep it
#
# transformers, vLLM and SGLang load this folder. The run itself, with its curves as `report.html`, is in `RUN`.
# The same cells go on from its last checkpoint if the session ends.

# %%
trainer.save_pretrained("brief-model")
updates = [row for row in trainer.history if "reward" in row]
print(f"{len(updates)} updates; the model is in brief-model, the report in {RUN}/report.html")

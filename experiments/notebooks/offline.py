# %% [markdown]
# # Answers that were judged elsewhere, and demonstrations
#
# GVPO does not ask who wrote the samples. So it can learn from a file of judged answers, with no sampling at all, and from answers of an expert beside the model's own.
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
STEPS = 20

# %%
import jax

print(jax.__version__, jax.devices())

# %% [markdown]
# ## A file of groups
#
# A row has a prompt, several completions and a reward for each. They may come from another model, from people, or from an earlier run.

# %%
words = {"cold": "warm", "big": "small", "wet": "dry", "up": "down", "fast": "slow", "old": "young"}
words |= {
    "hard": "soft",
    "open": "shut",
    "full": "empty",
    "rich": "poor",
    "day": "night",
    "near": "far",
}
rows = [
    {
        "prompt": f"What is the opposite of {word}?",
        "completions": [
            other.capitalize() + ".",
            f"The opposite of {word} is {other}.",
            "I like it.",
        ],
        "rewards": [1.0, 0.7, 0.0],
    }
    for word, other in words.items()
]
print(rows[0])

# %% [markdown]
# ## Train on the file
#
# The reference is the model itself. Its log-probs of the completions are computed once. `beta` says how far the model may go for a reward.

# %%
from gvpo_jax.trainer import Trainer

trainer = Trainer.from_pretrained(
    MODEL,
    beta=0.1,
    learning_rate=1e-5,
    max_completion_length=48,
    data__chat_template="always",
    train__steps=STEPS,
    train__batch_size=8,
    run__dir="runs/offline",
)
question = [{"role": "user", "content": "What is the opposite of happy?"}]
before = trainer.generate([question], num_generations=3)[0]
summary = trainer.train_offline(rows)
after = trainer.generate([question], num_generations=3)[0]
print("before:", *before, "after:", *after, sep="\n  ")

# %%
trainer.plot()

# %% [markdown]
# ## How near is the optimum?
#
# At the optimum `beta * log-ratio` differs between the completions of a group by just as much as their rewards do. `gvpo_mse` is half the variance of what is left, so it is 0 there.

# %%
losses = [row["gvpo_mse"] for row in trainer.history if "gvpo_mse" in row]
print(f"gvpo_mse {losses[0]:.4f} -> {losses[-1]:.4f}")

# %% [markdown]
# ## Demonstrations beside the model's own answers
#
# Now the model samples, and one completion of each group is the answer in the column `solution`. A function rewards them all.


# %%
def right(prompt, completion, solution):
    """1 if the answer is there, minus a little for each word."""
    return float(solution.strip(".").lower() in completion.lower()) - 0.02 * len(completion.split())


pairs = [
    {"prompt": f"What is the opposite of {word}?", "solution": f"{other.capitalize()}."}
    for word, other in words.items()
]
trainer = Trainer.from_pretrained(
    MODEL,
    beta=0.1,
    learning_rate=1e-5,
    num_generations=4,
    max_completion_length=48,
    data__chat_template="always",
    rollout__demonstrations=1,
    train__steps=STEPS,
    train__batch_size=8,
    run__dir="runs/demonstrations",
)
summary = trainer.train(pairs, right)

# %%
trainer.samples()

# %%
shares = [row["source/demonstration/share"] for row in trainer.history if "reward" in row]
print(f"{len(shares)} updates, {shares[-1]:.0%} of the completions were demonstrations")

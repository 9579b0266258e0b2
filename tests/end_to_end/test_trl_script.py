"""One script, once with TRL's imports and once with ours."""

import subprocess
import sys

from gvpo_jax.config import Config
from gvpo_jax.config_file import override
from gvpo_jax.models.load import load_model
from gvpo_jax.trainer import Trainer

SCRIPT = """
import sys

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback

{imports}

model, folder = sys.argv[1:]


def vowels(prompts, completions, target, **kwargs):
    return [1 - abs(len(text) - t) / 20 for text, t in zip(completions, target)]


def no_spaces(completions, **kwargs):
    return [float(" " not in text) for text in completions]


class Tell(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            step = f"step {{state.global_step}} of {{state.max_steps}}"
            print(f"{{step}}: reward {{logs['reward']:.3f}}")


rows = Dataset.from_list([{{"prompt": f"Say {{i}}:", "target": i}} for i in range(8)])
args = {config}(
    output_dir=folder,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_generations=4,
    max_completion_length=8,
    max_steps=3,
    learning_rate=1e-3,
    beta=0.1,
    logging_steps=1,
    reward_weights=[1.0, 0.5],
    save_strategy="no",
    bf16=False,
    use_cpu=True,
)
trainer = {trainer}(
    model=model,
    reward_funcs=[vowels, no_spaces],
    args=args,
    train_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained(model),
    callbacks=[Tell()],
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
)
trainer.train()
trainer.save_model(f"{{folder}}/adapter")
"""
THEIRS = {
    "imports": "from trl import GRPOConfig, GRPOTrainer",
    "config": "GRPOConfig", "trainer": "GRPOTrainer",
}  # fmt: skip
OURS = {
    "imports": "from gvpo_jax.integrations.trl import GVPOConfig, GVPOTrainer",
    "config": "GVPOConfig", "trainer": "GVPOTrainer",
}  # fmt: skip


def test_a_script_of_trl_is_ported_by_changing_its_imports(tmp_path):
    model = tmp_path / "model"
    config = override(Config(), run__dir=str(tmp_path / "unused"), mesh__fsdp=-1)
    Trainer(config, load_model("debug")).save_pretrained(model)
    for name, words in {"theirs": THEIRS, "ours": OURS}.items():
        script, folder = tmp_path / f"{name}.py", tmp_path / name
        script.write_text(SCRIPT.format(**words))
        command = [sys.executable, str(script), str(model), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        told = [line for line in done.stdout.splitlines() if line.startswith("step ")]
        told = [line for line in told if " of 3: reward " in line]
        assert [line.partition(":")[0] for line in told] == [f"step {i} of 3" for i in (1, 2, 3)]
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert "without effect; it is about PyTorch" in done.stdout

"""Token ids and texts of a small model, for .ci/run: all versions of transformers give the same."""

import sys

from transformers import PreTrainedTokenizerFast

from gvpo_jax.collect.collector import texts_of
from gvpo_jax.data.batch import padded
from gvpo_jax.data.prompts import DataConfig, completion_ids
from gvpo_jax.models import export_model, load_model

folder = sys.argv[1]
model = load_model("debug")
export_model(folder, model, model.params)
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, clean_up_tokenization_spaces=True)
texts = ["x != y, is n't it ?", "  two  spaces\n", "Ünï 日本語 🙂", "4<|im_end|>"]
messages = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
rows = [*messages, *({"prompt": text} for text in texts)]
dated = "{{ bos_token }}{{ strftime_now('%d %b %Y') }} {{ messages[-1]['content'] }}"
for options in (
    DataConfig(chat_template="always", system_prompt="Be brief."),
    DataConfig(chat_template="always", template=dated, template_date="2026-07-31"),
    DataConfig(),
):
    prompts = options.encode(rows, tokenizer)
    print(prompts.fingerprint(), prompts.token_ids)
completions = [completion_ids(text, tokenizer, (257, 259)) for text in texts]
lengths = padded([[len(ids)] for ids in completions])
print(completions, texts_of(tokenizer, padded(completions)[:, None], lengths))

"""OLMo 2: norms behind attention and feed-forward layer; queries and keys normed as a whole."""

from gvpo_jax.models.family import NAMES, Family

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    models="OLMo 2 and 3",
    constants={"norm": "float32", "norms": "after", "qk_norm": True, "qk_norm_over": "width"},
    silent={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    names=NAMES
    | {
        "attn_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
)

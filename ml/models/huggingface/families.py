"""What is known of each Hugging Face family: names, defaults of ``config.json``, fields that change nothing."""

from typing import Any

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForPreTraining",
    "clip": "CLIPModel",
}
# What else may be named in the ``architectures`` of a family, beside the bare ``...Model``.
OTHER_ARCHITECTURES = {"bert": ("BertForMaskedLM", "BertForSequenceClassification")}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
}
# What is written for those that have another name there; the Gemma and Llama families spell the second one otherwise.
ACTIVATION_NAMES = {"gelu_tanh": "gelu_new", "gelu_quick": "quick_gelu"}

# What transformers assumes when a family's file lacks the field; `None` for head_dim: embed_dim / num_heads.
COMMON = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}
_GEMMA = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "max_window_layers": 28, "head_dim": 128},
    "mixtral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    | {"num_experts_per_tok": 2},
    "qwen3_moe": {"max_position_embeddings": 32_768, "num_key_value_heads": 4}
    | {"num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "gemma": _GEMMA | {"num_key_value_heads": 16},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA | {"max_position_embeddings": 131_072, "rope_theta": 1e6, "sliding_window_pattern": 6},
    "gpt2": {"n_positions": 1024, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
    | {"tie_word_embeddings": True},
    "bert": {"max_position_embeddings": 512, "layer_norm_eps": 1e-12, "type_vocab_size": 2, "hidden_act": "gelu"}
    | {"tie_word_embeddings": True},
    "clip": {"projection_dim": 512, "logit_scale_init_value": 2.6592},
    "clip_text_model": {"vocab_size": 49_408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    | {"num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "clip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "patch_size": 32}
    | {"num_attention_heads": 12, "num_channels": 3, "image_size": 224, "hidden_act": "quick_gelu"}
    | {"layer_norm_eps": 1e-5},
}

# Fields without effect on the forward pass.
HARMLESS = frozenset(
    {
        # bookkeeping
        *("_name_or_path", "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "prefix"),
        *("tokenizer_class", "return_dict", "is_decoder", "id2label", "label2id", "num_labels", "problem_type"),
        *("finetuning_task", "task_specific_params", "unsloth_version", "unsloth_fixed", "is_llama_config"),
        "transformers.js_config",
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
        # execution
        *("use_cache", "cache_implementation", "attn_implementation", "_attn_implementation", "pretraining_tp"),
        *("chunk_size_feed_forward", "gradient_checkpointing", "reorder_and_upcast_attn"),
        *("output_router_logits", "output_attentions", "output_hidden_states"),
        # tokens and generation
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("max_length", "min_length", "temperature", "top_k", "top_p", "typical_p", "do_sample", "num_beams"),
        *("num_beam_groups", "length_penalty", "diversity_penalty", "repetition_penalty", "early_stopping"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences"),
        # training only
        *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
        *("attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout"),
        *("initializer_range", "router_aux_loss_coef", "router_jitter_noise"),
        # superseded by another field, or never read by the family that has it
        *("n_ctx", "max_sequence_length", "_sliding_window_pattern", "max_window_layers", "directionality"),
        *(
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
        ),
    }
)

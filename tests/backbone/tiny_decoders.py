"""Small configurations of decoder-only families: width 32, 2 layers, 4 heads."""

from __future__ import annotations

__all__ = ["CONFIGS"]

_USUAL: dict[str, object] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED: dict[str, object] = {**_USUAL, "num_key_value_heads": 2}
_WIDE: dict[str, object] = {**_GROUPED, "head_dim": 16}
_EXPERTS: dict[str, object] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_STATE: dict[str, object] = {
    "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "bos_token_id": 1,
    "eos_token_id": 2}

CONFIGS: dict[str, dict[str, object]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "cohere": {**_GROUPED, "use_qk_norm": True},
    "cohere2": {**_WIDE, "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": {**_USUAL, "num_key_value_heads": 4, "moe_intermediate_size": 16,
                    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "q_lora_rank": 12,
                    "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6,
                    "v_head_dim": 10, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "falcon": {**_USUAL, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True,
               "ffn_hidden_size": 48},
    "gemma": {**_WIDE, "num_key_value_heads": 1},
    "gemma2": {**_WIDE, "query_pre_attn_scalar": 16, "sliding_window": 4},
    "gemma3_text": {**_WIDE, "query_pre_attn_scalar": 16, "sliding_window": 4,
                    "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48,
                "attention_types": [[["global", "local"], 1]], "window_size": 4,
                "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_oss": {**_WIDE, **_EXPERTS, "sliding_window": 4,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48,
             "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2},
    "granite": {**_GROUPED, "residual_multiplier": 0.5, "attention_bias": True,
                "embedding_multiplier": 2.0, "attention_multiplier": 0.3},
    "mamba": {**_STATE, "time_step_rank": 4},
    "mamba2": {**_STATE, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 4},
    "mistral": {**_GROUPED, "sliding_window": 4},
    "mixtral": {**_GROUPED, **_EXPERTS},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    "olmo2": _GROUPED,
    "opt": {**_USUAL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": _GROUPED,
    "phi3": {**_GROUPED, "original_max_position_embeddings": 64},
    "qwen2": _GROUPED,
    "qwen3_moe": {**_WIDE, **_EXPERTS, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "smollm3": {**_GROUPED, "no_rope_layers": [1, 0]},
    "starcoder2": _GROUPED,
}

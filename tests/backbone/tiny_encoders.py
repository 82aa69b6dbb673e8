"""Small configurations of encoders, encoder-decoders and image models: width 32, 4 heads."""

from __future__ import annotations

__all__ = ["CONFIGS", "IMAGES", "PAIRS", "SPEECH", "TEXTS", "TOWERS"]

_TEXT: dict[str, object] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64}
_NARROW: dict[str, object] = {**_TEXT, "embedding_size": 16}
_RELATIVE: dict[str, object] = {
    **_TEXT, "relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 4,
    "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0}
_PAIR: dict[str, object] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": None}
_IMAGE: dict[str, object] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 8}

TEXTS: dict[str, dict[str, object]] = {
    "albert": _NARROW,
    "camembert": _TEXT,
    "deberta-v2": {**_RELATIVE, "share_att_key": True},
    "clip_text_model": {**_TEXT, "eos_token_id": 96},
    "electra": _NARROW,
    "modernbert": {**_TEXT, "local_attention": 4, "global_attn_every_n_layers": 2,
                   "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    "xlm-roberta": _TEXT,
    "xlm-roberta-xl": _TEXT,
}
PAIRS: dict[str, dict[str, object]] = {
    "bart": _PAIR,
    "marian": {**_PAIR, "decoder_vocab_size": 97, "bad_words_ids": None},
    "mbart": {**_PAIR, "scale_embedding": True},
    "pegasus": {**_PAIR, "scale_embedding": True},
}
SPEECH: dict[str, dict[str, object]] = {
    "whisper": {**_PAIR, "num_mel_bins": 8, "max_source_positions": 7,
                "max_target_positions": 64, "suppress_tokens": None,
                "begin_suppress_tokens": None},
}
IMAGES: dict[str, dict[str, object]] = {
    "beit": {**_IMAGE, "use_relative_position_bias": True},
    "deit": {**_IMAGE, "architectures": ["DeiTForImageClassification"]},
    "clip_vision_model": _IMAGE,
    "dinov2": {**_IMAGE, "mlp_ratio": 2, "layerscale_value": 0.5},
    "vit": _IMAGE,
}
TOWERS: dict[str, dict[str, object]] = {  # of different widths
    "clip": {"text_config": {**_TEXT, "vocab_size": 97, "eos_token_id": 2},
             "vision_config": {**_IMAGE, "hidden_size": 40, "num_attention_heads": 2},
             "projection_dim": 16},
}
CONFIGS = {**TEXTS, **PAIRS, **SPEECH, **IMAGES, **TOWERS}

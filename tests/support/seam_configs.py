"""Configs of tiny models of the families behind transformers' seam."""

from __future__ import annotations

from typing import Any

import transformers

BOS, EOS, PAD, START, END, IMAGE, VIDEO = range(7)
BREAK = 118  # behind a row of placeholders; above all letters
TEXT = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
TEXT |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
QWEN_TOKENS = {**TOKENS, "vision_start_token_id": START, "vision_end_token_id": END}
PACKED = {
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 32,
    "intermediate_size": 48,
}


def qwen2_vl() -> Any:
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    text = {**TEXT, "rope_parameters": MROPE}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)


def qwen2_5_vl() -> Any:
    """Blocks 0 and 2 attend to all patches, block 1 within windows of 2 x 2 tokens."""
    vision = {**PACKED, "window_size": 16, "fullatt_block_indexes": [0, 2], "tokens_per_second": 2}
    text = {**TEXT, "rope_parameters": MROPE}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)


def qwen3_vl() -> Any:
    vision = {**PACKED, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)


def qwen3_vl_moe() -> Any:
    vision = {**PACKED, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)


def qwen3_5() -> Any:
    vision = {**PACKED, "num_position_embeddings": 64}
    text = {**TEXT, "head_dim": 32, "layer_types": ["linear_attention", "full_attention"]}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    text |= {"linear_num_value_heads": 4}
    text["rope_parameters"] = {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.25}
    return transformers.Qwen3_5Config(text_config=text, vision_config=vision, **QWEN_TOKENS)


def glm4v() -> Any:
    vision = {**PACKED, "image_size": 32}
    text = {**TEXT, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}
    tokens = {"image_start_token_id": START, "image_end_token_id": END}
    return transformers.Glm4vConfig(text_config=text, vision_config=vision, **TOKENS, **tokens)


def qwen3_5_moe() -> Any:
    dense = qwen3_5()
    text = {**dense.text_config.to_dict(), "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    text |= {"shared_expert_intermediate_size": 16, "model_type": "qwen3_5_moe_text"}
    vision = {**PACKED, "num_position_embeddings": 64}
    return transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)


def glm46v() -> Any:
    dense = glm4v()
    tokens = {"image_start_token_id": START, "image_end_token_id": END}
    text, vision = dense.text_config.to_dict(), dense.vision_config.to_dict()
    return transformers.Glm46VConfig(text_config=text, vision_config=vision, **TOKENS, **tokens)


def glm4v_moe() -> Any:
    vision = {**PACKED, "image_size": 32}
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}
    text |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    tokens = {"image_start_token_id": START, "image_end_token_id": END}
    return transformers.Glm4vMoeConfig(text_config=text, vision_config=vision, **TOKENS, **tokens)


SQUARE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def internvl() -> Any:
    vision = {
        **SQUARE,
        "image_size": [32, 32],
        "patch_size": [4, 4],
        "use_qk_norm": True,
        "layer_scale_init_value": 1.0,
    }
    return transformers.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2"}, vision_config=vision, image_token_id=IMAGE, image_seq_length=16
    )


def gemma3() -> Any:
    vision = {**SQUARE, "image_size": 32, "patch_size": 4, "model_type": "siglip_vision_model"}
    text = {**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    tokens = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=16, **tokens)


def gemma4() -> Any:
    """Two layers attend to images in both directions, one of them within a window; keys have half as many heads."""
    vision = {**SQUARE, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2}
    vision |= {"position_embedding_size": 64, "model_type": "gemma4_vision"}
    text = {**TEXT, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "sliding_window": 64}
    text |= {"vocab_size_per_layer_input": 120, "use_bidirectional_attention": "vision"}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    others = {"boi_token_id": START, "eoi_token_id": END, "audio_config": None, "audio_token_id": 119}
    return transformers.Gemma4Config(text_config=text, vision_config=vision, **TOKENS, **others)


def idefics3() -> Any:
    vision = {**SQUARE, "image_size": 32, "patch_size": 4}
    text = {**TEXT, "model_type": "llama"}
    return transformers.Idefics3Config(text_config=text, vision_config=vision, image_token_id=IMAGE, pad_token_id=PAD)


def smolvlm() -> Any:
    vision = {**SQUARE, "image_size": 32, "patch_size": 4}
    text = {**TEXT, "model_type": "llama"}
    return transformers.SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, pad_token_id=PAD)


PIXTRAL_VISION = {**SQUARE, "head_dim": 8, "image_size": 64, "patch_size": 4, "model_type": "pixtral"}
MISTRAL = {**TEXT, "head_dim": 8, "model_type": "mistral", "sliding_window": None}


def mistral3() -> Any:
    return transformers.Mistral3Config(text_config=MISTRAL, vision_config=PIXTRAL_VISION, image_token_index=IMAGE)


def pixtral() -> Any:
    """Pixtral-12B is a LLaVA by its class; no patches are merged."""
    layer = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    vision = {**PIXTRAL_VISION, "patch_size": 8}
    return transformers.LlavaConfig(text_config=MISTRAL, vision_config=vision, image_token_index=IMAGE, **layer)

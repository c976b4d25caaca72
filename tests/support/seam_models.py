"""Tiny random models of the families behind transformers' seam, and prompts as their stock processors write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from checkpoints import scale_up

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


@dataclass(frozen=True)
class Family:
    """One of them.

    Attributes:
        name: of the class, before ``ForConditionalGeneration``.
        config: makes a tiny one.
        sizes: pictures have any size; otherwise 4 x 4 tokens.
        grids: positions have three axes, of ``image_grid_thw``.
        row_ends: each row of an image's placeholders ends with a token of its own.
        timestamps: text stands between the frames of a video.
        videos: it takes any.
    """

    name: str
    config: Callable[[], Any]
    sizes: bool = True
    grids: bool = True
    row_ends: bool = False
    timestamps: bool = False
    videos: bool = True

    def build(self, attention: str = "sdpa", **text: Any) -> Any:
        """A model of random weights that are far from zero; ``text`` changes fields of its language model's config."""
        torch.manual_seed(0)
        config = self.config()
        config.text_config.update(text)
        config._attn_implementation = attention
        model = getattr(transformers, f"{self.name}ForConditionalGeneration")(config).eval()
        scale_up(model)
        never = [START, END, IMAGE, VIDEO]  # a trained model does not say them
        model.generation_config.update(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS, suppress_tokens=never)
        return model


FAMILIES = {
    "qwen2_vl": Family("Qwen2VL", qwen2_vl),
    "qwen2_5_vl": Family("Qwen2_5_VL", qwen2_5_vl),
    "qwen3_vl": Family("Qwen3VL", qwen3_vl, timestamps=True),
    "qwen3_vl_moe": Family("Qwen3VLMoe", qwen3_vl_moe, timestamps=True),
    "qwen3_5": Family("Qwen3_5", qwen3_5, timestamps=True),
    "qwen3_5_moe": Family("Qwen3_5Moe", qwen3_5_moe, timestamps=True),
    "glm4v": Family("Glm4v", glm4v, videos=False),
    "glm4v_moe": Family("Glm4vMoe", glm4v_moe, videos=False),
    "glm46v": Family("Glm46V", glm46v, videos=False),
    "internvl": Family("InternVL", internvl, sizes=False, grids=False, videos=False),
    "gemma3": Family("Gemma3", gemma3, sizes=False, grids=False, videos=False),
    "gemma4": Family("Gemma4", gemma4, grids=False, timestamps=True),
    "mistral3": Family("Mistral3", mistral3, grids=False, row_ends=True, videos=False),
    "pixtral": Family("Llava", pixtral, grids=False, row_ends=True, videos=False),
    "idefics3": Family("Idefics3", idefics3, sizes=False, grids=False, videos=False),
    "smolvlm": Family("SmolVLM", smolvlm, sizes=False, grids=False, videos=False),
}


class Picture(NamedTuple):
    """An image, or a video of several frames, of rows x columns tokens of 2 x 2 patches."""

    seed: int
    rows: int = 4
    columns: int = 4
    frames: int = 0

    @property
    def tokens(self) -> int:
        """Of one frame."""
        return self.rows * self.columns

    def noise(self, *shape: int) -> Tensor:
        """Its pixels."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed))


Part = str | Picture


def prompt(family: Family, parts: list[Part]) -> list[int]:
    """A letter is a token; pictures are between a start and an end."""
    ids = [BOS]
    for part in parts:
        if isinstance(part, str):
            ids += [7 + ord(letter) % 100 for letter in part]
        elif family.timestamps and part.frames:
            for frame in range(part.frames):
                ids += [50 + frame, START, *[VIDEO] * part.tokens, END]
        else:
            ids += [START, *_placeholders(family, part), END]
    return ids


def _placeholders(family: Family, picture: Picture) -> list[int]:
    if family.row_ends:
        return [*[*[IMAGE] * picture.columns, BREAK] * picture.rows][:-1]  # the last row has the image's end
    return [VIDEO if picture.frames else IMAGE] * (picture.tokens * max(1, picture.frames))


def batch(family: Family, rows: list[list[Part]], side: str = "left", bos: bool = True) -> dict[str, Tensor]:
    """What the stock processor makes of prompts."""
    prompts = [prompt(family, parts)[not bos :] for parts in rows]
    longest = max(map(len, prompts))

    def padded(row: list[int], fill: int) -> list[int]:
        more = [fill] * (longest - len(row))
        return more + row if side == "left" else row + more

    ids = torch.tensor([padded(row, PAD) for row in prompts])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([padded([1] * len(row), 0) for row in prompts])}
    pictures = [[part for part in parts if isinstance(part, Picture)] for parts in rows]
    images = [[picture for picture in row if not picture.frames] for row in pictures]
    videos = [picture for row in pictures for picture in row if picture.frames]
    if family.name == "Gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if family.grids or family.name == "Gemma4":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return inputs | _pixels(family, images) | _videos(family, videos)


def _pixels(family: Family, images: list[list[Picture]]) -> dict[str, Tensor]:
    flat = [picture for row in images for picture in row]
    if not flat:
        return {}
    if family.grids:
        grid = torch.tensor([[1, 2 * picture.rows, 2 * picture.columns] for picture in flat])
        patches = [picture.noise(4 * picture.tokens, 3 * 2 * 4 * 4) for picture in flat]
        return {"pixel_values": torch.cat(patches), "image_grid_thw": grid}
    if family.name == "Gemma4":
        pixels, places = _with_places([picture._replace(frames=1) for picture in flat])
        return {"pixel_values": pixels, "image_position_ids": places}
    if family.row_ends:
        sizes = [[8 * picture.rows, 8 * picture.columns] for picture in flat]
        height, width = (max(edges) for edges in zip(*sizes, strict=True))
        filled = [
            F.pad(picture.noise(3, y, x), (0, width - x, 0, height - y))
            for picture, (y, x) in zip(flat, sizes, strict=True)
        ]
        return {"pixel_values": torch.stack(filled), "image_sizes": torch.tensor(sizes)}
    if family.name in ("Idefics3", "SmolVLM"):
        most = max(map(len, images))
        black = torch.zeros(3, 32, 32)
        rows = [[*(p.noise(3, 32, 32) for p in row), *[black] * (most - len(row))] for row in images]
        return {"pixel_values": torch.stack([torch.stack(row) for row in rows])}
    return {"pixel_values": torch.stack([picture.noise(3, 32, 32) for picture in flat])}


def _with_places(videos: list[Picture]) -> tuple[Tensor, Tensor]:
    """Patches of all frames, and the column and row of each; filled up to the most that one has."""
    pixels = [frame for video in videos for frame in video.noise(video.frames, 4 * video.tokens, 3 * 4 * 4)]
    places = [
        torch.cartesian_prod(torch.arange(2 * video.rows), torch.arange(2 * video.columns)).flip(-1)
        for video in videos
        for _ in range(video.frames)
    ]
    return pad_sequence(pixels, batch_first=True), pad_sequence(places, batch_first=True, padding_value=-1)


def _videos(family: Family, videos: list[Picture]) -> dict[str, Tensor]:
    if not videos:
        return {}
    if family.name == "Gemma4":
        pixels, places = _with_places(videos)
        counts = torch.tensor([video.frames for video in videos])
        return {"pixel_values_videos": pixels, "video_position_ids": places, "num_frames_per_video": counts}
    grid = torch.tensor([[video.frames, 2 * video.rows, 2 * video.columns] for video in videos])
    patches = [video.noise(video.frames * 4 * video.tokens, 3 * 2 * 4 * 4) for video in videos]
    return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": grid}

"""Tiny random models of transformers' video families, with their stock processors, and the method in plain code.

The processors are transformers' own, counting rules included. Only what decodes and resizes videos is a stand-in, as
transformers' video processors need torchvision.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import hf_models
import numpy as np
import torch
from hf_models import EOS, IMAGE, PAD, VIDEO, text_config, tokenizer, vision_config
from torch import Tensor, nn
from transformers import (
    BatchFeature,
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    Qwen2Config,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
)
from transformers.video_utils import make_batched_videos

FAMILIES = {
    "onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
    "next_video": (LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration),
    "video_llava": (VideoLlavaConfig, VideoLlavaForConditionalGeneration),
}


def build(family: str, *, edge: int = 56, siglip: bool | None = None, **config: Any) -> Any:
    """A random model of a family, in float32, ready for inference; the same arguments give the same weights.

    Args:
        family: a key of ``FAMILIES``.
        edge: of an image, tile or frame, in pixels; a patch is 14 x 14.
        siglip: an encoder without CLS token; OneVision's only, if not given.
        **config: fields of the model's config.
    """
    config_class, model_class = FAMILIES[family]
    text: Any = text_config()
    if family == "onevision":
        text = Qwen2Config.from_dict(text.to_dict() | {"model_type": "qwen2"})
    if family != "video_llava":
        config.setdefault("image_grid_pinpoints", pinpoints(edge))
    vision = vision_config(family == "onevision" if siglip is None else siglip, image_size=edge)
    tokens = {"image_token_index": IMAGE, "video_token_index": VIDEO, "pad_token_id": PAD}
    return hf_models.build(model_class, config_class(vision_config=vision, text_config=text, **tokens, **config))


def pinpoints(edge: int) -> list[list[int]]:
    """(height, width) of the grids of at most 2 x 2 tiles, and 1 x 3."""
    return [[edge, 2 * edge], [2 * edge, edge], [2 * edge, 2 * edge], [edge, 3 * edge]]


class Frames:
    """In the place of a video processor: a video is an array (F, H, W, 3), each frame is prepared as an image."""

    model_input_names = ("pixel_values_videos",)

    def __init__(self, edge: int) -> None:
        self.prepare = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})

    def __call__(self, videos: Any, **_: Any) -> BatchFeature:
        frames = [np.stack(self.prepare(list(video))["pixel_values"]) for video in make_batched_videos(videos)]
        return BatchFeature({"pixel_values_videos": frames}, tensor_type="pt")


def processor_for(family: str, *, edge: int = 56, padding_side: str = "left", **settings: Any) -> Any:
    """transformers' own processor of a family; ``settings`` replace its arguments."""
    size, crop = {"shortest_edge": edge}, {"height": edge, "width": edge}
    base, image_processor, counting = {
        "onevision": (
            LlavaOnevisionProcessor,
            LlavaOnevisionImageProcessorPil(size=crop, image_grid_pinpoints=pinpoints(edge)),
            {"num_image_tokens": (edge // 14) ** 2, "vision_feature_select_strategy": "full"},
        ),
        "next_video": (
            LlavaNextVideoProcessor,
            LlavaNextImageProcessorPil(size=size, crop_size=crop, image_grid_pinpoints=pinpoints(edge)),
            {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
        ),
        "video_llava": (VideoLlavaProcessor, VideoLlavaImageProcessor(size=size, crop_size=crop), {"patch_size": 14}),
    }[family]

    class Processor(base):  # the check of the parts' classes would import torchvision
        def check_argument_for_proper_class(self, *_: Any) -> None: ...

    parts = {"image_processor": image_processor, "video_processor": Frames(edge), "tokenizer": tokenizer(padding_side)}
    return Processor(**parts, **{**counting, **settings})


def video(seed: int, frames: int = 3) -> np.ndarray:
    """A video of noise (F, 60, 90, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (frames, 60, 90, 3), dtype=np.uint8)


def plain_encode(tower: nn.Module, pixels: Tensor, layer: int, cls_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, S, D) of an encoder layer, score (B, N) of each patch, keys (B, S, Dk), by eager attention."""
    eager = copy.deepcopy(tower)
    eager.set_attn_implementation("eager")
    output = eager(pixels, output_attentions=True, output_hidden_states=True)
    index = layer % len(eager.encoder.layers)
    scored = eager.encoder.layers[index]
    attention = output.attentions[index]  # (B, H, S, S)
    scores = attention[:, :, 0, 1:].sum(1) if cls_token else attention.mean(2).sum(1)
    keys = scored.self_attn.k_proj(scored.layer_norm1(output.hidden_states[index]))
    heads = scored.self_attn.num_heads
    return output.hidden_states[index + 1], scores, keys.unflatten(-1, (heads, -1)).mean(2)


def plain_select(scores: Tensor, keys: Tensor, dominant: int, contextual: int, cls_token: bool) -> tuple[list, list]:
    """Positions of the dominant tokens, and for each contextual token its target's and then its members' positions.

    Args:
        scores: (N,) of one image's patches.
        keys: (S, Dk).
    """
    first = int(cls_token)
    ranked = sorted(range(len(scores)), key=lambda patch: -scores[patch].item())
    kept = sorted([patch + first for patch in ranked[: dominant - first]] + [0] * first)
    rest = [position for position in range(len(keys)) if position not in kept]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    groups = {target: [target] for target in targets}
    for position in rest:
        if position not in groups:
            similar = torch.cosine_similarity(keys[position][None], keys[targets])
            groups[targets[similar.argmax()]].append(position)
    return kept, list(groups.values())


def plain_zip(
    hidden: Tensor, scores: Tensor, keys: Tensor, dominant: int, contextual: int, cls_token: bool
) -> list[tuple[Tensor, list[int]]]:
    """Dominant and contextual tokens (K + M, D) of each image, and the positions of the dominant ones."""
    zipped = []
    for tokens, score, key in zip(hidden, scores, keys, strict=True):
        kept, groups = plain_select(score, key, dominant, contextual, cls_token)
        merged = [tokens[target] + (tokens[members].mean(0) if members else 0) for target, *members in groups]
        zipped.append((torch.stack([tokens[position] for position in kept] + merged), kept))
    return zipped


def plain_tiles(
    tiles: list[tuple[Tensor, list[int]]], columns: int, side: int, contextual: int, cls_token: bool
) -> Tensor:
    """One image's tiles (of :func:`plain_zip`) in reading order, (T * (K + M), D).

    The whole image, the patches of all other tiles in raster order of the image, their CLS, their contextual tokens.
    """
    (whole, _), *others = tiles
    patches, cls, merged = [], [], []
    for number, (tokens, kept) in enumerate(others):
        for token, position in zip(tokens, kept, strict=False):
            if cls_token and position == 0:
                cls.append(token)
                continue
            y, x = divmod(position - int(cls_token), side)
            patches.append(((number // columns * side + y, number % columns * side + x), token))
        merged += tokens[len(kept) :]
    patches = [token for _, token in sorted(patches, key=lambda patch: patch[0])]
    assert len(merged) == contextual * len(others)
    return torch.cat([whole, torch.stack(patches + cls + merged)])


Run = tuple[int, Tensor]
"""Placeholders that the processor writes for an image or video, and the features (n, d) that take their place."""


def plain_rows(model: Any, inputs: Any, images: Sequence[Run] = (), videos: Sequence[Run] = ()) -> list[Tensor]:
    """Each row's embeddings (n, d) without its padding, with features in the place of each run of placeholders."""
    embed = model.get_input_embeddings()
    return [
        torch.cat([embed(ids) if features is None else features for ids, features in row])
        for row in _segments(inputs["input_ids"], inputs, images, videos)
    ]


def _segments(
    values: Tensor, inputs: Any, images: Sequence[Run], videos: Sequence[Run]
) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
    """Each row of ``values`` (B, S) without padding, cut into single tokens and runs with their features."""
    runs = {IMAGE: iter(images), VIDEO: iter(videos)}
    for row, ids, mask in zip(values, inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        kept, tokens, parts = row[mask], ids[mask], []
        while len(tokens):
            count, features = next(runs[tokens[0].item()]) if tokens[0].item() in runs else (1, None)
            assert (tokens[:count] == tokens[0]).all()
            parts.append((kept[:count], features))
            kept, tokens = kept[count:], tokens[count:]
        yield parts


def plain_loss(
    model: Any, inputs: Any, labels: Tensor, images: Sequence[Run] = (), videos: Sequence[Run] = ()
) -> Tensor:
    """Cross-entropy of the labelled tokens of text, each predicted from what stands before it in its row."""
    logits = [plain_logits(model, row)[:-1] for row in plain_rows(model, inputs, images, videos)]
    targets = []
    for row in _segments(labels, inputs, images, videos):
        parts = [own if features is None else own.new_full((len(features),), -100) for own, features in row]
        targets.append(torch.cat(parts)[1:])
    return torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets))


def plain_logits(model: Any, row: Tensor) -> Tensor:
    """Logits (n, V) of one row's embeddings (n, d)."""
    return model.lm_head(model.model.language_model(inputs_embeds=row[None]).last_hidden_state)[0]


def plain_answers(model: Any, row: Tensor, length: int, beams: int) -> list[list[int]]:
    """The best answers of some length to one row's embeddings by beam search (1: greedy), without a cache."""
    found: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(length):
        grown = []
        for score, answer in found:
            said = model.get_input_embeddings()(torch.tensor(answer, dtype=torch.long))
            scores = plain_logits(model, torch.cat([row, said]))[-1].log_softmax(-1)
            scores[EOS] = -float("inf")  # min_new_tokens
            best = scores.topk(beams)
            grown += [(score + float(value), [*answer, int(token)]) for value, token in zip(*best, strict=True)]
        found = sorted(grown, reverse=True)[:beams]
    return [answer for _, answer in found]


def text_labels(inputs: Any) -> Tensor:
    """The tokens of text themselves, without those that are special."""
    return inputs["input_ids"].masked_fill(inputs["input_ids"] <= VIDEO, -100)

"""Tiny random models of the families behind transformers' seam, and prompts as their stock processors write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import seam_configs as configs
import torch
import torch.nn.functional as F
import transformers
from seam_configs import BOS, BREAK, END, EOS, IMAGE, PAD, START, VIDEO
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from checkpoints import scale_up


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
    "qwen2_vl": Family("Qwen2VL", configs.qwen2_vl),
    "qwen2_5_vl": Family("Qwen2_5_VL", configs.qwen2_5_vl),
    "qwen3_vl": Family("Qwen3VL", configs.qwen3_vl, timestamps=True),
    "qwen3_vl_moe": Family("Qwen3VLMoe", configs.qwen3_vl_moe, timestamps=True),
    "qwen3_5": Family("Qwen3_5", configs.qwen3_5, timestamps=True),
    "qwen3_5_moe": Family("Qwen3_5Moe", configs.qwen3_5_moe, timestamps=True),
    "glm4v": Family("Glm4v", configs.glm4v, videos=False),
    "glm4v_moe": Family("Glm4vMoe", configs.glm4v_moe, videos=False),
    "glm46v": Family("Glm46V", configs.glm46v, videos=False),
    "internvl": Family("InternVL", configs.internvl, sizes=False, grids=False, videos=False),
    "gemma3": Family("Gemma3", configs.gemma3, sizes=False, grids=False, videos=False),
    "gemma4": Family("Gemma4", configs.gemma4, grids=False, timestamps=True),
    "mistral3": Family("Mistral3", configs.mistral3, grids=False, row_ends=True, videos=False),
    "pixtral": Family("Llava", configs.pixtral, grids=False, row_ends=True, videos=False),
    "idefics3": Family("Idefics3", configs.idefics3, sizes=False, grids=False, videos=False),
    "smolvlm": Family("SmolVLM", configs.smolvlm, sizes=False, grids=False, videos=False),
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

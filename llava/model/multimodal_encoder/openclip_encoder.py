"""OpenCLIP's ConvNeXt, Mini-Gemini's high-resolution tower: the maps of its four stages.

Written out with the names of its checkpoints (``stages.0.blocks.0.conv_dw``, …), which transformers' ConvNeXt does not
have; OpenCLIP's own package would bring timm, and that cannot be imported without torchvision. Of timm 1.0.29's
``convnext_large`` and ``convnext_base``, with the same random weights, names and maps were the same, bit by bit.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ConvNextConfig

from llava.model.checkpoints.files import find_file, load_weights
from llava.model.checkpoints.loading import gathered
from llava.model.multimodal_encoder.tower_files import resolve_tower_path

_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_EPS = 1e-6  # ConvNeXt's, everywhere
_XXLARGE = 384  # width of the first stage, where that is not so
STRIDE = 4  # pixels along an edge of a position in the first stage's map


class OpenCLIPVisionTower(nn.Module):
    """ConvNeXt-L of ``laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup``, or OpenCLIP's Base.

    Without stochastic depth. The released code builds this tower behind the call that ends training mode, so that by
    its text it drops blocks at random (up to one in ten) when it answers, too; here the same image is the same tokens.

    Args:
        vision_tower: hub name or folder with OpenCLIP's weights (``config.mm_vision_tower_aux``); a relative folder may
            also lie inside the checkpoint's.
        args: the model's config; its ``mm_vision_aux_config``, if stored, spares a look into the weights.
        delay_load: build it without weights; :meth:`load_model` loads them, or a checkpoint brings its own.

    Attributes:
        is_loaded: whether it has trained weights.

    Raises:
        OSError: the weights can neither be read nor fetched.
        ValueError: they are not a ConvNeXt's.
    """

    config_key: ClassVar[str] = "mm_vision_aux_config"

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False) -> None:
        super().__init__()
        self.vision_tower_name = resolve_tower_path(vision_tower, args)
        stored = getattr(args, self.config_key, None)
        self.config = ConvNextConfig(**stored) if stored else _architecture(self._read("meta"), self.vision_tower_name)
        widths, depths = self.config.hidden_sizes, self.config.depths
        self.vision_stem = nn.Sequential(nn.Conv2d(3, widths[0], STRIDE, STRIDE), ChannelNorm(widths[0], eps=_EPS))
        before = [widths[0], *widths[:-1]]
        self.vision_stages = nn.ModuleList(map(Stage, before, widths, depths))
        self.requires_grad_(False)
        self.untrained: frozenset[str] = frozenset()
        self.is_loaded = False
        if not delay_load:
            self.load_model()

    def load_model(self) -> None:
        """Load the weights from ``vision_tower_name``, in place; nothing happens if it has some.

        Raises:
            OSError: there are none, or the file is damaged.
            ValueError: one is missing there, or has another shape.
        """
        if not self.is_loaded:
            with gathered(self.parameters()):
                self.load_state_dict(self.read_weights())
            self.is_loaded = True

    def read_weights(self) -> dict[str, Tensor]:
        """The weights by name, on the CPU, as ``vision_tower_name`` has them.

        Raises:
            OSError: there are none, or the file is damaged.
            ValueError: one is missing there, or has another shape.
        """
        found = self._read("cpu")
        own = {key: getattr(value, "ds_shape", value.shape) for key, value in self.state_dict(keep_vars=True).items()}
        if wrong := sorted(key for key, shape in own.items() if key not in found or found[key].shape != shape):
            raise ValueError(
                f"the vision tower {self.vision_tower_name!r} lacks {len(wrong)} weights, or has them in another "
                f"shape, such as {', '.join(wrong[:3])}: the file is incomplete or holds another model. Download it "
                "again, or set mm_vision_tower_aux in the checkpoint's config.json to the right one"
            )
        return {key: found[key] for key in own}

    def _read(self, device: str) -> dict[str, Tensor]:
        """OpenCLIP's weights under the names that Mini-Gemini's checkpoints have; ``"meta"`` reads their shapes only.

        ``visual.trunk.stem.0.weight`` is ``vision_stem.0.weight`` there, and so on; the text encoder is left out.
        """
        file = next(filter(None, (find_file(self.vision_tower_name, name) for name in _FILES)), None)
        if file is None:
            raise OSError(
                f"there is no {' or '.join(_FILES)} in the vision tower mm_vision_tower_aux="
                f"{self.vision_tower_name!r}: it is neither a folder (also not inside the checkpoint) nor to be had "
                "from the hub. Download laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup and set "
                "mm_vision_tower_aux in the checkpoint's config.json to its folder"
            )
        trunk = "visual.trunk."
        weights = load_weights(file, device)
        return {"vision_" + key.removeprefix(trunk): value for key, value in weights.items() if key.startswith(trunk)}

    def needs(self, key: str) -> bool:
        """Whether the tower uses the weight of this name: all of them."""
        return True

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps of all stages.

        Args:
            images: (B, 3, h, w).

        Returns:
            (B, C, h / 4, w / 4), then (B, 2C, h / 8, w / 8) and so on, in the tower's type. The released code returns
            them scaled up to the first one's size and joined, (B, 15C, h / 4, w / 4): 424 MB for an image of 768
            pixels in float32. Here :func:`llava.model.mini_gemini.mining.sub_patches` reads from them what is needed.
        """
        # The channels of a position side by side, as the blocks' norms and MLPs want them: no copies between.
        images = images.to(device=self.device, dtype=self.dtype, memory_format=torch.channels_last)
        maps = [self.vision_stem(images)]
        for stage in self.vision_stages:
            maps.append(stage(maps[-1]))
        return tuple(maps[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.vision_stem[0].weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vision_stem[0].weight.device

    @property
    def hidden_size(self) -> int:
        """Channels of all stages together: 2880 for ConvNeXt-L."""
        return sum(self.config.hidden_sizes)


class Stage(nn.Module):
    """A stage of ConvNeXt: half the resolution (not in the first stage), then blocks."""

    def __init__(self, before: int, width: int, depth: int) -> None:
        super().__init__()
        halved = (ChannelNorm(before, eps=_EPS), nn.Conv2d(before, width, 2, 2)) if before != width else ()
        self.downsample = nn.Sequential(*halved)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, before, h, w) to (B, width, h', w')."""
        return self.blocks(self.downsample(maps))


class Block(nn.Module):
    """A block of ConvNeXt: a 7 x 7 convolution of each channel, an MLP of each position, and the way around both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, 4 * width))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * width, width))
        self.gamma = nn.Parameter(1e-6 * self.norm.weight.detach())

    def forward(self, maps: Tensor) -> Tensor:
        """(B, width, h, w) to the same."""
        positions = self.conv_dw(maps).permute(0, 2, 3, 1)
        return maps + (self.gamma * self.mlp(self.norm(positions))).permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of maps (B, C, h, w)."""

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise each position."""
        positions = maps.permute(0, 2, 3, 1)
        return F.layer_norm(positions, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def _architecture(weights: dict[str, Tensor], name: str) -> ConvNextConfig:
    """Widths and depths, as the weights' names and shapes have them."""
    depths: dict[int, int] = {}
    widths: dict[int, int] = {}
    for key, value in weights.items():
        if match := re.fullmatch(r"vision_stages\.(\d+)\.blocks\.(\d+)\.gamma", key):
            stage, block = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), block + 1)
            widths[stage] = len(value)
    stages = range(len(depths))
    if widths.get(0) == _XXLARGE:
        raise ValueError(
            f"the vision tower mm_vision_tower_aux={name!r} is OpenCLIP's ConvNeXt-XXLarge, whose norms have another "
            "epsilon: supported are Large, which Mini-Gemini has, and Base"
        )
    if not depths or set(depths) != set(stages) or any(2 * widths[a] != widths[b] for a, b in pairwise(stages)):
        raise ValueError(
            f"the vision tower mm_vision_tower_aux={name!r} is not OpenCLIP's ConvNeXt: supported is what "
            "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup has (visual.trunk.stages.0.blocks.0.gamma, …)"
        )
    return ConvNextConfig(depths=[depths[stage] for stage in stages], hidden_sizes=[widths[stage] for stage in stages])

"""Cases recorded from the released method: a subset lies in ``golden``; where the whole set is at hand, all are run.

``golden/FORMAT.md`` says what the fields are.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from checkpoints import GOLDEN, TOWER_PREFIX, write_tokenizer, write_tower

_SHARED = Path(__file__).parents[3] / "shared" / "golden"
ROOT = _SHARED if _SHARED.is_dir() else GOLDEN


def cases(kind: str) -> list[str]:
    return sorted(path.stem for path in ROOT.glob(f"{kind}_*.json"))


class Case(SimpleNamespace):
    """One recorded case: the fields of its JSON, and ``data``, its tensors."""

    @classmethod
    def read(cls, name: str) -> Case:
        fields = json.loads((ROOT / f"{name}.json").read_text())
        return cls(**fields, data=load_file(ROOT / fields["tensors"]))

    def pixels(self, compact: torch.Tensor) -> torch.Tensor:
        return compact.repeat_interleave(self.pixel_expand, -1).repeat_interleave(self.pixel_expand, -2)

    def images(self) -> torch.Tensor | list[torch.Tensor]:
        pixels = self.pixels(self.data["pixel_compact"])
        if self.images_container == "tensor4d":
            return pixels
        tiles = list(pixels.split(self.tiles_per_image))
        if self.images_container == "list3d":
            return [image[0] for image in tiles]
        return torch.stack(tiles) if self.images_container == "tensor5d" else tiles


def write_recorded_checkpoint(folder: Path, model: str, overrides: dict[str, Any]) -> None:
    """A recorded model in the original checkpoint format, with fields of its config replaced; again for others."""
    recorded = json.loads((ROOT / model).read_text())
    if not (folder / "model.safetensors").is_file():
        weights = load_file(ROOT / recorded["weights"])
        prefix = TOWER_PREFIX
        tower = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        write_tower(folder / "tower", recorded["vision_config"], tower)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        write_tokenizer(folder, ROOT / "models" / "toy_tokenizer.model")
    config = {
        **recorded["config"],
        **overrides,
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(folder / "tower"),
    }
    (folder / "config.json").write_text(json.dumps(config))

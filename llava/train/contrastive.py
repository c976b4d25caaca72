"""Contrastive pretraining of a small CLIP vision tower from nothing, against sentences about images.

    python -m llava.train.contrastive --data_path captions.json --image_folder images --output_dir tower …

Each image comes with sentences that are true of it and some that are false (one word changed); the sentences of the
other images in the batch are taken as false, too. Every pair of image and sentence is one yes-or-no decision (the loss
of SigLIP, arXiv 2303.15343). It is made by the CLS token, as CLIP does, at the last layer and at the one before it,
which is the one that LLaVA and VisionZip read; and by the patch of that layer that fits the sentence best (late
interaction, as FILIP, arXiv 2111.07783). No boxes, masks or class labels are used.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    set_seed,
)

from llava.images import load_image
from llava.storage.folders import whole_files
from llava.storage.lock import locked_folder
from llava.train.running.checkpoints import check_same_run, last_checkpoint, records_digest, what_decides_steps
from llava.train.running.run import (
    TrainingArguments,
    TrainingParser,
    check_finite,
    check_installed,
    finish,
    run_training,
)
from llava.train.running.steady import SteadyTrainer

_PATHS = ("data_path", "image_folder", "validation_path", "validation_folder", "init")  # which may move
_WORDS = 4096  # rows of the word table; words are hashed into it


@dataclass
class TowerArguments:
    """What is trained on what."""

    data_path: str = field(
        metadata={"help": "json list of {image, captions: [true, …], negatives: [false, …], harder: […]}"}
    )
    image_folder: str = field(metadata={"help": "where the images are"})
    validation_path: str | None = field(default=None, metadata={"help": "the same of held-out images, to report on"})
    validation_folder: str | None = field(default=None, metadata={"help": "where those are"})
    harder: bool = field(default=False, metadata={"help": "compare with the false sentences under 'harder' too"})
    init: str | None = field(default=None, metadata={"help": "run to go on from; the position embedding is resized"})
    image_size: int = field(default=144, metadata={"help": "edge of the images in pixels"})
    patch_size: int = field(default=12, metadata={"help": "edge of a patch in pixels"})
    hidden_size: int = field(default=128, metadata={"help": "width of the tower"})
    num_layers: int = field(default=6, metadata={"help": "layers of the tower"})
    num_heads: int = field(default=4, metadata={"help": "attention heads"})
    local_weight: float = field(default=1.0, metadata={"help": "weight of the decision by patches; 0 leaves it out"})

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_finite(self)


class CaptionedImages(Dataset):
    """Pixels and sentences of a json file's images."""

    def __init__(self, data_path: str, image_folder: str, processor: Any, harder: bool = False) -> None:
        self.records = json.loads(Path(data_path).read_text())
        self.lists = ("negatives", "harder") if harder else ("negatives",)
        self.folder = Path(image_folder)
        self.processor = processor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        image = load_image(self.folder / record["image"], as_stored=True)
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        negatives = [sentence for name in self.lists for sentence in record[name]]
        return {"pixels": pixels, "captions": record["captions"], "negatives": negatives}


@functools.cache
def word_ids(sentence: str) -> list[int]:
    """Rows of the word table for a sentence's words."""
    return [zlib.crc32(word.encode()) % _WORDS for word in sentence.split()]


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch: ``pixels`` (B, 3, h, w); P sentences as ``words`` (T,) and ``offsets`` (P,); ``truth`` (B, P)."""
    sentences = list(dict.fromkeys(s for sample in samples for s in (*sample["captions"], *sample["negatives"])))
    words = [word_ids(sentence) for sentence in sentences]
    return {
        "pixels": torch.stack([sample["pixels"] for sample in samples]),
        "words": torch.tensor([index for ids in words for index in ids]),
        "offsets": torch.tensor([0, *(len(ids) for ids in words[:-1])]).cumsum(0),
        "truth": torch.tensor([[sentence in sample["captions"] for sentence in sentences] for sample in samples]),
    }


class ContrastiveModel(nn.Module):
    """A vision tower and what it is compared with: sentences as bags of words."""

    def __init__(self, tower: CLIPVisionModel, local_weight: float) -> None:
        super().__init__()
        self.tower = tower
        width = tower.config.hidden_size
        self.words = nn.EmbeddingBag(_WORDS, width, mode="sum")
        self.sentence = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 2 * width))
        self.image_head, self.patch_head = nn.Linear(width, width), nn.Linear(width, width)
        # Temperature and bias of each decision, started as in SigLIP but with the bias at these batches' odds.
        self.scale = nn.Parameter(torch.tensor([10.0, 10.0]).log())
        self.bias = nn.Parameter(torch.tensor([-5.0, -5.0]))
        self.local_weight = local_weight

    def forward(self, pixels: Tensor, words: Tensor, offsets: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """``loss`` and ``logits`` (3, B, P): by the CLS token of the last layer and of the one before, by patches."""
        states = self.tower(pixels, output_hidden_states=True).hidden_states
        text = self.sentence(self.words(words, offsets)).chunk(2, dim=-1)
        for_image, for_patch = (F.normalize(part.float(), dim=-1) for part in text)
        norm = self.tower.post_layernorm
        scale, bias = self.scale.exp(), self.bias
        logits = []
        for state in (states[-1], states[-2]):
            image = F.normalize(self.image_head(norm(state[:, 0])).float(), dim=-1)
            logits.append(image @ for_image.T * scale[0] + bias[0])
        patches = F.normalize(self.patch_head(norm(states[-2][:, 1:])).float(), dim=-1)
        fit = patches @ for_patch.T  # (B, N, P)
        best = (fit * (fit * 20).softmax(dim=1)).sum(dim=1)  # a maximum that more than one patch learns from
        logits.append(best * scale[1] + bias[1])
        target = truth.float()
        losses = [F.binary_cross_entropy_with_logits(one, target, reduction="sum") / len(target) for one in logits]
        return {"loss": (losses[0] + losses[1]) / 2 + self.local_weight * losses[2], "logits": torch.stack(logits)}


def new_tower(arguments: TowerArguments) -> CLIPVisionModel:
    """A random tower to train."""
    config = CLIPVisionConfig(
        hidden_size=arguments.hidden_size,
        intermediate_size=4 * arguments.hidden_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.num_heads,
        image_size=arguments.image_size,
        patch_size=arguments.patch_size,
        hidden_act="gelu",
        attn_implementation="eager",  # faster than sdpa on a CPU at this size
    )
    tower = CLIPVisionModel(config)
    with torch.no_grad():
        # Plain waves across the grid: learning starts sooner than from noise.
        side = arguments.image_size // arguments.patch_size
        tower.embeddings.position_embedding.weight[1:] = 0.4 * _waves(side, arguments.hidden_size)
        tower.embeddings.patch_embedding.weight.mul_(1.5)
    return tower


def _waves(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column (side * side, width); the longest wave spans the image."""
    place = torch.arange(side) * (2 * math.pi / side)
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    frequency = 100 ** -(torch.arange(width // 4) / (width // 4))
    waves = [wave(axis.flatten()[:, None] * frequency) for axis in (columns, rows) for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=1)


def go_on_from(model: ContrastiveModel, run: str) -> None:
    """Put another run's weights into a model, its position embedding resized to the model's grid.

    Raises:
        FileNotFoundError: ``run`` is no folder of a finished run.
        ValueError: its tower has another width, depth or patch size.
    """
    weights = torch.load(Path(run) / "contrastive.pt")
    name = "tower.embeddings.position_embedding.weight"
    old = weights[name]
    grid = math.isqrt(len(old) - 1)
    side = math.isqrt(len(model.state_dict()[name]) - 1)
    patches = old[1:].T.reshape(1, -1, grid, grid)
    patches = F.interpolate(patches, size=(side, side), mode="bilinear").flatten(2)[0].T
    weights = {**weights, name: torch.cat([old[:1], patches])}
    own = model.state_dict()
    if wrong := sorted(key for key in own.keys() | weights.keys() if _shape(own, key) != _shape(weights, key)):
        raise ValueError(f"the tower in {run} has another width, depth or patch size: {wrong[0]} does not fit")
    model.load_state_dict(weights)


def _shape(weights: dict[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(weights[key].shape) if key in weights else None


@torch.inference_mode()
def pair_accuracy(model: ContrastiveModel, data: CaptionedImages) -> list[float]:
    """How often a true sentence scores above a false one of the same image, for each of the three decisions."""
    model.eval()
    right, pairs = torch.zeros(3), 0
    for index in range(len(data)):
        batch = collate([data[index]])
        score, truth = model(**batch)["logits"][:, 0], batch["truth"][0]
        wins = score[:, truth][:, :, None] > score[:, ~truth][:, None]
        right += wins.flatten(1).sum(1)
        pairs += wins[0].numel()
    return (right / pairs).tolist()


def train(arguments: TowerArguments, training: TrainingArguments) -> None:
    """Train a tower, from the last checkpoint if there is one, and save it with its image processor.

    Raises:
        FileNotFoundError: the data or the run to go on from is not there.
        ValueError: that run's tower has another width, depth or patch size, validation data has no image folder, or
            the output folder has checkpoints of another run.
        BlockingIOError: another process trains into the output folder.
    """
    if arguments.validation_path and not arguments.validation_folder:
        raise ValueError("validation_path needs validation_folder too: where its images are")
    set_seed(training.seed)
    edge = arguments.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})
    data = CaptionedImages(arguments.data_path, arguments.image_folder, processor, arguments.harder)
    model = ContrastiveModel(new_tower(arguments), arguments.local_weight)
    if arguments.init:
        go_on_from(model, arguments.init)
    is_first = training.process_index == 0
    with locked_folder(Path(training.output_dir), "output_dir") if is_first else nullcontext():
        _train(model, data, arguments, training)


def _train(
    model: ContrastiveModel, data: CaptionedImages, arguments: TowerArguments, training: TrainingArguments
) -> None:
    decides = {name: Path(str(value)).name if name in _PATHS else value for name, value in asdict(arguments).items()}
    decides |= {"records": records_digest(data.records), "seed": training.seed, **what_decides_steps(training)}
    checkpoint = last_checkpoint(training.output_dir, quiet=training.process_index > 0)
    check_same_run(checkpoint, decides)
    trainer = SteadyTrainer(model=model, args=training, train_dataset=data, data_collator=collate, decides=decides)
    trainer.train(resume_from_checkpoint=checkpoint)
    if not trainer.is_world_process_zero():
        return
    output = Path(training.output_dir)
    with whole_files(output) as unfinished:
        model.tower.save_pretrained(unfinished)
        data.processor.save_pretrained(unfinished)
        torch.save(model.state_dict(), unfinished / "contrastive.pt")
    facts: dict[str, Any] = {}
    if arguments.validation_path:
        held_out = CaptionedImages(arguments.validation_path, arguments.validation_folder, data.processor)
        names = ("cls_last_layer", "cls_read_layer", "best_patch")
        facts["pair_accuracy"] = dict(zip(names, pair_accuracy(model, held_out), strict=True))
    finish(trainer, {"tower": arguments}, facts)


def _run(words: list[str]) -> None:
    check_installed(words)
    parser = TrainingParser((TowerArguments, TrainingArguments), "python -m llava.train.contrastive", __doc__)
    train(*parser.parse_args_into_dataclasses(words))


def main() -> int:
    """The command: parse the arguments and train; bad input is one line and exit status 2."""
    return run_training("llava.train.contrastive", _run)


if __name__ == "__main__":
    sys.exit(main())

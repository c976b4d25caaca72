"""What each part of visionzip-plus adds, on the embedded model and a test set of scenes; usage in ``--help``.

Images are read once; each variant then chooses, and one forward of prompts with their right answers says which it would
give: greedy decoding does so exactly if each of their words is the likeliest behind the right ones before it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.benchmarks import scenes
from eval.models.llava import LlavaModel
from eval.running.asking import in_order
from llava.commands.parsers import Parser
from llava.constants import IGNORE_INDEX
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.encoded_image import EncodedImage
from llava.model.prompts import pad_rows, splice
from llava.model.visual import VisualTokens, lay_out
from visionzip import VisionZipConfig
from visionzip.compress import CompressedTokens
from visionzip.encoder import choose_tokens, read_encoder
from visionzip.methods import METHODS, EncoderRead, Method, TokenCounts, kept_patches
from visionzip.methods.greedy import cosine_similarity, farthest_first


@dataclass(frozen=True)
class Variant:
    """One way to choose and to show what was chosen; the defaults are visionzip-plus."""

    alpha: float = 0.25
    features: str = "projected"
    centred: bool = True
    merge: float = 0.0  # weight of a dropped patch in the mean that its kept one becomes
    cls: bool = False
    positions: str = "original"
    size_bias: bool = True
    method: str | None = None  # another method's choice

    def choose(self, read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
        """Choose as visionzip-plus does but for what the variant changes."""
        features = {"projected": read.projected, "keys": read.keys[:, 1:], "hidden": read.patches}[self.features]
        similarity = cosine_similarity(features, centred=self.centred)
        weight = (read.scores / read.scores.amax(dim=1, keepdim=True)) ** self.alpha
        number = counts.dominant - self.cls
        chosen = kept_patches(read, farthest_first(similarity, number, read.scores.argmax(dim=1), weight))
        if self.merge:
            chosen = chosen._replace(tokens=self._merged(read, chosen.kept))
        if self.cls:
            tokens = torch.cat([read.hidden_states[:, :1], chosen.tokens], dim=1)
            chosen = chosen._replace(tokens=tokens, dominant_indices=F.pad(chosen.kept, (1, 0)))
        return chosen

    def _merged(self, read: EncoderRead, kept: Tensor) -> Tensor:
        """Each kept patch as the mean of itself and, with the variant's weight, of those that count for it."""
        unit = F.normalize(read.keys[:, 1:], dim=-1)
        own = kept - 1
        member = (unit @ unit.gather(1, own[..., None].expand(-1, -1, unit.shape[-1])).mT).argmax(dim=-1)
        members = F.one_hot(member, kept.shape[1]).float().mT * self.merge
        members = members * (1 - F.one_hot(own, unit.shape[1]).float().sum(dim=1, keepdim=True))
        weights = members + F.one_hot(own, unit.shape[1]).float()
        return (weights / weights.sum(dim=-1, keepdim=True)) @ read.patches


PLUS = Variant()
VARIANTS = {
    "visionzip": Variant(method="visionzip", positions="consecutive", size_bias=False),
    "visionzip, original positions and size bias": Variant(method="visionzip"),
    "choice alone": replace(PLUS, positions="consecutive", size_bias=False),
    "choice, size bias": replace(PLUS, positions="consecutive"),
    "choice, original positions": replace(PLUS, size_bias=False),
    "visionzip-plus": PLUS,
    "CLS kept": replace(PLUS, cls=True),
    **{f"exponent {alpha:g}": replace(PLUS, alpha=alpha) for alpha in (0.0, 0.1, 0.5, 1.0)},
    "keys": replace(PLUS, features="keys"),
    "hidden states": replace(PLUS, features="hidden"),
    "not centred": replace(PLUS, centred=False),
    **{f"merging with weight {weight:g}": replace(PLUS, merge=weight) for weight in (0.3, 1.0)},
    "merging with weight 0.3, no size bias": replace(PLUS, merge=0.3, size_bias=False),
    "merging with weight 1, no size bias": replace(PLUS, merge=1.0, size_bias=False),
}


class Scenes:
    """The embedded model, and a test set whose images it has read.

    Args:
        model_path: the checkpoint.
        data: the test set.
    """

    def __init__(self, model_path: str, data: Path) -> None:
        tokenizer, self.model, processor, _ = load_pretrained_model(model_path, device="cpu")
        truth = scenes.truth(data)
        asked = LlavaModel(self.model, tokenizer, processor, "vicuna_v1")
        prompts = in_order(asked.prepare(scenes.questions(data)))
        self.keys = [prompt.question.visuals[0].key for prompt in prompts]
        self.types = [truth[prompt.question.id][0] for prompt in prompts]
        answers = [tokenizer(f" {truth[p.question.id][1]}", add_special_tokens=False).input_ids[1:] for p in prompts]
        self.ids = [
            torch.cat([p.ids, p.ids.new_tensor([*answer, tokenizer.eos_token_id])])
            for p, answer in zip(prompts, answers, strict=True)
        ]
        self.lengths = [len(answer) + 1 for answer in answers]
        self.reads = {}
        setting = VisionZipConfig(keep=1, method="visionzip-plus")
        self.tower = self.model.get_vision_tower()
        for start in range(0, len(prompts), 64):
            new = {key: each.images[0] for key, each in asked.visuals_of(prompts[start : start + 64]).items()}
            new = {key: image for key, image in new.items() if key not in self.reads}
            if new:
                read = read_encoder(self.tower.encoder, torch.stack(list(new.values())), setting)
                read = read.replace(projected=self.model._project(read.patches))
                self.reads |= dict(zip(new, _each(read), strict=True))

    @torch.inference_mode()
    def right(self, variant: Variant, tokens: int) -> Tensor:
        """Which questions (Q,) bool are answered right at T tokens."""
        name = variant.method or "variant"
        METHODS["variant"] = Method("variant", "", variant.choose, METHODS["visionzip-plus"].reads)
        keep = {"dominant": 27 * tokens // 32, "contextual": tokens - 27 * tokens // 32} if name == "visionzip" else {}
        keep = keep or {"keep": tokens, "method": name}
        config = VisionZipConfig(**keep, positions=variant.positions, size_bias=variant.size_bias)
        self.tower.visionzip, seen = config, {}
        for key, read in self.reads.items():
            chosen = choose_tokens(read, config)
            encoded = EncodedImage(self.model._project(chosen.tokens), chosen.kept, chosen.sizes)
            seen[key] = lay_out(encoded, self.tower)
        found = [self._right(places, seen) for places in _batches(len(self.ids))]
        self.tower.visionzip = None
        return torch.cat(found)

    def _right(self, places: range, seen: dict[str, VisualTokens]) -> Tensor:
        embed = self.model.get_model().embed_tokens
        rows = []
        for place in places:
            ids, answer = self.ids[place], self.lengths[place]
            labels = torch.where(torch.arange(len(ids)) < len(ids) - answer, IGNORE_INDEX, ids)
            rows.append(splice(ids, [seen[self.keys[place]]], embed, labels))
        padded = pad_rows(rows, "right")
        hidden = self.model.get_model()(
            inputs_embeds=padded.embeds,
            attention_mask=padded.mask.long(),
            position_ids=padded.positions,
            token_sizes=padded.sizes,
            use_cache=False,
        ).last_hidden_state
        row, column = (padded.labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        said = self.model.lm_head(hidden[row, column]).argmax(dim=-1)
        wrong = (said != padded.labels[row, column + 1]).float()
        return torch.zeros(len(rows)).scatter_add(0, row, wrong) == 0


def _each(read: EncoderRead) -> Iterator[EncoderRead]:
    parts = {name: getattr(read, name) for name in ("hidden_states", "scores", "keys", "projected", "pixels")}
    for place in range(len(read.hidden_states)):
        yield read.replace(**{name: part[place : place + 1] for name, part in parts.items()})


def _batches(total: int, size: int = 100) -> Iterator[range]:
    return (range(start, min(start + size, total)) for start in range(0, total, size))


def report(right: Tensor, baseline: Tensor, types: list[str]) -> dict[str, Any]:
    """Percent right, overall and by type, and the difference to a baseline with its paired standard error."""
    difference = (right.float() - baseline.float()) * 100
    by_type = {
        name: 100 * right[torch.tensor([own == name for own in types])].float().mean().item()
        for name in dict.fromkeys(types)
    }
    error = difference.std().item() / sqrt(len(difference))
    return {
        "right": 100 * right.float().mean().item(),
        "difference": difference.mean().item(),
        "error": error,
    } | by_type


def main() -> int:
    """Print a line for each variant and budget, and write them all as JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model-path", default="checkpoints/llava-mini")
    parser.add_argument("--data", type=Path, required=True, help="a test set of scenes, a parquet file")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 16], metavar="T")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    asked, results = Scenes(args.model_path, args.data), []
    for tokens in args.tokens:
        baseline = asked.right(VARIANTS["visionzip"], tokens)
        for name in args.variants:
            own = report(asked.right(VARIANTS[name], tokens), baseline, asked.types)
            results.append({"variant": name, "tokens": tokens, **own})
            print(f"{tokens:3} {name:45} " + " ".join(f"{v:5.1f}" for v in own.values()), flush=True)
            args.output.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

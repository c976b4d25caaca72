"""Trains the small Qwen3-VL of :mod:`playground.qwen_mini` on scenes, in two stages.

    python -m playground.qwen_training encoder --data … --init … --output_dir …
    python -m playground.qwen_training model   --data … --init … --output_dir …

``encoder``: its blocks learn to give what the blocks of llava-mini's tower give for the same pixels, which have a CLS
token, a norm in front and no rotary positions; its merger learns the mean of what llava-mini's projector makes of the
four patches. ``model``: all of it learns from questions, up to twelve about each image, which do not see each other,
on pictures of four sizes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Qwen3VLForConditionalGeneration, set_seed
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from llava.constants import IGNORE_INDEX
from llava.images import load_image
from llava.model.stock.processor_model import load_processor, prompt_of, user_turn
from llava.storage.folders import whole_files
from llava.train.labels import attention_apart
from llava.train.running.checkpoints import check_same_run, last_checkpoint, records_digest, what_decides_steps
from llava.train.running.run import TrainingArguments, TrainingParser, check_installed, finish, run_training
from llava.train.running.steady import SteadyTrainer
from playground.qwen_mini import EDGE, copy_processor

SIDES = {6: 0.5, 4: 0.25, 3: 0.15, 2: 0.1}  # tokens along the edge of a picture, and the share of the batches


@dataclass
class MiniArguments:
    """What is trained on what."""

    data: str = field(metadata={"help": "folder of training scenes"})
    init: str = field(metadata={"help": "model to begin with"})
    stage: str = field(default="model", metadata={"help": "encoder or model"})
    teacher: str = field(default="checkpoints/llava-mini", metadata={"help": "whose tower the encoder learns from"})
    encoder_rate: float = field(default=2e-4, metadata={"help": "learning rate of the encoder's blocks in stage model"})
    turns: int = field(default=12, metadata={"help": "questions about an image at most"})


class Scenes(Dataset):
    """Pictures, and the questions about them as token ids."""

    def __init__(self, data: Path, processor: Any, turns: int) -> None:
        self.records = json.loads((data / "instruct.json").read_text())
        self.folder, self.processor, self.turns = data / "images", processor, turns

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``image``; ``start``, the ids that all prompts begin with; ``asked`` and ``said`` of each question."""
        record = self.records[index]
        turns = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"][: 2 * self.turns]]
        pieces = [self._piece(*pair) for pair in zip(turns[::2], turns[1::2], strict=True)]
        return {
            "image": load_image(self.folder / record["image"], as_stored=True),
            "start": pieces[0][0],
            "asked": [asked for _, asked, _ in pieces],
            "said": [said for *_, said in pieces],
        }

    def _piece(self, question: str, answer: str) -> tuple[list[int], list[int], list[int]]:
        """Ids up to the image's placeholder, behind it, and of the answer with its end."""
        prompt = prompt_of(self.processor, [user_turn(question, 1)])
        whole = self.processor.tokenizer(prompt + answer).input_ids
        end = len(self.processor.tokenizer(prompt).input_ids)
        place = whole.index(self.processor.image_token_id)
        return whole[:place], whole[place + 1 : end], [*whole[end:], self.processor.tokenizer.eos_token_id]


@dataclass
class Collate:
    """Batches of pictures of one size, which is drawn for each batch by the shares in ``sides``."""

    processor: Any
    sides: dict[int, float]

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """``patches`` (B, N, P), ``side`` in tokens, and ``ids``, ``labels``, ``turns`` (B, L)."""
        side = list(self.sides)[torch.multinomial(torch.tensor(list(self.sides.values())), 1).item()]
        batch: dict[str, Any] = {"side": side, "patches": self.patches([s["image"] for s in samples], side)}
        rows = [self._row(sample, side) for sample in samples]
        fills = {"ids": self.processor.tokenizer.pad_token_id, "labels": IGNORE_INDEX, "turns": -1}
        for place, (name, fill) in enumerate(fills.items()):
            values = [torch.tensor(row[place]) for row in rows]
            batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        return batch

    def patches(self, images: Sequence[Image.Image], side: int) -> Tensor:
        """What the model's own processor makes of pictures that shall have ``side`` x ``side`` tokens."""
        pixels = (side * EDGE) ** 2
        size = {"shortest_edge": pixels, "longest_edge": pixels}
        values = self.processor.image_processor(list(images), size=size, return_tensors="pt")["pixel_values"]
        return values.view(len(images), 4 * side * side, -1)

    def _row(self, sample: dict[str, Any], side: int) -> tuple[list[int], list[int], list[int]]:
        ids = sample["start"] + [self.processor.image_token_id] * side * side
        labels, turns = [IGNORE_INDEX] * len(ids), [0] * len(ids)
        for number, (asked, said) in enumerate(zip(sample["asked"], sample["said"], strict=True), start=1):
            ids = ids + asked + said
            labels = labels + [IGNORE_INDEX] * len(asked) + said
            turns = turns + [number] * (len(asked) + len(said))
        return ids, labels, turns


def encode(visual: nn.Module, patches: Tensor, side: int) -> list[Tensor]:
    """The states behind each of the encoder's blocks (B, N, D) of pictures of one size.

    The stock encoder's numbers, but for all pictures at once and with the embedding of patches as the matrix product
    that it is: on a CPU in bfloat16 the convolution's gradient takes seconds.
    """
    grid = torch.tensor([[1, 2 * side, 2 * side]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid,
        num_grid_per_side=visual.num_grid_per_side,
        mode=visual.interpolation_mode,
        align_corners=visual.interpolation_align_corners,
        spatial_merge_size=visual.spatial_merge_size,
        kwargs={},
    )
    embed = visual.patch_embed.proj
    state = F.linear(patches, embed.weight.flatten(1), embed.bias)
    state = state + (visual.pos_embed(indices) * weights[:, :, None]).sum(1)
    cos, sin = visual.rotary_pos_emb(state, get_vision_position_ids(grid, visual.spatial_merge_size, kwargs={}))
    states = []
    for block in visual.blocks:
        own = block.attn
        query, key, value = own.qkv(block.norm1(state)).unflatten(-1, (3, own.num_heads, -1)).unbind(-3)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        weights = (query @ key.mT * own.scaling).float().softmax(dim=-1).to(value.dtype)
        state = state + own.proj((weights @ value).transpose(1, 2).flatten(2))
        state = state + block.mlp(block.norm2(state))
        states.append(state)
    return states


def merge(visual: nn.Module, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Tokens (B, n, P) for the language model's input, and those for its layers (deepstack)."""
    batch = len(states[0])
    layers = zip(visual.deepstack_visual_indexes, visual.deepstack_merger_list, strict=True)
    deep = [merger(states[index]).view(batch, -1, visual.config.out_hidden_size) for index, merger in layers]
    return visual.merger(states[-1]).view(batch, -1, visual.config.out_hidden_size), deep


def positions_apart(turns: Tensor, start: int, side: int) -> tuple[Tensor, Tensor]:
    """Mask (B, 1, L, L) and M-RoPE positions (3, B, L) of prompts that share an image but do not see each other.

    Args:
        turns: (B, L), as :func:`llava.train.labels.attention_apart` takes them.
        start: tokens in front of the image.
        side: of the image, in tokens.
    """
    mask, positions = attention_apart(turns)
    image = slice(start, start + side * side)
    positions = torch.where(torch.arange(turns.shape[1]) < image.stop, positions, positions - side * side + side)
    positions = positions.expand(3, -1, -1).clone()
    positions[:, :, image] = start
    positions[1, :, image] += torch.arange(side).repeat_interleave(side)
    positions[2, :, image] += torch.arange(side).repeat(side)
    return mask, positions


class AnswerModel(nn.Module):
    """The whole model, with the loss of its answers."""

    def __init__(self, model: Qwen3VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, patches: Tensor, side: int, ids: Tensor, labels: Tensor, turns: Tensor) -> dict[str, Tensor]:
        """``loss``, the mean over all tokens of all answers, and ``right``, the share that is predicted."""
        base = self.model.model
        tokens, deep = merge(base.visual, encode(base.visual, patches, side))
        visual = ids == self.model.config.image_token_id
        embeds = base.language_model.embed_tokens(ids).masked_scatter(visual[..., None], tokens.float())
        mask, positions = positions_apart(turns, int(visual[0].int().argmax()), side)
        hidden = base.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            visual_pos_masks=visual,
            deepstack_visual_embeds=[layer.flatten(0, 1) for layer in deep],
            use_cache=False,
        ).last_hidden_state
        learnt = labels[:, 1:] != IGNORE_INDEX
        logits, wanted = self.model.lm_head(hidden[:, :-1][learnt]).float(), labels[:, 1:][learnt]
        return {"loss": F.cross_entropy(logits, wanted), "right": (logits.argmax(-1) == wanted).float().mean()}


class DistilModel(nn.Module):
    """The encoder and its merger, which learn from llava-mini's tower and projector."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, teacher: str) -> None:
        super().__init__()
        from llava.model.builder import load_pretrained_model  # noqa: PLC0415 - this stage alone needs it

        self.model = model
        _, llava, _, _ = load_pretrained_model(teacher, dtype=torch.float32, device="cpu")
        tower = llava.get_vision_tower().vision_tower.vision_model
        self.learnt_from = [tower.requires_grad_(False), llava.get_model().mm_projector.requires_grad_(False)]

    def forward(self, patches: Tensor, side: int, **text: Tensor) -> dict[str, Tensor]:
        """``loss``: the mean squared difference in each block and in the merger, by the teacher's variance."""
        tower, projector = self.learnt_from
        visual = self.model.model.visual
        with torch.no_grad():
            pixels = patches.view(len(patches), side, side, 2, 2, 3, 2, 12, 12)[:, :, :, :, :, :, 0]
            pixels = pixels.permute(0, 5, 1, 3, 6, 2, 4, 7).flatten(2, 4).flatten(3)
            raster = tower(pixels, output_hidden_states=True).hidden_states[1:-1]
            wanted = [self._in_blocks(state[:, 1:], side) for state in raster]
            projected = projector(wanted[-1]).unflatten(1, (-1, 4)).mean(dim=2)
        states = encode(visual, patches, side)
        tokens, _ = merge(visual, states)
        pairs = [*zip(states, wanted, strict=True), (states[-1], wanted[-1]), (tokens, projected)]
        losses = [_difference(own, teacher) for own, teacher in pairs]
        return {"loss": torch.stack(losses).mean(), "parts": torch.stack(losses).detach()}

    @staticmethod
    def _in_blocks(state: Tensor, side: int) -> Tensor:
        """Patches (B, N, D) from raster order to that of Qwen-VL, where the four of a token follow each other."""
        return state.unflatten(1, (side, 2, side, 2)).transpose(2, 3).flatten(1, 4)


def _difference(own: Tensor, teacher: Tensor) -> Tensor:
    teacher = teacher.float()
    centred = teacher - teacher.mean(dim=(0, 1))
    return (own.float() - teacher).square().mean() / centred.square().mean()


def _groups(model: Qwen3VLForConditionalGeneration, arguments: MiniArguments, rate: float) -> list[dict[str, Any]]:
    visual = model.model.visual
    if arguments.stage == "encoder":
        return [{"params": [*visual.parameters()], "lr": rate}]
    slow = [p for name, p in visual.named_parameters() if "merger" not in name]
    known = {id(p) for p in slow}
    return [
        {"params": slow, "lr": arguments.encoder_rate},
        {"params": [p for p in model.parameters() if id(p) not in known], "lr": rate},
    ]


def train(arguments: MiniArguments, training: TrainingArguments) -> None:
    """Train a stage, from its last checkpoint if there is one, and save the model with its processor."""
    set_seed(training.seed)
    processor = load_processor(arguments.init)
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        arguments.init, dtype=torch.float32, attn_implementation="eager"
    )
    is_encoder = arguments.stage == "encoder"
    data = Scenes(Path(arguments.data), processor, 1 if is_encoder else arguments.turns)
    learner = DistilModel(model, arguments.teacher) if is_encoder else AnswerModel(model)
    decides = asdict(arguments) | {"records": records_digest(data.records), **what_decides_steps(training)}
    checkpoint = last_checkpoint(training.output_dir)
    check_same_run(checkpoint, decides)
    rate = training.learning_rate
    optimizer = torch.optim.AdamW(
        _groups(model, arguments, rate), betas=(0.9, training.adam_beta2), weight_decay=training.weight_decay
    )
    trainer = SteadyTrainer(
        model=learner,
        args=training,
        train_dataset=data,
        data_collator=Collate(processor, {6: 1.0} if is_encoder else SIDES),
        decides=decides,
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    with whole_files(Path(training.output_dir)) as unfinished:
        model.save_pretrained(unfinished)
        copy_processor(Path(arguments.init), unfinished)
    finish(trainer, {"mini": arguments}, {})


def _run(words: list[str]) -> None:
    check_installed(words)
    parser = TrainingParser((MiniArguments, TrainingArguments), "python -m playground.qwen_training", __doc__)
    train(*parser.parse_args_into_dataclasses(words))


if __name__ == "__main__":
    raise SystemExit(run_training("playground.qwen_training", _run))

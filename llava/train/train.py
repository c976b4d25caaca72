"""Training a LLaVA on transformers' Trainer, with LLaVA's argument names.

    … --model_name_or_path LLAVA --tune_mm_mlp_adapter True --visionzip_dominant 54 --visionzip_contextual 10 …
    … --model_name_or_path LLAVA --lora_enable True …
    … --model_name_or_path BASE --vision_tower TOWER --tune_mm_mlp_adapter True --version plain …
    … --model_name_or_path BASE --vision_tower TOWER --pretrain_mm_mlp_adapter FILE …

(``python -m llava.train.train`` in front, ``--data_path``, ``--image_folder`` and ``--output_dir`` behind; scripts/ has
the settings.) The first tunes the projector of a LLaVA to few visual tokens, as the paper's efficient tuning does; the
second learns a LoRA adapter with the projector. The last two are LLaVA's own stages, from a language model and a vision
tower: the projector alone, from captions, then projector and language model, from conversations. VisionZip can be on in
all of them. A run that was stopped goes on where it was when it is started again.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from llava.storage.lock import locked_folder
from llava.train.arguments import (
    DataArguments,
    LlavaTrainingArguments,
    ModelArguments,
    check_arguments,
    weight_dtype,
    what_decides,
)
from llava.train.cache import cache_visual_tokens, check_cache_folder, drop_tower
from llava.train.data import Collator, InstructionData, Records, read_records
from llava.train.lengths import cut_share, visual_tokens_at_least
from llava.train.model import build_model, choose_what_is_learnt, is_llava, whiten_projector
from llava.train.running.checkpoints import check_same_run, last_checkpoint
from llava.train.running.outputs import check_room
from llava.train.running.run import (
    TrainingParser,
    check_installed,
    finish,
    run_training,
)
from llava.train.running.trainer import LlavaTrainer
from visionzip import visionzip

logger = logging.getLogger(__name__)


def start_deepspeed(training: LlavaTrainingArguments) -> None:
    """Start DeepSpeed's communication between CPU processes, before the model is built: ZeRO-3 shares it out then.

    On GPUs accelerate does this itself. The processes talk through gloo: DeepSpeed has its own way through shared
    memory, too, but compiles it first, for minutes.
    """
    if not training.deepspeed or not training.use_cpu:
        return
    import deepspeed  # noqa: PLC0415 - optional

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def train(arguments: ModelArguments, data: DataArguments, training: LlavaTrainingArguments) -> None:
    """Train a model, from its last checkpoint if there is one, and save what it learnt.

    Writes into ``output_dir``: the model, or what is learnt of it (:func:`llava.train.running.outputs.save_learnt`),
    the config with the VisionZip setting, ``run.json`` (arguments, ids of the records if they are a sample, records
    left out, versions, losses) and ``losses.png``.

    Raises:
        OSError: a file is missing or damaged, the disk is full, or another process trains into ``output_dir``.
        ValueError: the arguments, the data or the weights do not fit.
        ImportError: a library is not installed.
    """
    check_arguments(arguments, data, training)
    if data.cache_visual_tokens:
        check_cache_folder(data.cache_visual_tokens)
    records = read_records(
        data.data_path,
        data.image_folder,
        arguments.version,
        fraction=data.data_fraction,
        seed=42 if training.data_seed is None else training.data_seed,
        # The model, which may be on the hub, is asked where the arguments do not say it: data come first.
        has_tower=arguments.needs_tower or is_llava(arguments.model_name_or_path),
        skip_bad=data.skip_bad_samples,
    )
    if len(records.kept) < training.world_size:
        raise ValueError(
            f"{training.world_size} processes, but {len(records.kept)} records to train on: start fewer, or give more"
        )
    _check_gradients(records, arguments, data)
    is_first = training.process_index == 0
    with locked_folder(Path(training.output_dir), "output_dir") if is_first else nullcontext():
        _train(arguments, data, training, records)


def _train(arguments: ModelArguments, data: DataArguments, training: LlavaTrainingArguments, records: Records) -> None:
    is_llava(arguments.model_name_or_path)  # what is wrong with its config is known before its weights are looked at
    decides = what_decides(arguments, data, training, records.kept)
    checkpoint = last_checkpoint(training.output_dir, quiet=training.process_index > 0)
    check_same_run(checkpoint, decides)
    set_seed(training.seed)
    start_deepspeed(training)
    tokenizer, model, image_processor = build_model(
        arguments, data.image_aspect_ratio, weight_dtype(arguments, training)
    )
    _check_data_settings(data, model, image_processor is not None)
    output = Path(training.output_dir)
    skipped = output / "skipped.jsonl" if data.skip_bad_samples else None
    said = (records.kept, data.image_folder, tokenizer, arguments.version, image_processor, model.config)
    dataset = InstructionData(*said, data.turns_apart, skipped)
    if arguments.whiten_mm_projector:
        whiten_projector(model, torch.stack([dataset[index]["image"] for index in range(min(256, len(dataset)))]))
    if arguments.budget:
        visionzip(model, **arguments.budget)
    limit = training.model_max_length or getattr(model.config, "tokenizer_model_max_length", None) or 2048
    model.config.tokenizer_model_max_length = limit
    model.config.use_cache = False
    model = choose_what_is_learnt(model, arguments, precise=not training.deepspeed)
    if training.activation_checkpointing:
        model.enable_input_require_grads()  # frozen embeddings of text would hide from it that visual tokens learn
    check_room(model, training, len(dataset), arguments.learns_part)
    _check_lengths(dataset, model, limit)
    if data.cache_visual_tokens:
        dataset.encoded = cache_visual_tokens(data.cache_visual_tokens, dataset, model, training)
        if arguments.learns_part:  # else the result has the tower, too
            drop_tower(model)
    output.mkdir(parents=True, exist_ok=True)
    trainer = LlavaTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        data_collator=Collator(tokenizer, limit),
        processing_class=tokenizer,
        decides=decides,
        learns_part=arguments.learns_part,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    model.config.use_cache = True
    trainer.save_model()
    if trainer.is_world_process_zero():
        _say_what_was_cut(trainer, len(dataset), limit)
        used = [record.get("id") for record in records.kept] if data.data_fraction < 1 else len(dataset)
        facts = {"records": used, "left_out": [*records.left_out, *_skipped(dataset.skipped)]}
        finish(trainer, {"model": arguments, "data": data}, facts)


def _check_data_settings(data: DataArguments, model: Any, has_tower: bool) -> None:
    """Refuse settings of the data that this model cannot follow."""
    if data.turns_apart and (not has_tower or "flash" in model.config._attn_implementation):
        raise ValueError("turns_apart needs a vision tower, and attention that takes a mask: eager or sdpa")
    if data.cache_visual_tokens and not has_tower:
        raise ValueError("cache_visual_tokens needs a vision tower: this is a language model")


def _check_gradients(records: Records, arguments: ModelArguments, data: DataArguments) -> None:
    """Refuse data without an image where the projector alone is to learn, and say so where something else does too."""
    if any("image" in record for record in records.kept):
        return
    problem = f"not one of the {len(records.kept)} records of {data.data_path} has an image, so that the projector"
    if arguments.tune_mm_mlp_adapter:
        raise ValueError(f"{problem} would get no gradient, and nothing else is to learn: give records with images")
    if arguments.needs_tower:
        logger.warning("%s gets no gradient and stays as it is", problem)


def _check_lengths(dataset: InstructionData, model: Any, limit: int) -> None:
    """Refuse a limit that leaves nothing to learn, and say so where it leaves nothing of some records."""
    tokens = visual_tokens_at_least(model)
    share, seen = cut_share(dataset, limit, tokens)
    if not share:
        return
    image = f" (an image has {tokens} tokens or more)" if tokens else ""
    problem = f"of {seen} records looked at, {share:.0%} lose their whole answer to model_max_length={limit}{image}"
    if share == 1:
        raise ValueError(f"{problem}: there is nothing to learn. Raise it, or keep fewer visual tokens")
    logger.warning("%s and teach nothing: raise it, or keep fewer visual tokens", problem)


def _say_what_was_cut(trainer: LlavaTrainer, records: int, limit: int) -> None:
    if lost := trainer.logged("cut_answers"):
        samples = round((trainer.state.epoch or 0) * records)
        logger.warning(
            "%d of %d samples (%.1f %%) lost their whole answer to model_max_length=%d and taught nothing: raise it, "
            "or keep fewer visual tokens",
            lost,
            samples,
            100 * lost / max(lost, samples),
            limit,
        )


def _skipped(file: Path | None) -> list[dict[str, Any]]:
    """What the data set has noted, each note once although each epoch meets its record again."""
    if file is None or not file.is_file():
        return []
    return [json.loads(line) for line in dict.fromkeys(file.read_text(encoding="utf-8").splitlines())]


def _run(words: list[str]) -> None:
    check_installed(words)
    kinds = (ModelArguments, DataArguments, LlavaTrainingArguments)
    parser = TrainingParser(kinds, "python -m llava.train.train", __doc__)
    train(*parser.parse_args_into_dataclasses(words))


def main() -> int:
    """The command: parse LLaVA's arguments and train; bad input is one line and exit status 2."""
    return run_training("llava.train.train", _run)


if __name__ == "__main__":
    sys.exit(main())

"""Runs a benchmark: each method at each budget over all questions, with one loaded model; then what the tokens cost.

Everything lies in one folder: ``answers/`` with a file per run, ``cost.json`` with the timings, ``results.json`` and
``table.md``. Run again, it does what is not there yet, and a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import visionzip
from eval.answers import Answer, AnswersFile, open_answers
from eval.benchmark import Benchmark, Sample
from eval.cost import covers, measure_cost, read_cost
from eval.methods import Run, attached, plan
from eval.registry import BENCHMARKS
from eval.results import summarize
from eval.table import write_atomically, write_table
from llava.arguments import load_from_arguments
from llava.benchmark import environment
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_mode_for, new_conversation
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.loading import find_file
from llava.serve.chat import with_image_tokens

ROOT = Path(__file__).resolve().parents[1]
_MODEL_FILES = (".json", ".safetensors", ".bin", ".model")


@dataclass(frozen=True)
class Prompt:
    """A question, ready for the model.

    Attributes:
        sample: the question.
        ids: (L,) token ids with the image sentinel.
        images: its images; questions about one image share the tensor.
        sizes: (width, height) of each image.
    """

    sample: Sample
    ids: Tensor
    images: tuple[Tensor, ...]
    sizes: tuple[tuple[int, int], ...]

    @property
    def text_tokens(self) -> int:
        """Tokens that are not an image's."""
        return int((self.ids != IMAGE_TOKEN_INDEX).sum())


def run(args: argparse.Namespace) -> None:
    """Answer a benchmark's questions with each method at each budget, and write a table of accuracy and cost.

    Raises:
        ValueError: a flag, the data or the model is not as it should be, or the output folder has answers of another
            setting. Whatever can be known before the model is loaded is said before.
        OSError: a file is missing or damaged.
    """
    benchmark = BENCHMARKS[args.benchmark]
    runs = plan(args.method, args.tokens, args.seeds)
    data = Path(args.data or ROOT / benchmark.source)
    samples = benchmark.load(data)[: args.limit]
    args.conv_mode = args.conv_mode or template_for(args.model_path)
    folder, facts = Path(args.output), {**environment(_device(args)), "git_commit": git_commit()}
    setting = setting_of(args, benchmark, data, samples[0])
    with ExitStack() as stack:
        files = {}
        for each in runs:
            own = {"method": each.method, "tokens": each.tokens, "budget": each.budget, "seed": each.seed}
            path = folder / "answers" / f"{each.name}.jsonl"
            files[each] = stack.enter_context(open_answers(path, {**setting, **own}, facts))
        answers = {each: file.answers for each, file in files.items()}
        if earlier := {str(file.made.get("git_commit")) for file in files.values()} - {str(facts["git_commit"])}:
            print(
                f"{folder} has answers of other code (commit {', '.join(sorted(earlier))}), which stay: delete it to "
                "answer all again",
                file=sys.stderr,
            )
        cost = read_cost(folder / "cost.json", setting)
        complete = all(sample.id in given for given in answers.values() for sample in samples)
        if not complete or cost is None or not covers(cost, answers, samples):
            tokenizer, model, image_processor, _ = load_from_arguments(args, vanilla=True)
            for each in runs:  # what a method refuses, it refuses before the long work
                with attached(model, each):
                    pass
            prompts = prepare(benchmark, samples, tokenizer, image_processor, model.config, args.conv_mode)
            answer_all(model, tokenizer, benchmark, prompts, files, args.batch_size)
            cost = measure_cost(model, prompts, answers)
            write_atomically(folder / "cost.json", json.dumps({"setting": setting, **cost}, indent=1))
    results = {
        "benchmark": benchmark.name,
        "model": get_model_name_from_path(args.model_path),
        "model_path": str(args.model_path),
        "data": str(data),
        "questions": len(samples),
        "conv_mode": args.conv_mode,
        "setting": setting,
        "environment": facts,
        "visionzip": visionzip.__version__,
        **summarize(benchmark, samples, answers, cost),
        "cost": cost,
        "answers_made": {each.name: file.made for each, file in files.items()},
    }
    write_atomically(folder / "results.json", json.dumps(results, indent=1))
    write_table(folder)


def template_for(model_path: str) -> str:
    """The template that LLaVA's evaluation scripts use for a checkpoint.

    That of its name, but ``vicuna_v1`` for LLaVA-1.5, which they name where LLaVA's chat takes ``llava_v1``.
    """
    mode = conv_mode_for(get_model_name_from_path(model_path))
    return "vicuna_v1" if mode == "llava_v1" else mode


def _device(args: argparse.Namespace) -> str:
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def setting_of(args: argparse.Namespace, benchmark: Benchmark, data: Path, first: Sample) -> dict[str, Any]:
    """Everything that decides the answers of all runs; it is written into their files and must not change in them.

    Raises:
        OSError: a file of the model is missing.
    """
    config = find_file(args.model_path, "config.json")
    if config is None:
        raise FileNotFoundError(
            f"--model-path {args.model_path} has no config.json: give a checkpoint's folder or hub name"
        )
    values = SimpleNamespace(**json.loads(Path(config).read_text(encoding="utf-8")))
    tower = getattr(values, "mm_vision_tower", None)
    # Where the tower has no folder, its weights are in the checkpoint, or its name (in the config) says enough.
    parts = [args.model_path, args.model_base, tower if tower and Path(tower).is_dir() else None]
    return {
        "benchmark": benchmark.name,
        "data": sha256(data),
        "model": fingerprint(*filter(None, parts)),
        "bits": 8 if args.load_8bit else 4 if args.load_4bit else None,
        "device": _device(args).split(":")[0],
        "first_prompt": prompt_of(benchmark, first, values, args.conv_mode),
        "max_new_tokens": benchmark.max_new_tokens,
    }


def fingerprint(*paths: str) -> str:
    """A checksum of the files in some checkpoints; of one on the hub, its revision."""
    parts = []
    for path in paths:
        if Path(path).is_dir():
            files = sorted(file for file in Path(path).rglob("*") if file.suffix in _MODEL_FILES and file.is_file())
            parts += [f"{file.relative_to(path)} {sha256(file)}" for file in files]
        else:
            config = find_file(path, "config.json")
            parts.append(f"{path} {Path(config).parent.name if config else ''}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_commit() -> str | None:
    """The repository's commit, with ``-dirty`` where files differ from it; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def prompt_of(benchmark: Benchmark, sample: Sample, config: Any, conv_mode: str) -> str:
    """The whole prompt for a question, in a template."""
    conversation = new_conversation(conv_mode)
    text = with_image_tokens(benchmark.prompt(sample), len(sample.images), config)
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def prepare(
    benchmark: Benchmark, samples: Sequence[Sample], tokenizer: Any, image_processor: Any, config: Any, conv_mode: str
) -> list[Prompt]:
    """Prompts and pixels of all questions, once for all runs; questions about one image come together."""
    images = {id(image): image for sample in samples for image in sample.images}
    pixels = dict(
        zip(images, process_images(list(images.values()), image_processor, config) if images else [], strict=True)
    )
    places = {identity: place for place, identity in enumerate(images)}
    together = sorted(samples, key=lambda sample: [places[id(image)] for image in sample.images])
    return [
        Prompt(
            sample,
            tokenizer_image_token(prompt_of(benchmark, sample, config, conv_mode), tokenizer, return_tensors="pt"),
            tuple(pixels[id(image)] for image in sample.images),
            tuple(image.size for image in sample.images),
        )
        for sample in together
    ]


def answer_all(
    model: Any,
    tokenizer: Any,
    benchmark: Benchmark,
    prompts: Sequence[Prompt],
    files: Mapping[Run, AnswersFile],
    batch_size: int,
) -> None:
    """Answer what is not answered yet, and append it to the files, batch by batch.

    Batches are cut before what is answered is left out: a run that was killed answers as one that was not.
    """
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    done = sum(prompt.sample.id in file.answers for file in files.values() for prompt in prompts)
    with tqdm(total=len(prompts) * len(files), initial=done, unit="question", smoothing=0.05) as progress:
        for run, file in files.items():
            progress.set_description(run.name)
            with attached(model, run):
                for batch in batches:
                    missing = [prompt.sample.id not in file.answers for prompt in batch]
                    if any(missing):
                        answers = answer(model, tokenizer, batch, benchmark.max_new_tokens)
                        file.append([one for one, wanted in zip(answers, missing, strict=True) if wanted])
                        progress.update(sum(missing))


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, batch: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
    """Greedy answers to a batch of prompts."""
    device = model.get_input_embeddings().weight.device
    ids = [prompt.ids for prompt in batch]
    pad = model.generation_config.pad_token_id
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
    images = [image for prompt in batch for image in prompt.images]
    with _prompt_lengths(model) as lengths:
        output = model.generate(
            pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left").to(device),
            attention_mask=mask.to(device),
            images=images or None,
            image_sizes=[size for prompt in batch for size in prompt.sizes] or None,
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [
        Answer(prompt.sample.id, text.strip(), length - prompt.text_tokens)
        for prompt, text, length in zip(batch, texts, lengths, strict=True)
    ]


@contextmanager
def _prompt_lengths(model: Any) -> Iterator[list[int]]:
    """Collects the length of each prompt, visual tokens included, as the language model gets it."""
    lengths: list[int] = []

    def listen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (embeds := kwargs.get("inputs_embeds")) is not None:  # the prefill; later calls have a token each
            mask = kwargs.get("attention_mask")  # none where there is no padding
            lengths.extend([embeds.shape[1]] * len(embeds) if mask is None else mask.sum(dim=1).tolist())

    handle = model.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()

"""What only the inside of the engine shows of Qwen-VL; test_engine_qwen.py runs this with the engine's own Python.

As in engine_inside.py, transformers' zipped model in the same process says what is right: answers with the
probabilities of their tokens, which tell positions apart, and the visual tokens and places of each method.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from visionzip import visionzip
from visionzip.methods import METHODS
from visionzip.serving.places import split_places

Say = Callable[..., None]
NEW = 8
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0)
ONE = "<|vision_start|><|image_pad|><|vision_end|>"


def pictures() -> list[Image.Image]:
    """Images of noise, of different shapes."""
    noise = [
        np.random.default_rng(at).integers(0, 255, size)
        for at, size in enumerate([(60, 90, 3), (40, 120, 3), (56, 56, 3)])
    ]
    return [Image.fromarray(each.astype(np.uint8)) for each in noise]


def requests() -> list[tuple[str, list[Image.Image]]]:
    """Prompts with no image and with several."""
    one, two, three = pictures()
    return [
        ("what is it?", []),
        (f"{ONE} what?", [one]),
        (f"see {ONE} and {ONE}{ONE} what is it?", [one, two, three]),
        (f"{ONE} and then? {ONE}", [two, three]),
    ]


def load(path: str, **options: Any) -> tuple[Any, Any, LLM]:
    """Return transformers' zipped model, its processor, and the engine."""
    reference = visionzip(AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval())
    llm = LLM(
        path,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=4,
        gpu_memory_utilization=0.3,
        **options,
    )
    return reference, AutoProcessor.from_pretrained(path), llm


def ask(llm: LLM, asked: list[tuple[str, list[Image.Image]]]) -> list[Any]:
    """Ask all at once."""
    prompts = [{"prompt": text, **({"multi_modal_data": {"image": own}} if own else {})} for text, own in asked]
    return llm.generate(prompts, GREEDY)


def own_answer(
    reference: Any, processor: Any, text: str, images: list[Image.Image]
) -> tuple[list[int], list[float], int]:
    """Answer with transformers: its tokens, their log-probabilities, and the length of the shortened prompt."""
    inputs = processor(images=images or None, text=text, return_tensors="pt")
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        out = reference.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, **options)
    length = inputs["input_ids"].shape[1]
    tokens = out.sequences[0, length:].tolist()
    full = [int(grid.prod()) // 4 for grid in inputs.get("image_grid_thw", [])]
    dropped = sum(count - round(0.4 * count) for count in full)
    found = [float(own[0].log_softmax(-1)[token]) for own, token in zip(out.logits, tokens, strict=True)]
    return tokens, found, length - dropped


def compare(reference: Any, processor: Any, served: list[Any], say: Say) -> None:
    """Compare answers, and the lengths of prompts at 40 % of each image's tokens."""
    for (text, images), each in zip(requests(), served, strict=True):
        tokens, own, length = own_answer(reference, processor, text, images)
        found = [next(iter(step.values())).logprob for step in each.outputs[0].logprobs]
        say(f"answer to {len(images)}", tokens == list(each.outputs[0].token_ids), tokens)
        say("log-probabilities", max(abs(a - b) for a, b in zip(own, found, strict=True)) < 1e-3, [own, found])
        say("prompt", len(each.prompt_token_ids) == length, [len(each.prompt_token_ids), length])


def whole(path: str, say: Say) -> None:
    """Answers, then visual tokens and places of each method, one image at a time and all together."""
    reference, processor, llm = load(path, mm_device_do_normalize=False)  # so that both choose from the same pixels
    compare(reference, processor, ask(llm, requests()), say)
    inputs = processor(images=pictures(), text=ONE * 3, return_tensors="pt")
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    sizes = (inputs["image_grid_thw"].prod(dim=1) // 4).tolist()
    for method in METHODS.values():
        if not method.keeps_patches:
            continue
        setting = replace(llm.apply_model(lambda model: model.setting)[0], method=method.name, size_bias=False)
        visionzip(reference, **setting.to_dict())
        with torch.no_grad():
            expected = reference.model.get_image_features(**pixels)
        deepstack = getattr(expected, "deepstack_features", None) or []
        layers = torch.cat([torch.cat(list(layer)) for layer in (expected.pooler_output, *deepstack)], dim=1)

        def tokens(model: Any, budget: int, setting: Any = setting) -> Any:
            model.setting, model._budget, runs = setting, budget, []
            with model.visual.register_forward_hook(lambda module, args, out: runs.append(len(out))):
                return [split_places(rows)[0] for rows in model.embed_multimodal(**pixels)], runs

        for budget, encoded in ((60, sizes), (1000, [sum(sizes)])):
            found, runs = llm.apply_model(lambda model, budget=budget: tokens(model, budget))[0]
            wrong = float((torch.cat(found) - layers).abs().max() / layers.abs().max())
            say(f"{method.name} in {len(encoded)} runs", wrong < 1e-4 and runs == encoded, [wrong, runs])


def cut(path: str, say: Say) -> None:
    """Answers where prompts are cut in the middle of images, and again with what the prefix cache has of them."""
    reference, processor, llm = load(path, max_num_batched_tokens=16, block_size=32)
    compare(reference, processor, ask(llm, requests()), say)
    again = ask(llm, requests())
    compare(reference, processor, again, say)
    say("prefix cache", any(each.num_cached_tokens > 0 for each in again), [each.num_cached_tokens for each in again])
    clip = (np.zeros((4, 16, 16, 3), np.uint8), {"fps": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]})
    refused(llm, ("<|vision_start|><|video_pad|><|vision_end|>", "video", [clip]), "At most 0 video(s)", say)
    lines = [Image.new("RGB", (512, 8))] * 90  # each has 64 columns and keeps 26 tokens
    refused(llm, (ONE * 90, "image", lines), "90 images have 3420 positions more than kept tokens, and 3072", say)


def refused(llm: LLM, asked: tuple[str, str, Any], said: str, say: Say) -> None:
    """Check that a request is refused as the client's fault."""
    prompt, kind, media = asked
    try:
        llm.generate({"prompt": prompt, "multi_modal_data": {kind: media}})
    except VLLMValidationError as error:
        say(f"{kind} refused", said in str(error), str(error))


def main(kind: str, path: str) -> None:
    """Run one of the two and write its findings as JSON lines."""

    def say(what: str, right: bool, value: Any) -> None:
        print(json.dumps({"what": what, "right": bool(right), "value": value}), flush=True)

    {"whole": whole, "cut": cut}[kind](path, say)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(*sys.argv[1:])

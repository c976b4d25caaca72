"""What only the inside of the engine shows: tests/serving/test_engine.py runs this with the engine's own Python.

The visual tokens and answers of tiny models are compared with those of transformers' zipped ones in the same process,
on the same pixels; ``config.visionzip`` of their checkpoints is the setting. Each finding is a line.
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

from visionzip import visionzip
from visionzip.methods import METHODS

SIZES = [(90, 60), (120, 40), (56, 56)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def pictures() -> list[Image.Image]:
    """Images of noise, all different."""
    noise = [np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3)) for seed, size in enumerate(SIZES)]
    return [Image.fromarray(each.astype(np.uint8)) for each in noise]


def tokens_of(model: Any, pixels: dict[str, Any]) -> list[torch.Tensor]:
    """Visual tokens that vLLM's model makes of images."""
    return [each.float() for each in model.embed_multimodal(**pixels)]


def compare(path: str, say: Callable[..., None]) -> None:
    """Compare answers, and the visual tokens of each method, few at a time and all together."""
    reference = visionzip(AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval())
    processor = AutoProcessor.from_pretrained(path)
    llm = LLM(path, dtype="float32", enforce_eager=True, max_model_len=2048, max_num_seqs=4, gpu_memory_utilization=0.3)
    for images in ([pictures()[0]], pictures()):
        text = "<image>" * len(images) + " what?"
        inputs = processor(images=images, text=text, return_tensors="pt")
        with torch.no_grad():
            out = reference.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        own = out[0, inputs["input_ids"].shape[1] :].tolist()
        served = llm.generate([{"prompt": text, "multi_modal_data": {"image": images}}], GREEDY)[0]
        say("answer", own == list(served.outputs[0].token_ids), len(images))
    pixels = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    setting = llm.apply_model(lambda model: model.setting)[0]
    for method in METHODS.values():
        if not method.keeps_patches and "image_sizes" in inputs:
            continue
        chosen = replace(setting, method=method.name, keep=6, positions="consecutive", size_bias=False)
        visionzip(reference, **chosen.to_dict())
        with torch.no_grad():
            expected = reference.get_image_features(**pixels).pooler_output

        def served_tokens(model: Any, at_once: int, chosen: Any = chosen) -> list[torch.Tensor]:
            model.setting, model._at_once = chosen, at_once
            return tokens_of(model, pixels)

        for at_once in (2, 100):
            found = llm.apply_model(lambda model, at_once=at_once: served_tokens(model, at_once))[0]
            worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
            say(f"{method.name}, {at_once} at once", worst < 1e-4, worst)


def count_encodings(path: str, say: Callable[..., None]) -> None:
    """Ask three questions about one image, one after the other, and count how often the encoder runs."""
    llm = LLM(path, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=4, gpu_memory_utilization=0.3)
    runs: list[int] = []

    def watch(model: Any) -> None:
        model.vision_tower.register_forward_hook(lambda module, args, out: runs.append(len(args[0])))

    llm.apply_model(watch)
    prompt, lengths = "USER: <image>\n", []
    for question in ("What is it?", " And that?", " And then?"):
        prompt += question
        out = llm.generate([{"prompt": prompt, "multi_modal_data": {"image": pictures()[0]}}], GREEDY)[0]
        prompt += out.outputs[0].text
        lengths.append(len(out.prompt_token_ids))
    say("encoded once in three turns", runs == [1] and lengths == sorted(set(lengths)), runs)


def load_stock(path: str, say: Callable[..., None]) -> None:
    """Load a checkpoint in vLLM without the plugin; its answers are those of transformers' uncompressed model."""
    os.environ["VLLM_PLUGINS"] = ""
    reference = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    llm = LLM(path, dtype="float32", enforce_eager=True, max_model_len=2048, gpu_memory_utilization=0.3)
    say("stock class", llm.apply_model(lambda model: type(model).__module__)[0].startswith("vllm."), path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (144, 144, 3)).astype(np.uint8))
    text = {"llava": "<image>", "qwen": "<|vision_start|><|image_pad|><|vision_end|>"}[
        "qwen" if "Qwen" in type(processor).__name__ else "llava"
    ] + " what?"
    inputs = processor(images=[image], text=text, return_tensors="pt")
    with torch.no_grad():
        out = reference.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    served = llm.generate([{"prompt": text, "multi_modal_data": {"image": image}}], GREEDY)[0]
    own = out[0, inputs["input_ids"].shape[1] :].tolist()
    say("stock answer", own == list(served.outputs[0].token_ids), own)


def main(kind: str, path: str) -> None:
    """Run one of the three and write its findings as JSON lines."""

    def say(what: str, right: bool, value: Any) -> None:
        print(json.dumps({"what": what, "right": bool(right), "value": value}), flush=True)

    {"compare": compare, "count": count_encodings, "stock": load_stock}[kind](path, say)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(*sys.argv[1:])

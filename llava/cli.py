"""The console script ``visionzip``."""

from __future__ import annotations

import sys

from llava.commands.parsers import Commands, run_commands

BENCHMARKS: Commands = {
    "tower": ("llava.measure.tower:add_tower_arguments", "the vision encoder with and without compression"),
    "prefill": ("llava.measure.generate:add_prefill_arguments", "from pixels to the first token"),
    "generate": ("llava.measure.generate:add_generate_arguments", "from pixels to the last token"),
    "memory": ("llava.measure.memory:add_memory_arguments", "peak memory and KV cache of a prefill"),
    "frames": ("llava.measure.frames:add_frames_arguments", "time and memory of videos with more and more frames"),
    "families": ("llava.measure.families:add_families_arguments", "scaled Qwen models: whole, zipped and resized"),
    "mining": (
        "llava.measure.mining:add_mining_arguments",
        "Mini-Gemini's patch info mining, of all patches and of the kept ones",
    ),
    "serve": ("llava.measure.serve:add_serve_arguments", "OpenAI-compatible servers under load, in turns"),
    "tuning": (
        "llava.measure.tuning:add_tuning_arguments",
        "a step of projector tuning, zipped, cached, both or neither",
    ),
    "gpu": ("llava.measure.gpu.report:add_gpu_arguments", "all that only a GPU can show, within a time limit"),
}
COMMANDS: Commands = {
    "chat": ("llava.serve.cli:add_zipped_chat_arguments", "talk about images and videos in the terminal"),
    "demo": ("llava.demo.command:add_demo_arguments", "a page: what is kept of an image, both answers, all methods"),
    "visualize": ("llava.commands.visualize:add_visualize_arguments", "draw what is kept and merged of an image"),
    "benchmark": (BENCHMARKS, "measure what compression costs and gains"),
    "merge": ("llava.commands.merge:add_merge_arguments", "a tuned projector or LoRA and its base as one checkpoint"),
    "eval": ("visionzip_eval.__main__:COMMANDS", "benchmarks: accuracy, errors and cost of methods and budgets"),
    "convert": (
        "llava.commands.convert:add_convert_arguments",
        "a checkpoint in transformers' layout or LLaVA's own",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status (2 for bad input, as argparse has it)."""
    about = "VisionZip (CVPR 2025): a vision-language model on a fraction of its visual tokens."
    return run_commands("visionzip", COMMANDS, sys.argv[1:] if argv is None else argv, about, _version)


def _version() -> str:
    from visionzip import __version__  # noqa: PLC0415 - imports torch

    return __version__


if __name__ == "__main__":
    sys.exit(main())

"""What the tests of ``--cache_visual_tokens`` share: images of several shapes, a budget, and the cache's files."""

from __future__ import annotations

from pathlib import Path

SIZES = [(90, 60), (60, 90), (70, 70), (130, 40), (56, 56), (64, 100)]
ZIPPED = {"visionzip_dominant": 3, "visionzip_contextual": 2}


def stored(cache: Path) -> dict[str, bytes]:
    """The files with tokens, of all settings."""
    return {file.name: file.read_bytes() for file in cache.glob("*/tokens-*.bin")}


def lines(cache: Path) -> list[str]:
    return [line for file in sorted(cache.glob("*/index-*.jsonl")) for line in file.read_text().splitlines()]

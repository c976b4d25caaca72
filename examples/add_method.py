"""Add a method of one's own: keep the patches of most contrast, and compare it with VisionZip and with chance.

    python examples/add_method.py [QUESTIONS]

The method looks at pixels only. The table and the answers are written to results/examples/contrast, where a second run
goes on. CONTRIBUTING.md says how a method becomes one of the package: one file, one line, one test.
"""

import sys
from pathlib import Path

from torch import Tensor

from visionzip import CompressedTokens, VisionZipConfig
from visionzip.methods import METHODS, EncoderRead, Method, TokenCounts, top_patches
from visionzip_eval.__main__ import main as evaluate

ROOT = Path(__file__).resolve().parents[1]


def contrast(read: EncoderRead) -> Tensor:
    """Standard deviation of the pixels of each patch, (B, N)."""
    rows, columns = read.grid
    batch, channels, height, width = read.pixels.shape
    patches = read.pixels.reshape(batch, channels, rows, height // rows, columns, width // columns)
    return patches.float().std(dim=(1, 3, 5)).flatten(1)


def choose(read: EncoderRead, counts: TokenCounts, config: VisionZipConfig) -> CompressedTokens:
    """Keep the K patches of most contrast, of B images at once."""
    return top_patches(read, contrast(read), counts.dominant)


METHOD = Method("contrast", "patches of most contrast", choose, reads=frozenset({"pixels", "grid"}))


def main(questions: str = "140") -> int:
    """Register the method, and run it beside two others on the first questions of the scenes."""
    METHODS[METHOD.name] = METHOD
    model, data = ROOT / "checkpoints/llava-mini", ROOT / "playground/data/eval"
    where = ["--model-path", str(model), "--device", "cpu", "--data-root", str(data), "--limit", questions]
    what = ["--method", "visionzip", "random", METHOD.name, "--tokens", "32", "--seeds", "1"]
    return evaluate(["run", "scenes", *where, *what, "--output", "results/examples/contrast"])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

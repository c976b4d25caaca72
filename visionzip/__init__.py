"""VisionZip (CVPR 2025, arXiv 2412.04467): fewer visual tokens for vision-language models, without training."""

from visionzip.apply import unzip, visionzip
from visionzip.compress import CompressedTokens, compress_tokens
from visionzip.config import VisionZipConfig
from visionzip.picking import picked_tokens

__version__ = "0.1.0"

__all__ = [
    "CompressedTokens",
    "VisionZipConfig",
    "__version__",
    "compress_tokens",
    "picked_tokens",
    "unzip",
    "visionzip",
]

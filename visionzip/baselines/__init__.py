"""What VisionZip is compared with."""

from visionzip.baselines.controls import (
    average_pool,
    drop_cls_token,
    random_tokens,
    remove_control,
    uniform_tokens,
)
from visionzip.baselines.fastv import fastv, fastv_keep
from visionzip.baselines.language import remove_pruning
from visionzip.baselines.sparsevlm import sparsevlm

__all__ = [
    "average_pool",
    "drop_cls_token",
    "fastv",
    "fastv_keep",
    "random_tokens",
    "remove_control",
    "remove_pruning",
    "sparsevlm",
    "uniform_tokens",
]

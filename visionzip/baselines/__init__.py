"""What VisionZip is compared with."""

from visionzip.baselines.controls import (
    average_pool,
    drop_cls_token,
    random_tokens,
    remove_control,
    uniform_tokens,
)

__all__ = ["average_pool", "drop_cls_token", "random_tokens", "remove_control", "uniform_tokens"]

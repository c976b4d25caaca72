"""The families LLaVA-1.5 and Video-LLaVA of transformers: images and frames are compressed one by one.

Video-LLaVA has two CLIP encoders, one for images and one for videos. The paper's 136 tokens of a video (its Table 3)
are 17 tokens for each of 8 frames. The paper does not say how many of them are dominant; here they are 15 + 2, while
the ratio of its settings for images would give 14 + 3. The original model attends over time in its video encoder; the
class of transformers has no weights for that. Its videos have a placeholder for the CLS token too.
"""

from __future__ import annotations

from visionzip.config import VisionZipConfig
from visionzip.integrations.towers.base import TowerFamily, plain_modality

LLAVA = TowerFamily({"image": plain_modality("pixel_values", "vision_tower")})
VIDEO_LLAVA = TowerFamily(
    {
        "image": plain_modality("pixel_values", "image_tower", stacked=True, former_pixels="pixel_values_images"),
        "video": plain_modality("pixel_values_videos", "video_tower", frames=True, every=True, stacked=True),
    },
    towers=("image_tower", "video_tower"),
    default=VisionZipConfig(15, 2),
)

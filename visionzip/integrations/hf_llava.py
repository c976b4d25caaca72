"""transformers' LLaVA-1.5 (and what is built like it) and Video-LLaVA: images and frames are compressed one by one.

Video-LLaVA has two CLIP encoders, one for images and one for videos. The paper's 136 tokens of a video (its Table 3)
are 17 of each of 8 frames; how many of them are dominant it does not say: 15 + 2 here; by the ratio of its settings for
images it would be 14 + 3. The original model attends over time in its video encoder, for which this class has no
weights; its videos have a placeholder for CLS too.
"""

from __future__ import annotations

from visionzip.config import VisionZipConfig
from visionzip.integrations.towers import TowerFamily, plain_modality

LLAVA = TowerFamily({"image": plain_modality("pixel_values", "vision_tower")})
VIDEO_LLAVA = TowerFamily(
    {
        "image": plain_modality("pixel_values", "image_tower", stacked=True, former_pixels="pixel_values_images"),
        "video": plain_modality("pixel_values_videos", "video_tower", frames=True, every=True, stacked=True),
    },
    towers=("image_tower", "video_tower"),
    default=VisionZipConfig(15, 2),
)

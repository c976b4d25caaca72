"""Add a family: teach VisionZip to read the encoder of a class of transformers that it knows only from outside.

    python examples/add_family.py

Aya Vision has a SigLIP encoder and makes a token of 2 x 2 patches. Without a family, methods that read attention refuse
it; with the two functions below every method runs on it. The model is tiny and random. CONTRIBUTING.md says how a
family becomes one of the package.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

from visionzip import visionzip
from visionzip.attention import QueriesKeys, merge_keys, patch_scores, read_attention
from visionzip.integrations import register
from visionzip.integrations.seam import Encoder, Frames, Scored, SeamFamily, modality

IMAGE, SIDE = 5, 4  # the placeholder's id; tokens along the edge of a picture
VISION = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 4}
TEXT = {"model_type": "cohere2", "vocab_size": 99, "num_key_value_heads": 4, "pad_token_id": 0, "eos_token_id": 1}
BOTH = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}


def frames(base: nn.Module, arguments: dict[str, Tensor]) -> list[Frames]:
    """Each image is one frame, a square of tokens. Nothing is computed here."""
    return [Frames(1, (SIDE, SIDE))] * len(arguments["pixel_values"])


@contextmanager
def read(base: nn.Module, layer: int, arguments: dict[str, Tensor]) -> Iterator[Scored]:
    """Read a layer while the encoder runs: a score and a key of each patch, averaged over the patches of a token."""

    def scores_and_keys(found: QueriesKeys) -> Tensor:
        return torch.cat([patch_scores(found, cls_token=False)[..., None], merge_keys(found)], dim=-1)  # (B, N, 1 + Dk)

    def tokens() -> tuple[Tensor, Tensor]:
        values = reader.result().unflatten(1, (SIDE, 2, SIDE, 2)).mean(dim=(2, 4)).flatten(0, 2)
        return values[:, 0], values[:, 1:]

    with read_attention(base.vision_tower.encoder.layers[layer].self_attn, scores_and_keys) as reader:
        yield tokens


ENCODER = Encoder(read, layers=lambda base: [-3, -2, -1])  # those that may be scored; the last one is the default
IMAGES = {"image": modality("image", "pixel_values", frames, ENCODER, stacked=True)}

if __name__ == "__main__":
    config = AyaVisionConfig(vision_config=VISION | BOTH, text_config=TEXT | BOTH, image_token_index=IMAGE)
    model = AyaVisionForConditionalGeneration(config).eval()
    inputs = {"input_ids": torch.tensor([[2, *[IMAGE] * 16, 7, 8]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    register(type(model), SeamFamily(IMAGES, encoder=ENCODER, frames=frames), "Aya Vision (transformers)")
    for keep in (1.0, 0.5, 0.25):
        visionzip(model, keep=keep)
        print(f"keep={keep}: {model(**inputs).logits.shape[1] - 3} of 16 visual tokens")

"""The figures: what they draw is what the tower attends to, keeps and merges."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from checkpoints import CLIP, NEXT, SIGLIP, picture
from llava.mm_utils import expand2square, process_images
from visionzip import unzip, visionzip
from visionzip.visualize import (
    TokenMap,
    attention_histogram,
    attention_map,
    inspect_tokens,
    layer_panel,
    overview,
    token_overlay,
)

LAYERS, PATCHES = CLIP["num_hidden_layers"], 16  # 4 x 4 of 14 pixels
both = pytest.mark.parametrize("vision", [CLIP, SIGLIP], ids=["clip", "siglip"])


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def maps(load: Any, pixels: Tensor) -> list[TokenMap]:
    """Two images in a CLIP tower: CLS and 4 patches are kept, 12 patches merged into 2 tokens."""
    return inspect_tokens(visionzip(load()[1], dominant=5, contextual=2), pixels)


def drawn(axes: Axes) -> Tensor:
    """The array that a panel shows."""
    return torch.as_tensor(np.asarray(axes.images[0].get_array()))


def patches_of(image: Tensor, edge: int = 14) -> Tensor:
    """(N, edge * edge * 3) of an image (h, w, 3), row by row."""
    return image.unfold(0, edge, edge).unfold(1, edge, edge).flatten(2).flatten(0, 1)


def words(figure: Figure) -> str:
    """All text of a figure's panels."""
    texts = [[axes.get_title(), axes.get_xlabel(), *(text.get_text() for text in axes.texts)] for axes in figure.axes]
    return "\n".join(sum(texts, [row.get_suptitle() for row in figure.subfigs]))


# --- what is drawn ---


@both
def test_attention_is_that_of_every_layer(load: Any, pixels: Tensor, vision: dict):
    """As transformers' eager attention has it: the CLS token's row, or the mean of all rows."""
    model = load(vision=vision)[1]
    eager = copy.deepcopy(model.get_vision_tower().encoder)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        layers = torch.stack(eager(pixels, output_attentions=True).attentions, dim=1).mean(dim=2)
    expected = layers[:, :, 0, 1:] if vision is CLIP else layers.mean(dim=2)
    maps = inspect_tokens(model, pixels)
    assert [tokens.layer for tokens in maps] == [LAYERS - 2] * 2
    torch.testing.assert_close(torch.stack([tokens.attention for tokens in maps]), expected, atol=1e-5, rtol=0)


@both
def test_roles_are_what_the_tower_does(load: Any, pixels: Tensor, vision: dict):
    model = visionzip(load(vision=vision)[1], dominant=5, contextual=2)
    with torch.no_grad():
        compressed = model.get_vision_tower().compress(pixels)
    first = int(vision is CLIP)
    for index, tokens in enumerate(inspect_tokens(model, pixels)):
        highest = tokens.attention[tokens.layer].topk(5 - first).indices.sort().values
        assert torch.equal(tokens.roles.dominant.nonzero().flatten(), highest)
        assert torch.equal(highest + first, compressed.dominant_indices[index, first:])
        assert torch.equal(tokens.roles.groups, compressed.assignment[index, first:])
        assert torch.equal(tokens.roles.groups == -1, tokens.roles.dominant)
        assert tokens.roles.groups[tokens.roles.targets].tolist() == [0, 1]


@both
def test_the_image_is_what_the_tower_saw(load: Any, vision: dict):
    """Padded to a square, resized, and without the 4 pixels that the 4 x 4 patches of 14 leave over."""
    _, model, processor, _ = load(vision={**vision, "image_size": 60})
    (tokens,) = inspect_tokens(model, process_images([picture(0, (60, 40))], processor, model.config))
    background = tuple(int(channel * 255) for channel in processor.image_mean)
    square = np.asarray(expand2square(picture(0, (60, 40)), background), dtype=np.float32) / 255
    assert tokens.image.shape == (56, 56, 3)
    torch.testing.assert_close(tokens.image, torch.from_numpy(square[:56, :56]), atol=1e-5, rtol=0)


def test_layers_without_weights_are_left_out(load: Any, pixels: Tensor):
    """A tower that was loaded from a checkpoint which ends at the layer that LLaVA reads."""
    model = load()[1]
    whole = inspect_tokens(model, pixels)[0]
    model.get_vision_tower().untrained = frozenset({f"encoder.layers.{LAYERS - 1}.self_attn.q_proj.weight"})
    assert torch.equal(inspect_tokens(model, pixels)[0].attention, whole.attention[: LAYERS - 1])


def test_models_towers_and_wrapped_models(load: Any, pixels: Tensor):
    model = load()[1]
    expected = inspect_tokens(model, pixels)[1]
    for same in (model.get_vision_tower(), get_peft_model(model, LoraConfig(target_modules=["o_proj"]))):
        assert torch.equal(inspect_tokens(same, pixels)[1].attention, expected.attention)
    assert not any(module._forward_hooks for module in model.get_vision_tower().modules())
    with pytest.raises(TypeError, match="VisionZip does not support Linear"):
        inspect_tokens(nn.Linear(1, 1), pixels)


def test_tiles_are_images_of_their_own(load: Any):
    _, model, processor, _ = load(**NEXT)
    tiles = process_images([picture(0), picture(1)], processor, model.config)
    with pytest.raises(ValueError, match=r"got \(2, 5, 3, 56, 56\).*give images\[:, 0\]"):
        inspect_tokens(model, tiles)
    assert len(inspect_tokens(model, tiles[:, 0])) == 2


# --- how it is drawn ---


def test_overview(maps: list[TokenMap]):
    figure = overview(maps)
    assert len(figure.axes) == 2 * 4
    for tokens, (image, heat, kept, merged) in zip(maps, (figure.axes[:4], figure.axes[4:]), strict=True):
        assert torch.equal(drawn(image), tokens.image)
        assert torch.equal(drawn(heat), tokens.attention[LAYERS - 2].reshape(4, 4))
        as_they_were = (patches_of(drawn(kept)) == patches_of(tokens.image)).all(dim=1)
        assert torch.equal(as_they_were, tokens.roles.dominant)
        outlined = [(int(box.get_y()), int(box.get_x())) for box in merged.patches]
        assert outlined == [divmod(int(target), 4) for target in tokens.roles.targets]
    text = words(figure)
    assert "16 patches + CLS become 7 visual tokens (41%)" in text
    assert "56 x 56 pixels, 4 x 4 patches" in text and f"layer {LAYERS - 1} of {LAYERS}" in text
    assert "5 dominant tokens: 4 patches + CLS" in text
    assert f"they hold {maps[0].top_share(LAYERS - 2):.0%} of the attention" in text
    assert "2 contextual tokens, by colour" in text and "12 patches merged" in text


def test_groups_have_one_colour_each(load: Any, pixels: Tensor):
    """On a plain image, so that there are no other differences: 7 groups and the grey of the dominant patches."""
    model = visionzip(load()[1], dominant=4, contextual=7)
    tokens = replace(inspect_tokens(model, pixels)[0], image=torch.full((56, 56, 3), 0.5))
    colors = patches_of(drawn(overview([tokens]).axes[3])).view(PATCHES, 3, -1)
    assert (colors == colors[..., :1]).all()
    names = np.array([to_hex(color.numpy()) for color in colors[..., 0]])
    for slot in range(-1, 7):
        assert len(set(names[tokens.roles.groups == slot])) == 1
    assert len(set(names)) == 8


def test_encoders_without_cls(load: Any, pixels: Tensor):
    text = words(overview(inspect_tokens(visionzip(load(vision=SIGLIP)[1], dominant=5, contextual=1), pixels)))
    assert "attention that patches receive" in text and "CLS" not in text
    assert "16 patches become 6 visual tokens" in text
    assert "5 dominant patches" in text and "1 contextual token, by colour" in text


def test_budgets_at_the_limits(load: Any, pixels: Tensor):
    model = visionzip(load()[1], dominant=1, contextual=0)
    text = words(overview(inspect_tokens(model, pixels)))
    assert "1 dominant token: 0 patches + CLS" in text
    assert "no contextual tokens" in text and "16 patches dropped" in text
    with pytest.warns(UserWarning, match="nothing will be compressed"):
        visionzip(model, dominant=10, contextual=10)
    maps = inspect_tokens(model, pixels)
    assert torch.equal(drawn(overview(maps).axes[2]), maps[0].image)
    assert "16 patches + CLS become 17 visual tokens (100%)" in words(overview(maps))


def test_token_overlay(maps: list[TokenMap]):
    for tokens, axes in zip(maps, token_overlay(maps).axes, strict=True):
        as_they_were = (patches_of(drawn(axes)) == patches_of(tokens.image)).all(dim=1)
        assert torch.equal(as_they_were, tokens.roles.dominant)
        assert len(axes.patches) == 2
        assert axes.get_title() == "4 dominant patches (+ CLS) and, by colour, 2 contextual tokens"


def test_attention_map(maps: list[TokenMap]):
    image, heat, bar = attention_map(maps[:1]).axes
    assert torch.equal(drawn(image), maps[0].image)
    assert torch.equal(drawn(heat), maps[0].attention[LAYERS - 2].reshape(4, 4))
    assert bar.get_ylabel() == "attention, mean over heads"


def test_layer_panel(maps: list[TokenMap]):
    panels = layer_panel(maps[:1]).axes
    assert [axes.get_title() for axes in panels] == ["layer 1", "layer 2", "layer 3, scored", "layer 4"]
    for index, axes in enumerate(panels):
        assert torch.equal(drawn(axes), maps[0].attention[index].reshape(4, 4))
        share = maps[0].attention[index].sort(descending=True).values[:4].sum() / maps[0].attention[index].sum()
        assert axes.get_xlabel() == f"{share:.0%}"
        assert (axes.spines["top"].get_linewidth() > 1) == (index == 2)


def test_layers_of_a_deep_encoder(maps: list[TokenMap]):
    deep = replace(maps[0], attention=torch.rand(27, PATCHES), layer=25)
    panels = layer_panel([deep]).axes
    assert len(panels) == 27  # 4 rows of 7, one place empty
    assert panels[25].get_title() == "layer 26, scored"


def test_attention_histogram(maps: list[TokenMap]):
    histogram, shares = attention_histogram(maps).axes
    assert sum(bar.get_height() for bar in histogram.patches) == 2 * PATCHES
    assert histogram.get_yscale() == "log"
    curve = shares.lines[0].get_ydata()
    assert curve[0] == 0 and curve[PATCHES] == pytest.approx(1)
    share = sum(tokens.top_share(LAYERS - 2) for tokens in maps) / 2
    assert curve[4] == pytest.approx(share)
    assert f"4 of 16,\nhold {share:.0%} of the attention" in shares.texts[0].get_text()


def test_no_setting_of_matplotlib_is_touched(maps: list[TokenMap], tmp_path: Path):
    before = dict(mpl.rcParams)
    figure = overview(maps)
    figure.savefig(tmp_path / "tokens.png")
    assert figure.canvas.manager is None  # no window of pyplot's
    assert dict(mpl.rcParams) == before


# --- what cannot be drawn ---


def test_a_model_that_is_not_zipped_has_attention_only(load: Any, pixels: Tensor):
    maps = inspect_tokens(unzip(load()[1]), pixels)
    assert torch.equal(drawn(attention_map(maps).axes[1]), maps[0].attention[LAYERS - 2].reshape(4, 4))
    assert "layer 3, scored" in words(layer_panel(maps))
    assert "a tenth of the patches, 1 of 16" in words(attention_histogram(maps))
    for draw in (overview, token_overlay):
        with pytest.raises(ValueError, match=r"not zipped.*call visionzip\(model"):
            draw(maps)


def test_maps_that_do_not_go_together(load: Any, pixels: Tensor, maps: list[TokenMap]):
    other = inspect_tokens(visionzip(load()[1], dominant=4, contextual=2), pixels)
    with pytest.raises(ValueError, match="differ in patches or budget"):
        attention_histogram([*maps, *other])
    for draw in (overview, attention_map, token_overlay, attention_histogram, layer_panel):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw([])

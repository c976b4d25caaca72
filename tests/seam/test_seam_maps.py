"""Figures of today's families: attention on merged tokens, and what is kept and merged, as the zipped model has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from seam_checkpoints import save_checkpoint
from seam_models import FAMILIES, Picture, batch

from checkpoints import picture
from llava.cli import main as visionzip_command
from llava.model.stock.processor_model import inputs_of, load_model, load_processor, prompt_of, user_turn
from visionzip import unzip, visionzip
from visionzip.attention import read_packed_attention
from visionzip.integrations import family_of
from visionzip.integrations.seam.maps import inspect_picture, token_pairs


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(request.param, tmp_path_factory.mktemp("maps") / request.param)


@torch.no_grad()
@pytest.mark.parametrize("method", ["visionzip", "divprune"])
def test_a_map_has_what_the_model_keeps(checkpoint: Path, method: str):
    """Places of the kept tokens are those that the language model gets, in a grid of the picture's own shape."""
    processor = load_processor(str(checkpoint))
    model, image = load_model(str(checkpoint), processor, "cpu", torch.float32), picture(0, (90, 60))
    inputs = inputs_of(processor, [prompt_of(processor, [user_turn("", 1)])], [[image]])
    visionzip(model, keep=0.4, method=method)
    tokens = inspect_picture(model, inputs, image)
    rows, columns = tokens.grid
    assert (rows, columns) == ((6, 9) if "qwen" in checkpoint.name else (4, 4))
    assert tuple(tokens.image.shape) == (28 * rows, 28 * columns, 3)
    encoded = family_of(model).modalities["image"].encode(model.model, model._visionzip.config, inputs)
    kept = tokens.roles.dominant.clone()
    kept[tokens.roles.targets] = True
    assert kept.nonzero().flatten().tolist() == encoded.places[-1].tolist()
    assert tokens.num_kept == len(encoded.places[-1]) and len(tokens.roles.targets) == (3 if rows == 6 else 1) * (
        method == "visionzip"
    )
    layers = family_of(model).encoder.layers(model.model)
    assert len(tokens.attention) == len(layers) and tokens.layer == len(layers) - 1
    torch.testing.assert_close(tokens.attention.sum(dim=1), torch.ones(len(layers)))
    if method == "visionzip":  # the dominant tokens are those of highest attention
        assert tokens.attention[-1][tokens.roles.dominant].min() >= tokens.attention[-1][~tokens.roles.dominant].max()
    assert inspect_picture(unzip(model), inputs, image).roles is None


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral3", "pixtral", "gemma4"])
@pytest.mark.parametrize("method", ["visionzip", "random"])
def test_families_that_fill_pictures_up(name: str, method: str):
    """Of several pictures the last one, without what fills it up to the size of the others."""
    family = FAMILIES[name]
    model, inputs = family.build(), batch(family, [["a", Picture(1, 4, 4), Picture(2, 3, 2)]])
    visionzip(model, keep=0.5, method=method)
    tokens = inspect_picture(model, inputs, picture(0, (20, 30)))
    assert tokens.grid == (3, 2) and tokens.num_kept == 3
    (places,) = family_of(model).modalities["image"].encode(model.model, model._visionzip.config, inputs).places[1:]
    if family.row_ends:  # without the ends of rows
        places = torch.tensor([place - place // 3 for place in places.tolist() if place % 3 < 2])
    kept = tokens.roles.dominant.clone()
    kept[tokens.roles.targets] = True
    assert kept.nonzero().flatten().tolist() == places.tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "internvl", "gemma3", "idefics3", "mistral3", "pixtral", "gemma4"],
)
def test_what_tokens_attend_to(name: str):
    """The paper's Figure 14 for merged patches: what each token is paid on average is the attention of the map."""
    family = FAMILIES[name]
    model, inputs = family.build(), batch(family, [["a", Picture(1, 4, 4)]])
    visionzip(model, keep=0.5)
    tokens, pairs = inspect_picture(model, inputs, picture(0, (40, 40))), token_pairs(model, inputs)
    assert pairs.shape == (tokens.num_patches,) * 2 and not torch.equal(pairs, pairs.T)
    if name == "internvl":  # its scores are what the CLS token pays, and some attention goes to that
        assert pairs.sum(dim=1).min() > 0 and pairs.sum(dim=1).max() < 1
        return
    torch.testing.assert_close(pairs.sum(dim=1), torch.ones(len(pairs)))
    torch.testing.assert_close(pairs.mean(dim=0), tokens.attention[tokens.layer])


@torch.no_grad()
def test_a_token_pays_what_its_patches_do():
    """Of Qwen3-VL four patches in a row are a token."""
    family = FAMILIES["qwen3_vl"]
    model, inputs = family.build(), batch(family, [["a", Picture(1, 2, 4)]])
    arguments = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    with read_packed_attention(model.model.visual.blocks[-1].attn, lambda *read: read) as found:
        model.model.get_image_features(**arguments)
    queries, keys, _, _, scale = found[0]
    paid = (queries @ keys.mT * scale).softmax(dim=-1).mean(dim=0)
    expected = [
        [paid[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].sum(dim=1).mean().item() for j in range(8)] for i in range(8)
    ]
    torch.testing.assert_close(token_pairs(model, inputs), torch.tensor(expected))
    two = batch(family, [["a", Picture(1, 2, 4), Picture(2, 2, 2)]])
    with pytest.raises(ValueError, match="pairs are computed of one picture, but the inputs have 2: give one"):
        token_pairs(model, two)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Pictures of two shapes, one row each."""
    checkpoint = save_checkpoint("qwen3_vl", tmp_path / "qwen3_vl")
    files = [str(tmp_path / f"{seed}.png") for seed in range(2)]
    for seed, file in enumerate(files):
        picture(seed, (90, 60) if seed else (60, 90)).save(file)
    command = ["visualize", "--model-path", str(checkpoint), "--image", *files, "--device", "cpu"]
    assert visionzip_command([*command, "--keep", "0.4", "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("wrote") == 5
    assert all(file.stat().st_size > 10_000 for file in (tmp_path / "out").glob("*.png"))

"""VisionZip on Mistral 3 and Pixtral-12B, whose placeholders stand row by row: ``[IMG] [IMG] [IMG_BREAK] …``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_plain import plain_select
from seam_models import BREAK, END, FAMILIES, START, Part, Picture, batch
from test_seam_families import answers
from torch import Tensor
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from checkpoints import picture
from visionzip import visionzip
from visionzip.integrations import family_of
from visionzip.methods.visionzip import split

each = pytest.mark.parametrize("name", ["mistral3", "pixtral"])
PICTURES = [Picture(1, 3, 4), Picture(2, 4, 2)]
ROWS: list[list[Part]] = [["a", PICTURES[0], PICTURES[1], "what"], ["b", Picture(3, 2, 3), "c"], ["no picture"]]


def seen_ids(model: Any) -> list[Tensor]:
    """Ids that the model embeds, call by call."""
    seen: list[Tensor] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


def kept_places(model: Any, inputs: Any) -> list[Tensor]:
    """Of each picture, what stays of its run."""
    return family_of(model).modalities["image"].encode(model.model, model._visionzip.config, inputs).places


@each
@torch.no_grad()
def test_kept_tokens_equal_the_plain_method(name: str):
    """By attention received within each picture, averaged over the patches of a token, from the eager matrix."""
    model, inputs = FAMILIES[name].build("eager"), batch(FAMILIES[name], [list(PICTURES)])
    tower, merge, keys = model.model.vision_tower, 2 if name == "mistral3" else 1, []
    tower.transformer.layers[-1].attention.k_proj.register_forward_hook(lambda m, args, output: keys.append(output[0]))
    given = {key: inputs[key] for key in ("pixel_values", "image_sizes")}
    matrix = tower(**given, output_attentions=True).attentions[-1][0]
    whole = model.model.get_image_features(**given, return_dict=True).pooler_output
    visionzip(model, keep=0.6)
    encoded = family_of(model).modalities["image"].encode(model.model, model._visionzip.config, inputs)
    start = 0
    for at, (_, rows, columns, _) in enumerate(PICTURES):
        end = start + rows * columns * merge**2
        scores = matrix[:, start:end, start:end].mean(dim=1).sum(dim=0)
        key = keys[0][start:end].unflatten(-1, (4, -1)).mean(dim=1)
        width, start = columns * merge, end
        cells = [
            [(y * merge + j) * width + x * merge + i for j in range(merge) for i in range(merge)]
            for y in range(rows)
            for x in range(columns)
        ]
        score, key = (torch.stack([values[cell].mean(dim=0) for cell in cells]) for values in (scores, key))
        kept, groups = plain_select(score, key, *split(round(0.6 * rows * columns)))
        found = {place: whole[at][place] for place in kept}
        for target, *members in groups:
            found[target] = whole[at][target] + (whole[at][members].mean(0) if members else 0)
        expected = torch.stack([found[place] for place in sorted(found)])
        torch.testing.assert_close(encoded.tokens[at], expected, atol=1e-4, rtol=1e-4)
        ends = [row * (columns + 1) + columns for row in range(rows)]
        assert encoded.places[at].tolist() == sorted([place + place // columns for place in found] + ends)


@each
@torch.no_grad()
@pytest.mark.parametrize("keep", [0.5, 2])
def test_every_row_keeps_its_end(name: str, keep: float):
    """Also one of which nothing is kept, so that what is in front of a token says which row it is of."""
    family = FAMILIES[name]
    model = visionzip(family.build(), keep=keep, method="norm")
    seen, inputs = seen_ids(model), batch(family, ROWS)
    model(**inputs)
    places = iter(kept_places(model, inputs))
    for row, parts in enumerate(ROWS):
        ids, left = batch(family, [parts])["input_ids"][0].tolist(), []
        while ids:
            left.append(ids.pop(0))
            if left[-1] == START:
                run = next(places).tolist()
                left += [ids[place] for place in run]
                assert ids[run[-1]] == END
                del ids[: run[-1] + 1]
        assert seen[0][row, -len(left) :].tolist() == left
        assert left.count(BREAK) == sum(part.rows - 1 for part in parts if isinstance(part, Picture))


@each
@torch.no_grad()
def test_original_positions_and_a_size_bias(name: str):
    """A token stands where its patch was, and what ends a row where it was; that counts as one."""
    family = FAMILIES[name]
    model = visionzip(family.build(), keep=0.4, positions="original", size_bias=True)
    seen: list[dict[str, Any]] = []
    model.model.language_model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True, prepend=True
    )
    parts: list[Part] = ["a", PICTURES[0], "b"]
    inputs = batch(family, [parts])
    model(**inputs)
    start = inputs["input_ids"][0].tolist().index(START) + 1
    places = kept_places(model, inputs)[0].tolist()
    columns = [*range(start), *(start + place for place in places), start + 15]
    assert seen[0]["position_ids"][0].tolist() == columns
    sizes = dict(zip(columns, seen[0]["token_sizes"][0].tolist(), strict=True))
    assert sum(sizes.values()) == start + 12 + 3 + 1
    assert all(sizes[start + end] == 1 for end in (4, 9, 14))
    both = batch(family, ROWS)
    assert torch.equal(answers(model, both), answers(model, both, use_cache=False))
    last = batch(family, [["a", PICTURES[0]]])  # [IMG_END] is there to go on from
    assert torch.equal(answers(model, last), answers(model, last, use_cache=False))


@each
def test_other_rows_are_refused(name: str):
    """As many tokens, but of a picture of another shape: before the encoder runs."""
    family = FAMILIES[name]
    model = visionzip(family.build(), keep=0.5)
    ran: list[Any] = []
    model.model.vision_tower.register_forward_pre_hook(lambda *call: ran.append(call))
    inputs = batch(family, [["a", Picture(1, 6, 1), "b"]])
    other = batch(family, [["a", Picture(1, 3, 3), "b"]])
    assert inputs["input_ids"].shape == other["input_ids"].shape
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"image 0 .* rows of 3 placeholders .*, but prompt 0"):
            call(**{**other, "input_ids": inputs["input_ids"]})
        with pytest.raises(ValueError, match="image_sizes must have"):
            call(**{key: value for key, value in inputs.items() if key != "image_sizes"})
    assert not ran


def test_pictures_of_too_few_tokens_are_refused():
    """Where transformers' own forward fails in words about its tensors; with a second picture one token is enough."""
    family = FAMILIES["mistral3"]
    model, one = visionzip(family.build(), keep=1), batch(family, [["a", Picture(1, 1, 1), "b"]])
    with pytest.raises(ValueError, match=r"8 x 8 pixels, which is one token of 8 x 8, .* at least 16 pixels"):
        model(**one)
    small = one | {"pixel_values": one["pixel_values"][..., :4, :], "image_sizes": torch.tensor([[4, 8]])}
    with pytest.raises(ValueError, match=r"4 x 8 pixels, but a token of this model is 8 x 8: .* at least 8 pixels"):
        model(**small)
    model(**batch(family, [["a", Picture(1, 1, 1), Picture(2, 1, 1), "b"]]))


@torch.no_grad()
def test_pictures_of_the_stock_image_processor():
    """Filled up to the largest, whose shape changes no choice: ``random`` draws by a picture's own pixels."""
    processor = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    model = visionzip(FAMILIES["mistral3"].build(), keep=0.5, method="random")
    pictures = [picture(0, (48, 32)), picture(1, (32, 32)), picture(2, (24, 64))]
    both, alone = (processor(images, return_tensors="pt") for images in (pictures, pictures[1:2]))
    assert both["pixel_values"].shape[1:] != alone["pixel_values"].shape[1:]
    tokens = model.get_image_features(**both).pooler_output
    sizes = [rows * columns // 64 for rows, columns in both["image_sizes"].tolist()]
    assert [len(own) for own in tokens] == [size // 2 for size in sizes]
    torch.testing.assert_close(model.get_image_features(**alone).pooler_output[0], tokens[1], atol=1e-4, rtol=1e-4)

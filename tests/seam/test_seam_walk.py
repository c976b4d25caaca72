"""VisionZip on every class of transformers behind the seam; ``docs/families.md`` is what comes out.

``WRITE_FAMILIES=1 pytest tests/seam/test_seam_walk.py`` writes that file anew.
"""

from __future__ import annotations

import inspect
import os
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from seam_walk import build, classes, encode, prompts
from torch import Tensor

from visionzip import unzip, visionzip
from visionzip.integrations import REGISTRY

TABLE = Path(__file__).parents[2] / "docs" / "families.md"
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
WITHOUT_ATTENTION = ("cen-prune", "divprune", "random", "uniform")


class Verdict(NamedTuple):
    """What came of a class.

    Attributes:
        word: ``"all methods"``, ``"without attention"``, ``"refused"`` or ``"not tried"``.
        why: in words, of the last two.
    """

    word: str
    why: str = ""


def one_line(error: BaseException) -> str:
    """What an error says, short enough for a table."""
    text = " ".join(f"{error}".split()).replace("|", "/")
    return text if len(text) < 280 else f"{text[:277]}..."


def is_ours(error: BaseException) -> bool:
    """Whether VisionZip raised it, not the model."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, (ValueError, TypeError)) and "visionzip" in Path(frames[-1].filename).parts


def answers(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    return model.generate(**inputs, **GREEDY, **options)[:, inputs["input_ids"].shape[1] :]


def row_of(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """One row of a batch without its padding, with its image."""
    real, alone = inputs["attention_mask"][row].bool(), {}
    for name, value in inputs.items():
        if value.shape == real[None].expand(len(inputs["input_ids"]), -1).shape:
            alone[name] = value[row : row + 1, real]
        elif name == "pixel_values" and "image_grid_thw" in inputs:
            alone[name] = value.split(inputs["image_grid_thw"].prod(dim=1).tolist())[row]
        elif name == "pixel_values" and "target_sizes" in inputs:  # strips of patches, side by side
            widths = [patches * value.shape[2] for patches in inputs["target_sizes"].prod(dim=1).tolist()]
            alone[name] = value.split(widths, dim=3)[row]
        else:
            alone[name] = value[row : row + 1]
    return alone


def reference(model: Any, alone: dict[str, Any]) -> Tensor:
    """Logits (L', V) of the stock model for one row, without the half of its image's tokens that has smaller norms.

    Positions are its own of the whole prompt where they have three axes; otherwise they are counted anew.
    """
    taken = inspect.signature(model.model.get_image_features).parameters
    images = {name: value for name, value in alone.items() if name in taken}
    output = model.model.get_image_features(**images, return_dict=True)
    whole = output.pooler_output
    flat = whole.flatten(0, -2) if isinstance(whole, Tensor) else torch.cat(list(whole))
    kept = flat.norm(dim=-1).topk(max(1, round(0.5 * len(flat)))).indices.sort().values
    fields = dict(output) | {"pooler_output": flat[kept][None] if isinstance(whole, Tensor) else [flat[kept]]}
    if fields.get("deepstack_features"):
        fields["deepstack_features"] = [[torch.cat(list(layer))[kept]] for layer in fields["deepstack_features"]]
    ids = alone["input_ids"]
    image = ids[0] == model.config.image_token_id
    stays = ~image
    stays[image] = torch.isin(torch.arange(len(flat)), kept)
    positions = {}
    if hasattr(model.model, "get_rope_index"):
        names = inspect.signature(model.model.get_rope_index).parameters.keys() & images.keys()
        given = {name: images[name] for name in names} | {"mm_token_type_ids": image[None].int()}
        positions["position_ids"] = model.model.get_rope_index(ids, **given)[0][:, :, stays]
    mask = torch.ones_like(ids[:, stays])
    seen = {"image": type(output)(**fields)}
    return model(input_ids=ids[:, stays], attention_mask=mask, mm_encoder_outputs=seen, **positions).logits[0]


def check(model: Any, inputs: dict[str, Any], stock: list[Tensor]) -> None:
    """All tokens are the stock model bit for bit; half of them are the reference; a cache changes no answer."""
    rows = [row_of(inputs, row) for row in range(len(inputs["input_ids"]))]
    expected = [reference(model, alone) for alone in rows]
    visionzip(model, keep=1.0, method="norm")
    assert torch.equal(model(**inputs).logits, stock[0])
    assert torch.equal(answers(model, inputs), stock[1])
    visionzip(model, keep=0.5, method="norm")
    logits = model(**inputs).logits
    for alone, right in zip(rows, expected, strict=True):
        torch.testing.assert_close(model(**alone).logits[0], right, atol=2e-3, rtol=2e-3)
    assert logits.shape[1] == max(map(len, expected)) < inputs["input_ids"].shape[1]
    assert torch.equal(answers(model, inputs), answers(model, inputs, use_cache=False))
    for method in WITHOUT_ATTENTION:
        other = visionzip(model, keep=0.5, method=method)(**inputs).logits
        assert other.shape == logits.shape and torch.isfinite(other).all()
    unzip(model)
    assert torch.equal(model(**inputs).logits, stock[0])


@torch.no_grad()
def verdict_of(own: type) -> Verdict:
    """Build, zip and compare one class.

    Raises:
        AssertionError: it is neither right nor refused.
    """
    if any(f"{base.__module__}.{base.__qualname__}" in REGISTRY for base in own.__mro__):
        return Verdict("all methods", "a family of its own, with tests of its own")
    try:
        model = build(own)
    except Exception as error:
        return Verdict("not tried", f"no tiny model by rule: {one_line(error)}")
    try:
        given, lengths = encode(model)
        inputs = prompts(lengths, given)
        if hasattr(model.model, "get_rope_index"):
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
        stock = [model(**inputs).logits, answers(model, inputs)]
    except Exception as error:
        try:
            visionzip(model, keep=0.5, method="norm")
        except (TypeError, ValueError) as refusal:
            return Verdict("refused", one_line(refusal))
        return Verdict("not tried", f"the stock class: {one_line(error)}")
    try:
        check(model, inputs, stock)
    except Exception as error:
        if is_ours(error):
            return Verdict("refused", one_line(error))
        raise AssertionError(f"{own.__name__}: {type(error).__name__}: {one_line(error)}") from error
    return Verdict("without attention")


# --- the table ---

HEAD = """# Classes of transformers that VisionZip takes

Written by `WRITE_FAMILIES=1 pytest tests/seam/test_seam_walk.py`, which finds every class of transformers {version}
whose `forward` takes `mm_encoder_outputs`, builds a tiny random model of each by rule, and runs it.

- **all methods**: a family of its own, named in `visionzip/integrations`, with tests of its own.
- **without attention**: `visionzip(model, keep=0.5, method="cen-prune")`, or `divprune`, `norm`, `random`, `uniform`;
  others read the encoder's attention, of which nothing is known there. Checked of two rows with an image each, one of
  them padded: `keep=1.0` is the stock class bit for bit, in `forward` and `generate`; `keep=0.5` with `norm` equals the
  stock class given the tokens that a plain choice keeps; cached decoding is recomputation; `unzip` is exact. Prompts
  have one run of placeholders for each image. Where they are cut into rows, and with videos or sound, these classes
  refuse before the encoder runs.
- **refused**: what `visionzip(model)` says, or the call.
- **not tried**: its default config could not be made small by rule, or the stock class did not take what is made for
  it. It may work; the line says how far it came.

| class | VisionZip | |
|---|---|---|
"""


def table(found: dict[str, Verdict]) -> str:
    """The file's text."""
    counts: dict[str, int] = {}
    for verdict in found.values():
        counts[verdict.word] = counts.get(verdict.word, 0) + 1
    rows = [f"| {name} | {verdict.word} | {verdict.why} |" for name, verdict in sorted(found.items())]
    total = f"\n{len(found)} classes: {', '.join(f'{count} {word}' for word, count in sorted(counts.items()))}.\n"
    return HEAD.format(version=transformers.__version__.rsplit(".", 1)[0]) + "\n".join(rows) + "\n" + total


def test_every_class_behind_the_seam():
    """Each is right, refused, or not tried and says why; the file in the repository says the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the stock classes, to configs that were made small
        found = {own.__name__: verdict_of(own) for own in classes()}
    text = table(found)
    if os.environ.get("WRITE_FAMILIES"):
        TABLE.write_text(text)
    assert TABLE.read_text() == text, "docs/families.md is out of date: see this file's first lines"
    assert sum(verdict.word == "without attention" for verdict in found.values()) >= 25

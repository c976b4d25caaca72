"""VisionZip on every family behind transformers' seam: what must hold for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from seam_models import END, FAMILIES, IMAGE, START, VIDEO, Family, Part, Picture, batch
from torch import Tensor
from transformers import DynamicCache

from visionzip import unzip, visionzip

each = pytest.mark.parametrize("name", list(FAMILIES))
OF_IMAGES = ("pixel_values", "image_grid_thw", "image_sizes", "image_position_ids")
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def sized(family: Family, seed: int, rows: int, columns: int) -> Picture:
    """A picture of this size where the family has sizes."""
    return Picture(seed, rows, columns) if family.sizes else Picture(seed)


def mixed(family: Family) -> list[list[Part]]:
    """Rows of two images of unequal size, of one, of none, and of a video and an image where there are any."""
    rows: list[list[Part]] = [
        ["a", sized(family, 1, 3, 4), "b", sized(family, 2, 2, 2), "what"],
        [sized(family, 3, 4, 2), "c"],
        ["no picture"],
    ]
    if family.videos:
        rows.append(["see ", Picture(4, 2, 3, frames=2), " or ", Picture(5, 2, 2)])
    return rows


def answers(model: Any, inputs: Any, **options: Any) -> Tensor:
    out = model.generate(**inputs, **GREEDY | options)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    return out[:, inputs["input_ids"].shape[1] :]


@each
@torch.no_grad()
def test_all_tokens_give_the_stock_model_bit_for_bit(name: str):
    family = FAMILIES[name]
    model, inputs = family.build(), batch(family, mixed(family))
    stock = [model(**inputs).logits, answers(model, inputs)]
    zipped = visionzip(model, keep=1.0)
    assert torch.equal(zipped(**inputs).logits, stock[0]) and torch.equal(answers(zipped, inputs), stock[1])
    assert not torch.equal(visionzip(model, keep=0.25)(**inputs).logits[:, -1], stock[0][:, -1])
    unzip(model)
    assert torch.equal(model(**inputs).logits, stock[0]) and torch.equal(answers(model, inputs), stock[1])


@each
@torch.no_grad()
def test_a_batch_equals_its_rows_alone_and_is_as_short_as_the_share_says(name: str):
    family = FAMILIES[name]
    model, rows = visionzip(family.build()), mixed(family)
    assert model.config.visionzip["keep"] == 0.5
    inputs = batch(family, rows)
    output = model(**inputs)
    said = answers(model, inputs)
    for row, parts in enumerate(rows):
        alone = batch(family, [parts])
        expected = model(**alone).logits[0]
        pictures = [part for part in parts if isinstance(part, Picture)]
        dropped = sum((p.tokens - max(1, round(0.5 * p.tokens))) * max(1, p.frames) for p in pictures)
        assert len(expected) == alone["input_ids"].shape[1] - dropped
        torch.testing.assert_close(output.logits[row, -len(expected) :], expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(answers(model, alone)[0], said[row])


@each
@torch.no_grad()
@pytest.mark.parametrize("method", ["cen-prune", "divprune", "norm", "random", "uniform", "scope", "agile"])
def test_other_methods(name: str, method: str):
    family = FAMILIES[name]
    model, inputs = visionzip(family.build(), keep=0.5, method=method), batch(family, mixed(family))
    logits = model(**inputs).logits
    assert torch.isfinite(logits).all() and logits.shape[1] < inputs["input_ids"].shape[1]


@each
@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_cached_decoding_is_recomputation(name: str, options: dict[str, Any]):
    family = FAMILIES[name]
    model, inputs = visionzip(family.build(), keep=0.4), batch(family, mixed(family))
    options = {"output_logits": True, "return_dict_in_generate": True, **GREEDY, **options}
    cached, anew = (model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, anew.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(anew.logits), atol=1e-4, rtol=1e-4)


@each
@torch.no_grad()
@pytest.mark.parametrize("way", ["prompt_lookup_num_tokens", "static cache", "prefill_chunk_size"])
def test_ways_to_generate_that_change_no_answer(name: str, way: str):
    family = FAMILIES[name]
    model, inputs = visionzip(family.build(), keep=0.4), batch(family, mixed(family)[:1])
    if name.startswith("qwen3_5") and way == "prompt_lookup_num_tokens":
        with pytest.raises(ValueError, match="stateful"):  # linear attention: transformers refuses by itself
            answers(model, inputs, **{way: 3})
        return
    options = {"cache_implementation": "static"} if way == "static cache" else {way: 7}
    if way == "prefill_chunk_size":
        options["past_key_values"] = DynamicCache(config=model.config)
    assert torch.equal(answers(model, inputs, **options), answers(model, inputs))


@each
@torch.no_grad()
def test_a_decoding_loop_of_ones_own(name: str):
    family = FAMILIES[name]
    model = visionzip(family.build(), keep=0.4)
    inputs = batch(family, [["a", sized(family, 1, 3, 4), "b"]])
    output, said = model(**inputs), []
    while len(said) < 5:
        said.append(output.logits[:, -1:, VIDEO + 1 :].argmax(-1) + VIDEO + 1)  # what generate may say
        output = model(input_ids=said[-1], past_key_values=output.past_key_values)
    never = list(range(VIDEO + 1))
    assert torch.equal(torch.cat(said, dim=1), answers(model, inputs, suppress_tokens=never))


def joined(name: str, first: Tensor, second: Tensor, dim: int) -> Tensor:
    """One behind the other; pictures are filled up to one size, as processors do."""
    if dim == 0 and first.ndim > 2:
        most = [max(edges) for edges in zip(first.shape[1:], second.shape[1:], strict=True)]
        fill = -1 if name == "image_position_ids" else 0
        pads = [
            [pad for edge, size in zip(most[::-1], own.shape[:0:-1], strict=True) for pad in (0, edge - size)]
            for own in (first, second)
        ]
        first, second = (F.pad(own, pad, value=fill) for own, pad in zip((first, second), pads, strict=True))
    return torch.cat([first, second], dim=dim)


@each
@torch.no_grad()
def test_three_turns_with_a_kept_cache(name: str):
    """Images in the first turn, a new one in the second, text in the third: as without a cache, given as new tokens."""
    family = FAMILIES[name]
    model = visionzip(family.build(), keep=0.4)
    turns: list[list[Part]] = [["a", sized(family, 1, 3, 4), "b"], ["or", sized(family, 2, 2, 2)], ["why so"]]
    sofar, cache = {}, None
    for parts in turns:
        new = batch(family, [parts], bos=not sofar)
        last = sofar["input_ids"][:, -1:] if sofar else new["input_ids"][:, :0]
        whole = {}
        for key, values in new.items():
            dim = {
                "pixel_values": 1 if values.ndim == 5 else 0,
                "image_grid_thw": 0,
                "image_sizes": 0,
                "image_position_ids": 0,
            }.get(key, 1)
            whole[key] = joined(key, sofar[key], values, dim) if key in sofar else values
        sofar |= whole
        expected = model.generate(**sofar, **GREEDY)
        length = 0 if cache is None else cache.get_seq_length()
        own = {**new, "input_ids": torch.cat([last, new["input_ids"]], dim=1)}
        own["attention_mask"] = torch.ones(1, length + own["input_ids"].shape[1], dtype=torch.long)
        for key in ("mm_token_type_ids", "token_type_ids"):
            if key in own:
                own[key] = torch.cat([torch.zeros_like(last, dtype=own[key].dtype), own[key]], dim=1)
        turn = model.generate(**own, past_key_values=cache, **GREEDY, return_dict_in_generate=True)
        assert torch.equal(turn.sequences[:, -5:], expected[:, -5:])
        cache = turn.past_key_values
        for key, values in sofar.items():
            if values.shape == sofar["input_ids"].shape and key != "input_ids":
                sofar[key] = torch.cat([values, values.new_full((1, 5), int(key == "attention_mask"))], dim=1)
        sofar["input_ids"] = expected


@each
def test_training(name: str):
    """Labels run along, and every part gets a gradient: encoder, merger or projector, and language model."""
    family = FAMILIES[name]
    model = visionzip(family.build(), keep=0.4).train()
    inputs = batch(family, [["a", sized(family, 1, 3, 4), "bc"], [sized(family, 2, 2, 2), "what"]], side="right")
    special = torch.isin(inputs["input_ids"], torch.tensor([START, END, IMAGE, VIDEO]))
    labels = inputs["input_ids"].masked_fill(special | (inputs["attention_mask"] == 0), -100)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    reached = {key for key, value in model.named_parameters() if value.grad is not None and value.grad.abs().sum() > 0}
    for part in ("visual.blocks.0", "vision_tower.encoder.layer", "vision_model.encoder.layers.0", "merger"):
        named = [key for key, _ in model.named_parameters() if part in key]
        assert not named or reached & set(named), part
    assert any("lm_head" in key or "embed_tokens" in key for key in reached)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
def test_gradients_with_and_without_checkpointing_are_the_same(name: str):
    family = FAMILIES[name]
    inputs, gradients = batch(family, [["a", sized(family, 1, 3, 4), "bc"]]), []
    for checkpointing in (False, True):
        model = visionzip(family.build(), keep=0.4).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    torch.testing.assert_close(*gradients)


@each
@torch.no_grad()
def test_bfloat16(name: str):
    """Scores are float32; everything else keeps the model's type."""
    family = FAMILIES[name]
    model, inputs = visionzip(family.build().to(torch.bfloat16), keep=0.4), batch(family, mixed(family))
    logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
    assert answers(model, inputs).shape == (len(inputs["input_ids"]), 5)


@each
@torch.no_grad()
def test_save_and_reload(name: str, tmp_path: Any):
    family = FAMILIES[name]
    model, inputs = visionzip(family.build(), keep=0.3, method="divprune"), batch(family, mixed(family)[:1])
    model.save_pretrained(tmp_path)
    again = visionzip(type(model).from_pretrained(tmp_path).eval())
    assert again.config.visionzip == model.config.visionzip
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


@each
def test_what_does_not_fit(name: str):
    family = FAMILIES[name]
    model, inputs = family.build(), batch(family, [["a", sized(family, 1, 3, 4), "b"]])
    given = {key: value for key, value in inputs.items() if key in OF_IMAGES}
    features = model.get_image_features(**given, return_dict=True)
    visionzip(model, keep=0.4)
    ran = []
    encoder = next(
        getattr(model.model, part) for part in ("visual", "vision_tower", "vision_model") if hasattr(model.model, part)
    )
    encoder.register_forward_pre_hook(lambda *call: ran.append(call))
    fewer = {**inputs, "input_ids": inputs["input_ids"][:, :-3], "attention_mask": inputs["attention_mask"][:, :-3]}
    embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    none = {key: value for key, value in inputs.items() if key != "pixel_values"}
    for wrong, message in (
        (fewer, "prompt 0 has a run of"),
        (embeds, "needs input_ids, not inputs_embeds"),
        (none, "placeholders .* but no pixel_values were given"),
        ({**inputs, "mm_encoder_outputs": {}}, "mm_encoder_outputs were given beside pixels"),
        ({**none, "mm_encoder_outputs": {"image": features}}, "has features of images, but a zipped model"),
        ({**inputs, "pixel_values": inputs["pixel_values"][..., :-1]}, r"pixel_values must be \(.*own processor"),
        ({**inputs, "pixel_values": inputs["pixel_values"] * torch.nan}, "pixels that are NaN or infinite"),
    ):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=message):
                call(**wrong)
    assert not ran
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"keep={share} is outside 0 to 1"):
            visionzip(model, keep=share)
    with pytest.raises(ValueError, match="method='pool' averages areas"):
        visionzip(model, keep=0.5, method="pool")
    whole = type(model).__name__
    with pytest.raises(TypeError, match=rf"Give the whole {whole}, not its base model\. Supported are .* {whole} \("):
        visionzip(model.model)

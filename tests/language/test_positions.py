"""Original positions and the size bias in LLaVA's models: where kept tokens stand, through every way prompts take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import picture, pixels
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.serve.chat import ChatSession
from llava.train.labels import attention_apart
from slow_llama import slow_sized
from visionzip import unzip, visionzip
from visionzip.language import fastv, remove_pruning

PLUS = {"keep": 5, "method": "visionzip-plus"}
LONG = torch.tensor([[1, 10, IMAGE_TOKEN_INDEX, 11, 12, IMAGE_TOKEN_INDEX, 13, 14]])
SHORT = torch.tensor([[1, 20, IMAGE_TOKEN_INDEX, 21]])
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def logits_of(model: Any, ids: Tensor, images: Any, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, images=images, **arguments).logits


def slow_logits(model: Any, prompt: Tensor, images: Tensor) -> Tensor:
    """Logits (L', V) of one prompt, its positions counted by hand and each layer written out."""
    embed, patches = model.get_model().embed_tokens, model.get_vision_tower().num_patches
    visual = iter(model.placed_tokens(images))
    embeds, places, sizes, position = [], [], [], 0
    for token in prompt.tolist():
        if token != IMAGE_TOKEN_INDEX:
            embeds.append(embed(torch.tensor(token)))
            places.append(position)
            sizes.append(1.0)
            position += 1
            continue
        image = next(visual)
        for row, place, size in zip(image.tokens, image.places.tolist(), image.sizes.tolist(), strict=True):
            embeds.append(row)
            places.append(position + place)
            sizes.append(size)
        position += patches
    own = torch.stack(embeds), torch.tensor(sizes), torch.tensor(places)
    visible = torch.ones(len(embeds), len(embeds)).tril()
    return slow_sized(model.get_model(), *own, visible) @ model.lm_head.weight.T


# --- the language model sees them there ---


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_equals_the_slow_reference(make_checkpoint, kernel: str):
    path = str(make_checkpoint())
    model = visionzip(load_pretrained_model(path, device="cpu", attn_implementation=kernel)[1], **PLUS)
    images = pixels(2)
    expected = slow_logits(model, LONG[0], images)
    torch.testing.assert_close(logits_of(model, LONG, images)[0], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("model_type", ["llava_llama", "llava_mistral", "llava_qwen"])
def test_all_tokens_are_the_model_without_visionzip(load, model_type: str):
    """A budget of all patches: original positions are consecutive ones, and every size is 1."""
    model, images = load(model_type=model_type)[1], pixels(2)
    expected = logits_of(model, LONG, images)
    with pytest.warns(UserWarning, match="nothing will be compressed"):
        visionzip(model, keep=16, method="visionzip-plus")
    torch.testing.assert_close(logits_of(model, LONG, images), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(logits_of(unzip(model), LONG, images), expected)


@pytest.mark.parametrize("model_type", ["llava_llama", "llava_mistral", "llava_qwen"])
def test_cached_decoding_is_recomputing(load, model_type: str):
    """By hand, without position_ids: what the cache holds says where it goes on; so do a cut and a further image."""
    model, images = visionzip(load(model_type=model_type)[1], **PLUS), pixels(3)
    whole = torch.cat([LONG, torch.tensor([[30, 31, 32, IMAGE_TOKEN_INDEX, 33]])], dim=1)
    expected = logits_of(model, whole, images)
    with torch.no_grad():
        out = model(input_ids=LONG, images=images[:2], use_cache=True)
        model(input_ids=torch.tensor([[40, 41]]), past_key_values=out.past_key_values)
        out.past_key_values.crop(-2)
        parts = [out.logits]
        for token in (30, 31, 32):
            parts.append(model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values).logits)
        last = torch.tensor([[IMAGE_TOKEN_INDEX, 33]])
        parts.append(model(input_ids=last, images=images[2:], past_key_values=out.past_key_values).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("setting", [PLUS, PLUS | {"size_bias": False}, PLUS | {"positions": "consecutive"}])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_answers_as_its_prompts_alone(load, beams: int, setting: dict[str, Any]):
    """Two images, one and none, padded on the left; decoding recomputes to the same words."""
    model, images = visionzip(load()[1], **setting), pixels(3)
    text = torch.tensor([[1, 5, 6]])
    options = GREEDY | {"num_beams": beams}
    alone = [model.generate(LONG, images=images[:2], **options), model.generate(SHORT, images=images[2:], **options)]
    alone.append(model.generate(text, **options))
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for row, prompt in enumerate((LONG, SHORT, text)):
        ids[row, 8 - prompt.shape[1] :], mask[row, 8 - prompt.shape[1] :] = prompt[0], 1
    together = model.generate(ids, images=images, attention_mask=mask, **options)
    assert torch.equal(together, torch.cat(alone))
    if beams == 1:
        for prompt, own, answer in ((LONG, images[:2], alone[0]), (SHORT, images[2:], alone[1])):
            said = logits_of(model, torch.cat([prompt, answer], dim=1), own)[0, -7:-1].argmax(dim=-1)
            assert torch.equal(said, answer[0])


def test_three_turns_equal_recomputing_everything(load):
    """A conversation that keeps its cache, with another image in its second turn."""
    tokenizer, model, processor, _ = load()
    visionzip(model, **PLUS)
    session, images = ChatSession(model, tokenizer, processor, **GREEDY), []
    for number, question in enumerate(("What is shown here?", "And here?", "Is it red?")):
        new = [picture(number)] if number < 2 else []
        images += new
        turn = session.ask(question, new)
        conversation = session.conversation.copy()
        conversation.messages[-1] = (conversation.roles[1], None)
        ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None]
        out = model.generate(ids, images=process_images(images, processor, model.config), **GREEDY)
        assert turn.text == tokenizer.decode(out[0], skip_special_tokens=True).strip()
    assert turn.cached_tokens > 40


def test_the_context_is_one_of_positions(load):
    tokenizer, model, processor, _ = load()
    session = ChatSession(visionzip(model, **PLUS), tokenizer, processor, max_new_tokens=50)
    row = session._prompt(session_prompt(session), model.placed_tokens(pixels(1)))[1]
    model.config.max_position_embeddings = row.end + 3
    assert row.end == len(row.embeds) + 11 and session.ask("Why?", [picture(0)]).new_tokens == 3
    model.config.max_position_embeddings = row.end
    session.reset()
    with pytest.raises(ValueError, match=f"{row.end - 11} tokens at {row.end} positions.*positions='consecutive'"):
        session.ask("Why?", [picture(0)])


def session_prompt(session: ChatSession) -> str:
    """The prompt of a first turn."""
    conversation = session.conversation.copy()
    conversation.append_message(conversation.roles[0], "<image>\nWhy?")
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


# --- training ---


def labelled() -> tuple[Tensor, Tensor, Tensor]:
    """Two prompts with answers, the second padded on the right: ids, mask and labels."""
    ids, mask = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.bool)
    ids[0], mask[0] = LONG, True
    ids[1, :4], mask[1, :4] = SHORT, True
    labels = ids.masked_fill(~mask | (ids == IMAGE_TOKEN_INDEX), IGNORE_INDEX)
    return ids, mask, labels


def test_training_is_that_of_the_prompts_alone(load):
    model, images = visionzip(load()[1], **PLUS).train(), pixels(3)
    ids, mask, labels = labelled()
    out = model(input_ids=ids, attention_mask=mask, labels=labels, images=images)
    first, second = logits_of(model, LONG, images[:2]), logits_of(model, SHORT, images[2:])
    torch.testing.assert_close(out.logits[0], first[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.logits[1, : second.shape[1]], second[0], atol=1e-5, rtol=1e-4)
    out.loss.backward()
    assert all((parameter.grad != 0).any() for parameter in model.get_model().mm_projector.parameters())
    encoded = [model.get_vision_tower().encode(image[None], model._project) for image in images]  # as a cache has them
    again = model(input_ids=ids, attention_mask=mask, labels=labels, images=encoded)
    torch.testing.assert_close(again.loss, out.loss)


def test_a_row_is_cut_at_positions(load):
    model, images = visionzip(load()[1], **PLUS), pixels(3)
    model.config.tokenizer_model_max_length = 20  # the first prompt has 38 positions and 16 tokens
    ids, mask, labels = labelled()
    prepared, visual, sizes = model.prepare(ids, None, mask, None, labels, images)
    _, positions, mask, _, embeds, labels = prepared
    assert positions.max() == 19 and mask[0].sum() == 9 and embeds.shape[:2] == labels.shape == visual.shape
    assert sizes.shape == labels.shape and (sizes[~visual] == 1).all()


def test_turns_apart_count_on_from_the_common_start():
    """An image of two tokens in the place of ten, and two turns of two tokens behind it."""
    turns = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, -1]])
    positions = torch.tensor([[0, 3, 8, 11, 12, 13, 14, 15, 0]])
    assert attention_apart(turns, positions)[1].tolist()[0][:8] == [0, 3, 8, 11, 12, 13, 12, 13]
    assert attention_apart(turns)[1].tolist()[0][:8] == [0, 1, 2, 3, 4, 5, 4, 5]


# --- the setting ---


def test_saved_and_loaded(load, tmp_path: Path):
    model, images = visionzip(load()[1], **PLUS), pixels(2)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again, LONG, images), logits_of(model, LONG, images))


def test_positions_and_sizes_are_options_of_any_method(load):
    model, images = load()[1], pixels(2)
    found = [
        logits_of(visionzip(model, 5, 2, positions=positions, size_bias=size_bias), LONG, images)
        for positions in ("consecutive", "original")
        for size_bias in (False, True)
    ]
    plain = logits_of(visionzip(model, 5, 2), LONG, images)
    assert torch.equal(found[0], plain)
    assert all(not torch.allclose(other, plain, atol=1e-3) for other in found[1:])


def refused_calls(model: Any, images: Tensor) -> dict[str, Callable[[], Any]]:
    embeds = torch.randn(1, 4, 32)
    return {
        "prompt 0 ends with an image.*put text behind it": lambda: model.generate(LONG[:, :6], images=images),
        "inputs_embeds came without position_ids.*model.prepare": lambda: model.generate(inputs_embeds=embeds),
        "inputs_embeds came without token_sizes": lambda: model.generate(
            inputs_embeds=embeds, position_ids=torch.arange(4)[None]
        ),
        "no place for token_sizes.*model.prepare": lambda: model.prepare_inputs_labels_for_multimodal(
            LONG, None, None, None, None, images
        ),
        "zipped with size_bias.*pruning inside": lambda: fastv(model, 1, 2),
    }


def test_refused(load):
    model, images = visionzip(load()[1], **PLUS), pixels(2)
    for message, call in refused_calls(model, images).items():
        with pytest.raises(ValueError, match=message):
            call()
    fastv(visionzip(model, **PLUS, size_bias=False), 1, 2)
    with pytest.raises(ValueError, match="call remove_pruning"):
        visionzip(model, **PLUS)
    visionzip(remove_pruning(model), **PLUS)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' takes for the start of another"):
        visionzip(model, **PLUS)
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' takes none"):
        visionzip(model, **PLUS | {"positions": "consecutive"})

"""The LLaVA models: prompts and images in every combination, generation, and training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from checkpoints import CLIP, NEXT, SIGLIP, pixels, spoilt_pixels
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from visionzip import visionzip

IMG = IMAGE_TOKEN_INDEX
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def ids(*rows: list[int], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded with 0 on one side, and their mask."""
    length = max(map(len, rows))
    pad = [[0] * (length - len(row)) for row in rows]
    both = zip(rows, pad, strict=True)
    padded = torch.tensor([p + row if side == "left" else row + p for row, p in both])
    ones = zip([[1] * len(row) for row in rows], pad, strict=True)
    return padded, torch.tensor([p + row if side == "left" else row + p for row, p in ones])


# Generation


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_answers_as_its_prompts_would_alone(model, side: str):
    """Different lengths, several images, text only; wherever the prompts are padded."""
    images = pixels(4)
    prompts = [[1, IMG, 13, 40, 41], [1, 50, IMG, 51, IMG, 52, 53, 54], [1, 60, 61], [1, 70, IMG]]
    alone = [
        model.generate(torch.tensor([prompts[0]]), images=images[:1], **GREEDY),
        model.generate(torch.tensor([prompts[1]]), images=images[1:3], **GREEDY),
        model.generate(torch.tensor([prompts[2]]), **GREEDY),
        model.generate(torch.tensor([prompts[3]]), images=images[3:], **GREEDY),
    ]
    input_ids, mask = ids(*prompts, side=side)
    batch = model.generate(input_ids, images=images, attention_mask=mask, **GREEDY)
    assert torch.equal(batch, torch.cat(alone))
    # The padding is found without a mask too, and a text-only prompt may carry LLaVA's dummy image.
    with_dummy = torch.cat([images[:3], torch.zeros(1, 3, 56, 56), images[3:]])
    assert torch.equal(model.generate(input_ids, images=with_dummy, **GREEDY), batch)


def test_a_pad_id_inside_a_prompt_is_text(model):
    prompts = [[1, IMG, 5, 6, 7], [1, IMG, 9, 0, 4, 8]]
    alone = [model.generate(torch.tensor([prompt]), images=pixels(1), **GREEDY) for prompt in prompts]
    input_ids, _ = ids(*prompts)
    batch = model.generate(input_ids, images=pixels(1).expand(2, -1, -1, -1), **GREEDY)
    assert torch.equal(batch, torch.cat(alone))


def test_a_kept_cache_and_another_image(model):
    """By hand: the mask covers the cache and the new prompt, as in transformers."""
    first, second, images = torch.tensor([[1, IMG, 7]]), torch.tensor([[8, IMG, 9]]), pixels(2)
    whole = model(torch.cat([first, second], dim=1), images=images).logits
    cache = model(first, images=images[:1], use_cache=True).past_key_values
    mask = torch.ones(1, cache.get_seq_length() + second.shape[1], dtype=torch.long)
    rest = model(second, images=images[1:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, -rest.shape[1] :])
    with pytest.raises(ValueError, match=r"shape \(1, 0\), but they have \(1, 3\).*with a cache"):
        model(second, images=images[1:], attention_mask=torch.ones(1, 3), past_key_values=cache)


def test_images_as_tensor_list_or_tiles(model):
    input_ids, _ = ids([1, IMG, 7, IMG, 8])
    images = pixels(2)
    expected = model.generate(input_ids, images=images, **GREEDY)
    for same in (list(images), images[:, None], [images[0], images[1:]]):
        assert torch.equal(model.generate(input_ids=input_ids, images=same, **GREEDY), expected)


def encoded_at_once(model) -> list[int]:
    """Collects how many images (or tiles) each pass of the encoder has."""
    batches: list[int] = []
    encoder = model.get_vision_tower().encoder
    encoder.embeddings.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    return batches


def test_questions_about_one_image_encode_it_once(model):
    """By the tensor object: equal pixels in another one are another image."""
    first, second = pixels(2)
    input_ids, mask = ids([1, IMG, 7], [1, IMG, 8, 9], [1, IMG, IMG, 10])
    apart = [first, second.clone(), first.clone(), second]
    expected = model.generate(input_ids, images=apart, attention_mask=mask, **GREEDY)
    batches = encoded_at_once(model)
    shared = model.generate(input_ids, images=[first, second, first, second], attention_mask=mask, **GREEDY)
    assert torch.equal(shared, expected)
    assert batches == [2]
    with pytest.raises(ValueError, match=r"images\[3\] has 1 pixels that are NaN"):
        model.visual_tokens([first, first, first, spoilt_pixels(float("nan"))[1]])


def test_tiles_of_an_image_that_comes_twice(load):
    """The same grid for the same size; for another size the same tiles are laid out otherwise."""
    _, model, _, _ = load(**NEXT)
    image, sizes = pixels(3), [(100, 50), (100, 50), (112, 56), (100, 30)]
    expected = [model.visual_tokens([image], [size])[0] for size in sizes]
    batches = encoded_at_once(model)
    tokens = model.visual_tokens([image] * 4, sizes)
    assert batches == [9]
    for mine, alone in zip(tokens, expected, strict=True):
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-4)  # another batch, another rounding


def test_a_list_straight_to_the_tower(model):
    tower, images = model.get_vision_tower(), pixels(2)
    torch.testing.assert_close(torch.cat(tower(list(images))), tower(images))


def test_forward_takes_llavas_order(model):
    prompt, images = torch.tensor([[1, IMG, 7]]), pixels(1)
    out = model(prompt, None, None, None, None, prompt.clamp(min=0), False, False, True, images, None)
    assert len(out.hidden_states) == 3 and out.past_key_values is None
    torch.testing.assert_close(out.logits, model(prompt, images=images).logits)


def test_text_only_equals_the_plain_language_model(load, make_checkpoint):
    _, model, _, _ = load()
    visionzip(model, dominant=5, contextual=2)
    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key in plain.state_dict()})
    prompt = torch.tensor([[1, 30, 31, 32]])
    expected = plain.eval().generate(prompt, pad_token_id=0, **GREEDY)[:, prompt.shape[1] :]
    assert torch.equal(model.generate(prompt, **GREEDY), expected)
    torch.testing.assert_close(model(prompt).logits, plain(prompt).logits)


def test_beams_return_sequences_and_sampling(model):
    input_ids, mask = ids([1, IMG, 7, 8], [1, 9, IMG])
    inputs = {"images": pixels(2), "attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5}
    beams = model.generate(input_ids, num_beams=3, num_return_sequences=2, do_sample=False, **inputs)
    assert beams.shape == (4, 5)
    alone = inputs | {"images": inputs["images"][1:], "attention_mask": mask[1:, 1:]}
    first = model.generate(input_ids[1:, 1:], num_beams=3, do_sample=False, **alone)
    assert torch.equal(beams[2:3], first)
    torch.manual_seed(1)
    sampled = model.generate(input_ids, do_sample=True, temperature=1.5, **inputs)
    torch.manual_seed(1)
    assert torch.equal(sampled, model.generate(input_ids, do_sample=True, temperature=1.5, **inputs))
    assert not torch.equal(sampled, model.generate(input_ids, do_sample=True, temperature=1.5, **inputs))


@pytest.mark.parametrize("prompts", [1, 2])
def test_the_prefill_asks_for_the_last_tokens_logits_only(model, prompts: int):
    """The head is as large as some layers: over a whole prompt of images it takes a fifth of the prefill."""
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, logits: seen.append((args[0].stride(0), logits.shape)))
    model.generate(torch.tensor([[1, IMG, 13, 40]] * prompts), images=pixels(prompts), **GREEDY)
    # Not a slice of the prompt: its stride is one token's, for which bf16 on CPUs has a fast kernel.
    assert seen == [(model.config.hidden_size, (prompts, 1, model.config.vocab_size))] * GREEDY["max_new_tokens"]


def test_streaming(model):
    class Collect(BaseStreamer):
        tokens: list[int] = []  # noqa: RUF012

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer = Collect()
    out = model.generate(torch.tensor([[1, IMG, 7]]), images=pixels(1), streamer=streamer, **GREEDY)
    assert streamer.tokens == [*out[0].tolist(), -1]


@pytest.mark.parametrize("model_type", ["llava_llama", "llava_mistral", "llava_qwen"])
@pytest.mark.parametrize("vision", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_backbones_and_towers(load, model_type: str, vision: dict[str, Any]):
    _, model, _, _ = load(model_type=model_type, vision=vision)
    prompt = torch.tensor([[1, IMG, 7]])
    images = pixels(1)

    def prefill_length() -> int:
        return model(prompt, images=images).logits.shape[1]

    assert model.get_vision_tower().num_patches == 16
    assert prefill_length() == 16 + 2
    visionzip(model, dominant=5, contextual=2)
    assert prefill_length() == 7 + 2
    assert model.generate(prompt, images=images, **GREEDY).shape == (1, 6)


# Training


def test_loss_ignores_visual_tokens_and_reaches_the_projector(model):
    """LLaVA's training step: labels follow the text, and a text-only batch carries a dummy image."""
    input_ids, mask = ids([1, 40, IMG, 41, 42], [1, 43, 44], side="right")
    labels = input_ids.masked_fill((mask == 0) | (input_ids == IMG), IGNORE_INDEX)
    out = model(input_ids, attention_mask=mask, labels=labels, images=pixels(2))
    visual = out.logits.shape[1] - 4
    predicted = torch.cat([out.logits[0, [0, 1 + visual, 2 + visual]], out.logits[1, :2]])
    expected = torch.nn.functional.cross_entropy(predicted, torch.tensor([40, 41, 42, 43, 44]), reduction="none")
    # Between 40 and 41 stand the visual tokens; the last of them predicts 41.
    torch.testing.assert_close(out.loss, expected.mean())
    out.loss.backward()
    assert model.get_model().mm_projector[0].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.get_vision_tower().parameters())

    model.zero_grad()
    text, _ = ids([1, 40, 41])
    model(text, labels=text, images=pixels(1)).loss.backward()
    assert model.get_model().mm_projector[0].weight.grad is not None  # all zeros, but there for DDP and ZeRO


@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing(model, frozen: bool):
    model.get_vision_tower().requires_grad_(not frozen)
    prompt, weight = torch.tensor([[1, IMG, 7, 8]]), model.get_model().mm_projector[0].weight
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(prompt, labels=prompt.clamp(min=0), images=pixels(1), use_cache=False).loss.backward()
        gradients.append(weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_half_precision_beside_full(model):
    """Pixels and projector may have other types than the model."""
    prompt, images = torch.tensor([[1, IMG, 7]]), pixels(1).half()
    expected = model(prompt, images=images.float()).logits
    for container in (images, list(images)):
        torch.testing.assert_close(model(prompt, images=container).logits, expected)
    model.bfloat16().get_model().mm_projector.float()
    assert model(prompt, images=images).logits.dtype == torch.bfloat16


def test_long_prompts_are_cut(model):
    model.config.tokenizer_model_max_length = 6
    prompt = torch.tensor([[1, IMG, 9]])
    _, _, _, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(prompt, None, None, None, prompt, pixels(1))
    assert embeds.shape == (1, 6, 32)
    assert labels.tolist() == [[1, *[IGNORE_INDEX] * 5]]

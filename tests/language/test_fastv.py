"""FastV, and what it shares with SparseVLM: against a slow reference, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slow_llama import slow_fastv, slow_forward, slow_sparsevlm
from visionzip import unzip, visionzip
from visionzip.language import fastv, fastv_keep, remove_pruning, sparsevlm
from visionzip.language.stages import seen_of_prompt

TEXTS = ([1, 7, -200, 20, 21, 22, 23, 24], [1, -200, 30, 31], [1, 9, 8, 7, 6, -200, 40, 41, 42])
METHODS: dict[str, tuple[Callable[[Any], Any], Callable[..., Any]]] = {
    "fastv": (lambda model: fastv(model, 2, 5), slow_fastv(2, 5)),
    "fastv, first layer": (lambda model: fastv(model, 1, 0.25), slow_fastv(1, 4)),
    "sparsevlm": (lambda model: sparsevlm(model, (9, 4), (0, 2)), slow_sparsevlm((0, 2), (9, 4))),
    "sparsevlm, none kept": (lambda model: sparsevlm(model, (6, 0), (1, 2)), slow_sparsevlm((1, 2), (6, 0))),
}


@pytest.fixture(params=["llava_llama", "llava_mistral", "llava_qwen"])
def model(request, load) -> Any:
    return load(model_type=request.param, num_hidden_layers=4)[1].float().eval()  # 4 x 4 patches


def pixels(count: int, seed: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(seed)))


def batch(*texts: list[int]) -> dict[str, Tensor]:
    """Prompts padded on the left."""
    length = max(map(len, texts))
    ids = torch.tensor([[0] * (length - len(text)) + text for text in texts])
    return {"inputs": ids, "attention_mask": (ids != 0).long()}


def generate(model: Any, texts: tuple[list[int], ...], images: list[Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, **options}
    return model.generate(**batch(*texts), images=images, return_dict_in_generate=True, output_logits=True, **options)


def embedded(model: Any, text: list[int], image: Tensor) -> tuple[Tensor, Tensor]:
    """A prompt's embeddings (L, D) and where its visual tokens are."""
    place, tokens = text.index(-200), model.visual_tokens([image])[0]
    embed = model.get_input_embeddings()
    head, tail = (embed(torch.tensor(part)) for part in (text[:place], text[place + 1 :]))
    visual = torch.zeros(len(head) + len(tokens) + len(tail), dtype=torch.bool)
    visual[place : place + len(tokens)] = True
    return torch.cat([head, tokens, tail]), visual


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_equals_the_slow_reference(name: str, model):
    """Three prompts of different lengths in a batch, at each of 20 tokens: the same logits, and tokens kept."""
    attach, prune = METHODS[name]
    images = pixels(3)
    result = generate(attach(model), TEXTS, images)
    stages = seen_of_prompt(result.past_key_values)
    width = max(len(embedded(model, text, image)[0]) for text, image in zip(TEXTS, images, strict=True))
    for row, (text, image) in enumerate(zip(TEXTS, images, strict=True)):
        prompt, visual = embedded(model, text, image)
        answer = result.sequences[row].tolist()
        for step in range(20):
            logits, kept = slow_forward(model, prompt, visual, answer[:step], prune)
            torch.testing.assert_close(result.logits[step][row], logits, rtol=1e-4, atol=1e-4)
        assert len(kept) == len(stages)
        for mine, expected in zip(stages, kept, strict=True):
            own = mine.kept[row][mine.real[row]]
            assert torch.where(own < 0, own, own - (width - len(prompt))).tolist() == expected


@pytest.mark.parametrize("backbone", ["llava_mistral", "llava_qwen"])
@torch.no_grad()
def test_sliding_windows(load, backbone: str):
    """Answers longer than the window: all of Mistral's layers have one, of Qwen2's here the last."""
    qwen = {"use_sliding_window": True, "max_window_layers": 3} if backbone == "llava_qwen" else {}
    model = load(model_type=backbone, num_hidden_layers=4, sliding_window=26, **qwen)[1].float().eval()
    images = pixels(3)
    for attach, prune in METHODS.values():
        result = generate(attach(model), TEXTS, images)
        for row, (text, image) in enumerate(zip(TEXTS, images, strict=True)):
            prompt, visual = embedded(model, text, image)
            logits, _ = slow_forward(model, prompt, visual, result.sequences[row, :19].tolist(), prune)
            torch.testing.assert_close(result.logits[19][row], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attach", [lambda m: fastv(m, 1, 1.0), lambda m: sparsevlm(m, (1.0, 16), (0, 2))])
def test_nothing_pruned_is_vanilla(model, attach):
    expected = generate(model, TEXTS, pixels(3))
    mine = generate(attach(model), TEXTS, pixels(3))
    assert torch.equal(torch.stack(mine.logits), torch.stack(expected.logits))
    assert seen_of_prompt(mine.past_key_values) == []


@pytest.mark.parametrize("name", METHODS)
def test_comes_off_without_a_trace(model, name: str):
    def hooks() -> list[int]:
        return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]

    own, before = hooks(), torch.stack(generate(model, TEXTS, pixels(3)).logits)
    attach = METHODS[name][0]
    assert attach(model) is model and attach(model) is model
    pruned = torch.stack(generate(model, TEXTS, pixels(3)).logits)
    assert not torch.allclose(pruned, before)
    assert remove_pruning(model) is model and remove_pruning(model) is model
    assert torch.equal(torch.stack(generate(model, TEXTS, pixels(3)).logits), before)
    assert hooks() == own


def test_models_are_independent(load):
    (_, one, _, _), (_, other, _, _) = load(num_hidden_layers=4), load(num_hidden_layers=4)
    before = torch.stack(generate(other, TEXTS, pixels(3)).logits)
    pruned = torch.stack(generate(fastv(one, 2, 5), TEXTS, pixels(3)).logits)
    assert torch.equal(torch.stack(generate(other, TEXTS, pixels(3)).logits), before)
    sparsevlm(other, (4,), (1,))
    assert torch.equal(torch.stack(generate(one, TEXTS, pixels(3)).logits), pruned)


def test_each_layer_caches_what_it_has_seen(model):
    cache = generate(fastv(model, 2, 5), TEXTS, pixels(3)).past_key_values
    longest = 9 + 15  # the third prompt
    assert [cache.get_seq_length(layer) for layer in range(4)] == [longest + 19] * 2 + [longest - 11 + 19] * 2
    (stage,) = seen_of_prompt(cache)
    assert (stage.layer, stage.length) == (2, longest)
    positions = stage.kept - stage.real.long().cumsum(1).eq(0).sum(1, keepdim=True)  # the padding is not counted
    assert torch.equal(stage.positions[stage.real], positions[stage.real])  # those that they had


def test_batch_with_different_numbers_of_visual_tokens(model):
    """A prompt without an image and one with two, beside one with one: each answers as alone."""
    texts = (TEXTS[0], [1, 30, 31, 32], [1, -200, 5, -200, 6, 7])
    images = pixels(3)
    for attach in (lambda: fastv(model, 1, 0.25), lambda: sparsevlm(model, (0.5, 3), (0, 1))):
        attach()
        together = generate(model, texts, images)
        for row, own in enumerate((images[:1], None, images[1:])):
            alone = generate(model, texts[row : row + 1], own)
            torch.testing.assert_close(
                torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("name", ["fastv", "sparsevlm"])
def test_beams(model, name: str):
    """Beams of one prompt share what is kept: they find what full searches from scratch would."""
    METHODS[name][0](model)
    result = generate(model, TEXTS[:2], pixels(2), num_beams=3, max_new_tokens=6, min_new_tokens=6)
    for row, (text, image) in enumerate(zip(TEXTS[:2], pixels(2), strict=True)):
        prompt, visual = embedded(model, text, image)
        beams: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(6):
            longer = []
            for score, answer in beams:
                with torch.no_grad():
                    logits, _ = slow_forward(model, prompt, visual, answer, METHODS[name][1])
                logits[2] = -torch.inf  # no end before the sixth
                found = logits.log_softmax(-1).topk(3)
                pairs = zip(found.values.tolist(), found.indices.tolist(), strict=True)
                longer += [(score + value, [*answer, token]) for value, token in pairs]
            beams = sorted(longer, reverse=True)[:3]
        assert result.sequences[row].tolist() == beams[0][1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_kernels_agree(load, attention: str):
    model = load(num_hidden_layers=4)[1].float()
    expected = torch.stack(generate(fastv(model, 2, 5), TEXTS, pixels(3)).logits)
    model.set_attn_implementation(attention)
    torch.testing.assert_close(torch.stack(generate(model, TEXTS, pixels(3)).logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fastv", "sparsevlm"])
@torch.no_grad()
def test_text_that_follows_a_cache(model, name: str):
    """Several tokens at once after a pruned prompt, as a next turn on its cache: as one by one."""
    METHODS[name][0](model)
    prompt, visual = embedded(model, TEXTS[0], pixels(1)[0])
    first = model(inputs_embeds=prompt[None], visual_mask=visual[None], use_cache=True)
    later = [50, 51, 52, 53]
    together = model(input_ids=torch.tensor([later]), past_key_values=first.past_key_values).logits[0]
    for number in range(4):
        logits, _ = slow_forward(model, prompt, visual, later[: number + 1], METHODS[name][1])
        torch.testing.assert_close(together[number], logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="without past_key_values"):
        model(
            inputs_embeds=prompt[None],
            visual_mask=visual[None],
            past_key_values=first.past_key_values,
        )


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_positions_with_gaps(name: str, model):
    """As of an image whose tokens keep the places of their patches; decoding continues the prompt's last position."""
    attach, prune = METHODS[name]
    attach(model)
    prompt, visual = embedded(model, TEXTS[0], pixels(1)[0])
    positions = (torch.arange(len(prompt)) + 3 * visual.cumsum(0)).tolist()
    given = torch.tensor([positions])
    cache = model(
        inputs_embeds=prompt[None], visual_mask=visual[None], position_ids=given, use_cache=True
    ).past_key_values
    mine = model(input_ids=torch.tensor([[50]]), past_key_values=cache, position_ids=given[:, -1:] + 1).logits[0, -1]
    logits, _ = slow_forward(model, prompt, visual, [50], prune, positions)
    torch.testing.assert_close(mine, logits, rtol=1e-4, atol=1e-4)


def test_an_answer_to_embeddings_always_has_a_cache(model):
    """Transformers does not do without for these prompts, so that tokens are chosen once."""
    fastv(model, 2, 5)
    expected = generate(model, TEXTS, pixels(3)).sequences
    assert torch.equal(generate(model, TEXTS, pixels(3), use_cache=False).sequences, expected)


def test_forward_with_images_prunes_too(model):
    fastv(model, 1, 3)
    ids = torch.tensor([TEXTS[0]])
    logits = model(ids, images=pixels(1)).logits
    assert logits.shape[1] == len(TEXTS[0]) - 1 + 3
    torch.testing.assert_close(logits[:, -1], generate(model, TEXTS[:1], pixels(1)).logits[0])
    with pytest.raises(ValueError, match=r"remove_pruning\(model\) to train"):
        model(ids, images=pixels(1), labels=ids)


def test_prunes_what_visionzip_leaves(model):
    visionzip(model, dominant=6, contextual=2)
    (stage,) = seen_of_prompt(generate(fastv(model, 1, 3), TEXTS[:1], pixels(1)).past_key_values)
    assert (stage.length, stage.kept.shape[1]) == (7 + 8, 7 + 3)
    unzip(model)


def test_a_cache_that_is_used_again(model):
    """After reset(), for a prompt without an image, it is as a new one."""
    first = generate(fastv(model, 2, 5), TEXTS[:1], pixels(1))
    cache = first.past_key_values
    cache.reset()
    with torch.no_grad():
        for token in ([1, 30, 31], [40]):
            mine = model(input_ids=torch.tensor([token]), past_key_values=cache).logits
        expected = remove_pruning(model)(input_ids=torch.tensor([[1, 30, 31, 40]])).logits[:, -1:]
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def test_budgets():
    """The published numbers, of LLaVA-1.5-7B: an average over layers of 192, 128 and 64."""
    assert [fastv_keep(average, 576, 32) for average in (192, 128, 64)] == [166, 98, 30]
    assert [fastv_keep(average, 576, 32, layer=3) for average in (192, 128, 64)] == [152, 82, 11]
    assert fastv_keep(576, 576, 32) == 576
    with pytest.raises(ValueError, match=r"average of 160 .* between 180 .* after the cut"):
        fastv_keep(160, 2880, 32)
    with pytest.raises(ValueError, match="layer=2 of 2"):
        fastv_keep(8, 16, 2)


def test_errors(load):
    model = load(num_hidden_layers=4)[1]
    for layer, keep, message in (
        (0, 3, "layer=0"),
        (4, 3, "after layer 3 of 4"),
        (2, -1, "keep=-1"),
        (2, 1.5, "keep=1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            fastv(model, layer, keep)
    with pytest.raises(TypeError, match="not its vision tower"):
        fastv(model.get_vision_tower())
    with pytest.raises(TypeError, match="does not support Linear"):
        fastv(torch.nn.Linear(2, 2))
    fastv(model, 2, 5)
    with pytest.raises(ValueError, match="DynamicCache"):
        generate(model, TEXTS[:1], pixels(1), cache_implementation="static")
    model.config.sliding_window = 8
    with pytest.raises(ValueError, match="sliding_window=8"):
        generate(model, TEXTS[:1], pixels(1))

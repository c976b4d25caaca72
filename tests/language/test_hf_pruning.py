"""FastV and SparseVLM on transformers' own LLaVA classes: as on LLaVA's, and as the slow reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_video_models
import pytest
import torch
from hf_models import IMAGE, IMAGES, VIDEO, llava, llava_batch, llava_next, next_processor
from pairs import Pair, load_pair, native_pixels, native_prompts, pictures
from seam_models import FAMILIES, Picture
from seam_models import batch as seam_batch
from test_fastv import METHODS, TEXTS, batch, embedded, generate
from torch import Tensor

from checkpoints import NEXT, picture
from slow_llama import slow_fastv, slow_forward, slow_sparsevlm
from visionzip import unzip, visionzip
from visionzip.language import fastv, remove_pruning, sparsevlm
from visionzip.language.pruning import is_pruned
from visionzip.language.stages import seen_of_prompt

GREEDY = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20, "suppress_tokens": [IMAGE, VIDEO]}
RECORD = {"return_dict_in_generate": True, "output_logits": True}
SIZES = ((90, 60), (40, 120), (100, 100))
# Two layers: the first is scored, the second prunes.
SHALLOW: dict[str, tuple[Callable[[Any], Any], Callable[..., Any]]] = {
    "fastv": (lambda model: fastv(model, 1, 5), slow_fastv(1, 5)),
    "sparsevlm": (lambda model: sparsevlm(model, (7,), (0,)), slow_sparsevlm((0,), (7,))),
}


@pytest.fixture(params=["llava_llama", "llava_mistral", "llava_qwen"])
def backbone(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Pair]:
    """One set of weights in LLaVA's layout and in transformers': 4 layers."""
    return lambda **options: load_pair(make_checkpoint(num_hidden_layers=4, **options), tmp_path / "native")


def both_answers(pair: Pair, images: list[Tensor], sizes: Any, runs: list[int], **options: Any) -> tuple[Any, Any]:
    """What both models answer to ``TEXTS`` of unequal lengths; the prompts are cut off the second's sequences.

    Args:
        runs: placeholders of each image, as the processor writes them.
    """
    ids = batch(*TEXTS)
    own = generate(pair.own, TEXTS, images, image_sizes=sizes, **options)
    prompts = native_prompts(pair.native, ids["inputs"], ids["attention_mask"], runs)
    native = pair.native.generate(
        **prompts,
        **native_pixels(pair.native, images, sizes),
        **{**GREEDY, **RECORD, "suppress_tokens": None, **options},
    )
    native.sequences = native.sequences[:, prompts["input_ids"].shape[1] :]
    native.logits = [step[:, : pair.own.config.vocab_size] for step in native.logits]
    return own, native


def check_equal(own: Any, native: Any) -> None:
    """The same tokens kept, the same logits and tokens at each step."""
    stages = [seen_of_prompt(each.past_key_values) for each in (own, native)]
    assert len(stages[0]) == len(stages[1]) > 0
    for one, other in zip(*stages, strict=True):
        assert torch.equal(one.kept, other.kept) and torch.equal(one.positions, other.positions)
    torch.testing.assert_close(torch.stack(native.logits), torch.stack(own.logits), rtol=1e-4, atol=1e-4)
    assert torch.equal(native.sequences, own.sequences)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_equals_llavas_classes_and_the_slow_reference(name: str, backbone: str, pair):
    """Three prompts of different lengths in a batch, 20 greedy tokens."""
    both = pair(model_type=backbone)
    images, sizes = pictures(both, *SIZES)
    attach, prune = METHODS[name]
    for model in both[:2]:
        assert attach(model) is model
    own, native = both_answers(both, images, sizes, [16] * 3)
    check_equal(own, native)
    for row, (text, image) in enumerate(zip(TEXTS, images, strict=True)):
        prompt, visual = embedded(both.own, text, image)
        for step in (0, 19):
            logits, _ = slow_forward(both.own, prompt, visual, native.sequences[row, :step].tolist(), prune)
            torch.testing.assert_close(native.logits[step][row], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, NEXT], ids=["1.5", "next"])
@pytest.mark.parametrize("first", ["visionzip", "pruning"])
def test_prunes_what_visionzip_leaves(first: str, options: dict[str, Any], pair):
    """In either order of attaching, also where the base model is called by itself."""
    both = pair(**options)
    images, sizes = pictures(both, *SIZES)
    runs = [len(tokens) for tokens in both.own.visual_tokens(images, sizes)]
    for model in both[:2]:
        for turn in ("visionzip", "pruning") if first == "visionzip" else ("pruning", "visionzip"):
            visionzip(model, 5, 2) if turn == "visionzip" else fastv(model, 2, 3)
    own, native = both_answers(both, images, sizes, runs)
    check_equal(own, native)
    ids = batch(*TEXTS)
    inputs = native_prompts(both.native, ids["inputs"], ids["attention_mask"], runs)
    inputs |= native_pixels(both.native, images, sizes)
    with torch.no_grad():
        cache = both.native.model(**inputs, use_cache=True).past_key_values
        logits = both.native(**inputs).logits[:, -1, : both.own.config.vocab_size]
    assert torch.equal(seen_of_prompt(cache)[0].kept, seen_of_prompt(own.past_key_values)[0].kept)
    torch.testing.assert_close(logits, own.logits[0], rtol=1e-4, atol=1e-4)
    unzip(both.native)
    assert is_pruned(both.native)
    remove_pruning(both.native)
    assert not is_pruned(both.native)


@pytest.mark.parametrize("name", ["fastv", "sparsevlm"])
def test_beams(name: str, pair):
    both = pair()
    images, sizes = pictures(both, *SIZES)
    for model in both[:2]:
        METHODS[name][0](model)
    own, native = both_answers(both, images, sizes, [16] * 3, num_beams=3, max_new_tokens=6, min_new_tokens=6)
    assert torch.equal(native.sequences, own.sequences)


def slow_view(native: Any) -> Any:
    """A model of transformers as :func:`slow_forward` reads one."""
    language = native.get_decoder()
    return SimpleNamespace(get_model=lambda: language, config=language.config, lm_head=native.lm_head)


def embeddings_of(native: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the language model is given for one prompt (L, D), and where its visual tokens are, by the ids."""
    seen: list[Tensor] = []
    handle = native.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    native(**inputs)
    handle.remove()
    ids, config = inputs["input_ids"][0], native.config
    return seen[0], (ids == config.image_token_id) | (ids == getattr(config, "video_token_id", -1))


def an_image(family: str) -> tuple[Any, Any]:
    """A model of a family and one prompt with an image, or with an image and a video."""
    if family == "llava":
        return llava(), llava_batch(texts=["what is <image> here"])
    if family == "llava_next":
        inputs = next_processor()(images=IMAGES[0], text="what is <image> here", return_tensors="pt")
        return llava_next(), inputs
    if family in FAMILIES:
        return FAMILIES[family].build(), seam_batch(FAMILIES[family], [["what is ", Picture(1), "here"]])
    native, processor = hf_video_models.build(family), hf_video_models.processor_for(family)
    text, video = "a <image> or <video> here", hf_video_models.video(0, 8 if family == "video_llava" else 3)
    return native, processor(images=picture(1, (90, 60)), videos=[video], text=text, return_tensors="pt")


@pytest.mark.parametrize("name", SHALLOW)
@pytest.mark.parametrize(
    "family", ["llava", "llava_next", "onevision", "next_video", "video_llava", "internvl", "smolvlm"]
)
@torch.no_grad()
def test_every_family(family: str, name: str):
    """Images, tiles and videos: the tokens that the slow reference keeps, and its logits."""
    native, inputs = an_image(family)
    attach, prune = SHALLOW[name]
    prompt, visual = embeddings_of(native, inputs)
    attach(native)
    result = native.generate(**inputs, **{**GREEDY, **RECORD, "max_new_tokens": 4, "min_new_tokens": 4})
    answer = result.sequences[0, len(prompt) :].tolist()
    for step in (0, 3):
        logits, kept = slow_forward(slow_view(native), prompt, visual, answer[:step], prune)
        torch.testing.assert_close(result.logits[step][0], logits, rtol=1e-4, atol=1e-4)
    assert [stage.kept[0].tolist() for stage in seen_of_prompt(result.past_key_values)] == kept
    torch.testing.assert_close(native(**inputs).logits[:, -1], result.logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_later_turns():
    """Text after a pruned prompt sees what was kept; the whole conversation without its cache is pruned anew."""
    native, inputs = llava(), llava_batch(texts=["what is <image> here"])
    attach, prune = SHALLOW["fastv"]
    prompt, visual = embeddings_of(native, inputs)
    attach(native)
    first = native.generate(**inputs, **{**GREEDY, **RECORD, "max_new_tokens": 3, "min_new_tokens": 3})
    more = torch.tensor([[40, 41, 42]])
    whole = torch.cat([first.sequences, more], dim=1)
    second = native.generate(
        whole, attention_mask=torch.ones_like(whole), past_key_values=first.past_key_values, **GREEDY | RECORD
    )
    answer = whole[0, len(prompt) :].tolist()
    logits, _ = slow_forward(slow_view(native), prompt, visual, answer, prune)
    torch.testing.assert_close(second.logits[0][0], logits, rtol=1e-4, atol=1e-4)
    anew = native.generate(whole, pixel_values=inputs["pixel_values"], **GREEDY | RECORD)
    text = native.get_input_embeddings()(whole[0, len(prompt) :])
    extended, longer = torch.cat([prompt, text]), torch.cat([visual, torch.zeros(len(text), dtype=torch.bool)])
    logits, kept = slow_forward(slow_view(native), extended, longer, [], prune)
    torch.testing.assert_close(anew.logits[0][0], logits, rtol=1e-4, atol=1e-4)
    assert [stage.kept[0].tolist() for stage in seen_of_prompt(anew.past_key_values)] == kept
    cache = native(**inputs).past_key_values
    with pytest.raises(ValueError, match="without past_key_values"):
        native(inputs["input_ids"], pixel_values=inputs["pixel_values"], past_key_values=cache)


def test_comes_off_without_a_trace():
    native, inputs = llava(), llava_batch()

    def traces() -> list[int]:
        modules = list(native.modules())
        return [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(vars(m)) for m in modules]

    before = native.generate(**inputs, **GREEDY)
    own = traces()
    fastv(native, 1, 5)
    assert not torch.equal(native.generate(**inputs, **GREEDY), before)
    sparsevlm(native, (4,), (0,))  # in the place of FastV
    remove_pruning(native)
    assert traces() == own
    assert torch.equal(native.generate(**inputs, **GREEDY), before)


def test_text_alone_is_left_as_it_is():
    native, texts = llava(), llava_batch(texts=["no picture", "nor here, with more words"])
    expected = native.generate(**texts, **GREEDY)
    result = fastv(native, 1, 5).generate(**texts, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(result.sequences, expected) and seen_of_prompt(result.past_key_values) == []


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "gemma3"])
def test_other_layers_are_refused(family: str):
    """Positions with three axes, norms on queries and keys, features added in deeper layers: nothing is guessed."""
    native = FAMILIES[family].build()
    for attach in (fastv, sparsevlm):
        with pytest.raises(TypeError, match=r"prune inside layers of llama, mistral, qwen2, .*DecoderLayer: use"):
            attach(native)
    assert not is_pruned(native)


def test_errors():
    """What would choose several times, or by another token than the prompt's last, is refused."""
    native, inputs = llava(), llava_batch(texts=["what is <image> here"])
    with pytest.raises(ValueError, match="after layer 1 of 2"):
        fastv(native, 2, 5)
    fastv(native, 1, 5)
    for options, message in (
        ({"prefill_chunk_size": 20}, "prefill_chunk_size=20: .* leave prefill_chunk_size out"),
        ({"use_cache": False}, "generate with use_cache=True"),
        ({"prompt_lookup_num_tokens": 3}, "drafted tokens .* Leave them out"),
        ({"cache_implementation": "static"}, "DynamicCache"),
    ):
        with pytest.raises(ValueError, match=message):
            native.generate(**inputs, **GREEDY, **options)
    embeds = native.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="give input_ids"):
        native(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match=r"remove_pruning\(model\) to train"):
        native(**inputs, labels=inputs["input_ids"])

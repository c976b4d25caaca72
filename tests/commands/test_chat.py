"""Conversations with a kept KV cache."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from checkpoints import NEXT, picture
from llava.conversation import with_image_tokens
from llava.mm_utils import process_images, tokenizer_image_token
from llava.serve.chat import ChatSession
from visionzip import visionzip

GENERATE = {"max_new_tokens": 8, "min_new_tokens": 3}
QUESTIONS = ["What is shown here?", "And behind it?", "Is it red?"]


@pytest.fixture(params=["pad", "anyres"])
def session(request: pytest.FixtureRequest, load):
    """A zipped model in a conversation; ``session.encoded`` counts the images that the vision tower has seen."""
    tokenizer, model, processor, _ = load(**NEXT if request.param == "anyres" else {})
    model.config.max_position_embeddings = 2048
    visionzip(model, dominant=5, contextual=2)
    session = ChatSession(model, tokenizer, processor, **GENERATE)
    session.encoded = 0

    def count(module: Any, args: tuple, output: Any) -> None:
        session.encoded += 1

    model.get_vision_tower().encoder.embeddings.register_forward_hook(count)
    return session


def recompute(session: ChatSession, images: list[Image.Image]) -> str:
    """The answer to the last question from scratch, as LLaVA's own commands compute it: whole prompt, no cache."""
    conversation = session.conversation.copy()
    conversation.messages[-1] = (conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), session.tokenizer, return_tensors="pt")
    out = session.model.generate(
        ids[None],
        images=process_images(images, session.image_processor, session.model.config),
        image_sizes=[image.size for image in images],
        do_sample=False,
        **GENERATE,
    )
    return session.tokenizer.decode(out[0], skip_special_tokens=True).strip()


def test_three_turns_equal_recomputing_everything(session: ChatSession):
    image = picture(0)
    turns = []
    for number, question in enumerate(QUESTIONS):
        turns.append(session.ask(question, [image] if number == 0 else []))
        assert session.encoded == 1  # once, in the first turn
        assert turns[-1].text == recompute(session, [image])
        session.encoded = 1  # recompute has encoded it again
    first, second, third = turns
    assert first.cached_tokens == 0 and first.visual_tokens > 0 and first.vision_seconds > 0
    for before, turn in ((first, second), (second, third)):
        assert turn.visual_tokens == 0 and turn.vision_seconds == 0
        # All up to the last answer is cached, and of the answer whatever is tokenized as the model wrote it.
        assert turn.cached_tokens >= before.cached_tokens + before.fed_tokens


def test_a_conversation_goes_on_under_another_setting(session: ChatSession):
    """Its words stay, its images are encoded anew, and the first turn behind that feeds everything."""
    images = [picture(0), picture(1)]
    asked = zip(QUESTIONS[:2], images, strict=True)
    said = [(question, [image], session.ask(question, [image]).text) for question, image in asked]
    before = session.visual_tokens
    visionzip(session.model, dominant=3, contextual=1)
    session.resume(said)
    assert session.encoded == 4 and session.visual_tokens == before * 4 // 7
    turn = session.ask(QUESTIONS[2])
    assert turn.cached_tokens == 0 and turn.visual_tokens == 0
    assert turn.text == recompute(session, images)
    assert session.ask("And now?").cached_tokens > session.visual_tokens


def test_what_the_model_wrote_is_not_fed_again(session: ChatSession):
    """Where the answer's text is tokenized as it was generated, only what is new goes through the model."""
    prompt = session.tokenizer("ASSISTANT:").input_ids
    answer = session.tokenizer("ASSISTANT: A red cube.</s>").input_ids[len(prompt) :]

    def say(batch: int, written: torch.Tensor) -> list[int]:
        return [answer[min(len(written), len(answer) - 1)]]

    session.generate_kwargs |= {"prefix_allowed_tokens_fn": say, "max_new_tokens": 20, "min_new_tokens": None}
    first = session.ask(QUESTIONS[0], [picture(0)])
    assert first.text == "A red cube." and first.new_tokens == len(answer)
    second = session.ask(QUESTIONS[1])
    # The end token was generated but never read, so it is fed with the question.
    assert second.cached_tokens == first.fed_tokens + first.new_tokens - 1
    question = session.tokenizer(f"ASSISTANT: A red cube.</s>USER: {QUESTIONS[1]} ASSISTANT:").input_ids
    assert second.fed_tokens == len(question) - len(prompt) - len(answer) + 1


@pytest.mark.parametrize("conv_mode", ["llava_v1", "llava_llama_2", "mistral_instruct", "chatml_direct", "qwen_1_5"])
def test_other_templates_equal_recomputing_everything(load, conv_mode: str):
    tokenizer, model, processor, _ = load()
    visionzip(model, dominant=5, contextual=2)
    session = ChatSession(model, tokenizer, processor, conv_mode, **GENERATE)
    for number, question in enumerate(QUESTIONS):
        turn = session.ask(question, [picture(0)] if number == 0 else [])
        assert turn.text == recompute(session, [picture(0)])
        assert (turn.cached_tokens > 0) == (number > 0)


def test_a_sliding_window(load):
    """Mistral's: the cache is kept whole all the same, so that it can be cropped to what two turns share."""
    tokenizer, model, processor, _ = load(model_type="llava_mistral", sliding_window=16)
    visionzip(model, dominant=5, contextual=2)
    session = ChatSession(model, tokenizer, processor, "mistral_instruct", **GENERATE)
    for number, question in enumerate(QUESTIONS):
        turn = session.ask(question, [picture(0)] if number == 0 else [])
        assert turn.text == recompute(session, [picture(0)])
    assert turn.cached_tokens > 16


def test_an_answer_that_writes_about_an_image(session: ChatSession):
    """The marker in the model's own words is not taken for a picture."""
    session.ask(QUESTIONS[0], [picture(0)])
    session.tokenizer.decode = lambda *_, **__: "The <image> is red."
    assert session.ask(QUESTIONS[1]).text == "The <image> is red."
    assert session.ask(QUESTIONS[2]).cached_tokens > 0


def test_an_interrupted_answer_does_not_spoil_the_next(session: ChatSession):
    class Interrupt(BaseStreamer):
        tokens = 0

        def put(self, value: torch.Tensor) -> None:
            self.tokens += 1
            if self.tokens == 4:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    session.ask(QUESTIONS[0], [picture(0)])
    with pytest.raises(KeyboardInterrupt):
        session.ask(QUESTIONS[1], streamer=Interrupt())
    turn = session.ask(QUESTIONS[2])
    assert session.encoded == 1  # the image's tokens are still there, only the language model starts again
    assert turn.cached_tokens == 0 and turn.text == recompute(session, [picture(0)])


def test_an_answer_ends_at_the_models_context(session: ChatSession):
    prompt = session.ask(QUESTIONS[0], [picture(0)]).fed_tokens
    session.reset()
    session.model.config.max_position_embeddings = prompt + 2
    assert session.ask(QUESTIONS[0], [picture(0)]).new_tokens == 2


def test_an_image_in_a_later_turn(session: ChatSession):
    first, second = picture(0), picture(1, (60, 90))
    session.ask(QUESTIONS[0], [first])
    session.ask(QUESTIONS[1])
    turn = session.ask("Compare <image> with the first.", [second])
    assert session.encoded == 2 and turn.visual_tokens > 0
    assert turn.text == recompute(session, [first, second])


def test_reset_and_text_only(session: ChatSession):
    session.ask(QUESTIONS[0], [picture(0)])
    session.reset()
    assert session.ask("Hello").cached_tokens == 0
    assert session.conversation.messages[0] == ["USER", "Hello"]


def test_what_goes_wrong_leaves_the_conversation_as_it_was(session: ChatSession):
    session.ask(QUESTIONS[0], [picture(0)])
    before = list(session.conversation.messages)
    with pytest.raises(TypeError, match="not a PIL image"):
        session.ask("And this?", ["cube.png"])
    with pytest.raises(ValueError, match="2 <image> but 1 images"):
        session.ask("<image> or <image>?", [picture(1)])
    session.model.config.max_position_embeddings = 40
    with pytest.raises(ValueError, match="context is 40"):
        session.ask(QUESTIONS[1])
    session.model.config.max_position_embeddings = 2048
    assert session.conversation.messages == before
    session.ask(QUESTIONS[1])


@pytest.mark.parametrize(
    ("conv_mode", "generate_kwargs", "message"),
    [
        ("vicuna", {}, "conv_mode='vicuna' is unknown: use one of vicuna_v1"),
        ("plain", {}, "conv_mode='plain' is for pretraining"),
        ("vicuna_v1", {"num_beams": 2}, "num_beams=2"),
        (
            "vicuna_v1",
            {"num_return_sequences": 2},
            "num_return_sequences=2 cannot be used here: a conversation",
        ),
        ("vicuna_v1", {"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2 cannot .* again behind its cache"),
        ("vicuna_v1", {"assistant_model": torch.nn.Linear(1, 1)}, "assistant_model=Linear cannot"),
        ("vicuna_v1", {"prefill_chunk_size": 8}, "prefill_chunk_size=8 cannot"),
        ("vicuna_v1", {"guidance_scale": 2.0}, "guidance_scale=2.0 cannot"),
        ("vicuna_v1", {"cache_implementation": "static"}, "cache_implementation=static cannot .* its own cache"),
        ("vicuna_v1", {"return_dict_in_generate": True}, "return_dict_in_generate=True cannot .* returns a Turn"),
        ("vicuna_v1", {"max_new_tokens": None}, "max_new_tokens=None: .* needs a limit, give 1 or more"),
        ("vicuna_v1", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("vicuna_v1", {"max_new_tokens": 2.5}, r"max_new_tokens=2\.5"),
        ("vicuna_v1", {"streamer": None, "images": []}, "images, streamer cannot be given to a session"),
    ],
)
def test_unusable_settings(conv_mode: str, generate_kwargs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ChatSession(None, None, None, conv_mode, **generate_kwargs)


def test_settings_of_the_models_own_config(load):
    """What a checkpoint asks for is refused as what a call asks for, and can be switched off."""
    tokenizer, model, processor, _ = load()
    for name, value, off in (("prompt_lookup_num_tokens", 2, None), ("num_beams", 3, 1)):
        setattr(model.generation_config, name, value)
        with pytest.raises(ValueError, match=f"{name}={value} cannot"):
            ChatSession(model, tokenizer, processor)
        session = ChatSession(model, tokenizer, processor, **GENERATE, **{name: off})
        assert session.ask("Hello").new_tokens >= 3
        setattr(model.generation_config, name, None)


def test_a_cache_that_something_else_has_cut(session: ChatSession):
    """Its length is checked after each turn; the next turn starts with a new one."""

    def cut(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 2:
            session._cache.crop(-1)
        return scores

    session.ask(QUESTIONS[0], [picture(0)])
    before = list(session.conversation.messages)
    session.generate_kwargs["logits_processor"] = [cut]
    with pytest.raises(RuntimeError, match=r"^the cache has \d+ positions") as raised:
        session.ask(QUESTIONS[1])
    held, said = re.search(r"(\d+) positions, but the conversation (\d+)", str(raised.value)).groups()
    assert int(held) == int(said) - 1
    assert session.conversation.messages == before
    del session.generate_kwargs["logits_processor"]
    turn = session.ask(QUESTIONS[1])
    assert turn.cached_tokens == 0 and turn.text == recompute(session, [picture(0)])


def test_image_tokens_with_markers():
    class Config:
        mm_use_im_start_end = True

    assert with_image_tokens("What?", [1, 1], None) == "<image>\n<image>\nWhat?"
    assert with_image_tokens("What is <image>?", [1], Config()) == "What is <im_start><image><im_end>?"

"""A zipped model of transformers in the hands of transformers, PEFT, accelerate, bitsandbytes and torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attaching import same
from hf_models import (
    FAMILIES,
    IMAGE,
    PATCHES,
    both,
    build,
    content,
    llava,
    llava_batch,
    llava_processor,
    pictures,
    text_config,
    vision_config,
)
from hf_plain import plain_encode, plain_loss, plain_zip, text_labels
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from visionzip import unzip, visionzip

K, M = 4, 2
TEXTS = ["what is <image> here", "<image> or <image>"]


def batch(family: str = "llava") -> Any:
    images = pictures((90, 60), (60, 90), (56, 56))
    return FAMILIES[family][1]()(images=images, text=TEXTS, padding=True, return_tensors="pt")


def short_length(inputs: Any) -> int:
    """Tokens of the longest prompt when each of its images has K + M."""
    rows = [content(inputs, row) for row in range(len(inputs["input_ids"]))]
    return max(len(row) - int((row == IMAGE).sum()) // PATCHES * (PATCHES - K - M) for row in rows)


def with_labels(inputs: Any) -> dict[str, Tensor]:
    hidden = (inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(hidden, -100)}


@torch.no_grad()
def outputs(model: Any, inputs: Any) -> list[Tensor]:
    found = model(**with_labels(inputs))
    return [found.loss, found.logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)]


@both
def test_loaded_by_the_auto_classes_and_run_by_a_pipeline(family: str, tmp_path: Path):
    make, processor = FAMILIES[family]
    visionzip(make(), K, M).save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    model = visionzip(AutoModelForImageTextToText.from_pretrained(tmp_path))
    model.generation_config.pad_token_id = 2
    assert model.config.visionzip["dominant"] == K
    loaded = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    ask = pipeline("image-text-to-text", model=model, processor=loaded)
    image = pictures((90, 60))[0]
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]}
    ]
    prompts = []
    model.model.language_model.register_forward_hook(lambda module, args, output: prompts.append(output[0].shape[1]))
    answer = ask(text=messages, max_new_tokens=4, return_full_text=False, generate_kwargs={"do_sample": False})
    inputs = loaded(
        images=image, text=loaded.apply_chat_template(messages, add_generation_prompt=True), return_tensors="pt"
    )
    features = len(
        model.get_image_features(**{k: v for k, v in inputs.items() if "pixel" in k or "sizes" in k}).pooler_output[0]
    )
    assert prompts[0] == inputs["input_ids"].shape[1] - int((inputs["input_ids"] == IMAGE).sum()) + features
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    assert answer[0]["generated_text"] == loaded.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
@pytest.mark.parametrize("zip_first", [True, False])
def test_peft_adapters(task: str | None, zip_first: bool):
    """Zipped before or after the adapter is put on; the encoder's own projections may have one too."""
    inputs = batch()
    settings = LoraConfig(task_type=task, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    if zip_first:
        adapted = get_peft_model(visionzip(llava(), K, M), settings)
    else:
        adapted = get_peft_model(llava(), settings)
        assert visionzip(adapted, K, M) is adapted
    adapted.eval()
    found = outputs(adapted, inputs)
    assert found[1].shape[1] == short_length(inputs)
    with adapted.disable_adapter():
        plain = outputs(adapted, inputs)
    assert same(plain, outputs(visionzip(llava(), K, M), inputs))
    assert not torch.equal(found[1], plain[1])
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(outputs(merged, inputs)[1], found[1], atol=1e-3, rtol=1e-3)


def test_a_saved_adapter_has_no_setting(tmp_path: Path):
    """PEFT saves the adapter without the model's config: say again how it was zipped. A merged model keeps it."""
    inputs = batch()
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"], init_lora_weights=False)
    adapted = get_peft_model(visionzip(llava(), K, M), settings).eval()
    expected = outputs(adapted, inputs)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(llava(), tmp_path / "adapter").eval()
    assert not hasattr(again.config, "visionzip")
    assert same(outputs(visionzip(again, K, M), inputs), expected)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = visionzip(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")).eval()
    assert merged.config.visionzip["dominant"] == K
    torch.testing.assert_close(outputs(merged, inputs)[1], expected[1], atol=1e-3, rtol=1e-3)


class Examples(torch.utils.data.Dataset):
    """The rows of a batch, of one image each."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs = llava_processor()(
            images=pictures((90, 60 + index)), text=f"what is <image> {index}", return_tensors="pt"
        )
        return {key: value[0] for key, value in with_labels(inputs).items()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_trainer_with_gradient_checkpointing(reentrant: bool, tmp_path: Path):
    model = visionzip(llava(), K, M)
    before = {name: value.clone() for name, value in model.named_parameters()}
    lengths = []
    model.model.language_model.register_forward_hook(lambda module, args, output: lengths.append(output[0].shape[1]))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        learning_rate=1e-2,
        max_grad_norm=1.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Examples())
    result = trainer.train()
    assert torch.isfinite(torch.tensor(result.training_loss))
    text = Examples()[0]["input_ids"].shape[0] - PATCHES
    assert set(lengths) == {text + K + M}
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {"model.multi_modal_projector.linear_1.weight", "lm_head.weight"} < changed
    trainer.save_model(str(tmp_path / "tuned"))
    again = visionzip(AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned"))
    assert same(outputs(again.eval(), batch()), outputs(model.eval(), batch()))


def test_gradients_equal_the_plain_reference():
    """Of every parameter: the encoder's through the tokens that are kept and merged, but none through the choice."""
    inputs = llava_batch("right", TEXTS)
    labels = text_labels(inputs)
    model, plain = visionzip(llava(attention="eager"), K, M), llava(attention="eager")
    model(**inputs, labels=labels).loss.backward()
    zipped = plain_zip(*plain_encode(plain.model.vision_tower, inputs["pixel_values"]), K, M)
    images = [(PATCHES, plain.model.multi_modal_projector(tokens)) for tokens, _ in zipped]
    plain_loss(plain, inputs, labels, images).backward()
    found, expected = dict(model.named_parameters()), dict(plain.named_parameters())
    reached = {name for name, value in expected.items() if value.grad is not None}
    assert {"lm_head.weight", "model.vision_tower.encoder.layers.0.mlp.fc1.weight"} < reached
    assert reached == {name for name, value in found.items() if value.grad is not None}
    for name in reached:
        torch.testing.assert_close(found[name].grad, expected[name].grad, atol=1e-4, rtol=1e-3)


def test_gradients_with_and_without_checkpointing_are_the_same():
    gradients = []
    for checkpointing in (False, True):
        model = visionzip(llava(), K, M).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**with_labels(batch())).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert "model.vision_tower.encoder.layers.0.mlp.fc1.weight" in gradients[0]
    torch.testing.assert_close(*gradients)


@both
def test_bfloat16(family: str):
    inputs = batch(family)
    model = visionzip(FAMILIES[family][0]().to(torch.bfloat16), K, M)
    output = model(**inputs)
    assert output.logits.dtype == output.image_hidden_states.dtype == torch.bfloat16
    exact = visionzip(FAMILIES[family][0]().to(torch.bfloat16).float(), K, M)(**inputs)
    error = (output.logits - exact.logits).norm() / exact.logits.norm()
    assert error < 0.3  # a different patch may win a close race, and the tokens behind it move; others differ by 1.4
    assert outputs(model, inputs)[2].shape == (2, inputs["input_ids"].shape[1] + 4)


def test_autocast():
    model, inputs = visionzip(llava(), K, M), with_labels(batch())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, model(**inputs).loss, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(bits: int, tmp_path: Path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    width = {"hidden_size": 64, "intermediate_size": 64}  # whole blocks of 64 weights
    config = LlavaConfig(
        vision_config=vision_config(**width), text_config=text_config(**width), image_token_index=IMAGE, pad_token_id=2
    )
    build(LlavaForConditionalGeneration, config).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=settings).eval()
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    assert isinstance(model.model.vision_tower.encoder.layers[2].self_attn.k_proj, kind)
    inputs = batch()
    plain = outputs(model, inputs)
    zipped = outputs(visionzip(model, K, M), inputs)
    assert zipped[1].shape[1] == short_length(inputs)
    assert same(outputs(unzip(model), inputs), plain)


def test_a_kernel_that_hides_its_weights():
    """As flash attention does: no layer's attention matrix is ever asked for."""
    calls = []

    def fused(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append(type(module).__name__)
        assert not kwargs.get("output_attentions")
        return sdpa_attention_forward(module, *args, **kwargs)[0], None

    AttentionInterface.register("fused_for_a_test", fused)
    expected = outputs(visionzip(llava(), K, M), batch())
    model = visionzip(llava(), K, M)
    model.set_attn_implementation({"vision_config": "fused_for_a_test"})
    torch.testing.assert_close(outputs(model, batch()), expected)
    assert calls.count("CLIPAttention") == len(calls) == 2 * 3  # forward and generate, three layers of four


@pytest.mark.parametrize("place", ["model.vision_tower", "model.language_model"])
def test_offloaded_weights(place: str, tmp_path: Path):
    """With accelerate's hooks, which bring the weights in layer by layer."""
    model = llava()
    model.save_pretrained(tmp_path / "saved")
    parts = {"model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"}
    offloaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "saved",
        device_map={part: "disk" if part == place else "cpu" for part in parts},
        offload_folder=str(tmp_path / "offload"),
    ).eval()
    torch.testing.assert_close(outputs(visionzip(offloaded, K, M), batch()), outputs(visionzip(model, K, M), batch()))

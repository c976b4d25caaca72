"""Reading one layer's attention while the encoder runs its own kernels, compared with transformers' eager attention."""

from __future__ import annotations

import copy
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from checkpoints import CLIP, SIGLIP, scale_up
from visionzip.attention import (
    QueriesKeys,
    cls_attention,
    merge_keys,
    patch_scores,
    read_attention,
    received_attention,
)

LAYERS, HEADS = CLIP["num_hidden_layers"], CLIP["num_attention_heads"]
FAMILIES = {
    "clip": (CLIPVisionModel, CLIPVisionConfig, CLIP),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, SIGLIP),
}
both = pytest.mark.parametrize("family", list(FAMILIES))


def encoder(family: str, seed: int = 0, **config: Any) -> nn.Module:
    torch.manual_seed(seed)
    model_class, config_class, values = FAMILIES[family]
    model = model_class(config_class(**values, **config)).eval()
    scale_up(model)
    return model


def pixels(seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def attention_of(model: nn.Module, layer: int = -2) -> nn.Module:
    return model.encoder.layers[layer].self_attn


@torch.no_grad()
def read(model: nn.Module, images: Tensor, layer: int = -2) -> QueriesKeys:
    with read_attention(attention_of(model, layer)) as reader:
        model(images)
    return reader.result()


@torch.no_grad()
def eager_attentions(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """(B, H, S, S) of each layer, of a copy: a model and its layers share one config."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return eager(images, output_attentions=True).attentions


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


class Recorder(TorchFunctionMode):
    """The torch functions that are called, with the shapes of the tensors they return."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, torch.Size]] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.calls.append((function.__name__, result.shape))
        return result

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        return [tuple(shape) for called, shape in self.calls if called == name]


# --- the same numbers as eager attention ---


@both
@pytest.mark.parametrize("layer", range(LAYERS))
def test_scores_equal_eager_attention(family: str, layer: int):
    model = encoder(family)
    eager = eager_attentions(model, pixels())[layer]
    assert eager.max() > 0.5  # far from uniform
    layer_read = read(model, pixels(), layer)
    assert_close(cls_attention(layer_read), eager[:, :, 0])
    assert_close(received_attention(layer_read), eager.mean(dim=2))
    assert_close(patch_scores(layer_read, cls_token=True), eager[:, :, 0, 1:].sum(dim=1))
    assert_close(patch_scores(layer_read, cls_token=False), eager.mean(dim=2).sum(dim=1))


@pytest.mark.parametrize("block", [1, 5, 16, 1000])
def test_received_attention_in_blocks(block: int):
    """No more than (B, H, block, S) at a time; 5 does not divide the 16 positions."""
    layer_read = read(encoder("siglip"), pixels())
    with Recorder() as recorder:
        received = received_attention(layer_read, block=block)
    assert max(shape[2] for shape in recorder.shapes("softmax")) == min(block, 16)
    assert_close(received, received_attention(layer_read))


def test_cls_attention_computes_one_row():
    layer_read = read(encoder("clip"), pixels())
    with Recorder() as recorder:
        cls_attention(layer_read)
    assert recorder.shapes("softmax") == [(2, HEADS, 1, 17)]


@both
def test_merge_keys_are_the_mean_over_heads_of_the_key_projection(family: str):
    model = encoder(family)
    projected = []
    attention_of(model).k_proj.register_forward_hook(lambda module, args, output: projected.append(output))
    keys = merge_keys(read(model, pixels()))
    assert_close(keys, sum(projected[0].chunk(HEADS, dim=-1)) / HEADS)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gives_float32(family: str, dtype: torch.dtype):
    layer_read = read(encoder(family).to(dtype), pixels().to(dtype))
    assert layer_read.queries.dtype == dtype
    exact = QueriesKeys(layer_read.queries.float(), layer_read.keys.float(), layer_read.scale)
    for function in (cls_attention, received_attention, merge_keys):
        result = function(layer_read)
        assert result.dtype == torch.float32 and torch.equal(result, function(exact))
    assert_close(cls_attention(layer_read).sum(dim=-1), torch.ones(2, HEADS))


@pytest.mark.parametrize("function", [cls_attention, received_attention, merge_keys])
def test_autocast_changes_nothing(function: Any):
    layer_read = read(encoder("clip"), pixels())
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = function(layer_read)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, function(layer_read))


def test_what_is_kept_can_be_reduced_at_once():
    """So that queries and keys of large encoders do not outlive their layer."""
    model = encoder("clip")
    with torch.no_grad(), read_attention(attention_of(model), merge_keys) as reader:
        model(pixels())
    assert torch.equal(reader.result(), merge_keys(read(model, pixels())))


def test_the_last_run_counts():
    model = encoder("clip")
    with torch.no_grad(), read_attention(attention_of(model)) as reader:
        model(pixels(seed=1))
        model(pixels(seed=2, batch=3))
    assert torch.equal(reader.result().keys, read(model, pixels(seed=2, batch=3)).keys)


# --- all layers keep their kernel ---


@both
def test_no_layer_falls_back_to_eager_attention(family: str):
    model = encoder(family)
    with Recorder() as recorder:
        read(model, pixels())
    assert len(recorder.shapes("scaled_dot_product_attention")) == LAYERS
    assert recorder.shapes("softmax") == []
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None or not torch.cuda.is_available(),
    reason="needs the flash-attn package and a GPU",
)
@both
def test_flash_attention(family: str):
    flash = encoder(family, attn_implementation="flash_attention_2").to("cuda", torch.bfloat16)
    images = pixels().to("cuda", torch.bfloat16)
    eager = eager_attentions(flash, images)[-2].float()
    layer_read = read(flash, images)
    assert flash.config._attn_implementation == "flash_attention_2"
    torch.testing.assert_close(cls_attention(layer_read), eager[:, :, 0], atol=3e-2, rtol=0)
    torch.testing.assert_close(received_attention(layer_read), eager.mean(dim=2), atol=3e-2, rtol=0)


# --- nothing but this layer, in this block and thread, is read ---


def test_hooks_are_gone_afterwards():
    attention = attention_of(encoder("clip"))
    with read_attention(attention):
        assert attention.q_proj._forward_hooks and attention.k_proj._forward_hooks
    assert not any(module._forward_hooks for module in attention.modules())


def test_hooks_are_gone_after_an_exception():
    model = encoder("clip")
    with pytest.raises(ValueError, match="size"), read_attention(attention_of(model)):
        model(torch.zeros(1, 3, 28, 28))
    assert not any(module._forward_hooks for module in model.modules())


def test_another_model_is_not_read():
    model, other = encoder("clip"), encoder("clip", seed=1)
    with torch.no_grad(), read_attention(attention_of(model)) as reader:
        model(pixels())
        other(pixels())
    assert torch.equal(reader.result().keys, read(model, pixels()).keys)


def test_another_thread_is_not_read():
    model = encoder("clip")
    with read_attention(attention_of(model)) as reader:
        thread = Thread(target=model, args=(pixels(),))
        thread.start()
        thread.join()
    with pytest.raises(RuntimeError, match="has not run"):
        reader.result()


def test_two_threads_read_the_same_model_at_once():
    """Each gets its own input's keys although both have hooks on the layer while both run it."""
    model = encoder("clip")
    barrier = Barrier(2, timeout=60)

    def keys(images: Tensor) -> Tensor:
        with torch.no_grad(), read_attention(attention_of(model)) as reader:
            barrier.wait()
            model(images)
            barrier.wait()
        return merge_keys(reader.result())

    inputs = [pixels(seed=1), pixels(seed=2, batch=3)]
    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(keys, inputs))
    for result, images in zip(at_once, inputs, strict=True):
        assert_close(result, merge_keys(read(model, images)))


def test_an_adapter_is_read_with_its_layer():
    model = encoder("clip")
    plain = cls_attention(read(model, pixels()))
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)  # random, as if trained
    adapted = get_peft_model(model, lora).get_base_model()
    eager = eager_attentions(adapted, pixels())[-2][:, :, 0]
    assert not torch.allclose(plain, eager, atol=1e-2)
    assert_close(cls_attention(read(adapted, pixels())), eager)


# --- errors ---


def test_reading_before_the_layer_has_run():
    message = "has not run inside read_attention"
    with read_attention(attention_of(encoder("clip"))) as reader, pytest.raises(RuntimeError, match=message):
        reader.result()


def test_a_layer_that_cannot_be_read():
    message = r"MultiheadAttention is not an attention layer .* no \['q_proj', 'k_proj', 'scale'\]"
    with pytest.raises(TypeError, match=message), read_attention(nn.MultiheadAttention(8, 2)):
        pass

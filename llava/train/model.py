"""The model to train: a LLaVA, or a language model and a vision tower that become one; what of it is learnt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CLIPVisionConfig, PretrainedConfig

from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM, LlavaQwenForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.checkpoints.configs import read_config
from llava.model.checkpoints.files import checkpoint_path, load_weights
from llava.model.checkpoints.loading import check_finite_weights, gathered
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.tokenizer import load_tokenizer
from llava.train.arguments import ModelArguments

_NEW = {"llama": LlavaLlamaForCausalLM, "mistral": LlavaMistralForCausalLM, "qwen2": LlavaQwenForCausalLM}
_PROJECTOR = "model.mm_projector."
# The linear layers of the language model's blocks; the vision tower has layers of the same last names.
_ADAPTED = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"


def is_llava(path: str) -> bool:
    """Whether a checkpoint (folder or hub name) is a LLaVA, by its config; else it is a language model.

    Raises:
        OSError: its config cannot be read.
        ValueError: it is a Video-LLaVA or a Mini-Gemini.
    """
    values, _ = PretrainedConfig.get_config_dict(checkpoint_path(path))
    if values.get("mm_video_tower"):
        raise ValueError(
            f"model_name_or_path={path} is a Video-LLaVA, which is not trained here (its data has videos, which are "
            "not read): give a LLaVA-1.5 or LLaVA-NeXT"
        )
    if values.get("mm_vision_tower_aux"):
        raise ValueError(
            f"model_name_or_path={path} is a Mini-Gemini, whose second tower the training here does not know: give a "
            "LLaVA-1.5 or LLaVA-NeXT"
        )
    return bool(values.get("mm_vision_tower"))


def build_model(
    arguments: ModelArguments, image_aspect_ratio: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any, Any]:
    """The tokenizer, the model to train and the image processor (None for text only).

    A language model and a vision tower become a new LLaVA, its projector random or from ``pretrain_mm_mlp_adapter``; a
    LLaVA and a vision tower become one with that tower.

    Args:
        arguments: what is trained.
        image_aspect_ratio: how images are prepared; None as the LLaVA has it, ``"square"`` for a new one.
        dtype: of the weights.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: the weights do not fit, or the arguments need a vision tower and there is none.
    """
    path = arguments.model_name_or_path
    options: dict[str, Any] = {"dtype": dtype}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    if arguments.vision_tower is None and not is_llava(path):
        if arguments.learns_part or arguments.pretrain_mm_mlp_adapter or arguments.budget:
            raise ValueError(
                f"{path} is a language model, without projector and visual tokens: give a vision_tower, or leave "
                "tune_mm_mlp_adapter, lora_enable, pretrain_mm_mlp_adapter and visionzip_… out"
            )
        return load_tokenizer(path), AutoModelForCausalLM.from_pretrained(path, **options), None
    if arguments.vision_tower is None:
        return _load_llava(arguments, image_aspect_ratio, options)
    return _new_llava(arguments, image_aspect_ratio, options)


def _load_llava(
    arguments: ModelArguments, image_aspect_ratio: str | None, options: dict[str, Any]
) -> tuple[Any, Any, Any]:
    path = arguments.model_name_or_path
    projector = read_projector(arguments.pretrain_mm_mlp_adapter, read_config(path)[1])
    # No device_map: the Trainer moves the model to each process's own device, and ZeRO-3 shares it out.
    bits = {"load_4bit": arguments.bits == 4, "load_8bit": arguments.bits == 8}
    tokenizer, model, image_processor, _ = load_pretrained_model(path, device_map=None, **bits, **options)
    own = dict(model.named_parameters())
    with torch.no_grad(), gathered(own[key] for key in projector):
        for key, value in projector.items():
            own[key].copy_(value)
    if image_aspect_ratio:
        model.config.image_aspect_ratio = image_aspect_ratio
    return tokenizer, model, image_processor


def _new_llava(
    arguments: ModelArguments, image_aspect_ratio: str | None, options: dict[str, Any]
) -> tuple[Any, Any, Any]:
    path = arguments.model_name_or_path
    if arguments.bits < 16:
        raise ValueError(f"bits={arguments.bits} needs a whole LLaVA as model_name_or_path, and no vision_tower")
    if is_llava(path):
        model_class, base = read_config(path)
        values = base.to_dict()
    else:
        values, _ = PretrainedConfig.get_config_dict(path)
        if values.get("model_type") not in _NEW:
            raise ValueError(f"{path} is a {values.get('model_type')!r}: a new LLaVA can be built on {', '.join(_NEW)}")
        model_class = _NEW[values["model_type"]]
    left_out = ("model_type", "architectures", "image_aspect_ratio")
    config = model_class.config_class(
        **{key: value for key, value in values.items() if key not in left_out and not key.startswith("mm_")},
        mm_vision_tower=arguments.vision_tower,
        mm_hidden_size=CLIPVisionConfig.from_pretrained(arguments.vision_tower).hidden_size,
        mm_projector_type=arguments.mm_projector_type,
        mm_vision_select_layer=arguments.mm_vision_select_layer,
        mm_vision_select_feature="patch",
        mm_patch_merge_type="flat",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        image_aspect_ratio=image_aspect_ratio or "square",
    )
    extra = read_projector(arguments.pretrain_mm_mlp_adapter, config)
    if not extra and not is_llava(path):
        extra = {_PROJECTOR + key: value for key, value in build_vision_projector(config).state_dict().items()}
    config._name_or_path = ""  # a LLaVA's folder has the image processor of its own encoder, and its weights
    tower = build_vision_tower(config)
    weights = tower.encoder.state_dict()
    extra |= {f"model.vision_tower.vision_tower.vision_model.{key}": value for key, value in weights.items()}
    model = model_class.from_pretrained(path, config=config, extra_weights=extra, **options)
    model.get_vision_tower().image_processor = tower.image_processor
    return load_tokenizer(path), model, tower.image_processor


def read_projector(file: str | None, config: Any) -> dict[str, Tensor]:
    """A projector's weights by the model's names, from ``mm_projector.bin`` or ``.safetensors``; none for no file.

    Raises:
        OSError: the file is damaged.
        ValueError: it has no projector, one of another shape than the config's, or one that is not finite.
    """
    if file is None:
        return {}
    found = {  # peft and DeepSpeed put more in front
        _PROJECTOR + key.split("mm_projector.")[1]: value
        for key, value in load_weights(file).items()
        if "mm_projector." in key
    }
    if not found:
        raise ValueError(f"pretrain_mm_mlp_adapter={file} has no weights of the name mm_projector.…")
    with torch.device("meta"):
        own = {_PROJECTOR + key: value for key, value in build_vision_projector(config).state_dict().items()}
    shapes = [{key: tuple(value.shape) for key, value in weights.items()} for weights in (found, own)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the projector in {file} has weights {shapes[0]}, but this model's mm_projector_type="
            f"{config.mm_projector_type!r} is made of {shapes[1]}: it belongs to another model"
        )
    check_finite_weights(found, file)
    return found


def choose_what_is_learnt(model: Any, arguments: ModelArguments, precise: bool) -> Any:
    """Freeze what is to stay as it is, and put in the LoRA adapter if there is to be one.

    Args:
        model: from :func:`build_model`, zipped or not.
        arguments: the way to train.
        precise: what is learnt is to be float32 (unless DeepSpeed keeps such a copy).

    Returns:
        The model; a LoRA model is wrapped.
    """
    if arguments.lora_enable:
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - optional

        config = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=_ADAPTED,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    elif arguments.tune_mm_mlp_adapter:
        model.requires_grad_(False)
    elif getattr(model.config, "visionzip", None) and hasattr(model.get_model(), "image_newline"):
        # VisionZip uses it with images of one tile only; what a step may leave out cannot be shared out (DDP).
        model.get_model().image_newline.requires_grad_(False)
    if arguments.learns_part:
        model.get_model().mm_projector.requires_grad_(True)
    if precise and arguments.learns_part:
        for parameter in learnt(model).values():
            parameter.data = parameter.data.float()
    return model


def learnt(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.inference_mode()
def whiten_projector(model: Any, images: Tensor) -> None:
    """Start an MLP projector so that nothing of the features drowns in their mean and their few largest directions.

    The features of a tower are read in the middle of its residual stream, where a mean and a direction or two can hold
    nearly all of their size; a random projector passes that on, and the rest is learnt late or never. Here the first
    layer takes the mean off and gives all directions the same variance, and the last one gives tokens the size of the
    language model's embeddings. The architecture is as before.

    Args:
        model: a LLaVA whose projector is an MLP.
        images: (B, 3, h, w), some of the training images.

    Raises:
        ValueError: the projector is no MLP.
    """
    projector = model.get_model().mm_projector
    if not isinstance(projector, nn.Sequential) or len(projector) < 3:
        raise ValueError("whiten_mm_projector needs an MLP projector: set mm_projector_type to mlp2x_gelu")
    features = model.get_vision_tower()(images).flatten(0, 1).double()
    mean = features.mean(dim=0)
    variances, directions = torch.linalg.eigh((features - mean).T.cov())
    # Directions with next to no variance are noise, which is not to be blown up.
    scale = (variances.clamp(min=0) + 0.02 * variances.mean()).rsqrt()
    first, last = projector[0], projector[-1]
    weight = nn.init.orthogonal_(torch.empty_like(first.weight)).double() @ torch.diag(scale) @ directions.T
    first.weight.copy_(weight)
    first.bias.copy_(-weight @ mean)
    hidden = projector[:-1](features.to(first.weight.dtype))
    last.weight.normal_(std=float(model.get_input_embeddings().weight.std() / hidden.square().sum(dim=1).mean().sqrt()))
    last.bias.zero_()

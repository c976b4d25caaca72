"""What the families of transformers share: how VisionZip is attached to a model, and what a family has to define.

Models of transformers take ``mm_encoder_outputs`` beside the ids: what their own ``get_image_features`` has returned.
So a zipped model encodes first. It runs the family's encoder, chooses tokens, shortens the runs of placeholders that
the stock processor wrote (:mod:`visionzip.integrations.prompts.placeholders`), and passes both to the stock forward,
without the pixels. No class is changed and no forward is written again. ``visionzip(model)`` attaches these things to
the one model object, and ``unzip`` removes them:

- a forward pre-hook on the model, and one on its base model, which does the work if the base model is called alone
  (:mod:`visionzip.integrations.calls`);
- ``generate``, which does the same once for a whole answer (:mod:`visionzip.integrations.generation`);
- ``get_image_features`` (and ``get_video_features``) of the base model, which return the chosen tokens;
- ``save_pretrained`` of LLaVA's families, which writes the names of weights that inference engines read
  (:mod:`visionzip.integrations.saving`).

A :class:`Family` defines how long each run of placeholders is before and after, which follows from shapes and the
config alone, and how its encoder's tokens are computed and chosen. Everything else is the same for all families.

The result of ``generate`` begins with the user's own prompts. Everything else that a call returns has the length of the
shortened prompts: logits, hidden states, attentions and the KV cache. So a Trainer's ``compute_metrics``,
``compute_loss_func`` and ``label_smoothing_factor``, which compare logits with labels outside the model, do not work.

What cannot work is refused with an error that names the cure:

- pixels beside ``inputs_embeds`` or ``mm_encoder_outputs``, and features of images in the latter;
- ``logits_to_keep`` as positions, and ``cu_seq_lens_*``: both point at tokens of the uncompressed prompts;
- masks of four dimensions beside pixels;
- a zipped ``assistant_model`` for prompts with images;
- a second turn with the cache of the first, if its mask has the length of the uncompressed prompts; and, in a batch of
  unequal prompts, if it is padded anew or if ``generate`` has not filled its cache;
- encoders and projectors that the family's functions do not know.

Limits: PEFT saves an adapter without the model's config, so call ``visionzip(model, …)`` again after loading one (a
merged model keeps its setting). Call ``model(…)`` and not ``model.forward(…)``, as old versions of PEFT do: the latter
runs no hooks of the model, so ``labels`` are not shortened and the loss fails. ``DataParallel`` runs the encoder of all
replicas on the first device. ``torch.compile(model, fullgraph=True)`` fails on prompts with images, with and without
VisionZip; decoding steps are one graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip.config import VisionZipConfig
from visionzip.integrations.encoders import Encoder, Pooling
from visionzip.integrations.prompts.held import Held
from visionzip.integrations.prompts.runs import Run
from visionzip.methods import positions_of

Arguments = Mapping[str, Any]
_STOCK: ContextVar[bool] = ContextVar("stock", default=False)


@dataclass
class DeepstackOutput(BaseModelOutputWithPooling):
    """An output of families with deepstack: ``deepstack_features`` has an entry for each layer that gets some."""

    deepstack_features: list[list[Tensor]] | None = None


class Encoded(NamedTuple):
    """The chosen visual tokens of all images, or all videos, of a call, in lists with an entry for each run.

    Attributes:
        tokens: (T, hidden_size), a run's tokens as the language model gets them.
        places: (T,) int64, the place in the uncompressed run of the patch that each token keeps, from 0.
        sizes: (T,) float32, how many patches each token stands for; None without a size bias.
        hidden: the tokens before the projector, for ``last_hidden_state`` of the model's output.
        deepstack: for each layer of the language model that gets some, (T, hidden_size) of each run.
        stock: the model's own output, whose other fields are passed on; None if the family does not need it.
    """

    tokens: list[Tensor]
    places: list[Tensor]
    sizes: list[Tensor] | None = None
    hidden: Tensor | None = None
    deepstack: list[list[Tensor]] | None = None
    stock: Any = None

    def of_runs(self, chosen: list[int]) -> Encoded:
        """Select some of the runs."""

        def pick(values: list[Tensor]) -> list[Tensor]:
            return [values[index] for index in chosen]

        deepstack = self.deepstack and [pick(layer) for layer in self.deepstack]
        sizes = self.sizes and pick(self.sizes)
        return self._replace(tokens=pick(self.tokens), places=pick(self.places), sizes=sizes, deepstack=deepstack)

    def in_pieces(self, counts: list[int]) -> Encoded:
        """Join the tokens and deepstack of as many runs as each count says; other values are left out."""

        def join(runs: list[Tensor]) -> list[Tensor]:
            values = iter(runs)
            return [torch.cat([next(values) for _ in range(count)]) for count in counts if count]

        deepstack = self.deepstack and list(map(join, self.deepstack))
        return self._replace(tokens=join(self.tokens), places=[], sizes=None, deepstack=deepstack)


@dataclass(frozen=True)
class Modality:
    """Images or videos of a family.

    Attributes:
        pixels: the argument of the model's forward that has their pixels.
        runs: ``(base, config, arguments) -> [Run, …]``, an entry for each run of placeholders in order. ``base`` is the
            model without its head (``model.model``), and ``arguments`` are those of the forward by name, with the
            pixels. The function checks the shape of the pixels, and does not use their values.
        encode: ``(base, config, arguments) -> Encoded``, which runs the encoder and chooses as many tokens of each run
            as its ``short``.
        stacked: whether the model takes ``pooler_output`` as one tensor (runs, T, hidden_size), and not as a list.
        former_pixels: an older name of the argument, which the stock processor still uses.
        pooling: how a frame is pooled before its tokens are chosen; None if it is not.
    """

    pixels: str
    runs: Callable[[nn.Module, VisionZipConfig, Arguments], list[Run]]
    encode: Callable[[nn.Module, VisionZipConfig, Arguments], Encoded]
    stacked: bool = False
    former_pixels: str | None = None
    pooling: Pooling | None = None

    def stacks(self, encoded: Encoded) -> bool:
        """Say whether the model takes these tokens as one tensor."""
        return self.stacked

    def output(self, encoded: Encoded) -> BaseModelOutputWithPooling:
        """Make the output that the base model's own ``get_image_features`` would have with these tokens."""
        tokens: Any = encoded.tokens
        if self.stacked and tokens:  # of images of which different numbers of patches are picked, one after the other
            same = len({len(own) for own in tokens}) == 1
            tokens = torch.stack(tokens) if same else torch.cat(tokens)[None]
        if encoded.deepstack is None:
            return BaseModelOutputWithPooling(last_hidden_state=encoded.hidden, pooler_output=tokens)
        return DeepstackOutput(
            last_hidden_state=encoded.hidden, pooler_output=tokens, deepstack_features=encoded.deepstack
        )


@dataclass(frozen=True)
class Family:
    """One model family of transformers.

    Attributes:
        modalities: images and videos by name, ``"image"`` and ``"video"``. The model's config has
            ``<name>_token_id``, and its base model has ``get_<name>_features``.
        rotary: whether positions have three axes (M-RoPE).
    """

    modalities: Mapping[str, Modality]
    rotary: bool = False

    def check(self, model: nn.Module, config: VisionZipConfig) -> None:
        """Check that the model is built as the family's functions expect, and that the setting fits it.

        Raises:
            TypeError: the model is built differently, or is of another version of transformers.
            ValueError: the setting does not fit.

        Warns:
            UserWarning: the budget compresses nothing, or the projector was not trained on the layer.
        """
        check_attributes(model, ("model", "config", "generate", "generation_config"))
        check_attributes(model.model, [f"get_{name}_features" for name in self.modalities])
        check_attributes(model.config, [f"{name}_token_id" for name in self.modalities])
        taken = [*(modality.pixels for modality in self.modalities.values()), "mm_encoder_outputs"]
        if missing := [name for name in taken if name not in inspect.signature(type(model).forward).parameters]:
            raise TypeError(
                f"{type(model).__name__}.forward of transformers {transformers.__version__} takes no {missing}"
            )

    def default_config(self, model: nn.Module) -> VisionZipConfig:
        """Return the setting if the user gives none."""
        return VisionZipConfig()

    def encoders(self, model: nn.Module) -> dict[str, Encoder]:
        """Return the encoders of images and videos, for :mod:`visionzip.token_map`.

        Raises:
            ValueError: that module cannot read this family's encoder.
        """
        raise ValueError(
            f"this reads encoders of a fixed size, CLIP and SigLIP, and {type(model).__name__} has another one: use "
            "visionzip.integrations.seam.maps.inspect_picture, or visionzip visualize"
        )

    def has_original_positions(self, config: VisionZipConfig) -> bool:
        """Say whether kept tokens keep their positions in the uncompressed prompt, by the setting."""
        return positions_of(config) == "original"

    def positions(self, base: nn.Module, arguments: Arguments) -> Tensor | None:
        """Compute positions (3, B, L) of the uncompressed prompts; None if they follow from the mask."""
        return None

    def with_axes(self, positions: Tensor) -> Tensor:
        """Convert positions (B, L) of text to the form that the language model takes."""
        return positions

    def note(self, base: nn.Module, held: Held, arguments: Arguments) -> None:
        """Leave on the base model what it keeps about a call's positions, if it keeps anything."""

    def language_model(self, model: nn.Module) -> nn.Module:
        """Return the text backbone."""
        return model.model.language_model

    def image_tokens(self, model: nn.Module) -> int | None:
        """Count the tokens of an uncompressed image or tile; None if the number depends on the picture's size."""
        return None


@dataclass(eq=False)
class Zipped:
    """What is attached to a zipped model, as ``model._visionzip``.

    Attributes:
        family: the model's family.
        config: the setting.
        handles: the handles of the hooks.
        replaced: for each method that is overridden, the module, the name, and what the user had put there, or None.
    """

    family: Family
    config: VisionZipConfig
    handles: list[RemovableHandle] = field(default_factory=list)
    replaced: list[tuple[nn.Module, str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.original = self.family.has_original_positions(self.config)
        modalities = self.family.modalities.values()
        names = [name for modality in modalities for name in (modality.pixels, modality.former_pixels)]
        self.pixels = tuple(filter(None, names))  # the arguments that may have images or videos


TESTED = "5.23"  # of transformers; other versions warn


def check_attributes(holder: Any, names: Iterable[str]) -> None:
    """Check that an object has some attributes; names may be dotted.

    Raises:
        TypeError: one is missing.
    """
    if missing := [name for name in names if not _has(holder, name)]:
        raise TypeError(
            f"{type(holder).__name__} of transformers {transformers.__version__} has no {', '.join(missing)}: "
            f"VisionZip was tested with {TESTED}.x"
        )


def _has(holder: Any, name: str) -> bool:
    """Do what ``hasattr`` does, for dotted names."""
    try:
        attrgetter(name)(holder)
    except AttributeError:
        return False
    return True


def stock_features(base: nn.Module, name: str, given: Arguments) -> Any:
    """Call the class's own ``get_image_features`` or ``get_video_features``; one may call the other."""
    token = _STOCK.set(True)
    try:
        return getattr(type(base), f"get_{name}_features")(base, **given)
    finally:
        _STOCK.reset(token)


def runs_stock() -> bool:
    """Say whether the caller runs inside :func:`stock_features`."""
    return _STOCK.get()

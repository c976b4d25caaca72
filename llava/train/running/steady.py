"""A Trainer whose training ends well when it fails: numbers that are not finite are seen, named and not saved."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer

from llava.train.running.checkpoints import ARGUMENTS, last_checkpoint

logger = logging.getLogger(__name__)

_REPEATS = 2  # updates in a row that are not finite, and it does not pass any more
_SCALINGS = 24  # float16: the loss scale starts at 2 ** 16 and is halved for each gradient that overflows
_NAMED = 8  # records


class SteadyTrainer(Trainer):
    """Trainer that leaves out an update which is not finite, stops when that repeats, and saves finite weights only.

    Transformers' own shows such a loss as 0 and goes on with it. Its logged loss is NaN here. A batch that has nothing
    to learn in it has the loss 0.

    Args:
        decides: what the weights follow from; each checkpoint has it.
        *args: as the Trainer's, as are the ``**kwargs``. Batches may have ``records``, the names of their samples.
    """

    def __init__(self, *args: Any, decides: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.decides = decides
        self._batches: list[tuple[Tensor, list[Any]]] = []  # of the update that is being made: loss and records
        self._unfit: list[str] = []  # what was not finite in the last updates, one after the other
        self._is_scaling = False  # all that was the matter with them is the loss scale
        self._log_is_unfit = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; what it says when it fails begins on a line of its own.

        Raises:
            ValueError: loss, gradient or weights are not finite.
            OSError: a checkpoint cannot be written or read.
        """
        try:
            result = super().train(*args, **kwargs)
            if self._unfit and not (self._is_scaling and len(self._unfit) < self.state.global_step):
                raise self._failure()
            self._check_weights()
        except BaseException:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.close()
            raise
        return result

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The Trainer's; the loss that it adds up is 0 where it is not finite."""
        records = inputs.pop("records", [])
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._batches.append((loss, records))
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._judge(model, math.nan if norm is None else float(norm), is_known=norm is not None)
        return norm

    def _judge(self, model: nn.Module, norm: float, is_known: bool) -> None:
        """Look at an update before it is made: all processes come to the same conclusion."""
        batches, self._batches = self._batches, []
        losses = torch.stack([loss for loss, _ in batches]).isfinite().tolist()
        own = torch.tensor([not all(losses), is_known and not math.isfinite(norm)], device=self.args.device)
        bad_loss, bad_norm = (self.accelerator.reduce(own.float(), "sum") > 0).tolist()
        if not (bad_loss or bad_norm):
            self._unfit.clear()
            return
        guilty = [
            name
            for is_finite, (_, records) in zip(losses, batches, strict=True)
            for name in records
            if not (bad_loss and is_finite)
        ]
        names = gather_object(guilty)
        named = ", ".join(map(repr, names[:_NAMED])) + (f" and {len(names) - _NAMED} more" if names[_NAMED:] else "")
        what = f"the {'loss' if bad_loss else 'gradient'} of step {self.state.global_step + 1} is not finite"
        self._unfit.append(f"{what} (records {named})" if named else what)
        self._log_is_unfit = True
        self._is_scaling = self.args.fp16 and not bad_loss
        if len(self._unfit) >= (_SCALINGS if self._is_scaling else _REPEATS):
            raise self._failure()
        if not self.is_deepspeed_enabled:  # which has left it out itself
            model.zero_grad()  # without gradients, the optimizer does nothing
        if self.is_world_process_zero() and not self._is_scaling:
            logger.warning("%s: its update is left out", self._unfit[-1])

    def _failure(self) -> ValueError:
        checkpoint = last_checkpoint(self.args.output_dir)
        return ValueError(
            f"{'; '.join(self._unfit[-_REPEATS:])}: the training is stopped, and nothing of this is saved. Lower "
            f"learning_rate ({self.args.learning_rate:g}), or look at these records and at the weights it starts from. "
            + (f"The last checkpoint from before is {checkpoint}" if checkpoint else "There is no checkpoint yet")
        )

    def _check_weights(self) -> None:
        """Check that what is learnt is finite; each process looks at what it has of it."""
        own = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        parts = [getattr(parameter, "ds_tensor", parameter).detach() for parameter in own.values()]
        finite = torch.stack([part.isfinite().all() for part in parts]).tolist() if parts else []
        bad = gather_object([name for name, is_finite in zip(own, finite, strict=True) if not is_finite])
        if bad:
            raise ValueError(
                f"{len(set(bad))} weights are not finite after step {self.state.global_step}, such as {bad[0]}: they "
                f"are not saved. Lower learning_rate ({self.args.learning_rate:g}), or look at the data and at the "
                "weights it starts from"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's; the loss over updates of which one is not finite is NaN."""
        if "loss" in logs and self._log_is_unfit:
            logs["loss"], self._log_is_unfit = math.nan, False
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's; a checkpoint says of which run it is."""
        super().save_model(output_dir, _internal_call)
        if _internal_call:
            self.save_arguments(output_dir)

    def save_arguments(self, checkpoint: str | None) -> None:
        """Write into a checkpoint what :func:`llava.train.running.checkpoints.check_same_run` compares."""
        if self.args.should_save:
            Path(checkpoint or self.args.output_dir, ARGUMENTS).write_text(json.dumps(self.decides))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._unfit:
            return  # weights that this may come from
        self._check_weights()
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
            earlier = last_checkpoint(self.args.output_dir)
            on = f"it goes on at {earlier}, which is whole" if earlier else "there is no earlier one, so it begins anew"
            raise OSError(
                f"cannot write the checkpoint of step {self.state.global_step} to {self.args.output_dir}: {error}. "
                f"Make room and give the same command again: {on}"
            ) from error

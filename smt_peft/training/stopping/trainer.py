"""A trainer whose runs can be killed: whole checkpoints, a log that goes on, and an orderly end for what goes wrong."""

from __future__ import annotations

import shutil
import time
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ...schedules import ScheduleCallback
from ..errors import DiskFullError, DivergedError, Interrupted, StoppedError
from . import checkpoints
from .signals import Request, name, requesting

# Where the trainer's state keeps what is not in it by itself; `state` in JSON has this place for callbacks.
PROGRESS = "Progress"
_NEVER = 2**62


@cache
def safe(trainer: type[Trainer], *mixins: type) -> type[Trainer]:
    """A subclass of Transformers' trainer, or of one of TRL's, that is `SafeTraining`, too, and these mixins."""
    return type(f"Safe{trainer.__name__}", (SafeTraining, *mixins, trainer), {})


class SafeTraining:
    """Mixed into a trainer.

    A checkpoint is written aside and renamed, once, when all processes have written. With it goes what the trainer has
    summed up since it last logged, so that a resumed run logs what one that never stopped does. Ctrl-C and SIGTERM save
    a checkpoint at the next step boundary; of several processes, where these next exchange what they log.

    Raises:
        DivergedError: from `train`: a loss or weight is not finite. Told at the step itself on one CPU, elsewhere when
            the step is logged or a checkpoint is due, since looking at a number makes the host wait for the device.
        Interrupted: from `train`: a signal came, and the checkpoint is saved.
        StoppedError: from `train`: a checkpoint cannot be written, or the output directory is gone.
    """

    # A file that lies in the output directory for as long as that is there.
    witness: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._aside: Path | None = None
        self._request = Request()
        self._since, self._seconds_before = time.perf_counter(), 0.0
        self._diverged_at, self._saved_at = torch.tensor(_NEVER), -1
        self.add_callback(_Watch(weakref.proxy(self)))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with requesting() as self._request:
            result = super().train(*args, **kwargs)
        self._tr_loss.zero_()  # It is in the total by now.
        self._note_progress()
        if number := self._requested():
            if self._saved_at != self.state.global_step:
                self._save_checkpoint(self.model, None)
            raise Interrupted(f"stopped by {name(number)}", number)
        return result

    def end_as(self, state: TrainerState) -> None:
        """Stand where the training that wrote `state` has ended, its weights aside; log its summary if it did not."""
        self.state = state
        self._tr_loss, self._total_loss_scalar = torch.zeros((), device=self.args.device), 0.0
        self._take_up_progress()
        self._since = time.perf_counter()
        self._total_loss_scalar += self._tr_loss.item()
        if not any("train_loss" in entry for entry in state.log_history):
            self.model.train()
            self.log({"train_runtime": self.seconds, "total_flos": state.total_flos, "train_loss": 0.0})

    @property
    def seconds(self) -> float:
        """What the training has taken, in all the processes that one after another had a part in it."""
        return round(self._seconds_before + time.perf_counter() - self._since, 1)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        # With the filter the user has asked to pass over such losses.
        if not self.args.logging_nan_inf_filter:
            step = torch.where(loss.isfinite().all(), _NEVER, self.state.global_step + 1)
            self._diverged_at = torch.minimum(self._diverged_at.to(step.device), step)
            if self.args.world_size == 1 and step.device.type == "cpu":
                self._check_losses()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "train_loss" in logs:
            # The trainer divides by the steps of this process, by all of them here.
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # An upload in the background would be left without its files by the rename.
        if self._aside is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_losses()
        self._check_weights()
        self._check_directory()
        self._note_progress()
        directory = Path(self.args.output_dir)
        checkpoint = directory / f"checkpoint-{self.state.global_step}"
        self._aside = directory / checkpoints.SAVING
        try:
            super()._save_checkpoint(model, trial)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ScheduleCallback) and self.args.should_save:
                    callback.save(self._aside / checkpoint.name)
            self._publish(self._aside / checkpoint.name, checkpoint)
        # torch.save has RuntimeErrors for a disk that is full.
        except (OSError, RuntimeError, SafetensorError) as error:
            kind = DiskFullError if checkpoints.is_full(error, directory) else StoppedError
            shutil.rmtree(self._aside, ignore_errors=True)
            raise kind(f"{checkpoint.name} could not be written ({error})") from error
        finally:
            self._aside = None
        self._saved_at = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _publish(self, written: Path, checkpoint: Path) -> None:
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(checkpoint)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.publish(written, checkpoint)
        self.accelerator.wait_for_everyone()
        # Still there: on another machine, with a disk of its own.
        if self.is_local_process_zero() and written.exists():
            checkpoints.publish(written, checkpoint)
        if self.args.should_save:
            shutil.rmtree(written.parent, ignore_errors=True)
            kept = {checkpoint, *map(Path, filter(None, [self.state.best_model_checkpoint]))}
            checkpoints.prune(checkpoint.parent, self.args.save_total_limit, kept)

    def _check_losses(self) -> None:
        step = self._earliest(self._diverged_at)
        if step != _NEVER:
            raise DivergedError(f"the loss of step {step} is not finite")

    def _check_weights(self) -> None:
        """So that a checkpoint is worth resuming from: a gradient may be infinite where the loss was not."""
        # Of a sharded weight, what lies here.
        weights = [getattr(p, "_local_tensor", p) for p in self.model.parameters() if p.requires_grad]
        finite = torch.stack([weight.detach().isfinite().all().to(self.args.device) for weight in weights]).all()
        step = torch.where(finite, _NEVER, self.state.global_step)
        if (step := self._earliest(step)) != _NEVER:
            raise DivergedError(f"after step {step} there are weights that are not finite")

    def _earliest(self, step: Tensor) -> int:
        if self.args.world_size > 1:
            step = self.accelerator.gather(step.to(self.args.device).reshape(1)).min()
        return int(step)

    def _requested(self) -> int:
        """The signal that has come to any of the processes, which all must ask; 0: none."""
        return -self._earliest(torch.tensor(-self._request.number))

    def _check_directory(self) -> None:
        if self.args.process_index != 0:
            return  # On another machine the directory need not hold more than its own part of the checkpoints.
        directory = Path(self.args.output_dir)
        if not directory.is_dir() or (self.witness is not None and not self.witness.exists()):
            raise StoppedError(
                f"after step {self.state.global_step} the output directory {directory} is gone: deleted, emptied or "
                "no longer mounted"
            )

    def _note_progress(self) -> None:
        losses = self._tr_loss.detach().reshape(1)
        if self.args.world_size > 1:
            losses = self.accelerator.gather(losses)
        self.state.stateful_callbacks[PROGRESS] = {
            "losses": losses.tolist(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "seconds": self.seconds,
            # Of TRL's trainers.
            "metrics": dict(getattr(self, "_metrics", {}).get("train", {})),
            "tokens": getattr(self, "_total_train_tokens", 0),
        }

    def _take_up_progress(self) -> None:
        self._since, self._seconds_before = time.perf_counter(), 0.0
        self._diverged_at = torch.tensor(_NEVER)
        noted = self.state.stateful_callbacks.get(PROGRESS)
        if noted is None:
            return
        losses = noted["losses"]
        # Resumed by another number of processes, each goes on from the mean, which is all that is ever logged.
        same = len(losses) == self.args.world_size
        self._tr_loss.fill_(losses[self.args.process_index] if same else sum(losses) / len(losses))
        self._total_loss_scalar = noted["total_loss"]
        self._globalstep_last_logged = noted["last_logged"]
        self._seconds_before = noted["seconds"]
        if hasattr(self, "_metrics"):
            self._metrics["train"].update({name: list(values) for name, values in noted["metrics"].items()})
            self._total_train_tokens = noted["tokens"]


class _Watch(TrainerCallback):
    """What `SafeTraining` does between the steps."""

    def __init__(self, trainer: SafeTraining):
        self.trainer, self.due, self.stopping = trainer, False, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.due = self.stopping = False
        self.trainer._take_up_progress()

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size == 1:
            self.stopping = bool(self.trainer._requested())
        if self.stopping:
            control.should_save = control.should_training_stop = True
        if control.should_save and state.epoch == int(state.epoch):
            # What the end of the epoch logs and measures belongs into the checkpoint, since it is not done again.
            control.should_save, self.due = False, True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.due:
            control.should_save, self.due = True, False
        elif self.stopping and state.epoch != int(state.epoch):
            # Saved already; the epoch goes on when the run does.
            control.should_log = control.should_evaluate = control.should_save = False

    def on_log(self, args, state, control, **kwargs):
        if not self.trainer.is_in_train:
            return
        self.trainer._check_losses()
        self.trainer._check_directory()
        if args.world_size > 1:
            # The processes have just waited for each other; between the steps they would have to for this alone.
            self.stopping = bool(self.trainer._requested())

"""A fine-tuning that can be asked how it stands, and ended."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from typing import Any

from dspy.clients.provider import TrainingJob
from dspy.clients.utils_finetune import TrainingStatus
from transformers import TrainerCallback


class SMTTrainingJob(TrainingJob):
    """A fine-tuning under way; its result is the tuned LM, or the exception that ended it, as everywhere in DSPy."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.started, self._cancelled = threading.Event(), threading.Event()

    def status(self) -> TrainingStatus:
        if not self.done():
            return TrainingStatus.running if self.started.is_set() else TrainingStatus.pending
        result = self.result()
        if isinstance(result, CancelledError):
            return TrainingStatus.cancelled
        return TrainingStatus.failed if isinstance(result, Exception) else TrainingStatus.succeeded

    def cancel(self) -> bool:
        """End the training after the step it is at; the job's result is then a `CancelledError`."""
        self._cancelled.set()
        return not self.done()

    def raise_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise CancelledError("the fine-tuning was cancelled")


class Watch(TrainerCallback):
    """Ends a training whose job was cancelled."""

    def __init__(self, job: SMTTrainingJob):
        self.job = job

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.job.raise_if_cancelled()

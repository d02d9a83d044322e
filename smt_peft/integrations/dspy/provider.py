"""What fine-tunes a language model of DSPy: a run, merged into a checkpoint that the program then calls."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy.clients.provider import Provider
from dspy.clients.utils_finetune import TrainDataFormat

from ...export.merge import merge_adapter
from ...say import say
from .engine import TransformersEngine
from .job import SMTTrainingJob, Watch
from .server import check_server
from .settings import prepare_run, rows_of

if TYPE_CHECKING:
    import dspy

# A run seeds, counts and logs for the whole process, so that two at once would be neither repeatable nor faster.
_one_at_a_time = threading.Lock()


class SMTProvider(Provider):
    """Fine-tunes by SMT, or by the PEFT method that `train_kwargs` names, and merges the result into its base.

    Args:
        server: the prefix of models that a server answers for, `"openai/"` or `"hosted_vllm/"`; the tuned model has it,
            too. None: models run in this process (`LocalLM`).
    """

    def __init__(self, server: str | None = None):
        super().__init__()
        self.finetunable = True
        self.TrainingJob = SMTTrainingJob
        self.server = server or ""

    @staticmethod
    def is_provider_model(model: str) -> bool:
        """Whether `model` is the directory of a checkpoint."""
        return (Path(model) / "config.json").is_file()

    def launch(self, lm: dspy.LM, launch_kwargs: dict[str, Any] | None = None) -> None:
        """Load the model of an LM in this process; of a server, make sure that it serves the model.

        Raises:
            lm15.ConfigurationError: the model cannot be loaded.
            RuntimeError: the server does not answer, or serves other models; the message says how to start one.
        """
        if isinstance(lm.engine, TransformersEngine):
            lm.engine.load(lm.model)
        else:
            check_server(
                lm, lm.model.removeprefix(self.server), timeout=(launch_kwargs or lm.launch_kwargs).get("timeout", 10)
            )

    @staticmethod
    def kill(lm: dspy.LM, launch_kwargs: dict[str, Any] | None = None) -> None:
        """Let go of the model of an LM in this process. A server is not ours to end."""
        if isinstance(lm.engine, TransformersEngine):
            lm.engine.unload(lm.model)

    def finetune(
        self,
        job: SMTTrainingJob,
        model: str,
        train_data: list[dict[str, Any]],
        train_data_format: TrainDataFormat | str | None,
        train_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Train, verify, merge.

        Args:
            job: may be cancelled.
            model: the base.
            train_data: `{"messages": [...]}` each, of which the last answer is learned, or `{"prompt": text,
                "completion": text}`.
            train_data_format: `CHAT` or `COMPLETION`.
            train_kwargs: keys of a run (docs/yaml.md), `smt` among them; `peft_config`, the config of any PEFT method,
                `SMTConfig` included; and `output_dir`, in which each job makes a directory of its own (DSPy's own,
                `DSPY_FINETUNEDIR`, when not given).

        Returns:
            The merged checkpoint: a directory `model`, beside `run` with the adapter and all else that a run saves,
            and behind the prefix of the server, if there is one.

        Raises:
            ConfigError: lists every key that is wrong, or says what is wrong with the data.
            CancelledError: `job.cancel()` was called.
        """
        base, rows = model.removeprefix(self.server), rows_of(train_data, train_data_format)
        directory, train = prepare_run(base, rows, train_kwargs)
        with _one_at_a_time:
            job.started.set()
            job.raise_if_cancelled()
            say(f"{base} is fine-tuned on {len(rows)} rows, in {directory}")
            train(Watch(job))
            merge_adapter(directory / "run", directory / "model")
        return f"{self.server}{directory / 'model'}"

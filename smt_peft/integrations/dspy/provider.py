"""What fine-tunes a language model of DSPy: a run, merged into a checkpoint that the program then calls."""

from __future__ import annotations

import json
import re
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from dspy.clients.provider import Provider, TrainingJob
from dspy.clients.utils_finetune import TrainDataFormat, TrainingStatus, get_finetune_directory
from transformers import TrainerCallback

from ...config import SMTConfig
from ...export.merge import merge_adapter
from ...say import say
from ...training.errors import ConfigError
from .engine import TransformersEngine

if TYPE_CHECKING:
    import dspy

# What TRL would choose otherwise: rows cut at 1,024 tokens, of which DSPy's prompts alone can be longer, 3 epochs.
DEFAULTS = {"max_length": None, "num_train_epochs": 5, "save_strategy": "no"}
# A usual rate of LoRA, and 8 times that for blocks (docs/choosing.md); TRL's 2e-5 is one for full fine-tuning.
LEARNING_RATE, SMT_LEARNING_RATE = 1e-4, 1e-3
# The job says these.
_OF_THE_JOB = {
    "model_name_or_path": "the language model names it",
    "dataset_path": "the traces are the data",
    "dataset_name": "the traces are the data",
    "dataset_mixture": "the traces are the data",
}
# A run seeds, counts and logs for the whole process, so that two at once would be neither repeatable nor faster.
_one_at_a_time = threading.Lock()


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

    @staticmethod
    def launch(lm: dspy.LM, launch_kwargs: dict[str, Any] | None = None) -> None:
        """Load the model of an LM in this process; of a server, make sure that it serves the model.

        Raises:
            lm15.ConfigurationError: the model cannot be loaded.
            RuntimeError: the server does not answer, or serves other models; the message says how to start one.
        """
        if isinstance(lm.engine, TransformersEngine):
            lm.engine.load(lm.model)
        else:
            _check_server(lm, timeout=(launch_kwargs or lm.launch_kwargs).get("timeout", 10))

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
        base, settings = model.removeprefix(self.server), dict(train_kwargs or {})
        config = settings.pop("peft_config", None)
        rows = _rows(train_data, train_data_format)
        _check_keys(settings, config)
        directory = _new_directory(settings.pop("output_dir", None), base)
        train = _prepared(directory, base, rows, settings, config)
        with _one_at_a_time:
            job.started.set()
            job.raise_if_cancelled()
            say(f"{base} is fine-tuned on {len(rows)} rows, in {directory}")
            train(_Watch(job))
            merge_adapter(directory / "run", directory / "model")
        return f"{self.server}{directory / 'model'}"


class _Watch(TrainerCallback):
    """Ends a training whose job was cancelled."""

    def __init__(self, job: SMTTrainingJob):
        self.job = job

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.job.raise_if_cancelled()


def _rows(train_data: list[dict[str, Any]], form: TrainDataFormat | str | None) -> list[dict[str, Any]]:
    """The rows as a run reads them: prompts and completions, so that only what the model is to say is learned."""
    if form not in (TrainDataFormat.CHAT, TrainDataFormat.COMPLETION):
        raise ConfigError(f"train_data_format: {form!r} cannot be trained on; CHAT and COMPLETION can")
    if not train_data:
        raise ConfigError(
            "train_data: there is not one row: no trace passed the metric, or none has a call of this predictor; look "
            "at what the teacher says, take an easier metric or more examples"
        )
    if form == TrainDataFormat.COMPLETION:
        return train_data
    for number, row in enumerate(train_data):
        turns = row.get("messages")
        if not isinstance(turns, list) or len(turns) < 2 or turns[-1].get("role") != "assistant":
            raise ConfigError(
                f"train_data: row {number} is no conversation that ends with the assistant: "
                f'{{"messages": [..., {{"role": "assistant", "content": ...}}]}}'
            )
    return [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in train_data]


def _check_keys(settings: dict[str, Any], config: Any) -> None:
    # It loads TRL, with the first fine-tuning.
    from ...training.adapters import check_mergeable

    for key in settings.keys() & _OF_THE_JOB.keys():
        raise ConfigError(f"train_kwargs: {key} has no place here: {_OF_THE_JOB[key]}")
    if config is None:
        return
    check_mergeable(config)
    ours = {"smt"} if isinstance(config, SMTConfig) else {"smt", "verify", "compare_lora"}
    for key in ours & {key for key, value in settings.items() if value}:
        raise ConfigError(f"train_kwargs: {key} beside peft_config={type(config).__name__}: leave one of them out")


def _new_directory(parent: str | Path | None, base: str) -> Path:
    """A directory that no other job has; jobs of several predictors start at once."""
    parent = Path(parent or get_finetune_directory()).absolute()
    parent.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]+", "-", Path(base).name)
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))


def _prepared(
    directory: Path, base: str, rows: list[dict[str, Any]], settings: dict[str, Any], config: Any
) -> Callable[[TrainerCallback], Any]:
    """What trains, every key checked. The rows and the YAML that was made of the settings lie in `directory`."""
    from ...training.adapters import train_adapter
    from ...training.run import train
    from ...training.schema import load_run

    data, run_yaml = directory / "train.jsonl", directory / "train.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    is_smt = config is None or isinstance(config, SMTConfig)
    block = {"smt": _as_block(config, directory)} if isinstance(config, SMTConfig) else {}
    whole = {
        "model_name_or_path": base,
        "dataset_path": str(data),
        "output_dir": str(directory / "run"),
        "learning_rate": SMT_LEARNING_RATE if is_smt else LEARNING_RATE,
        **DEFAULTS,
        **settings,
        **block,
    }
    try:
        run_yaml.write_text(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True), encoding="utf-8")
    except yaml.representer.RepresenterError as error:
        raise ConfigError(f"train_kwargs: {error.args[-1]!r} is nothing that a YAML can hold") from error
    run = load_run(run_yaml)
    if is_smt:
        return lambda watch: train(run, [watch])
    return lambda watch: train_adapter(run, config, [watch])


def _as_block(config: SMTConfig, directory: Path) -> dict[str, Any]:
    """The settings of a config as the `smt:` block of a run."""
    from ...training.keys import known_keys

    if callable(config.score):
        raise ConfigError(
            "train_kwargs: peft_config has a score that is a function, which a run cannot record; choose blocks by it "
            "with select_blocks, and give the config the selection"
        )
    given, untouched = vars(config), vars(SMTConfig())
    names = [key.removeprefix("smt.") for key in known_keys() if key.startswith("smt.")]
    block = {name: given[name] for name in names if name in given and given[name] != untouched[name]}
    if "num_blocks" in block:
        block.pop("density", None)
    if config.selection is not None and not isinstance(config.selection, (str, Path)):
        block["selection"] = directory / "selection.safetensors"
        config.selection.save(block["selection"])
    return {name: _plain(value) for name, value in block.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return sorted(value) if isinstance(value, set) else list(value) if isinstance(value, tuple) else value


def _check_server(lm: dspy.LM, timeout: float) -> None:
    """Ask an OpenAI-compatible server what it serves."""
    name = lm.model.removeprefix(getattr(lm.provider, "server", ""))
    command = f"start one: vllm serve {name} --served-model-name {name}"
    url = lm.kwargs.get("api_base") or lm.kwargs.get("base_url")
    if url is None:
        raise RuntimeError(f"{lm.model} has no api_base, and no engine of this process; pass api_base, or take LocalLM")
    request = urllib.request.Request(f"{url.rstrip('/')}/models")
    if lm.kwargs.get("api_key"):
        request.add_header("Authorization", f"Bearer {lm.kwargs['api_key']}")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            served = [entry["id"] for entry in json.load(answer)["data"]]
    except (OSError, urllib.error.URLError, ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"the server at {url} does not say what it serves ({error}); {command}") from error
    if name not in served:
        raise RuntimeError(f"the server at {url} serves {', '.join(served) or 'nothing'}, not {name}; {command}")

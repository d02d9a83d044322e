"""Supervised fine-tuning: the next tokens of texts, answers or conversations, by TRL's `SFTTrainer`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..data.load import Data, load_data
from ..errors import ConfigError
from ..evaluate import exact_match
from ..model import passes_as_adapted
from ..sample import render_sample
from ..stopping.trainer import safe
from ..tokens import at_rest
from .task import Prepared, Task, evaluated

if TYPE_CHECKING:
    from ..yaml.schema import Run


class Sft(Task):
    def load_data(self, run: Run, tokenizer: PreTrainedTokenizerBase) -> Data:
        return load_data(run.config, run.trainer, tokenizer)

    def tokenising_trainer(
        self, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data
    ) -> SFTTrainer:
        """As of `Task`; the tokenizer may be given a chat template by the settings."""
        with passes_as_adapted(model):
            try:
                trainer = SFTTrainer(
                    model=model,
                    args=at_rest(run.trainer, model),
                    train_dataset=data.train,
                    eval_dataset=data.evaluation,
                    processing_class=tokenizer,
                )
            except (ValueError, RuntimeError) as error:
                raise ConfigError(f"the rows cannot be turned into tokens as the settings say: {error}") from error
        if next(iter(trainer.train_dataset), None) is None:
            raise ConfigError(
                f"max_length: no row keeps a token to learn from within {run.trainer.max_length} tokens; raise "
                "max_length"
            )
        return trainer

    def trainer(
        self,
        prepared: Prepared,
        args: SFTConfig,
        config: PeftConfig,
        callbacks: Iterable[TrainerCallback],
        mixins: Sequence[type] = (),
    ) -> SFTTrainer:
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        # The labels say it by now; of token ids TRL would not believe that there are assistants in them.
        args.assistant_only_loss = False
        return safe(SFTTrainer, *mixins)(
            model=prepared.model,
            args=args,
            train_dataset=prepared.train_set,
            eval_dataset=prepared.eval_set,
            processing_class=prepared.tokenizer,
            peft_config=config,
            callbacks=list(callbacks),
        )

    def measure(self, run: Run, prepared: Prepared, trainer: SFTTrainer, label: str) -> dict[str, float]:
        """`eval_loss` and `exact_match`."""
        found = {}
        if prepared.eval_set is not None:
            found["eval_loss"] = evaluated(trainer)["eval_loss"]
        if run.config.eval_exact_match:
            found["exact_match"] = exact_match(
                trainer.model,
                prepared.tokenizer,
                prepared.data.evaluation,
                max_new_tokens=run.config.generation_max_new_tokens,
                batch_size=run.config.generation_batch_size,
                label=None if run.trainer.disable_tqdm else f"exact match {label}",
            )
        return found

    def sample(self, trainer: SFTTrainer, tokenizer: PreTrainedTokenizerBase) -> str:
        return render_sample(trainer, tokenizer)

    def probes(self, rows: Iterable[dict]) -> list[list[int]]:
        return [row["input_ids"] for row in rows]

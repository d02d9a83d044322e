"""Direct preference optimisation (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), by TRL's `DPOTrainer`.

The reference is the base with the adapter off, so no second model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.pytorch_utils import Conv1D
from trl import DPOConfig, DPOTrainer

from ..data.load import Data, read_evaluation, read_train
from ..data.loss import kind_of
from ..data.preferences import ANSWERS, PREFERENCES
from ..data.read import Reading
from ..data.template import chat_template, refusal
from ..errors import ConfigError
from ..model import passes_as_adapted
from ..preview import IGNORED
from ..sample import has_colour, marked
from ..stopping.trainer import safe
from ..tokens import at_rest
from .task import LossFunction, Prepared, Task, evaluated

if TYPE_CHECKING:
    from ..yaml.schema import Run

# What an evaluation finds, by the name that a run gives it.
_MEASURES = {
    "eval_loss": "eval_loss",
    "reward_accuracy": "eval_rewards/accuracies",
    "reward_margin": "eval_rewards/margins",
}


class Dpo(Task):
    def load_data(self, run: Run, tokenizer: PreTrainedTokenizerBase) -> Data:
        reading = Reading(
            also=_template_check(tokenizer),
            on_broken_row=run.config.on_broken_row,
            forms={PREFERENCES.name: PREFERENCES},
        )
        train = read_train(run.config, run.trainer.seed, reading)
        evaluation = read_evaluation(run.config, run.trainer.seed, reading)
        for title, rows in (("the training set", train), ("the evaluation set", evaluation)):
            chats = rows is not None and kind_of(next(iter(rows))) == "chat preferences"
            if chats and chat_template(tokenizer, None) is None:
                raise ConfigError(
                    f"{title} holds messages, but the tokenizer has no chat template; take a model that was trained to "
                    "chat, or put one into its tokenizer_config.json"
                )
        return Data(train, evaluation)

    def tokenising_trainer(
        self, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data
    ) -> DPOTrainer:
        args = at_rest(run.trainer, model)
        args.precompute_ref_log_probs = False
        # For that it would put a hook on the embeddings, which stays.
        args.gradient_checkpointing = args.activation_checkpointing = False
        with passes_as_adapted(model):
            try:
                # Of a model with an adapter, DPOTrainer loads no second one to refer to.
                trainer = _trainer(model, args, data, tokenizer, _passing_adapter(model))
                first = next(iter(trainer.train_dataset), None)
            except (ValueError, RuntimeError, TemplateError) as error:
                raise ConfigError(f"the rows cannot be turned into tokens as the settings say: {error}") from error
        trainer.model = trainer.model_wrapped = trainer.model.unload()
        if first is None:
            raise ConfigError(
                f"max_length: no prompt leaves room for an answer within {run.trainer.max_length} tokens; raise "
                "max_length"
            )
        return trainer

    def warm_up_loss(self, prepared: Prepared) -> LossFunction:
        """The trainer's own loss at the start of the training, where the model is its own reference."""
        trainer = prepared.trainer
        # It is to look for the reference's log-probabilities in the batch.
        trainer.precompute_ref_logps = True

        def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            half = len(batch["input_ids"]) // 2
            zeros = batch["input_ids"].new_zeros(half, dtype=trainer.model.dtype)
            there = dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), zeros)
            return trainer.compute_loss(_from_itself(model), {**batch, **there})

        return loss

    def trainer(
        self,
        prepared: Prepared,
        args: DPOConfig,
        config: PeftConfig,
        callbacks: Iterable[TrainerCallback],
        mixins: Sequence[type] = (),
    ) -> DPOTrainer:
        # From the rows themselves, whose token ids are found in the cache: it takes no others.
        return _trainer(prepared.model, args, prepared.data, prepared.tokenizer, config, list(callbacks), mixins)

    def measure(self, run: Run, prepared: Prepared, trainer: DPOTrainer, label: str) -> dict[str, float]:
        """`eval_loss`; the share of pairs whose chosen answer has the higher reward, and by how much on average."""
        if prepared.eval_set is None:
            return {}
        found = evaluated(trainer)
        return {name: found[key] for name, key in _MEASURES.items()}

    def sample(self, trainer: DPOTrainer, tokenizer: PreTrainedTokenizerBase) -> str:
        row = next(iter(trainer.train_dataset))
        prompt, colour = row["prompt_ids"], has_colour()
        limit = trainer.args.max_length
        counts = [len(row[f"{name}_ids"]) for name in ANSWERS]
        how = "dimmed" if colour else "inside [-  -]"
        lines = [
            f"one pair, a prompt of {len(prompt):,} tokens ({how}), a chosen answer of {counts[0]:,}, a rejected one "
            f"of {counts[1]:,}:"
        ]
        for name, count in zip(ANSWERS, counts, strict=True):
            ids = [*prompt, *row[f"{name}_ids"]][:limit]
            labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
            cut = f", cut off at max_length {limit:,}" * (limit is not None and len(prompt) + count > limit)
            lines.append(f"{name}{cut}:\n{marked(tokenizer, ids, labels, colour)}")
        return "\n".join(lines)

    def probes(self, rows: Iterable[dict]) -> list[list[int]]:
        return [[*row["prompt_ids"], *row["chosen_ids"]] for row in rows]


def _trainer(
    model: PreTrainedModel,
    args: DPOConfig,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    config: PeftConfig,
    callbacks: list[TrainerCallback] | None = None,
    mixins: Sequence[type] = (),
) -> DPOTrainer:
    return safe(DPOTrainer, *mixins)(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        peft_config=config,
        callbacks=callbacks,
    )


def _passing_adapter(model: PreTrainedModel) -> LoraConfig:
    """The smallest adapter there is, which never runs and is taken off again."""
    head = model.get_output_embeddings()
    name, layer = next(
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head
    )
    return LoraConfig(r=1, target_modules=[name], fan_in_fan_out=isinstance(layer, Conv1D), task_type="CAUSAL_LM")


def _from_itself(model: nn.Module) -> Callable[..., Any]:
    """A model whose log-probabilities are told as differences from its own: zero, with the gradient they have."""

    def forward(**inputs: Any) -> Any:
        output = model(**inputs)
        own = output.log_probs.detach()
        changed = {"log_probs": output.log_probs - own}
        if output.log_sum_sq_probs is not None:
            # Weights by certainty compare it with the log-probabilities.
            changed["log_sum_sq_probs"] = output.log_sum_sq_probs - own
        return replace(output, **changed)

    return forward


def _template_check(tokenizer: PreTrainedTokenizerBase) -> Callable[[dict], str | None] | None:
    """What a template that may refuse conversations says to a row; None: it refuses none."""
    template = chat_template(tokenizer, None)
    if template is None or "raise_exception" not in template:
        return None

    def check(row: dict) -> str | None:
        if isinstance(row["prompt"], str):
            return None
        turns = ([*row["prompt"], *row[name]] for name in ANSWERS)
        return next(filter(None, (refusal(tokenizer, template, each, row.get("tools")) for each in turns)), None)

    return check

"""What a model says to prompts, and how often that is exactly the expected text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str | None = None,
) -> float:
    """Share of rows whose greedy completion equals the expected one, surrounding blanks aside.

    Args:
        model: a causal language model; its training mode is left as found.
        tokenizer: with a padding and an end-of-text token.
        rows: `prompt` and `completion`, text or lists of messages.
        max_new_tokens: length limit of a completion.
        batch_size: prompts completed at once.
        label: what the progress bar says; None shows none.
    """
    plain = isinstance(rows[0]["prompt"], str)  # a chat template has put the special tokens in already
    prompts = [_prompt(tokenizer, row["prompt"]) for row in rows]
    texts = completions(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        special_tokens=plain,
        label=label,
    )
    hits = sum(text.strip() == _text(row["completion"]).strip() for text, row in zip(texts, rows, strict=True))
    return hits / len(rows)


@torch.no_grad()
def completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    num_beams: int = 1,
    special_tokens: bool = True,
    label: str | None = None,
) -> list[str]:
    """What a model says to each prompt, without the prompt and without special tokens.

    Args:
        model: a causal language model; its training mode is left as found.
        tokenizer: with a padding and an end-of-text token.
        prompts: texts.
        max_new_tokens: length limit of a completion.
        batch_size: prompts completed at once.
        num_beams: beams of the search; 1 is greedy.
        special_tokens: whether the tokenizer puts its own around a prompt.
        label: what the progress bar says, on a terminal; None shows none.
    """
    # Prompts of like length share a batch, so that little of it is padding; the longest first, so that memory that does
    # not suffice runs out early.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    found = [""] * len(prompts)
    try:
        for start in tqdm(range(0, len(order), batch_size), desc=label, leave=False, disable=label is None or None):
            chosen = order[start : start + batch_size]
            batch = tokenizer(
                [prompts[i] for i in chosen],
                return_tensors="pt",
                padding=True,
                add_special_tokens=special_tokens,
                return_token_type_ids=False,
            )
            tokens = model.generate(
                **batch.to(model.device),
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            texts = tokenizer.batch_decode(
                tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            for i, text in zip(chosen, texts, strict=True):
                found[i] = text
    finally:
        model.train(training)
        tokenizer.padding_side = side
    return found


def _prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> str:
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)


def _text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]

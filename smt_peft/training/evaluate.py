"""Exact match: does the model complete a prompt with exactly the expected text?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
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
    expected = [_text(row["completion"]).strip() for row in rows]
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    hits = 0
    try:
        for start in tqdm(range(0, len(order), batch_size), desc=label, leave=False, disable=label is None):
            chosen = order[start : start + batch_size]
            batch = tokenizer(
                [prompts[i] for i in chosen],
                return_tensors="pt",
                padding=True,
                add_special_tokens=plain,
                return_token_type_ids=False,
            )
            batch = batch.to(model.device)
            tokens = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            texts = tokenizer.batch_decode(
                tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            hits += sum(text.strip() == expected[i] for text, i in zip(texts, chosen, strict=True))
    finally:
        model.train(training)
        tokenizer.padding_side = side
    return hits / len(rows)


def _prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> str:
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)


def _text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]

"""What engines that serve LoRA take of one, as their sources have it (read 2026-11).

vLLM, main at 0306474 and before (the list of ranks is that of 0.26 and 0.27): `--max-lora-rank` is one of `RANKS`
(`MaxLoRARanks` in vllm/config/lora.py), 16 when not given, and an adapter's `r` may not exceed it, nor may it have
`modules_to_save`, DoRA, or a bias (vllm/lora/peft_helper.py). `rank_pattern` and `alpha_pattern` are not read: a tensor
is copied into a slot of zeros by its own shape (vllm/lora/layers/base_linear.py), so that lower ranks are right as they
are, and all are scaled by `lora_alpha / r`, which is 1 here. A tensor of a module that the model does not offer to LoRA
is refused (vllm/lora/lora_model.py).

SGLang, main at 00639c4: any rank up to its `--max-lora-rank`, by default the largest `r` of the adapters that it starts
with; every tensor must have the rank `r` itself (python/sglang/srt/lora/mem_pool.py), hence `LoraForm.uniform`.
"""

from __future__ import annotations

from .lora import LoraForm

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_rank(rank: int) -> int | None:
    """The least `--max-lora-rank` of vLLM that admits an adapter; None: there is none."""
    return next((allowed for allowed in RANKS if allowed >= rank), None)


def serving_notes(form: LoraForm) -> list[str]:
    """Lines that say how an engine is to be started for this adapter, and what would refuse it."""
    rank, notes = vllm_rank(form.config.r), []
    besides = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(form.config, name)]
    if besides:
        notes.append(f"vLLM and SGLang refuse it for its {' and '.join(besides)}; merge it instead")
    elif rank is None:
        notes.append(
            f"vLLM takes no rank above {RANKS[-1]}; merge it, or train with max_lora_rank={RANKS[-1]} or less, which "
            "keeps the exact form within it"
        )
    else:
        notes.append(f"vLLM: vllm serve BASE --enable-lora --max-lora-rank {rank}")
    if form.config.rank_pattern and not besides:
        notes.append("SGLang wants one rank in all modules: --uniform-rank")
    return notes

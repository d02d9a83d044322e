"""Plain functions that tests share."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smt_peft.blocks import BlockGrid, BlockLayout


def assert_no_worse_than_torch(ours: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
    """Our error against an fp64 truth is at most twice PyTorch's own error in the same dtype (or one rounding)."""
    truth = truth.double()
    rounding = torch.finfo(same_dtype.dtype).eps * truth.abs().max().clamp(min=1e-30)
    allowed = 2 * torch.maximum((same_dtype.double() - truth).abs().max(), rounding / 2)
    error = (ours.double() - truth).abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


@st.composite
def layouts(draw, max_side: int = 40) -> BlockLayout:
    """Any matrix size (ragged too), square, rectangular or whole-side blocks, any non-empty selection."""
    shape = draw(st.tuples(st.integers(1, max_side), st.integers(1, max_side)))
    side = st.one_of(st.just(-1), st.integers(1, max_side))
    grid = BlockGrid.fit(shape, draw(st.tuples(side, side)))
    chosen = draw(st.sets(st.integers(0, grid.num_blocks - 1), min_size=1, max_size=40))
    return BlockLayout(grid, grid.unflatten(torch.tensor(sorted(chosen))))


def random_layout(grid: BlockGrid, num_blocks: int, seed: int = 0) -> BlockLayout:
    generator = torch.Generator().manual_seed(seed)
    return BlockLayout(grid, grid.unflatten(torch.randperm(grid.num_blocks, generator=generator)[:num_blocks]))


def tiny_llama(hidden: int = 32, layers: int = 2, tied: bool = False, vocab: int = 64) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=hidden * 2,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4))


class Mlp(nn.Module):
    """Two linear layers of odd sizes."""

    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(20, 36, bias=bias, dtype=dtype)
        self.down = nn.Linear(36, 12, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def batch(rows: int = 2, length: int = 8, vocab: int = 64, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def save_tiny_model(directory: Path) -> None:
    """A random Llama with a byte-level tokenizer."""
    torch.manual_seed(0)
    # Dropout, so that a generator that is not restored shows in the losses.
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
        eos_token_id=256,
        pad_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)

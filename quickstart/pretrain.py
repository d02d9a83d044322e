"""Pre-train the small byte-level Llama of the quickstart on the sources of Python's standard library.

    python quickstart/pretrain.py                 # remakes quickstart/model (two CPU cores: see README.md)
    python quickstart/pretrain.py --steps 50 --output-dir some/where

Everything is made offline from the running Python. The same seed, Python and machine give the same model.
"""

from __future__ import annotations

import argparse
import math
import platform
import sysconfig
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 264  # 256 bytes and 3 special tokens, rounded up to a multiple of 8
# Packages that are not the library's own, tests, and tables rather than code (code pages, help topics).
SKIPPED_DIRS = frozenset({"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "lib2to3"})


def make_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose token ids 0..255 are the bytes of the UTF-8 text, led by ``<|bos|>`` (id 256)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    # The byte-to-character table of the ByteLevel pre-tokenizer: the other bytes become U+0100 onwards.
    character = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    special = {"<|bos|>": BOS, "<|eos|>": EOS, "<|pad|>": PAD}
    vocab = {character[byte]: byte for byte in range(256)} | special
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    core.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def read_corpus() -> tuple[np.ndarray, np.ndarray]:
    """The library's sources as two uint16 token streams: the training files, and the held-out 1/32."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[np.ndarray] = []
    held_out: list[np.ndarray] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_DIRS.intersection(name.parts):
            continue
        tokens = np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.uint16)
        part = held_out if zlib.crc32(name.as_posix().encode()) % 32 == 0 else train
        part.append(np.concatenate([tokens, [EOS]]).astype(np.uint16))
    if not train or not held_out:
        raise FileNotFoundError(f"no library sources (*.py) under {root}: use a Python that ships them")
    return np.concatenate(train), np.concatenate(held_out)


def windows(stream: np.ndarray, starts: np.ndarray, context: int) -> torch.Tensor:
    """``[len(starts), context]`` int64 tokens: ``<|bos|>`` and the ``context - 1`` bytes from each start."""
    body = stream[starts[:, None] + np.arange(context - 1)].astype(np.int64)
    return torch.from_numpy(np.pad(body, ((0, 0), (1, 0)), constant_values=BOS))


def training_batches(stream: np.ndarray, batch: int, context: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of windows, each pass over the corpus cut at a new offset and shuffled.

    One window in eight repeats its first 8 to 96 bytes to its end, so that heads that copy from the context
    form early: by 2 million bytes, where sources alone had made none after 1.7 million (2026-11-21).
    """
    rng = np.random.default_rng(seed)
    while True:
        starts = np.arange(rng.integers(context), len(stream) - context, context)
        rng.shuffle(starts)
        for i in range(0, len(starts) - batch + 1, batch):
            tokens = windows(stream, starts[i : i + batch], context)
            for row in tokens[: batch // 8]:
                period = int(rng.integers(8, 97))
                row[1:] = row[1 : 1 + period].repeat(context // period + 1)[: context - 1]
            yield tokens


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Mean next-byte cross-entropy in nats, with CPU autocast to `dtype` where one is given."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: np.ndarray, context: int, rows: int = 256) -> float:
    """Loss in nats per byte over `rows` evenly spaced windows, in the model's own precision."""
    starts = np.linspace(0, len(stream) - context, rows).astype(np.int64)
    parts = [loss_of(model, windows(stream, part, context), None) for part in np.array_split(starts, 8)]
    return torch.stack(parts).mean().item()


@torch.no_grad()
def copy_loss(model: LlamaForCausalLM, length: int = 24, rows: int = 64) -> tuple[float, float]:
    """Loss on random letters and on their repetition; a gap between the two shows induction heads."""
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, (rows, length))
    tokens = torch.from_numpy(np.pad(np.tile(letters, (1, 2)), ((0, 0), (1, 0)), constant_values=BOS))
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return loss[:, :length].mean().item(), loss[:, length + 1 :].mean().item()


def make_optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adam]


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 50 steps, constant, then linear decay to zero over the last eighth."""
    return min(1.0, (step + 1) / 50, (steps - step) / (steps / 8))


def train(model: LlamaForCausalLM, streams: tuple[np.ndarray, np.ndarray], args: argparse.Namespace) -> None:
    """Train `model` in place for `args.steps` steps, printing the held-out loss ten times."""
    train_stream, held_out_stream = streams
    optimizers = make_optimizers(model, args)
    batches = training_batches(train_stream, args.batch_size, args.context, args.seed)
    compute_loss = torch.compile(loss_of) if args.compile else loss_of
    running = math.log(256)
    with tqdm(total=args.steps, unit="step", mininterval=5.0) as bar:
        for step in range(args.steps):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * learning_rate_factor(step, args.steps)
            loss = compute_loss(model, next(batches), torch.bfloat16)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            running += 0.05 * (loss.item() - running)
            bar.set_postfix(loss=f"{running:.3f}", refresh=False)
            bar.update()
            if (step + 1) % max(1, args.steps // 10) == 0:
                first, repeat = copy_loss(model)
                held_out = held_out_loss(model, held_out_stream, args.context, rows=64)
                bar.write(f"step {step + 1}: held-out {held_out:.3f} nats/byte, "
                          f"random letters {first:.2f}, repeated {repeat:.2f}")  # fmt: skip


def model_card(args: argparse.Namespace, weights: int, corpus_bytes: int, loss: float, seconds: float) -> str:
    """The README.md of the model, with its architecture, corpus, training, held-out loss and licence."""
    seen = args.steps * args.batch_size * args.context
    skipped = ", ".join(f"`{name}`" for name in sorted(SKIPPED_DIRS))
    return f"""---
license: psf-2.0
language: [code]
library_name: transformers
pipeline_tag: text-generation
---
# A {weights / 1e6:.1f} M parameter byte-level Llama for the quickstart

Made from scratch by `quickstart/pretrain.py`: there to be fine-tuned in a minute on a CPU, not to be useful.

- Architecture: `LlamaForCausalLM`, hidden {args.hidden}, intermediate {args.intermediate},
  {args.layers} layers, {args.hidden // 32} heads of 32, tied embedding, stored in bfloat16.
- Tokenizer: one token per UTF-8 byte (the id is the byte); `<|bos|>` 256 is put first, `<|eos|>` is 257,
  `<|pad|>` is 258.
- Corpus: {corpus_bytes / 1e6:.1f} MB, the `*.py` of the standard library of Python
  {platform.python_version()} without
  {skipped};
  1/32 of the files held out.
- Training: {args.steps} steps of {args.batch_size} x {args.context} bytes ({seen / 1e6:.1f} MB seen, one
  window in eight repeating its own beginning), Muon for the matrices and AdamW for the rest, peak learning
  rate {args.lr:g}, seed {args.seed}, bfloat16 autocast, {seconds / 60:.0f} minutes on
  {torch.get_num_threads()} CPU cores.
- Held-out loss: {loss:.3f} nats/byte ({loss / math.log(2):.3f} bits/byte).
- Licence: the text is that of the Python standard library, under the Python Software Foundation License,
  version 2 (Copyright 2001 and later, Python Software Foundation); the weights are given under its terms.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pre-train the small Llama of the quickstart.")
    parser.add_argument("--output-dir", type=Path, default=HERE / "model")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=16, help="windows per step (%(default)s)")
    parser.add_argument("--context", type=int, default=256, help="bytes per window (%(default)s)")
    parser.add_argument("--max-length", type=int, default=512, help="positions of the model (%(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 32 (%(default)s)")
    parser.add_argument("--intermediate", type=int, default=640)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the step (needs a C++ compiler)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 32,
        max_position_embeddings=args.max_length,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    streams = read_corpus()
    weights, corpus_bytes = sum(p.numel() for p in model.parameters()), sum(map(len, streams))
    print(f"{weights:,} parameters, corpus of {corpus_bytes:,} bytes")
    start = time.perf_counter()
    train(model, streams, args)
    seconds = time.perf_counter() - start
    model.to(torch.bfloat16).float()  # the loss of what is stored
    loss = held_out_loss(model, streams[1], args.context)
    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    make_tokenizer(args.max_length).save_pretrained(args.output_dir)
    card = model_card(args, weights, corpus_bytes, loss, seconds)
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")
    print(f"held-out loss {loss:.4f} nats/byte after {seconds:.0f} s; saved to {args.output_dir}")


if __name__ == "__main__":
    main()

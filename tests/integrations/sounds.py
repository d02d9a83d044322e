"""A small world for DSPy: a program of two steps, a scripted teacher, and a model that can learn it in seconds."""

from __future__ import annotations

from pathlib import Path

import dspy
import torch
from dspy.utils import DummyLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SOUNDS = {
    "cat": ("animal", "meow"),
    "dog": ("animal", "woof"),
    "car": ("machine", "vroom"),
    "bell": ("machine", "ding"),
    "cow": ("animal", "moo"),
}
EXAMPLES = [dspy.Example(word=word, sound=sound).with_inputs("word") for word, (_, sound) in SOUNDS.items()]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# For a model of 90,000 weights on 10 rows; enough to learn them by heart.
QUICK = {
    "max_steps": 60,
    "per_device_train_batch_size": 10,
    "learning_rate": 2e-2,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "verify": False,
}
SMT = {"density": 0.3, "warmup_batches": 1}


class Sounds(dspy.Module):
    def __init__(self):
        super().__init__()
        self.classify = dspy.Predict("word -> kind")
        self.speak = dspy.Predict("word, kind -> sound")

    def forward(self, word: str) -> dspy.Prediction:
        return self.speak(word=word, kind=self.classify(word=word).kind)


def right(example: dspy.Example, prediction: dspy.Prediction, trace=None) -> bool:
    return prediction.sound == example.sound


def score(program: dspy.Module) -> float:
    """The share of examples that a program has right, in percent; an answer that cannot be read is wrong."""
    evaluate = dspy.Evaluate(
        devset=EXAMPLES, metric=right, num_threads=2, display_progress=False, provide_traceback=False, max_errors=100
    )
    return evaluate(program).score


def scripted(**wrong: str) -> Sounds:
    """A teacher that knows the farm but for the sounds in `wrong`."""
    teacher = Sounds()
    teacher.classify.lm = DummyLM({word: {"kind": kind} for word, (kind, _) in SOUNDS.items()})
    sounds = {word: sound for word, (_, sound) in SOUNDS.items()} | wrong
    teacher.speak.lm = DummyLM({word: {"sound": sound} for word, sound in sounds.items()})
    return teacher


def row(signature, inputs: dict, outputs: dict) -> dict:
    """A call of a predictor as DSPy hands it to a provider."""
    return dspy.ChatAdapter().format_finetune_data(signature, [], inputs, outputs)


def rows() -> list[dict]:
    program, found = Sounds(), []
    for word, (kind, sound) in SOUNDS.items():
        found.append(row(program.classify.signature, {"word": word}, {"kind": kind}))
        found.append(row(program.speak.signature, {"word": word, "kind": kind}, {"sound": sound}))
    return found


def save_model(directory: Path, texts: list[str] = (), template: str | None = TEMPLATE) -> Path:
    """A random Llama whose tokenizer has a token for what DSPy's prompts repeat, so that a prompt is a few tokens.

    Its first weights are large, so that the frozen head tells tokens apart.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        min_frequency=2,
        special_tokens=["<eos>", "<pad>", "<system>", "<user>", "<assistant>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    contents = [message["content"] for item in rows() for message in item["messages"]]
    tokenizer.train_from_iterator([*contents, *texts], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = template
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory

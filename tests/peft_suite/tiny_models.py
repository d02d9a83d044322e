"""Tiny models under the names that PEFT's tests ask a hub for.

The tests run in the folder that holds them, where a name such as `org/model` is the path of a folder: nothing is
downloaded, and no test is edited.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from smt_peft import SMTConfig

VOCAB = 1024
STD = {"initializer_range": 0.1}
PLAIN = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **STD}
ENCODER = {**PLAIN, "intermediate_size": 64}
LLAMA = {
    **ENCODER,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Narrow: with weights of variance 1, as the tests draw them, freezing a wide base alone moves logits by more than 1e-6.
MIXTURE = {**LLAMA, "hidden_size": 16, "head_dim": 8, "intermediate_size": 32, "num_local_experts": 4}
LLAMA4 = {**MIXTURE, "intermediate_size_mlp": 32, "num_experts_per_tok": 1}
GPT_OSS = {**MIXTURE, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
GPT_OSS |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 1, **STD}
GPT |= {"eos_token_id": 2}
OPT = {"vocab_size": VOCAB, "num_attention_heads": 4, "max_position_embeddings": 512}
OPT_TINY = {**OPT, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "word_embed_proj_dim": 32}
OPT_TINY |= {"init_std": 0.1, "dropout": 0.0, "attention_dropout": 0.0}
OPT_DEEP = {**OPT, "hidden_size": 64, "num_hidden_layers": 12, "ffn_dim": 128, "word_embed_proj_dim": 64}
OPT_DEEP |= {"init_std": 0.05}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": VOCAB, "d_model": 32, "max_position_embeddings": 512, "init_std": 0.1}
BART |= {f"{side}_layers": 2 for side in ("encoder", "decoder")}
BART |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
BART |= {f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")}
CLIP = {**ENCODER, "max_position_embeddings": 77, "projection_dim": 32, "bos_token_id": 0, "eos_token_id": 2}
CLIP |= {"pad_token_id": 1}

WHISPER = "peft-internal-testing/tiny-random-WhisperForConditionalGeneration"
SPEECH = {**{key: value for key, value in BART.items() if key != "max_position_embeddings"}, "num_mel_bins": 8}
SPEECH |= {"max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1}
SPEECH |= {"eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}

# `{name: (model class, config class, settings)}`
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (hf.OPTForCausalLM, hf.OPTConfig, OPT_TINY),
    "peft-internal-testing/opt-125m": (hf.OPTForCausalLM, hf.OPTConfig, OPT_DEEP),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (hf.GPT2LMHeadModel, hf.GPT2Config, GPT),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (hf.GPTJForCausalLM, hf.GPTJConfig, {**GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (hf.LlamaForCausalLM, hf.LlamaConfig, LLAMA),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": (hf.LlamaForCausalLM, hf.LlamaConfig, LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig,
        {**LLAMA, "head_dim": 8},
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        hf.BloomForCausalLM,
        hf.BloomConfig,
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 5, "n_head": 4},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        T5,
    ),
    "peft-internal-testing/tiny-random-t5": (hf.T5ForConditionalGeneration, hf.T5Config, T5),
    "google/flan-t5-small": (hf.T5ForConditionalGeneration, hf.T5Config, T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        hf.BartForConditionalGeneration,
        hf.BartConfig,
        BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": (hf.BertModel, hf.BertConfig, ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": (hf.RobertaModel, hf.RobertaConfig, ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": (
        hf.DebertaModel,
        hf.DebertaConfig,
        {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (hf.DebertaV2Model, hf.DebertaV2Config, ENCODER),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        hf.BertForSequenceClassification,
        hf.BertConfig,
        ENCODER,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig,
        ENCODER,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        hf.LlamaForSequenceClassification,
        hf.LlamaConfig,
        LLAMA,
    ),
    "peft-internal-testing/tiny-random-BertForTokenClassification": (
        hf.BertForTokenClassification,
        hf.BertConfig,
        ENCODER,
    ),
    WHISPER: (hf.WhisperForConditionalGeneration, hf.WhisperConfig, SPEECH),
    "Qwen/Qwen2-0.5B": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {**LLAMA, "vocab_size": VOCAB + 8}),
    "hf-internal-testing/tiny-random-gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, GPT),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, ENCODER),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (hf.Llama4ForCausalLM, hf.Llama4TextConfig, LLAMA4),
    "trl-internal-testing/tiny-GptOssForCausalLM": (hf.GptOssForCausalLM, hf.GptOssConfig, GPT_OSS),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": (hf.LlamaForCausalLM, hf.LlamaConfig, LLAMA),
    "peft-internal-testing/tiny-clip-text-2": (hf.CLIPTextModelWithProjection, hf.CLIPTextConfig, CLIP),
}
# Their tests tokenise text.
WITH_TOKENIZER = (
    "peft-internal-testing/tiny-random-OPTForCausalLM",
    "peft-internal-testing/opt-125m",
    "trl-internal-testing/tiny-random-LlamaForCausalLM",
    "peft-internal-testing/tiny-random-LlamaForCausalLM",
    "Qwen/Qwen2-0.5B",
)
# Adapters of LoRA on a hub, in whose place the tests find one of SMT: `{name: (base model, task)}`.
ADAPTERS = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": ("peft-internal-testing/tiny-random-OPTForCausalLM", "CAUSAL_LM"),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": ("peft-internal-testing/tiny-random-t5", "SEQ_2_SEQ_LM"),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "SEQ_CLS",
    ),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": ("gpt2", "TOKEN_CLS"),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "QUESTION_ANS",
    ),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "FEATURE_EXTRACTION",
    ),
    "peft-internal-testing/gpt2-lora-random": ("gpt2", "CAUSAL_LM"),
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": (WHISPER, None),
}
AUTO_CLASSES = {
    "CAUSAL_LM": hf.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": hf.AutoModelForSeq2SeqLM,
    "SEQ_CLS": hf.AutoModelForSequenceClassification,
    "TOKEN_CLS": hf.AutoModelForTokenClassification,
    "QUESTION_ANS": hf.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": hf.AutoModel,
    None: hf.WhisperForConditionalGeneration,
}


def make_models(root: Path) -> None:
    """Build below `root` what is not there yet."""
    for name, (model, config, settings) in MODELS.items():
        _once(root / name, lambda path, m=model, c=config, s=settings: m(c(**s)).save_pretrained(path))
    for name in WITH_TOKENIZER:
        if not (root / name / "tokenizer.json").exists():
            _save_tokenizer(root / name)
    for name, (base, task) in ADAPTERS.items():
        _once(root / name, functools.partial(_save_adapter, root, base, task))
    # Two tests of configs read one of LoRA's.
    _once(root / "peft-internal-testing/tiny-opt-lora-revision", _save_lora_config)
    _once(root / "ybelkada/english_quotes_copy", _save_quotes)
    _once(root / "huggingface/cats-image", _save_image)
    _once(root / "hf-internal-testing/tiny-sd-pipe", _save_diffusion)
    _once(root / "peft-internal-testing/tiny-random-ResNetForImageClassification", _save_resnet)


def _once(path: Path, make: Callable[[Path], object]) -> None:
    if path.exists():
        return
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    make(unfinished)
    unfinished.rename(path)


def _save_adapter(root: Path, base: str, task: str | None, path: Path) -> None:
    model = AUTO_CLASSES[task].from_pretrained(root / base)
    settings = {"density": 0.1, "score": "random", "init_weights": False}
    model = get_peft_model(model, SMTConfig(task_type=task, **settings))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(path)


def _save_lora_config(path: Path) -> None:
    LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(path)


def _save_tokenizer(path: Path) -> None:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **special).save_pretrained(path)


def _save_quotes(path: Path) -> None:
    numbers = random.Random(0)
    path.mkdir()
    with (path / "train.jsonl").open("w") as file:
        for _ in range(200):
            start, length = numbers.randrange(4, 500), numbers.randrange(8, 40)
            words = " ".join(f"w{start + 3 * i}" for i in range(length))
            file.write(json.dumps({"quote": words, "author": "a", "tags": ["t"]}) + "\n")


def _save_image(path: Path) -> None:
    (path / "test").mkdir(parents=True)
    pixels = random.Random(0).randbytes(64 * 64 * 3)
    Image.frombytes("RGB", (64, 64), pixels).save(path / "test" / "0.png")


def _save_diffusion(path: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    blocks = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8}
    unet = UNet2DConditionModel(
        **blocks,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    _save_clip_tokenizer(path / "clip")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=hf.CLIPTextModel(hf.CLIPTextConfig(**CLIP)),
        tokenizer=hf.CLIPTokenizer.from_pretrained(path / "clip"),
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path)


def _save_clip_tokenizer(path: Path) -> None:
    """Letters and their word-final forms; no merges."""
    path.mkdir(parents=True)
    letters = [chr(code) for code in range(97, 123)]
    words = ["<|startoftext|>", "!", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def _save_resnet(path: Path) -> None:
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3, num_channels=3
    )
    hf.ResNetForImageClassification(config).save_pretrained(path)
    hf.ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(path)

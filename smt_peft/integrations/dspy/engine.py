"""Engines of DSPy that answer with Transformers, in this process: no server, and no network once a model is there."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

import torch
from dspy import lm15
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...training.errors import ConfigError
from ...training.model import load_model, load_tokenizer

# When a request names no max_tokens: Transformers' own default would stop after 20.
MAX_TOKENS = 1024
# Of a request's settings, what is obeyed; any other that is set is refused, never dropped.
_OBEYED = {"max_tokens", "temperature", "top_p", "top_k", "stop", "seed"}
# Which rollout a call belongs to, and a number for each of its candidates: of equal seeds these draw differently.
_draws: ContextVar[tuple[int, Iterator[int]]] = ContextVar("draws")


@contextmanager
def candidates_of(rollout: int | None) -> Iterator[None]:
    """Inside, completions are the candidates of one call, which DSPy asks an engine for one by one, with one seed."""
    token = _draws.set((rollout or 0, itertools.count()))
    try:
        yield
    finally:
        _draws.reset(token)


@dataclass
class _Loaded:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class TransformersEngine:
    """Answers requests with causal language models, loaded when first asked for and kept until `unload` or `close`.

    One request is generated at a time; threads wait for each other. `request.model` is a directory or a name on the
    Hub; its tokenizer's chat template renders the messages. `temperature` 0 is greedy, above 0 samples, and None leaves
    sampling to the checkpoint's `generation_config.json`. A `seed` makes a call repeatable, all its candidates and each
    rollout drawn differently; without one, the draws are those of PyTorch's generator.

    Args:
        device: where models go; None: the GPU where there is one.
        dtype: of the weights, by name; None: float32 on a CPU, else the checkpoint's own.
    """

    def __init__(self, device: str | None = None, dtype: str | None = None):
        self.device, self.dtype = device, dtype
        self._loaded: dict[str, _Loaded] = {}
        self._lock = threading.RLock()

    def load(self, model: str) -> None:
        """Have a model ready.

        Raises:
            lm15.ConfigurationError: it cannot be loaded, or its tokenizer has no chat template.
        """
        self._get(model)

    def unload(self, model: str) -> None:
        """Let go of a model, if it is loaded; the next request loads it again."""
        with self._lock:
            self._loaded.pop(model, None)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def loaded(self) -> list[str]:
        """The models in memory, in the order of their loading."""
        return list(self._loaded)

    def close(self) -> None:
        """Let go of every model."""
        for model in self.loaded():
            self.unload(model)

    def complete(self, request: lm15.Request) -> lm15.Response:
        """One candidate.

        Raises:
            lm15.UnsupportedFeatureError: the request asks for what is not obeyed here.
            lm15.ContextLengthError: the prompt leaves no room in the model's context.
            lm15.ConfigurationError: the model cannot be loaded, or its tokenizer has no chat template.
            lm15.InvalidRequestError: the chat template refuses the messages.
        """
        _refuse_unobeyed(request)
        with self._lock:
            loaded = self._get(request.model)
            ids = _prompt_ids(loaded.tokenizer, request)
            wanted = request.config.max_tokens or MAX_TOKENS
            limit = min(wanted, _room(loaded.model, ids.shape[1], request.model) or wanted)
            new = _generate(loaded, ids, limit, request.config)
        return _response(loaded, request, ids.shape[1], new, limit)

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """The events of the finished completion, all at once."""
        return lm15.response_to_events(self.complete(request))

    def dump_state(self) -> dict[str, Any]:
        """What a saved program needs to make this engine again; models are loaded anew."""
        return {"device": self.device, "dtype": self.dtype}

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> TransformersEngine:
        return cls(**state)

    def __deepcopy__(self, memo: dict[int, Any]) -> TransformersEngine:
        # Programs are copied for every attempt of BestOfN and Refine; the weights are not theirs.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.device, self.dtype)

    def _get(self, name: str) -> _Loaded:
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            return self._loaded[name]

    def _load(self, name: str) -> _Loaded:
        try:
            tokenizer = load_tokenizer(name)
            if tokenizer.chat_template is None:
                raise ConfigError(
                    f"the tokenizer of {name} has no chat template; set tokenizer.chat_template and save it beside the "
                    "model, or take an instruction-tuned model"
                )
            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            return _Loaded(load_model(name, self.dtype, device), tokenizer)
        except ConfigError as error:
            raise lm15.ConfigurationError(str(error).removeprefix("model_name_or_path: ")) from error


class AsyncTransformersEngine:
    """`TransformersEngine` for `await lm.acall(...)`: generates in a thread, with the same models."""

    def __init__(self, engine: TransformersEngine):
        self.engine = engine

    async def complete(self, request: lm15.Request) -> lm15.Response:
        return await asyncio.to_thread(self.engine.complete, request)

    async def stream(self, request: lm15.Request) -> AsyncIterator[Any]:
        for event in lm15.response_to_events(await self.complete(request)):
            yield event

    async def aclose(self) -> None:
        self.engine.close()

    def dump_state(self) -> dict[str, Any]:
        return self.engine.dump_state()

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> AsyncTransformersEngine:
        return cls(TransformersEngine.load_state(state))


def _refuse_unobeyed(request: lm15.Request) -> None:
    given = [field.name for field in fields(request.config) if getattr(request.config, field.name) not in (None, ())]
    refused = [name for name in given if name not in _OBEYED] + ["tools"] * bool(request.tools)
    if refused:
        raise lm15.UnsupportedFeatureError(
            f"{', '.join(refused)}: not to be had of a model in this process, which obeys "
            f"{', '.join(sorted(_OBEYED))}; leave it out, or serve the model (api_base)",
            feature=refused[0],
        )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, request: lm15.Request) -> torch.Tensor:
    """Token ids of the conversation up to where the assistant speaks, `(1, tokens)`, int64."""
    turns = [{"role": turn.role, "content": _text(turn.parts)} for turn in request.messages]
    if request.system is not None:
        system = request.system if isinstance(request.system, str) else _text(request.system)
        turns.insert(0, {"role": "system", "content": system})
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise lm15.InvalidRequestError(f"the chat template of {request.model} refuses the messages: {error}") from error
    # The template has put the special tokens in already.
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def _text(parts: tuple[Any, ...]) -> str:
    other = next((part.type for part in parts if part.type != "text"), None)
    if other is not None:
        raise lm15.UnsupportedFeatureError(f"{other}: a model in this process reads text alone", feature=other)
    return "".join(part.text for part in parts)


def _room(model: PreTrainedModel, length: int, name: str) -> int | None:
    """How many tokens may follow a prompt of `length`; None: a model without a limit."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return None
    if length >= context:
        raise lm15.ContextLengthError(f"the prompt has {length:,} tokens, and {name} a context of {context:,}")
    return context - length


@torch.no_grad()
def _generate(loaded: _Loaded, ids: torch.Tensor, limit: int, config: lm15.Config) -> list[int]:
    """The token ids that follow the prompt."""
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = ids.to(model.device)
    with _seeded(config.seed, model.device):
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(_ends(loaded)),
            **_sampling(config),
            **({"stop_strings": list(config.stop), "tokenizer": tokenizer} if config.stop else {}),
        )
    return tokens[0, ids.shape[1] :].tolist()


def _sampling(config: lm15.Config) -> dict[str, Any]:
    chosen = {name: value for name in ("top_p", "top_k") if (value := getattr(config, name)) is not None}
    if config.temperature is None:
        return chosen
    if config.temperature == 0:
        # None, so that Transformers does not warn of a checkpoint's own values, which greedy decoding leaves unread.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": config.temperature, "top_p": 1.0, "top_k": 0, **chosen}


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Inside, PyTorch draws by `seed`, rollout and candidate; afterwards its generators stand where they stood."""
    rollout, numbers = _draws.get((0, itertools.count()))
    number = next(numbers)
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(random.Random(f"{seed}/{rollout}/{number}").getrandbits(63))
        yield


def _ends(loaded: _Loaded) -> set[int]:
    """The tokens that end an answer: the tokenizer's, and those of the checkpoint's generation config."""
    own = loaded.model.generation_config.eos_token_id
    return {loaded.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


def _response(loaded: _Loaded, request: lm15.Request, length: int, new: list[int], limit: int) -> lm15.Response:
    text = loaded.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    cuts = [at for stop in request.config.stop if (at := text.find(stop)) >= 0]
    ended = bool(cuts) or (new and new[-1] in _ends(loaded)) or len(new) < limit
    return lm15.Response(
        id=None,
        model=request.model,
        message=lm15.Message.assistant([lm15.TextPart(text[: min(cuts)] if cuts else text)]),
        finish_reason="stop" if ended else "length",
        usage=lm15.Usage(input_tokens=length, output_tokens=len(new)),
    )

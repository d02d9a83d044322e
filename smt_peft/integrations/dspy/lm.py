"""A language model of DSPy that runs in this process and can be fine-tuned."""

from __future__ import annotations

from typing import Any

import dspy

from .engine import AsyncTransformersEngine, TransformersEngine, candidates_of
from .provider import SMTProvider


class LocalLM(dspy.LM):
    """`dspy.LM` over a `TransformersEngine`, with `SMTProvider` to fine-tune it.

    Caching, retries, history, callbacks, usage and `n` are DSPy's own. `launch()` loads the model and `kill()` lets go
    of it; a call loads it, too. Copies, and the LMs that fine-tuning gives back, share the engine.

    Args:
        model: a directory or a name on the Hub.
        engine: shares the models of another LM; None makes one.
        provider: what fine-tunes; None: `SMTProvider()`.
        settings: `temperature`, `max_tokens`, `seed`, `cache` and whatever else `dspy.LM` takes.
    """

    def __init__(
        self,
        model: str,
        *,
        engine: TransformersEngine | None = None,
        provider: SMTProvider | None = None,
        **settings: Any,
    ):
        engine = engine or TransformersEngine()
        # A saved program names it; it is made from the engine, so that both answer with the same models.
        settings.pop("async_engine", None)
        super().__init__(
            model,
            engine=engine,
            async_engine=AsyncTransformersEngine(engine),
            provider=provider or SMTProvider(),
            **settings,
        )

    def __call__(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        with candidates_of(self._rollout(kwargs)):
            return super().__call__(prompt, messages=messages, **kwargs)

    async def acall(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        with candidates_of(self._rollout(kwargs)):
            return await super().acall(prompt, messages=messages, **kwargs)

    def _rollout(self, kwargs: dict[str, Any]) -> int | None:
        return kwargs.get("rollout_id", self.kwargs.get("rollout_id"))

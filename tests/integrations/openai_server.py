"""A server that speaks as much of OpenAI's protocol as DSPy asks for, over models in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dspy import lm15

from smt_peft.integrations.dspy import TransformersEngine


@contextmanager
def serving(models: list[str]) -> Iterator[str]:
    """The `api_base` of a server that serves `models`, whatever is in the list when it is asked."""
    engine = TransformersEngine()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": model} for model in models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["model"] in models
            answer = engine.complete(lm15.request_from_openai_chat(body))
            choice = {"index": 0, "message": {"role": "assistant", "content": answer.text}, "finish_reason": "stop"}
            self._send({"id": "1", "object": "chat.completion", "model": body["model"], "choices": [choice]})

        def _send(self, answer: dict) -> None:
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()

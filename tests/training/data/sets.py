"""Files of rows, and the package's own way of loading them."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import byte_tokenizer
from trl import SFTConfig

from smt_peft.training.data.load import Data, load_data
from smt_peft.training.yaml.keys import RunConfig

# Marks what the assistant says with the token that ends its turn, and insists that users and assistants alternate.
TEMPLATE = (
    "{%- set last = namespace(role='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == last.role -%}{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "{%- set last.role = message['role'] -%}"
    "{{ message['role'][0] + ':' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{%- else -%}{{ message['content'] + ';' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'a:' }}{%- endif -%}"
)


def write(path: Path, *rows) -> str:
    """Lines of a file: texts as they are, anything else as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def load(
    path: str | list[str] | None = None, template: str | None = TEMPLATE, trainer: dict | None = None, **keys
) -> Data:
    """`load_data` with a byte-level tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    settings = {"output_dir": "out", "use_cpu": True, "bf16": False, **(trainer or {})}
    return load_data(RunConfig("m", dataset_path=path, **keys), SFTConfig(**settings), tokenizer)

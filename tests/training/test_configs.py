"""The shipped files: each passes a dry run over a tiny model of its architecture and a few rows of its form."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import trl
from helpers import byte_tokenizer, save_tiny_model
from mixtures import tiny_qwen3_moe
from omegaconf import OmegaConf
from runs import ROOT, write_jsonl
from transformers import ModernBertConfig, ModernBertForMaskedLM

from smt_peft import cli

CONFIGS = ROOT / "configs"
MESSAGES = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good day."}]
ROWS = {
    "messages": {"messages": MESSAGES},
    "alpaca": {"instruction": "1 + 1?", "input": "", "output": "2"},
    "preference": {"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "What?"}]},
    "text/label": {"text": "Shares rise", "label": 2},
}
# The form of its rows, the chat template of its model, and what a tiny model cannot take from it.
SHIPPED = {
    "llama3_8b_instruct": ("messages", "llama3", ["dataset_test_split=null"]),
    "llama3_8b_math": ("alpaca", None, []),
    "llama2_7b_commonsense_paper": ("alpaca", None, ["smt.num_blocks=3"]),
    "llama3_8b_4bit_24gb": ("alpaca", None, []),
    "llama3_8b_fsdp2_8gpu": ("alpaca", None, []),
    "qwen3_30b_a3b_experts": ("messages", "qwen3", []),
    "llama3_8b_dpo": ("preference", "llama3", ["dataset_test_split=null"]),
    "modernbert_classifier": ("text/label", None, ["dataset_test_split=null", "eval_strategy=no"]),
}


def stand_in(directory: Path, name: str, template: str | None) -> Path:
    """A model and a tokenizer of the architecture that a file is for."""
    if "modernbert" in name:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = ModernBertConfig(vocab_size=264, pad_token_id=257, cls_token_id=None, sep_token_id=None, **sizes)
        ModernBertForMaskedLM(config).save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
    elif "qwen3" in name:
        tiny_qwen3_moe(vocab_size=264, eos_token_id=256, pad_token_id=257).save_pretrained(directory)
    else:
        save_tiny_model(directory)
    if template is not None:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
        # Llama's template begins with it.
        tokenizer.bos_token = tokenizer.eos_token
        tokenizer.save_pretrained(directory)
    return directory


def test_all_of_them_are_tested():
    """The quickstart has tests of its own."""
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*SHIPPED, "quickstart"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_passes_a_dry_run(name, tmp_path, monkeypatch, capsys):
    form, template, changed = SHIPPED[name]
    if not find_spec("bitsandbytes"):
        # A dry run quantises nothing; that a training would need the package has a test of its own.
        monkeypatch.setattr("smt_peft.training.yaml.checks.find_spec", lambda name: True)
    monkeypatch.chdir(tmp_path)
    rows = [ROWS[form]] * 4
    if form == "text/label":
        rows[1:] = [{**ROWS[form], "label": number} for number in (0, 1, 3)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    places = [f"model_name_or_path={stand_in(tmp_path / 'model', name, template)}", f"dataset_path={data}"]
    path = str(CONFIGS / f"{name}.yaml")
    status = cli.main(["train", "--dry-run", path, *places, "dataset_name=null", *changed])
    told = capsys.readouterr()
    assert status == 0, told.err
    assert f"{form}, 4 rows" in told.out
    assert "is read as" not in told.out
    learned = {"messages": "Good day.", "alpaca": "2<eos>", "preference": "What?", "text/label": "class '2':\nShares"}
    sample = told.out[told.out.index("one pair" if form == "preference" else "one sample") :].replace("\x1b[22m", "-]")
    assert learned[form] in sample.rpartition("-]")[0] + sample.rpartition("-]")[2]
    if "experts" in name:
        assert "gate_up_proj 8, down_proj 8" in told.out


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_says_how_to_launch_it_and_what_is_not_measured(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    header = text[: text.index("model_name_or_path:")]
    assert f"configs/{name}.yaml" in header
    assert "Not measured" in header
    settings = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    assert 15 <= len(settings) + len(settings["smt"]) - 1 <= 28

"""Experiments in PEFT's MetaMathQA comparison: files that PEFT reads, sizes that match, a driver that selects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import byte_tokenizer, save_tiny_model
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.hub.metamathqa import compare, grid, harness, run
from smt_peft import SMTConfig, select_blocks
from smt_peft.bases.targets import find_targets
from smt_peft.selection import select_without_data
from smt_peft.selection.budget import choose_blocks

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / "peft_stand_in"
# Fields of TrainConfig in method_comparison/MetaMathQA/utils.py of huggingface/peft at 5d602fd (0.20.1.dev0, 2026-08).
TRAIN_CONFIG = {
    "model_id",
    "dtype",
    "max_seq_length",
    "batch_size",
    "batch_size_eval",
    "max_steps",
    "eval_steps",
    "compile",
    "use_gc",
    "query_template",
    "seed",
    "grad_norm_clip",
    "optimizer_type",
    "optimizer_kwargs",
    "lr_scheduler",
    "use_amp",
    "autocast_adapter_dtype",
    "generation_kwargs",
    "attn_implementation",
    "init_kv_cache_prefix",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """What the grid writes."""
    directory = tmp_path_factory.mktemp("grid")
    grid.write(directory)
    return directory / "experiments" / "smt"


@pytest.fixture(scope="module")
def llama():
    """The shapes of Llama-3.2-3B."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # Of the published row of full fine-tuning.
    assert model.num_parameters() == 3_212_749_824
    return model


@pytest.mark.parametrize("name", [experiment.name for experiment in grid.grid()])
def test_peft_reads_every_folder(folders, name):
    settings = json.loads((folders / name / "adapter_config.json").read_text())
    assert set(settings) <= set(SMTConfig.__dataclass_fields__)
    config = PeftConfig.from_pretrained(folders / name)
    assert isinstance(config, SMTConfig)
    assert {key: getattr(config, key) for key in ("score", "budget", "spread", "density")} == {
        key: settings[key] for key in ("score", "budget", "spread", "density")
    }
    training = json.loads((folders / name / "training_params.json").read_text())
    assert set(training) <= TRAIN_CONFIG
    assert name.endswith(f"-lr_{training['optimizer_kwargs']['lr']:g}")
    torch.optim.AdamW([torch.zeros(1)], **training["optimizer_kwargs"])


@pytest.mark.parametrize("variant", grid.variants())
def test_every_experiment_trains_as_many_weights_as_lora_of_rank_32(variant, llama, folders):
    config = PeftConfig.from_pretrained(folders / f"llama-3.2-3B-{variant}-lr_0.0001")
    selection = select_without_data(find_targets(llama, config), config)
    assert selection.effective_numel == 9_175_040
    if config.needs_data:
        # The way that scores go: any scores give as many. Layers do not share a budget but in a global one.
        layers = {name: g for name, g in selection.grids.items() if config.budget == "global" or ".layers.0." in name}
        generator = torch.Generator().manual_seed(0)
        scores = {name: torch.rand(g.stripes, generator=generator) for name, g in layers.items()}
        chosen = choose_blocks(scores, layers, config)
        trained = sum(
            len(blocks) * layers[name].block_rows * layers[name].block_cols for name, blocks in chosen.items()
        )
        assert trained * (1 if config.budget == "global" else 28) == 9_175_040


def test_lora_of_rank_32_and_shira_train_that_many(llama):
    with torch.device("meta"):
        model = LlamaForCausalLM(llama.config)
    lora = get_peft_model(model, LoraConfig(r=32, task_type="CAUSAL_LM"))
    assert lora.get_nb_trainable_parameters()[0] == grid.TRAINABLE
    rows = {row.experiment: row.trainable for row in compare.published()}
    assert rows["lora/llama-3.2-3B-rank32"] == grid.TRAINABLE
    assert rows["shira/llama-3.2-3B-lr_0.0003-random_seed_42"] == grid.TRAINABLE


def test_a_batch_of_the_warm_up_is_labelled_as_in_the_training():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["abcdef", "abc"]
    train_set = [dict(tokenizer(texts))]
    fake = SimpleNamespace(
        run=SimpleNamespace(BUCKET_FACTOR=20),
        utils=SimpleNamespace(get_tokenizer=lambda **_: tokenizer, BucketIterator=lambda rows, **_: rows),
        data=SimpleNamespace(get_train_valid_test_datasets=lambda **_: (train_set, None, None)),
    )
    settings = SimpleNamespace(model_id="", max_seq_length=8, query_template="", batch_size=2)
    (batch,) = run.training_batches(fake, settings)
    eos = tokenizer.eos_token_id
    short = tokenizer("abc")["input_ids"]
    assert batch["labels"].tolist() == [tokenizer("abcdef")["input_ids"], [*short, eos, -100, -100]]
    assert batch["input_ids"][1].tolist() == [*short, eos, eos, eos]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 3 + [0] * 3]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a tiny model and two experiments over it."""
    place = tmp_path_factory.mktemp("metamathqa")
    save_tiny_model(place / "model")
    adapter = {"peft_type": "SMT", "task_type": "CAUSAL_LM", "block_size": 4, "density": 0.1}
    for name, more in {"chosen": {"target_modules": ["q_proj", "v_proj"]}, "random": {"score": "random"}}.items():
        folder = place / "experiments" / "smt" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(adapter | more))
        (folder / "training_params.json").write_text(json.dumps({"model_id": str(place / "model")}))
    return place


def drive(place: Path, name: str, **environment: str) -> subprocess.CompletedProcess:
    """The driver's own process for one experiment; PEFT passes for one that is installed from the stand-in."""
    code = (
        "import sys; from types import SimpleNamespace; from benchmarks.hub.metamathqa import harness, run; "
        "harness.peft = SimpleNamespace(__file__=sys.argv[1] + '/src/peft/__init__.py'); "
        "run.main(['--peft', sys.argv[1], '--folder', sys.argv[2], '--out', sys.argv[2] + '/out', "
        "'--warmup-batches', '3', '--only', sys.argv[3]])"
    )
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code, str(STAND_IN), str(place), name],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_the_driver_trains_the_blocks_that_the_harness_own_batches_choose(place):
    pytest.importorskip("datasets")
    saved = place / "adapter"
    done = drive(place, "chosen", STAND_IN_SAVES=str(saved))
    assert done.returncode == 0, done.stderr
    log = json.loads((place / "out" / "smt--chosen.json").read_text())
    info = log["smt_info"]
    assert info["selection"]["num_batches"] == 3
    assert info["selection"]["score"] == "grad_abs"
    assert info["selection_seconds"] > 0
    assert info["versions"]["torch"] == torch.__version__

    # The same batches by hand: the longest of the first eight texts, four by four, then of the next eight.
    tokenizer = byte_tokenizer()
    texts = [f"Question: {i % 7}+{i % 5}\nAnswer: {i % 7 + i % 5}" + "!" * (i % 6) for i in range(16)]
    texts = [text for start in (0, 8) for text in sorted(texts[start : start + 8], key=len, reverse=True)]
    batches = []
    for start in (0, 4, 8):
        rows = [tokenizer(text)["input_ids"] for text in texts[start : start + 4]]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        beyond = torch.tensor([[place > len(row) for place in range(width)] for row in rows])
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(beyond, -100)})
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    config = SMTConfig(target_modules=["q_proj", "v_proj"], block_size=4, density=0.1)
    expected = select_blocks(model, config, batches, progress=False)
    tensors = load_file(saved / "adapter_model.safetensors")
    for name, blocks in expected.blocks.items():
        (index,) = (tensor for key, tensor in tensors.items() if name in key and key.endswith("index"))
        assert torch.equal(index.long(), blocks.long())
    assert log["train_info"]["num_trainable_params"] == expected.effective_numel
    (row,) = compare.results([place / "out" / "smt--chosen.json"])
    assert (row.experiment, row.trainable, row.test_acc) == ("smt/chosen", expected.effective_numel, 0.25)


def test_a_choice_without_data_needs_no_batch_and_a_cancelled_training_is_an_error(place):
    pytest.importorskip("datasets")
    done = drive(place, "random", STAND_IN_FAILS="1")
    assert done.returncode == 1
    assert "random: the training was canceled: out of luck" in done.stderr
    assert not (place / "out" / "smt--random.json").exists()
    (file,) = (place / "out" / "cancelled").glob("smt--random*.json")
    assert "num_batches" not in json.loads(file.read_text())["smt_info"]["selection"]
    with pytest.raises(ValueError, match="smt/random: its status is 'canceled'"):
        compare.results([file])


def test_an_experiment_that_is_done_is_not_run_again(tmp_path, monkeypatch, capsys):
    started = []

    def start(command, cwd):
        started.append(command[command.index("--only") + 1])
        return SimpleNamespace(returncode=int(started[-1] == "b"))

    monkeypatch.setattr(run.subprocess, "run", start)
    monkeypatch.setattr(run, "OLDEST_PYTHON", (3, 10))
    for name in "abc":
        (tmp_path / "experiments" / "smt" / name).mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "smt--a.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        run.main(["--peft", "nowhere", "--folder", str(tmp_path), "--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    assert started == ["b", "c"]
    assert "1 of 3 failed: b" in capsys.readouterr().err


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(harness.HarnessError, match=r"lacks run.py, utils.py, data.py, default_training_params.json"):
        harness.load_harness(tmp_path)
    with pytest.raises(harness.HarnessError, match="pip install -e"):
        harness.load_harness(STAND_IN)
    changed = SimpleNamespace(__name__="run", __file__="run.py", main=lambda path_experiment, clean: None)
    with pytest.raises(harness.HarnessError, match=r"no BUCKET_FACTOR, main\(experiment_name=\), main\(bucket_name=\)"):
        harness._check_module(changed)
    monkeypatch.setattr(run, "OLDEST_PYTHON", (3, 10))
    with pytest.raises(SystemExit, match="there is no experiment nothing; known are llama-3.2-3B-140x256-diag"):
        run.main(["--peft", str(tmp_path), "nothing"])
    monkeypatch.setattr(run, "OLDEST_PYTHON", (9, 1))
    with pytest.raises(SystemExit, match=r"harness needs Python 9\.1 or later"):
        run.main(["--peft", str(tmp_path)])


def test_the_table_holds_the_published_rows_and_ours_in_order(capsys):
    rows = compare.published()
    assert len(rows) == 63
    lora = next(row for row in rows if row.experiment == "lora/llama-3.2-3B-rank32")
    assert lora.line() == (
        "|  | lora/llama-3.2-3B-rank32 | 0.0001 | 9,175,040 | 47.8 | 1.4 | 0.050 | 0.607 | 20.8 | 942 | 1153 | 36.7 | "
        "NVIDIA L40S |"
    )
    compare.main(["--trainable", str(grid.TRAINABLE)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1].split("/")[0] for line in lines[2:]] == ["hira", "shira", "gralora", "deft", "lora"]
    assert len({line.count("|") for line in lines}) == 1
    with pytest.raises(ValueError, match="is not there"):
        compare.results([Path("nowhere")])

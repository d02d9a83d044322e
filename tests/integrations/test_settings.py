"""The settings that a host trainer's user gives, and what becomes of them; no host is needed."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import batch, tiny_llama
from peft import PeftModel

from smt_peft import BlockSelection, SMTConfig, select_blocks
from smt_peft.integrations.settings import Settings

GIVEN = {"density": 0.2, "block_size": 8, "warmup_batches": 2}


@pytest.fixture
def model():
    return tiny_llama()


def test_blocks_are_chosen_by_the_batches_and_kept_beside_the_run(model, tmp_path):
    batches = [batch(seed=seed) for seed in range(3)]
    expected = select_blocks(tiny_llama_like(model), SMTConfig(density=0.2, block_size=8), batches, 2)
    adapted = Settings.read(GIVEN).adapt(model, lambda: batches, tmp_path / "run", task_type="CAUSAL_LM")
    assert isinstance(adapted, PeftModel) and adapted.peft_config["default"].task_type == "CAUSAL_LM"
    kept = BlockSelection.load(tmp_path / "run" / "selection.safetensors")
    assert kept.provenance["num_batches"] == 2
    assert kept.blocks.keys() == expected.blocks.keys()
    assert all(torch.equal(kept.blocks[name], blocks) for name, blocks in expected.blocks.items())


def tiny_llama_like(model):
    twin = tiny_llama()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("more", [{"score": "magnitude"}, {"selection": "file"}])
def test_no_batch_is_asked_for_where_none_is_needed(model, tmp_path, more):
    if more == {"selection": "file"}:
        chosen = select_blocks(model, SMTConfig(density=0.2, block_size=8, score="random"))
        chosen.save(tmp_path / "file.safetensors")
        more = {"selection": str(tmp_path / "file.safetensors")}
    settings = Settings.read({**GIVEN, **more})
    adapted = settings.adapt(model, lambda: pytest.fail("batches were asked for"), tmp_path / "run")
    assert adapted.get_nb_trainable_parameters()[0] > 0
    assert (tmp_path / "run").exists() == ("selection" not in more)


def test_a_process_other_than_the_first_writes_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    Settings.read({**GIVEN, "score": "magnitude"}).adapt(model, list, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_host_that_adapts_by_itself_gets_the_selection_file(tmp_path):
    path = tmp_path / "file.safetensors"
    path.touch()
    assert Settings.read({"selection": str(path)}).unchosen("SEQ_CLS").selection == str(path)
    assert Settings.read({}).unchosen(None).selection is None


def test_maps_and_lists_of_a_hosts_own_kinds_become_plain():
    class Box(dict):
        """As axolotl's and omegaconf's."""

    settings = Settings.read(Box(budget=Box({"q_proj": 0.5, "v_proj": 0.5}), block_size=(8, 4)))
    assert type(settings.config.budget) is dict and settings.config.block_size == [8, 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1], "smt is a block of settings (density: 0.01, ...), got [1]"),
        ({"block_pattern": {}}, "smt.block_pattern: unknown setting"),
        ({"q": 1}, "smt.q: unknown setting; known are avoid, block_size, budget, coupled, density, "),
        ({"desity": 0.1}, "smt.desity: unknown setting; did you mean 'density'?"),
        ({"warmup_batches": 0}, "smt.warmup_batches must be a positive whole number, got 0"),
        ({"selection": "nowhere.safetensors"}, "got 'nowhere.safetensors', which is no file"),
        ({"density": "1e-2"}, "smt: density must be above 0"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings.read(given)

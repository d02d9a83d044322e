"""The LoRA form of an adapter: exact where asked for, honest where not, and read by PEFT alone."""

from __future__ import annotations

import copy
import itertools
import re
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import Mlp, batch, layouts, tiny_gpt2, tiny_llama
from hypothesis import given
from peft import PeftModel, get_peft_model
from peft import convert_to_lora as pefts_convert_to_lora
from plain import run_plain, site_without
from saved import save
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from smt_peft import SMTConfig
from smt_peft.cli import main
from smt_peft.export.lora import _cover, convert_to_lora, exact_ranks
from smt_peft.tuner.layer import SMTLayer

SETTINGS = {"density": 0.15, "block_size": 8, "score": "random", "init_weights": False}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
]


def trained(base, **settings):
    return get_peft_model(base, SMTConfig(**SETTINGS | {"target_modules": "all-linear"} | settings)).eval()


def deltas(model):
    """`(out, in)` deltas by module, as the layers state them."""
    layers = {layer.smt_name: layer for layer in model.modules() if isinstance(layer, SMTLayer)}
    return {
        name: delta.t() if isinstance(layer.get_base_layer(), Conv1D) else delta
        for name, layer in layers.items()
        for delta in [layer.get_delta_weight("default")]
    }


def products(form):
    found = {}
    for key, right in form.tensors.items():
        path, is_linear, _ = key.partition(".lora_A.weight")
        if is_linear:
            found[path.removeprefix("base_model.model.")] = form.tensors[f"{path}.lora_B.weight"] @ right
    return found


@given(layouts(max_side=12))
def test_the_cover_holds_every_block_and_none_is_cheaper(layout):
    rows, cols = _cover(layout)
    assert all(rows[row] or cols[col] for row, col in layout.blocks.tolist())
    heights, widths = layout.grid.heights(), layout.grid.widths()
    cost = int(heights[torch.from_numpy(rows)].sum() + widths[torch.from_numpy(cols)].sum())
    touched = sorted(set(layout.block_rows.tolist()))
    if len(touched) <= 8:
        cheapest = min(
            sum(int(heights[row]) for row in chosen)
            + sum(int(widths[col]) for col in {col for row, col in layout.blocks.tolist() if row not in chosen})
            for count in range(len(touched) + 1)
            for chosen in itertools.combinations(touched, count)
        )
        assert cost == cheapest
    # And it is the rank that random blocks at these places have.
    mask = layout.mask().double()
    assert cost == int(torch.linalg.matrix_rank(torch.randn(mask.shape, dtype=torch.float64) * mask))


SELECTIONS = {
    "random": {"spread": "free"},
    "matched": {"spread": "assignment"},
    "columns": {"block_size": [-1, 1]},
    "rows": {"block_size": [1, -1]},
    "ragged": {"block_size": [5, 7]},
    "capped": {"max_lora_rank": 8},
}


@pytest.mark.parametrize("settings", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, Mlp])
def test_the_exact_form_is_the_delta_bit_for_bit(build, settings):
    model = trained(build(), **settings)
    form = convert_to_lora(model, "exact")
    expected = deltas(model)
    assert form.ranks == exact_ranks(model) and form.energy == 1 and set(form.energies.values()) == {1.0}
    found = products(form)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], delta) for name, delta in expected.items())
    if "max_lora_rank" in settings:
        assert max(form.ranks.values()) <= 8


@pytest.mark.parametrize("rank", [1, 5, 0.3, 0.9, 1.0])
def test_the_energy_told_is_the_energy_kept(rank):
    model = trained(tiny_llama(), spread="free", density=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        form = convert_to_lora(model, rank)
    expected, found = deltas(model), products(form)
    for name, delta in expected.items():
        # A truncated decomposition is orthogonal to what it leaves.
        lost = (delta.double() - found[name].double()).square().sum() / delta.double().square().sum()
        assert abs(1 - lost - form.energies[name]) < 1e-5
        spectrum = torch.linalg.svdvals(delta.double()).square()
        best = spectrum.cumsum(0) / spectrum.sum()
        if isinstance(rank, int):
            assert form.ranks[name] == rank and abs(form.energies[name] - best[rank - 1]) < 1e-5
        else:
            assert form.energies[name] >= rank - 1e-6
            assert form.ranks[name] == 1 or best[form.ranks[name] - 2] < rank + 1e-6
    total = sum(delta.double().square().sum() for delta in expected.values())
    kept = sum(form.energies[name] * delta.double().square().sum() for name, delta in expected.items())
    assert abs(form.energy - kept / total) < 1e-9


def test_a_loss_is_never_silent():
    model = trained(tiny_llama(), density=0.3)
    with pytest.warns(UserWarning, match=r"rank 1 to 1 and keeps .*% of the delta.*least in model\.layers.*exact"):
        form = convert_to_lora(model, 1)
    assert form.energy < 0.5
    with pytest.raises(ValueError, match=r"min_energy=0\.9 asks for more"):
        convert_to_lora(model, 1, min_energy=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_to_lora(model, 1, min_energy=0.01)
        assert convert_to_lora(model, 64).energy == 1


def test_pefts_own_conversion_is_refused():
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        pefts_convert_to_lora(trained(Mlp()), rank=4)


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, "best", None])
def test_ranks_that_are_none(rank):
    with pytest.raises(ValueError, match="rank must be 'exact', a positive int"):
        convert_to_lora(trained(Mlp()), rank)


def test_what_cannot_be_converted():
    with pytest.raises(ValueError, match="every block of adapter default is zero"):
        convert_to_lora(trained(Mlp(), init_weights=True), "exact")
    with pytest.raises(ValueError, match="no SMT adapter 'other'"):
        convert_to_lora(trained(Mlp()), "exact", adapter_name="other")
    with pytest.raises(ValueError, match="no SMT adapter"):
        exact_ranks(nn.Linear(3, 3))


CODE = """
import sys, torch
from peft import AutoPeftModelForCausalLM
for path in sys.argv[1:]:
    model = AutoPeftModelForCausalLM.from_pretrained(path + "/lora").eval()
    expected = torch.load(path + "/expected.pt")
    logits = model(**expected["batch"]).logits
    error, size = (logits - expected["logits"]).abs().max(), expected["logits"].abs().max()
    assert error <= 1e-5 * size, (path, error, size)
    assert (expected["base"] - expected["logits"]).abs().max() > 100 * error, path
assert not any(name.startswith("smt_peft") for name in sys.modules)
print("equal")
"""
CASES = {
    "llama": (tiny_llama, {}),
    "gpt2": (tiny_gpt2, {}),
    "columns": (tiny_llama, {"block_size": [-1, 1]}),
    "low-rank pairs": (tiny_llama, {"lora_rank": 3, "lora_alpha": 5}),
    "tables": (tiny_llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "modules in full": (tiny_llama, {"modules_to_save": ["lm_head"]}),
    "token rows": (tiny_llama, {"trainable_token_indices": [1, 5]}),
}


def test_peft_alone_reads_them_in_a_fresh_process(tmp_path):
    for name, (build, settings) in CASES.items():
        path = tmp_path / name
        build().save_pretrained(path / "base")
        base = AutoModelForCausalLM.from_pretrained(path / "base").eval()
        plain = base(**batch()).logits.detach()
        model = trained(base, task_type="CAUSAL_LM", **settings)
        with torch.no_grad():
            for parameter in (
                p for n, p in model.named_parameters() if "modules_to_save" in n or "trainable_tokens" in n
            ):
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(path / "smt")
        form, from_directory = convert_to_lora(model, "exact"), convert_to_lora(path / "smt", "exact")
        assert form.tensors.keys() == from_directory.tensors.keys() and form.ranks == exact_ranks(path / "smt")
        assert all(torch.equal(tensor, from_directory.tensors[key]) for key, tensor in form.tensors.items())
        form.save(path / "lora")
        logits = model(**batch()).logits.detach()
        torch.save({"batch": batch(), "logits": logits, "base": plain}, path / "expected.pt")
    paths = [str(tmp_path / name) for name in CASES]
    done = subprocess.run([sys.executable, "-c", CODE, *paths], capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_ranks_that_differ_are_read_as_they_are(tmp_path):
    base = tiny_llama()
    model = trained(copy.deepcopy(base), budget="global", spread="free")
    form = convert_to_lora(model, 0.8, min_energy=0.8)
    assert len(set(form.ranks.values())) > 2
    form.save(tmp_path)
    lora = PeftModel.from_pretrained(base, tmp_path).base_model.model
    for name, rank in form.ranks.items():
        layer = lora.get_submodule(name)
        assert layer.r["default"] == rank and layer.scaling["default"] == 1
        torch.testing.assert_close(layer.get_delta_weight("default"), products(form)[name])


PLAIN = """
import torch
from peft import AutoPeftModelForCausalLM
for name in ("exact", "half"):
    model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + "/" + name).eval()
    torch.save(model(input_ids=torch.load(sys.argv[1] + "/ids.pt")).logits.detach(), sys.argv[1] + f"/{name}.pt")
"""
WITHOUT_SMT = "import importlib.util as u; assert u.find_spec('smt_peft') is None and u.find_spec('peft')"


def test_the_command_line_writes_what_an_environment_without_this_package_loads(tmp_path, capsys):
    model = save(tmp_path, tiny_llama)
    ids = batch()["input_ids"]
    torch.save(ids, tmp_path / "ids.pt")
    command = ["export", str(tmp_path / "adapter"), "--format", "lora"]
    assert main([*command, str(tmp_path / "exact")]) == 0
    told = capsys.readouterr().out
    ranks = exact_ranks(model)
    for name, rank in ranks.items():
        assert re.search(rf"^{re.escape(name)} +rank +{rank}  energy 100\.00%$", told, re.MULTILINE)
    assert f"rank {max(ranks.values())}, 100.00% kept" in told
    assert main([*command, str(tmp_path / "half"), "--rank", "0.5", "--min-energy", "0.4"]) == 0
    form = convert_to_lora(model, 0.5, min_energy=0.4)
    told = capsys.readouterr().out
    for name, share in form.energies.items():
        assert re.search(rf"^{re.escape(name)} +rank +{form.ranks[name]}  energy {share:.2%}$", told, re.MULTILINE)
    site = site_without(tmp_path, "peft")
    done = run_plain(site, PLAIN, tmp_path, prelude=WITHOUT_SMT)
    assert done.returncode == 0, done.stderr
    expected = model(input_ids=ids).logits.detach()
    error = (torch.load(tmp_path / "exact.pt") - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max()
    # The half that is left out shows in the logits, and what was written is what was converted.
    assert (torch.load(tmp_path / "half.pt") - expected).abs().max() > 100 * error
    approximate = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "half")
    torch.testing.assert_close(torch.load(tmp_path / "half.pt"), approximate.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "best"], "rank must be 'exact', a positive int, or a float"),
        (["--rank", "1", "--min-energy", "0.9"], "min_energy=0.9 asks for more"),
        (["--rank", "1", "--min-energy", "nan"], "min_energy must be a share from 0 to 1, got nan"),
        (["--min-energy", "95"], "min_energy must be a share from 0 to 1, got 95.0"),
        ([], "not empty; choose a new directory"),
    ],
)
def test_an_export_that_fails_leaves_nothing(tmp_path, capsys, words, message):
    save(tmp_path, tiny_llama)
    out = tmp_path / ("lora" if words else "base")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert main(["export", str(tmp_path / "adapter"), str(out), "--format", "lora", *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before

"""Embedding tables as targets, alone and tied to an output head."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import batch, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from smt_peft import SMTConfig, ops, select_blocks
from smt_peft.bases.targets import find_targets
from smt_peft.ops import swap
from smt_peft.tuner.embedding import Embedding
from smt_peft.tuner.layer import SMTLayer

SETTINGS = {"density": 0.3, "block_size": 8, "score": "random", "init_weights": False}
TABLE = {**SETTINGS, "target_modules": ["embed_tokens"]}
TIED = {"table": ["embed_tokens"], "head": ["lm_head"], "both": ["embed_tokens", "lm_head"]}
# PEFT warns of tied targets when they are chosen and when they are merged; that it does is tested once.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


def tiny_gemma(tied=True):
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    return Gemma3ForCausalLM(config)


def layers(model):
    return {layer.smt_name: layer for layer in model.modules() if isinstance(layer, SMTLayer)}


def delta_of(layer, adapter="default"):
    return layer.get_delta_weight(adapter)


def merged_copy(model, dtype=None):
    """A plain, untied model whose weights are base + delta, rounded once."""
    plain = copy.deepcopy(model).unload()
    plain.config.tie_word_embeddings = False
    plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())
    for name, layer in layers(model).items():
        weight = plain.get_submodule(name).weight
        weight.data = ops.add_rounded(weight.data, delta_of(layer))
    return plain


class Tables(nn.Module):
    """A plain table with every rule of `nn.Embedding`, and a subclass that normalises what it looks up."""

    def __init__(self, dtype=torch.float32, **rules):
        super().__init__()
        self.words, self.norms = nn.Embedding(50, 22, **rules, dtype=dtype), Normed(9, 22, dtype=dtype)

    def forward(self, ids):
        return self.words(ids) + self.norms(ids % 9)


class Normed(nn.Embedding):
    def forward(self, ids):
        return F.layer_norm(super().forward(ids), (self.embedding_dim,))


class TestTargets:
    def test_names_take_it_and_all_linear_leaves_it_out(self):
        assert "model.embed_tokens" in find_targets(tiny_llama(), SMTConfig(target_modules=["embed_tokens", "q_proj"]))
        assert "model.embed_tokens" not in find_targets(tiny_llama(), SMTConfig())
        target = find_targets(tiny_llama(), SMTConfig(target_modules=["embed_tokens"]))["model.embed_tokens"]
        assert target.shape == tuple(target.weight.shape) == (64, 32) and target.has_plain_weight

    def test_max_norm_is_refused_before_anything_changes(self):
        model = nn.Sequential(nn.Embedding(9, 8, max_norm=1.0), nn.Linear(8, 8))
        with pytest.raises(ValueError, match=r"Target module 0 is an embedding with max_norm=1\.0.*exclude_modules"):
            get_peft_model(model, SMTConfig(target_modules=["0", "1"], block_size=4))
        assert type(model[1]) is nn.Linear

    def test_token_rows_trained_besides_are_refused_by_name(self):
        for tied, names, tokens in (
            (False, ["embed_tokens"], [1, 2]),
            (False, ["embed_tokens"], {"embed_tokens": [1]}),
            (True, ["lm_head"], [1, 2]),
        ):
            model = tiny_llama(tied=tied)
            config = SMTConfig(**{**SETTINGS, "target_modules": names}, trainable_token_indices=tokens)
            with pytest.raises(ValueError, match=rf"{names[0]} is named by trainable_token_indices.*target_modules"):
                get_peft_model(model, config)
            assert type(model.model.embed_tokens) is nn.Embedding and type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rules", [{}, {"padding_idx": 3, "scale_grad_by_freq": True}], ids=["plain", "ruled"])
def test_forward_is_that_of_a_merged_table_and_gradients_are_those_of_a_dense_one(dtype, rules):
    base = Tables(dtype, **rules)
    ids = torch.randint(0, 50, (4, 9))
    ids[:, :3] = 3
    model = get_peft_model(base, SMTConfig(**SETTINGS, target_modules=["words", "norms"]))
    truth = copy.deepcopy(model.unload()).requires_grad_(True)
    model = get_peft_model(base, SMTConfig(**SETTINGS, target_modules=["words", "norms"]))
    for name, layer in layers(model).items():
        weight = truth.get_submodule(name).weight
        weight.data = ops.add_rounded(weight.data, delta_of(layer))
    y = model(ids)
    assert torch.equal(y, truth(ids))
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy)
    exact = copy.deepcopy(truth).double()
    exact(ids).backward(dy.double())
    truth(ids).backward(dy)
    for name, layer in layers(model).items():
        blocks = layer.smt_blocks["default"]
        same, dense = (ops.block_gather(m.get_submodule(name).weight.grad, blocks.layout()) for m in (truth, exact))
        error = (blocks.weight.grad.double() - dense).abs().max()
        rounding = torch.finfo(dtype).eps * dense.abs().max()
        assert error <= 2 * max((same.double() - dense).abs().max(), rounding / 2)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_changes_no_bit_of_the_output_and_unmerging_restores_every_bit(build, dtype):
    base = build(tied=False).to(dtype).eval()
    before, table = {}, base.get_input_embeddings().weight
    before = table.detach().clone()
    model = get_peft_model(base, SMTConfig(**TABLE))
    unmerged = model(**batch()).logits
    model.merge_adapter()
    assert torch.equal(model(**batch()).logits, unmerged) and not torch.equal(table, before)
    model.unmerge_adapter()
    assert torch.equal(table, before)
    with model.disable_adapter():
        plain = model(**batch()).logits
    assert torch.equal(plain, model.unload()(**batch()).logits) and not torch.equal(plain, unmerged)


def test_several_active_adapters_merge_to_what_they_give_unmerged():
    model = get_peft_model(tiny_llama().to(torch.bfloat16).eval(), SMTConfig(**TABLE))
    model.add_adapter("other", SMTConfig(**TABLE, seed=7))
    model.base_model.set_adapter(["default", "other"])
    unmerged = model(**batch()).logits
    model.merge_adapter(["default", "other"])
    assert torch.equal(model(**batch()).logits, unmerged)


def test_a_subclass_that_looks_nothing_up_is_an_error_not_a_silence():
    class Hashed(nn.Embedding):
        def forward(self, ids):
            return self.weight[ids]

    model = get_peft_model(nn.Sequential(Hashed(9, 8)), SMTConfig(target_modules=["0"], block_size=4))
    with pytest.raises(RuntimeError, match=r"0: Hashed\.forward does not look its weight up.*exclude_modules"):
        model(torch.arange(3))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma])
def test_mixed_batches(build):
    config = SMTConfig(**{**TABLE, "target_modules": ["embed_tokens", "v_proj"]})
    model = get_peft_model(build(tied=False), config)
    model.add_adapter("other", SMTConfig(**TABLE, seed=7))
    model.eval()
    inputs = {"input_ids": batch(rows=3)["input_ids"]}
    mixed = model(**inputs, adapter_names=["default", "__base__", "other"]).logits
    for row, name in enumerate(["default", None, "other"]):
        one = {"input_ids": inputs["input_ids"][row : row + 1]}
        if name is None:
            with model.disable_adapter():
                alone = model(**one).logits
        else:
            model.set_adapter(name)
            alone = model(**one).logits
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-6)


def test_training_lowers_the_loss_and_moves_the_blocks_alone():
    base = tiny_llama()
    model = get_peft_model(base, SMTConfig(**{**TABLE, "init_weights": True}))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["base_model.model.model.embed_tokens.smt_blocks.default.weight"]


def test_compiled_in_one_graph():
    model = get_peft_model(tiny_gemma(tied=False), SMTConfig(**TABLE)).get_input_embeddings()
    assert isinstance(model, Embedding)
    ids = torch.randint(0, 64, (2, 5))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids))


class TestTied:
    @pytest.mark.parametrize("which", TIED)
    @pytest.mark.parametrize("build", [tiny_llama, tiny_gemma])
    def test_forward_and_gradients_are_those_of_two_weights(self, which, build):
        model = get_peft_model(build(tied=True).eval(), SMTConfig(**SETTINGS, target_modules=TIED[which]))
        truth = merged_copy(model)
        model.train(), truth.train().requires_grad_(True)
        loss = model(**batch()).loss
        loss.backward()
        expected = truth(**batch()).loss
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        for name, layer in layers(model).items():
            blocks = layer.smt_blocks["default"]
            grad = ops.block_gather(truth.get_submodule(name).weight.grad, blocks.layout())
            torch.testing.assert_close(blocks.weight.grad, grad, rtol=1e-4, atol=1e-6)

    def test_a_swap_on_the_head_leaves_the_shared_weight(self):
        config = SMTConfig(**SETTINGS, target_modules=TIED["both"], forward="swap")
        base = tiny_llama(tied=True).train()
        weight = base.lm_head.weight
        before = weight.detach().clone()
        model = get_peft_model(base, config)
        model(**batch()).loss.backward()
        assert torch.equal(weight, before) and weight is model.get_input_embeddings().base_layer.weight

    def test_an_interrupted_swap_on_the_head_is_healed_by_a_look_up(self, monkeypatch):
        base = tiny_llama(tied=True).train()
        weight = base.lm_head.weight
        before = weight.detach().clone()
        model = get_peft_model(base, SMTConfig(**SETTINGS, target_modules=TIED["both"], forward="swap"))
        restore = swap._restore
        with pytest.raises(KeyboardInterrupt), ops.use_backend("reference"), monkeypatch.context() as patch:
            calls = []

            def interrupted(owner):
                calls.append(owner)
                if len(calls) > 1:
                    raise KeyboardInterrupt
                restore(owner)

            patch.setattr(swap, "_restore", interrupted)
            model(**batch())
        assert not torch.equal(weight, before)
        model.get_input_embeddings()(batch()["input_ids"])
        assert torch.equal(weight, before)

    @pytest.mark.parametrize("which", TIED)
    def test_unmerging_restores_the_shared_weight(self, which):
        base = tiny_llama(tied=True).to(torch.bfloat16).eval()
        weight = base.lm_head.weight
        before = weight.detach().clone()
        model = get_peft_model(base, SMTConfig(**SETTINGS, target_modules=TIED[which]))
        model.add_adapter("other", SMTConfig(**SETTINGS, target_modules=TIED[which], seed=7))
        unmerged = model(**batch()).logits
        for adapters in (["default"], ["default", "other"]):
            for adapter in adapters:
                model.merge_adapter([adapter])
            assert not torch.equal(weight, before)
            model.unmerge_adapter()
            assert torch.equal(weight, before)
        model.merge_adapter()
        with model.disable_adapter():
            model(**batch())
        assert torch.equal(weight, before)
        assert torch.equal(model(**batch()).logits, unmerged)

    @pytest.mark.parametrize("which", TIED)
    def test_merging_keeps_the_tie_as_it_does_for_lora(self, which):
        lora = get_peft_model(tiny_llama(tied=True), LoraConfig(target_modules=TIED[which], init_lora_weights=False))
        ours = get_peft_model(tiny_llama(tied=True), SMTConfig(**SETTINGS, target_modules=TIED[which]))
        outcomes = []
        for model in (lora, ours):
            with pytest.warns(UserWarning, match="tie_word_embeddings=True.*part of the adapter"):
                merged = model.merge_and_unload()
            same = merged.lm_head.weight is merged.model.embed_tokens.weight
            outcomes.append((same, merged.config.tie_word_embeddings))
        assert outcomes[0] == outcomes[1] == (True, True)

    def test_choosing_one_is_warned_of_as_for_lora(self):
        for config in (LoraConfig(target_modules=["embed_tokens"]), SMTConfig(**TABLE)):
            with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
                get_peft_model(tiny_llama(tied=True), config)


def test_saved_and_reloaded_in_a_fresh_process(tmp_path):
    paths = []
    for tied, which, saving, merged in itertools.product([False, True], TIED, ["auto", False], [False, True]):
        path = tmp_path / f"{tied}-{which}-{saving}-{merged}"
        tiny_llama(tied=tied).save_pretrained(path / "base")
        base = AutoModelForCausalLM.from_pretrained(path / "base")
        config = SMTConfig(**SETTINGS, target_modules=TIED[which])
        config.selection = select_blocks(base, config, None)
        model = get_peft_model(base, config).eval()
        torch.save({"batch": batch(), "logits": model(**batch()).logits.detach()}, path / "expected.pt")
        if merged:
            # The table is saved whole, beside the blocks: what is merged into it would be added twice.
            model.merge_adapter()
        model.save_pretrained(path / "adapter", save_embedding_layers=saving)
        paths.append(str(path))
    code = """
import sys, torch, smt_peft
from peft import AutoPeftModelForCausalLM
for path in sys.argv[1:]:
    model = AutoPeftModelForCausalLM.from_pretrained(path + "/adapter").eval()
    expected = torch.load(path + "/expected.pt")
    assert torch.equal(model(**expected["batch"]).logits, expected["logits"]), path
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_a_table_and_its_adapter_of_another_base_is_refused(tmp_path):
    get_peft_model(tiny_llama(), SMTConfig(**TABLE)).save_pretrained(tmp_path, save_embedding_layers=False)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=r"model\.embed_tokens: the base weights are not those"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)

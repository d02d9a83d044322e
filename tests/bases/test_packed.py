"""Packed weights: told from plain ones, read, written, put back, and fingerprinted within a quantisation step."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from packing import DEQUANTISABLE, packed_linear, same_storage, storage, torchao_config, true_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from smt_peft import SMTConfig
from smt_peft.bases.fingerprint import fingerprint, mismatch
from smt_peft.bases.packed import format_of, is_packed, quantization_of, stored, unpacked_numel
from smt_peft.bases.target import evidence_of


def linear(rows=48, cols=32, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Linear(cols, rows, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("plain", [nn.Linear(4, 4), Conv1D(4, 4), nn.Embedding(4, 4), nn.Bilinear(4, 4, 4), nn.ReLU()])
def test_plain_layers_are_not_packed(plain):
    assert format_of(plain) is None and not is_packed(plain)


@pytest.mark.parametrize("kind", DEQUANTISABLE)
@pytest.mark.parametrize("shape", [(48, 32), (20, 48)])
def test_read_gives_a_new_tensor_with_the_librarys_values(kind, shape):
    layer = packed_linear(linear(*shape), kind)
    packed = format_of(layer)
    before = storage(layer)
    weight = packed.read(layer)
    assert torch.equal(weight, true_weight(layer)) and weight.shape == shape and weight.is_contiguous()
    assert packed.why_not_read(layer) is None and packed.why_not_exact(layer) is None
    weight.zero_()
    assert same_storage(before, storage(layer))


@pytest.mark.parametrize("kind", DEQUANTISABLE)
def test_written_anew_and_put_back_bit_for_bit(kind):
    layer = packed_linear(linear(), kind)
    packed = format_of(layer, lambda: torchao_config(kind))
    x = torch.randn(3, 32)
    # Its first call moves what an 8-bit weight carries to the layer's state.
    y, before, kept = layer(x), storage(layer), packed.keep(layer)
    wanted = linear(seed=1).weight.detach().clone()
    packed.write(layer, wanted)
    other = linear(seed=1)
    assert torch.equal(packed.read(layer), true_weight(packed_linear(other, kind)))
    assert not torch.equal(layer(x), y)
    packed.put_back(layer, kept)
    assert same_storage(before, storage(layer))
    assert torch.equal(layer(x), y)
    # Where FSDP looks for it.
    assert getattr(layer, "quant_state", None) is getattr(layer.weight if "nf4" in kind else layer, "quant_state", None)
    layer.to("cpu")
    assert same_storage(before, storage(layer))


@pytest.mark.parametrize("kind", ["nf4", "nf4 in bf16", "int8"])
def test_weights_are_counted_not_bytes(kind):
    assert unpacked_numel(stored(packed_linear(linear(), kind))) == 48 * 32


def test_a_layer_without_a_weight_shows_what_it_stores():
    layer = packed_linear(linear(), "gptq")
    assert stored(layer) is layer.qweight
    assert "cannot be dequantised" in format_of(layer).why_not_read(layer)
    with pytest.raises(ValueError, match="ForwardOnly cannot be dequantised"):
        format_of(layer).read(layer)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_layer_that_is_not_quantised_yet_says_so(kind):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(32, 48) if kind == "nf4" else bnb.nn.Linear8bitLt(32, 48)
    assert "not quantised yet" in format_of(layer).why_not_read(layer)


@pytest.mark.parametrize("kind", DEQUANTISABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_a_step_covers_what_quantising_moved(kind, dtype):
    original = linear(96, 64, dtype=dtype)
    layer = packed_linear(original, kind)
    packed = format_of(layer)
    weight = packed.read(layer)
    # bf16 originals are packed from, and dequantised to, bf16: a rounding more.
    rounding = 2.0**-7 * weight.float().abs() + 1e-7
    moved = (weight.float() - original.weight.float()).abs()
    assert bool((moved <= packed.half_step(layer, weight) + rounding).all())


class TestFingerprint:
    @pytest.mark.parametrize("kind", DEQUANTISABLE)
    @pytest.mark.parametrize("sides", [(96, 64), (64, 48)])
    def test_the_original_and_its_packed_copy_agree_either_way(self, kind, sides):
        originals = {str(seed): linear(*sides, seed) for seed in range(4)}
        layers = {name: packed_linear(layer, kind) for name, layer in originals.items()}
        floats = {name: layer.weight for name, layer in originals.items()}
        packed = {name: evidence_of(layer, stored(layer)) for name, layer in layers.items()}
        recorded = json.loads(json.dumps(fingerprint(packed)))
        assert all(len(pair) == 2 for values in recorded.values() for pair in values)
        for taken, met in ((recorded, floats), (recorded, packed), (fingerprint(floats), packed)):
            assert mismatch(taken, met) is None
            assert mismatch(taken, {name: weight.bfloat16() for name, weight in floats.items()}) is None

    @pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "torchao int4", "hqq"])
    def test_another_model_does_not_pass(self, kind):
        layers = {str(seed): packed_linear(linear(96, 64, seed), kind) for seed in range(8)}
        recorded = fingerprint({name: evidence_of(layer, stored(layer)) for name, layer in layers.items()})
        for shift in range(1, 20):
            others = {name: linear(96, 64, 100 * shift + int(name)).weight for name in layers}
            assert mismatch(recorded, others) is not None

    def test_int8_tells_a_fine_tuned_copy(self):
        layer = packed_linear(linear(96, 64), "int8")
        recorded = fingerprint({"m": evidence_of(layer, stored(layer))})
        tuned = linear(96, 64).weight + 0.01 * torch.randn(96, 64)
        assert mismatch(recorded, {"m": tuned}) == "m"

    def test_one_layer_at_a_time_is_dequantised(self):
        alive, most = set(), 0

        def lazy(seed):
            def dequantise():
                nonlocal most
                values = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
                alive.add(seed)
                most = max(most, len(alive))
                weakref.finalize(values, alive.discard, seed)
                return values, torch.full((8, 1), 0.1)

            return dequantise

        weights = {str(seed): lazy(seed) for seed in range(5)}
        assert mismatch(fingerprint(weights), weights) is None
        assert most == 1

    @pytest.mark.parametrize("damaged", [[[0.1]], [[0.1, "x"]], [[0.1, 0.2], 0.3], [1], 0.5])
    def test_a_damaged_one_is_refused(self, damaged):
        with pytest.raises(ValueError, match="base_fingerprint must map modules to lists of floats"):
            SMTConfig(base_fingerprint={"m": damaged})
        SMTConfig(base_fingerprint={"m": [[0.1, 0.2], [0.3, 0.4]], "n": [0.5]})


def test_a_record_of_the_quantisation_is_plain_json():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    model = nn.Linear(2, 2)
    assert quantization_of(model) is None
    model.config = transformers.LlamaConfig(dtype="bfloat16")
    assert quantization_of(model) is None
    model.config.quantization_config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    record = quantization_of(model)
    assert record == json.loads(json.dumps(record))
    assert record["load_in_8bit"] is True and record["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="base_quantization must be a map"):
        SMTConfig(base_quantization=[1])

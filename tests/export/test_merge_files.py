"""A merge through the files: what PEFT's own merge gives, to the bit, and every other byte as it was."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import batch, tiny_gpt2, tiny_llama
from mixtures import EXPERTS, tiny_gpt_oss, tiny_llama4, tiny_mixtral, tiny_qwen3_moe
from plain import run_plain, site_without
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved import save
from transformers import AutoModelForCausalLM

from smt_peft.cli import main
from smt_peft.export import aside, merge
from smt_peft.export.merge import merge_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


def tied_llama():
    return tiny_llama(tied=True)


def shards_of(directory):
    return {file.name: file for file in sorted(directory.glob("*.safetensors"))}


def tensors_of(directory):
    return {name: tensor for file in shards_of(directory).values() for name, tensor in load_file(file).items()}


def raw(file):
    """Bytes of each tensor in a file, read without any library."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: content[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]]
        for name, entry in header.items()
    }


EXPERT_SETTINGS = {"target_modules": None, "target_parameters": EXPERTS, "density": 0.3}
CASES = {
    "bf16 in shards": (tiny_llama, {"dtype": torch.bfloat16, "shard": "20KB"}),
    "fp16": (tiny_llama, {"dtype": torch.float16}),
    "tied": (tied_llama, {"shard": "40KB"}),
    "stored transposed": (tiny_gpt2, {}),
    "ragged": (tiny_llama, {"block_size": [5, 7]}),
    "columns": (tiny_llama, {"block_size": [-1, 1], "dtype": torch.bfloat16}),
    "tables": (tiny_llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied tables": (tied_llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "dtype": torch.bfloat16}),
    "table and head of GPT-2": (tiny_gpt2, {"target_modules": ["wte", "c_attn"]}),
    "a head in full": (tiny_llama, {"modules_to_save": ["lm_head"], "dtype": torch.bfloat16}),
    "token rows": (tiny_llama, {"trainable_token_indices": [1, 5]}),
    "token rows of a tied table": (tied_llama, {"trainable_token_indices": [1, 5]}),
    "experts of Qwen3": (tiny_qwen3_moe, {**EXPERT_SETTINGS, "shard": "30KB"}),
    "experts of Mixtral": (tiny_mixtral, {**EXPERT_SETTINGS, "dtype": torch.bfloat16}),
    "experts of GPT-OSS": (tiny_gpt_oss, EXPERT_SETTINGS),
    "experts of Llama 4": (tiny_llama4, EXPERT_SETTINGS),
}


def is_tied_table(model, settings):
    """Blocks of a table that is the head, too, act on the look-up alone until they are merged, as PEFT warns."""
    return model.config.tie_word_embeddings and {"embed_tokens", "wte"} & {*settings.get("target_modules", ())}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_files_hold_what_merging_the_model_gives(case, tmp_path):
    build, settings = case
    model = save(tmp_path, build, **settings)
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert report is not None
    copy.deepcopy(model).merge_and_unload().save_pretrained(tmp_path / "by PEFT")
    expected, found = tensors_of(tmp_path / "by PEFT"), tensors_of(tmp_path / "merged")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    base, merged = shards_of(tmp_path / "base"), shards_of(tmp_path / "merged")
    assert base.keys() == merged.keys() and (len(base) > 1) == ("shard" in settings)
    for name, file in base.items():
        before, after = raw(file), raw(merged[name])
        assert list(before) == list(after) and file.stat().st_size == merged[name].stat().st_size
        for tensor, content in before.items():
            pair = hashlib.sha256(content).hexdigest(), hashlib.sha256(after[tensor]).hexdigest()
            if pair[0] == pair[1]:
                assert report.untouched[tensor] == pair[0] and tensor not in report.changed
            else:
                assert report.changed[tensor] == pair and tensor not in report.untouched
    assert report.changed and report.untouched
    assert str(report) == f"{len(report.untouched)} tensors untouched, byte-identical; {len(report.changed)} changed"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    if not settings.get("target_parameters") and not is_tied_table(again, settings):
        # In training mode the blocks are swapped into the weight, so that the sum is rounded as merging rounds it.
        assert torch.equal(again.train()(**batch()).logits, model.train()(**batch()).logits)


def test_names_without_the_prefix_of_the_head_model_are_found(tmp_path):
    model = save(tmp_path, tiny_gpt2)
    file = tmp_path / "base" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged").changed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.train()(**batch()).logits, model.train()(**batch()).logits)
    assert raw(tmp_path / "merged" / "model.safetensors").keys() == tensors.keys()


def test_two_copies_of_a_tied_weight_change_together(tmp_path):
    settings = {"target_modules": ["lm_head", "q_proj"]}
    model = save(tmp_path, tied_llama, **settings)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= report.changed.keys()
    merged = tensors_of(tmp_path / "merged")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert torch.equal(merged["lm_head.weight"], model.merge_and_unload().lm_head.weight)


def test_a_head_that_was_untied_is_merged_in_memory(tmp_path, caplog):
    caplog.set_level("INFO", logger="smt_peft")
    model = save(tmp_path, tied_llama, modules_to_save=["lm_head"])
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged") is None
    assert "the whole model is loaded for this merge, as lm_head.weight was tied" in caplog.text
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.lm_head.weight, model.merge_and_unload().lm_head.weight)
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_a_checkpoint_without_safetensors_is_merged_in_memory(tmp_path):
    model = save(tmp_path, tiny_llama)
    torch.save(load_file(tmp_path / "base" / "model.safetensors"), tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged") is None
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.train()(**batch()).logits, model.train()(**batch()).logits)


LOGITS = """
import torch
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
torch.set_num_threads(1)
for place in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(place + "/merged", dtype="auto").eval()
    save_file({"logits": model(input_ids=torch.load(place + "/ids.pt")).logits.detach()}, place + "/logits.safetensors")
assert not any(name.split(".")[0] in ("peft", "smt_peft") for name in sys.modules)
"""


def test_transformers_alone_computes_what_base_and_adapter_do(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = {}
    for name in ("bf16 in shards", "tied", "stored transposed", "a head in full", "experts of Qwen3"):
        build, settings = CASES[name]
        path = tmp_path / name
        model = save(path, build, **settings)
        merge_adapter(path / "adapter", path / "merged")
        ids = batch()["input_ids"]
        torch.save(ids, path / "ids.pt")
        with torch.no_grad():
            expected[path] = model.train()(input_ids=ids).logits
            model.eval()
            base = AutoModelForCausalLM.from_pretrained(path / "base", dtype="auto").eval()(input_ids=ids).logits
        assert (base - expected[path]).abs().max() > 1e-2
    torch.set_num_threads(threads)
    done = run_plain(site_without(tmp_path), LOGITS, *expected)
    assert done.returncode == 0, done.stderr
    for path, logits in expected.items():
        found = load_file(path / "logits.safetensors")["logits"]
        if "experts" in path.name:
            # Another order of products for the experts than in training.
            torch.testing.assert_close(found, logits)
        else:
            assert torch.equal(found, logits), path


def test_the_environment_without_the_packages_lacks_them(tmp_path):
    site = site_without(tmp_path)
    for name in ("smt_peft", "peft"):
        done = run_plain(site, f"import {name}")
        assert f"No module named '{name}'" in done.stderr
    assert run_plain(site, "import torch, transformers").returncode == 0


PEAK = """
import re, sys
from pathlib import Path
from smt_peft.export.merge import merge_adapter

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

small, large = map(Path, sys.argv[1:])
merge_adapter(small / "adapter", small / "merged")
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
merge_adapter(large / "adapter", large / "merged")
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_merge_takes_less_memory_than_a_shard_and_the_blocks(tmp_path):
    save(tmp_path / "small", tiny_llama)
    # Tensors of 1.6 MB and less, in a shard of 40 MB.
    save(tmp_path / "large", lambda: tiny_llama(hidden=640, layers=8, vocab=128), torch.bfloat16, "40MB", density=0.01)
    sizes = [file.stat().st_size for file in shards_of(tmp_path / "large" / "base").values()]
    assert len(sizes) > 1 and max(sizes) > 35e6
    blocks = (tmp_path / "large" / "adapter" / "adapter_model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "large"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < max(sizes) + blocks
    # And in fact for one tensor, and the places of its blocks: 6.7 MB (2026-11).
    assert int(done.stdout) < max(sizes) / 2


@pytest.fixture
def ready(tmp_path):
    save(tmp_path, tiny_llama, dtype=torch.bfloat16, shard="20KB")
    return tmp_path


def left(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyboardInterrupt(), "interrupted: nothing was kept"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left for .*run the same again"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written .*choose another place"),
    ],
)
def test_a_merge_that_stops_midway_leaves_nothing_and_says_how_to_go_on(ready, monkeypatch, caplog, error, words):
    caplog.set_level("INFO", logger="smt_peft")
    before, calls, write = left(ready), [], merge._copy

    def stop_at_the_fifth(tensor, out):
        calls.append(tensor.name)
        if len(calls) == 5:
            raise error
        return write(tensor, out)

    monkeypatch.setattr(merge, "_copy", stop_at_the_fifth)
    with pytest.raises(type(error), match=words if isinstance(error, OSError) else None):
        merge_adapter(ready / "adapter", ready / "merged")
    assert isinstance(error, OSError) or "interrupted: nothing was kept of" in caplog.text
    assert left(ready) == before
    merge_adapter(ready / "adapter", ready / "merged")
    assert shards_of(ready / "merged").keys() == shards_of(ready / "base").keys()


def test_a_full_disk_is_told_before_the_first_byte(ready, monkeypatch):
    before = left(ready)
    monkeypatch.setattr(aside.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1, 1))
    with pytest.raises(OSError, match=r"no space left for .*GiB are needed and 0\.00 GiB free"):
        merge_adapter(ready / "adapter", ready / "merged")
    assert left(ready) == before


def test_what_a_killed_merge_left_is_cleared_away(ready):
    stale = ready / ".merged.smt-part"
    stale.mkdir()
    (stale / "model-00001-of-00009.safetensors").write_bytes(b"half")
    merge_adapter(ready / "adapter", ready / "merged")
    assert not stale.exists() and "model-00001-of-00009.safetensors" not in left(ready / "merged")


def test_a_disk_that_does_not_keep_what_it_is_given_is_found_out(ready, monkeypatch):
    def forget(tensor, out):
        out.write(bytes(tensor.end - tensor.begin))
        return tensor.sha256()

    monkeypatch.setattr(merge, "_copy", forget)
    with pytest.raises(OSError, match="was not written as it should be"):
        merge_adapter(ready / "adapter", ready / "merged")
    assert "merged" not in left(ready)


@pytest.mark.parametrize("out", ["base", "adapter", "adapter/adapter_config.json", "link"])
def test_nothing_that_exists_is_written_over(ready, out):
    (ready / "link").symlink_to(ready / "nowhere")
    before = {path: path.read_bytes() for path in ready.rglob("*") if path.is_file()}
    with pytest.raises((FileExistsError, NotADirectoryError)):
        merge_adapter(ready / "adapter", ready / out)
    assert {path: path.read_bytes() for path in ready.rglob("*") if path.is_file()} == before


def test_linked_files_of_a_cache_are_read_and_never_linked_to(ready):
    (ready / "blobs").mkdir()
    for file in shards_of(ready / "base").values():
        file.rename(ready / "blobs" / file.name)
        file.symlink_to(ready / "blobs" / file.name)
    blobs = {file.name: file.read_bytes() for file in (ready / "blobs").iterdir()}
    merge_adapter(ready / "adapter", ready / "merged")
    assert not any(path.is_symlink() for path in (ready / "merged").iterdir())
    assert {file.name: file.read_bytes() for file in (ready / "blobs").iterdir()} == blobs


def first_shard(ready):
    return next(iter(shards_of(ready / "base").values()))


def cut(ready):
    file = first_shard(ready)
    file.write_bytes(file.read_bytes()[:-1])
    return f"{file.name} cannot be read"


def no_header(ready):
    first_shard(ready).write_bytes((2**60).to_bytes(8, "little") + b"{}")
    return "cannot be read"


def missing_shard(ready):
    file = first_shard(ready)
    file.unlink()
    return f"{file.name} cannot be read"


def damaged_index(ready):
    (ready / "base" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    return "index.json is damaged"


def unlisted(ready):
    file = ready / "base" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.extra.weight"] = first_shard(ready).name
    file.write_text(json.dumps(index))
    return r"names model\.extra\.weight in .* which has no such tensor"


def adapter_tensors(change):
    def damage(ready):
        file = ready / "adapter" / "adapter_model.safetensors"
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata()
        tensors = load_file(file)
        words = change(tensors)
        save_file(tensors, file, metadata=metadata)
        return words

    return damage


Q = "base_model.model.model.layers.0.self_attn.q_proj.smt_blocks."


def not_a_number(tensors):
    tensors[Q + "weight"][0, 0, 0] = float("nan")
    return "q_proj: smt_blocks.weight holds NaN"


def out_of_range(tensors):
    tensors[Q + "index"][-1] = 1000
    return "q_proj: block .* lies outside the grid"


def unsorted(tensors):
    tensors[Q + "index"] = tensors[Q + "index"].flip(0).contiguous()
    return "q_proj: blocks are not sorted"


def wrong_shape(tensors):
    tensors[Q + "weight"] = tensors[Q + "weight"][:, :4].contiguous()
    return r"q_proj: smt_blocks\.weight has shape"


def no_index(tensors):
    del tensors[Q + "index"]
    return r"q_proj: the adapter file has no smt_blocks\.index"


def unknown_module(tensors):
    for part in ("weight", "index"):
        tensors[f"base_model.model.elsewhere.smt_blocks.{part}"] = tensors[Q + part].clone()
    return "elsewhere: the adapter has blocks for this module"


def enormous(tensors):
    # The largest of fp32, which rounds to infinity in bf16.
    tensors[Q + "weight"][:] = torch.finfo(torch.float32).max
    return "q_proj: the merged weight holds NaN or infinity"


def cut_adapter(ready):
    file = ready / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    return "adapter_model.safetensors is damaged"


def no_adapter_file(ready):
    (ready / "adapter" / "adapter_model.safetensors").unlink()
    return "adapter_model.safetensors is missing"


def settings(**changed):
    def damage(ready):
        words = changed.get("words")
        file = ready / "adapter" / "adapter_config.json"
        content = {**json.loads(file.read_text()), **changed}
        content.pop("words")
        file.write_text(json.dumps(content))
        return words

    return damage


def other_base(ready):
    torch.manual_seed(7)
    shutil.rmtree(ready / "base")
    tiny_llama().to(torch.bfloat16).save_pretrained(ready / "base")
    return "the base weights are not those expected; the adapter was trained on another base"


DAMAGES = {
    "a shard cut off": cut,
    "no header": no_header,
    "a shard missing": missing_shard,
    "an index that leads out of the directory": damaged_index,
    "an index of what is not there": unlisted,
    "NaN": adapter_tensors(not_a_number),
    "an index out of range": adapter_tensors(out_of_range),
    "an unsorted index": adapter_tensors(unsorted),
    "a wrong shape": adapter_tensors(wrong_shape),
    "no index": adapter_tensors(no_index),
    "an unknown module": adapter_tensors(unknown_module),
    "a sum beyond the dtype": adapter_tensors(enormous),
    "an adapter cut off": cut_adapter,
    "no adapter file": no_adapter_file,
    "an impossible pattern": settings(
        block_pattern={"model.layers.0.self_attn.q_proj": [1, -8, 8]}, words="block_pattern"
    ),
    "another base": other_base,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_nothing_is_written(ready, damage, capsys):
    words = damage(ready)
    before = left(ready)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        merge_adapter(ready / "adapter", ready / "merged")
    assert main(["merge", str(ready / "adapter"), str(ready / "merged")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert left(ready) == before


def test_the_command_line_counts_and_writes_the_hashes(ready, capsys):
    command = ["merge", str(ready / "adapter"), str(ready / "merged"), "--report", str(ready / "hashes.json")]
    assert main(command) == 0
    assert "7 tensors untouched, byte-identical; 14 changed" in capsys.readouterr().out
    hashes = json.loads((ready / "hashes.json").read_text())
    assert hashes["hash"] == "sha256" and len(hashes["changed"]) == 14
    for file in shards_of(ready / "merged").values():
        for name, content in raw(file).items():
            known = hashes["untouched"].get(name) or hashes["changed"][name]["after"]
            assert hashlib.sha256(content).hexdigest() == known

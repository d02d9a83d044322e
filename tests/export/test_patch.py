"""A patch makes a checkpoint on disk the merged one, in place, and takes itself out again to the byte."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import tiny_gpt2, tiny_llama
from mixtures import EXPERTS, tiny_qwen3_moe
from plain import run_plain, site_without
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved import save

from smt_peft.cli import main
from smt_peft.export import patching
from smt_peft.export.checkpoint import JOURNAL
from smt_peft.export.merge import merge_adapter
from smt_peft.export.patch import Patch, export_patch
from smt_peft.export.patching import apply_patch, revert_patch


def content(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def shards(directory):
    return {name: data for name, data in content(directory).items() if name.endswith(".safetensors")}


CASES = {
    "bf16 in shards": (tiny_llama, {"dtype": torch.bfloat16, "shard": "20KB"}),
    "fp16": (tiny_llama, {"dtype": torch.float16}),
    "fp32, tied": (lambda: tiny_llama(tied=True), {"shard": "40KB"}),
    "columns": (tiny_llama, {"block_size": [-1, 1], "dtype": torch.bfloat16}),
    "stored transposed": (tiny_gpt2, {"block_size": [5, 7]}),
    "experts": (tiny_qwen3_moe, {"target_modules": None, "target_parameters": EXPERTS, "density": 0.3}),
    "a head in full, token rows": (tiny_llama, {"modules_to_save": ["lm_head"], "trainable_token_indices": [1, 5]}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_patched_checkpoint_is_the_merged_one_and_back(case, tmp_path):
    build, settings = case
    save(tmp_path, build, **settings)
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    patch = export_patch(tmp_path / "adapter", tmp_path / "patch.safetensors")
    before = content(tmp_path / "base")
    times = {path: path.stat().st_ino for path in (tmp_path / "base").iterdir()}
    apply_patch(patch.file, tmp_path / "base")
    assert shards(tmp_path / "base") == shards(tmp_path / "merged") != shards_in(before)
    assert {path: path.stat().st_ino for path in (tmp_path / "base").iterdir()} == times
    assert {tensor.name: (tensor.before, tensor.after) for tensor in patch.tensors} == report.changed
    revert_patch(patch.file, tmp_path / "base")
    assert content(tmp_path / "base") == before


def shards_in(files):
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


@pytest.fixture
def ready(tmp_path):
    save(tmp_path, tiny_llama, dtype=torch.bfloat16, shard="20KB")
    export_patch(tmp_path / "adapter", tmp_path / "patch.safetensors")
    return tmp_path


def test_the_patch_holds_the_changed_values_alone(ready):
    tensors = load_file(ready / "patch.safetensors")
    base = {name: t for file in (ready / "base").glob("*.safetensors") for name, t in load_file(file).items()}
    merge_adapter(ready / "adapter", ready / "merged")
    merged = {name: t for file in (ready / "merged").glob("*.safetensors") for name, t in load_file(file).items()}
    names = {name.rpartition(".")[0] for name in tensors}
    assert names == {name for name in base if not torch.equal(base[name], merged[name])}
    for name in names:
        changed = (base[name] != merged[name]).flatten().nonzero()[:, 0]
        assert torch.equal(tensors[f"{name}.index"], changed.int())
        assert torch.equal(tensors[f"{name}.old"], base[name].flatten()[changed])
        assert torch.equal(tensors[f"{name}.new"], merged[name].flatten()[changed])
    assert Patch.open(ready / "patch.safetensors").num_values == sum(len(tensors[f"{name}.index"]) for name in names)


def test_nothing_but_the_spans_of_blocks_is_written(ready, monkeypatch):
    written, write = [], patching._write_all

    def record(file, place, raw):
        written.append(len(raw))
        write(file, place, raw)

    monkeypatch.setattr(patching, "_write_all", record)
    patch = Patch.open(ready / "patch.safetensors")
    spans = {t.name: patch.changes(t)[0] for t in patch.tensors}
    apply_patch(patch.file, ready / "base")
    assert sum(written) == sum(int(index[-1] - index[0] + 1) * 2 for index in spans.values())


def test_large_tensors_are_written_window_by_window(ready, monkeypatch):
    monkeypatch.setattr(patching, "WINDOW", 64)
    before = content(ready / "base")
    apply_patch(ready / "patch.safetensors", ready / "base")
    patched = shards(ready / "base")
    revert_patch(ready / "patch.safetensors", ready / "base")
    assert content(ready / "base") == before
    merge_adapter(ready / "adapter", ready / "merged")
    assert shards(ready / "merged") == patched


def refused(ready, action, words, *, patch="patch.safetensors", kind=ValueError):
    before = content(ready / "base")
    with pytest.raises(kind, match=words):
        action(ready / patch, ready / "base")
    assert content(ready / "base") == before


def test_twice_in_and_twice_out_are_refused(ready):
    refused(ready, revert_patch, r"is not in .*nothing was written")
    apply_patch(ready / "patch.safetensors", ready / "base")
    refused(ready, apply_patch, r"is in .*nothing was written")


def test_another_checkpoint_is_refused_before_any_byte(ready, tmp_path):
    torch.manual_seed(3)
    for other, words in (
        (tiny_llama().to(torch.bfloat16), "is not the tensor that .* was made for"),
        (tiny_llama(), "was made for another model"),
        (tiny_llama(hidden=64).to(torch.bfloat16), "was made for another model"),
        (tiny_gpt2().to(torch.bfloat16), "no such tensor"),
    ):
        for file in (ready / "base").iterdir():
            file.unlink()
        other.save_pretrained(ready / "base")
        refused(ready, apply_patch, words)


def test_two_patches_of_one_base_do_not_mix(ready):
    tensors = load_file(ready / "adapter" / "adapter_model.safetensors")
    save_file({k: v * 2 if v.is_floating_point() else v for k, v in tensors.items()}, ready / "twice")
    os.replace(ready / "twice", ready / "adapter" / "adapter_model.safetensors")
    export_patch(ready / "adapter", ready / "other.safetensors")
    apply_patch(ready / "patch.safetensors", ready / "base")
    refused(ready, apply_patch, "another base, or another patch is in it", patch="other.safetensors")
    refused(ready, revert_patch, "another base, or another patch is in it", patch="other.safetensors")


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_files_that_others_share_are_refused(ready, link):
    (ready / "blobs").mkdir()
    for file in list((ready / "base").glob("*.safetensors")):
        file.rename(ready / "blobs" / file.name)
        if link == "symbolic":
            file.symlink_to(ready / "blobs" / file.name)
        else:
            file.hardlink_to(ready / "blobs" / file.name)
    blobs = content(ready / "blobs")
    refused(ready, apply_patch, rf"is a {link} link, such as the Hub's cache has.*cp -rL")
    assert content(ready / "blobs") == blobs


def test_a_directory_that_may_not_be_written_is_refused(ready, monkeypatch):
    # The mode alone would not keep root out.
    monkeypatch.setattr(patching.os, "access", lambda place, mode: place != ready / "base")
    refused(ready, apply_patch, "base may not be written; nothing was changed", kind=PermissionError)


STOPS = [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error"), OSError(errno.ENOSPC, "No space left")]


@pytest.mark.parametrize("error", STOPS, ids=lambda error: type(error).__name__ + str(getattr(error, "errno", "")))
@pytest.mark.parametrize("action", [apply_patch, revert_patch])
@pytest.mark.parametrize("then", [apply_patch, revert_patch])
def test_what_stops_midway_can_be_finished_or_taken_back(ready, monkeypatch, caplog, error, action, then):
    caplog.set_level("INFO", logger="smt_peft")
    old = shards(ready / "base")
    merge_adapter(ready / "adapter", ready / "merged")
    new = shards(ready / "merged")
    if action is revert_patch:
        apply_patch(ready / "patch.safetensors", ready / "base")
    calls, write = [], patching._write_all

    def stop(file, place, raw):
        calls.append(place)
        if len(calls) == 6:
            write(file, place, raw[: len(raw) // 2 + 1])  # an odd byte of an element, torn
            raise error
        write(file, place, raw)

    with monkeypatch.context() as patched:
        patched.setattr(patching, "_write_all", stop)
        with pytest.raises(type(error)) as caught:
            action(ready / "patch.safetensors", ready / "base")
    told = str(caught.value) if isinstance(error, OSError) else caplog.text
    assert "smt patch apply" in told and "finishes, smt patch revert" in told
    assert shards(ready / "base") not in (old, new)
    with pytest.raises(ValueError, match="a patch was being written into .* run smt patch apply or"):
        merge_adapter(ready / "adapter", ready / "again")
    then(ready / "patch.safetensors", ready / "base")
    assert "going on where a process ended" in caplog.text
    assert shards(ready / "base") == (new if then is apply_patch else old)
    assert not (ready / "base" / JOURNAL).exists()


KILLED = """
import os, signal, sys
from smt_peft.export import patching
write, calls = patching._write_all, []
def die(file, place, raw):
    calls.append(place)
    if len(calls) == 4:
        write(file, place, raw[:3])
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, place, raw)
patching._write_all = die
patching.apply_patch(*sys.argv[1:])
"""


def test_a_killed_process_leaves_a_journal_that_others_must_heed(ready):
    old = shards(ready / "base")
    command = [sys.executable, "-c", KILLED, ready / "patch.safetensors", ready / "base"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert json.loads((ready / "base" / JOURNAL).read_text())["patch"] == str(ready / "patch.safetensors")
    tensors = load_file(ready / "patch.safetensors")
    with safe_open(ready / "patch.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["smt_patch"])
    metadata["base"] = "elsewhere"
    save_file(tensors, ready / "other.safetensors", metadata={"smt_patch": json.dumps(metadata)})
    refused(ready, revert_patch, "another patch, .*, was being written", patch="other.safetensors")
    revert_patch(ready / "patch.safetensors", ready / "base")
    assert shards(ready / "base") == old


def test_a_journal_cut_off_is_no_permission_to_skip_the_hashes(ready):
    (ready / "base" / JOURNAL).write_text('{"patch": "')
    with pytest.raises(ValueError, match="a patch was being written"):
        merge_adapter(ready / "adapter", ready / "merged")
    with pytest.raises(ValueError, match="is not in .*nothing was written"):
        revert_patch(ready / "patch.safetensors", ready / "base")
    assert not (ready / "base" / JOURNAL).exists()
    apply_patch(ready / "patch.safetensors", ready / "base")


def test_two_processes_do_not_patch_at_once(ready):
    busy = pytest.raises(BlockingIOError, match="another process is patching")
    with patching._held(ready / "base" / JOURNAL), busy:
        apply_patch(ready / "patch.safetensors", ready / "base")
    (ready / "base" / JOURNAL).unlink()


def damaged(change):
    def damage(file):
        with safe_open(file, framework="pt") as opened:
            record = json.loads(opened.metadata()["smt_patch"])
        tensors = load_file(file)
        change(tensors, record)
        save_file(tensors, file, metadata={"smt_patch": json.dumps(record)})

    return damage


NAME = "model.layers.0.self_attn.q_proj.weight"


def beyond(tensors, record):
    tensors[f"{NAME}.index"][-1] = 10**6


def negative(tensors, record):
    tensors[f"{NAME}.index"][0] = -1


def unsorted(tensors, record):
    tensors[f"{NAME}.index"] = tensors[f"{NAME}.index"].flip(0).contiguous()


def shorter(tensors, record):
    tensors[f"{NAME}.new"] = tensors[f"{NAME}.new"][:-1].contiguous()


def other_dtype(tensors, record):
    tensors[f"{NAME}.old"] = tensors[f"{NAME}.old"].float()


def not_finite(tensors, record):
    tensors[f"{NAME}.new"][0] = float("nan")


def without_old(tensors, record):
    del tensors[f"{NAME}.old"]


def other_version(tensors, record):
    record["version"] = 99


def no_tensors(tensors, record):
    record["tensors"] = [NAME]


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def no_patch(file):
    save_file({"a": torch.zeros(1)}, file)


DAMAGES = {
    change.__name__: damaged(change)
    for change in (
        beyond,
        negative,
        unsorted,
        shorter,
        other_dtype,
        not_finite,
        without_old,
        other_version,
        no_tensors,
    )
} | {"cut": cut, "no patch": no_patch}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_patch_is_refused(ready, damage):
    damage(ready / "patch.safetensors")
    refused(ready, apply_patch, r"patch\.safetensors.*export (it|the patch) again")


def test_what_cannot_be_a_patch(tmp_path):
    save(tmp_path / "zero", tiny_llama, init_weights=True)
    with pytest.raises(ValueError, match="changes no value of its base"):
        export_patch(tmp_path / "zero" / "adapter", tmp_path / "patch")
    save(tmp_path / "untied", lambda: tiny_llama(tied=True), modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="was tied to another weight"):
        export_patch(tmp_path / "untied" / "adapter", tmp_path / "patch")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["untied", "zero"]
    (tmp_path / "patch").write_text("mine")
    with pytest.raises(FileExistsError, match="choose a new name"):
        export_patch(tmp_path / "zero" / "adapter", tmp_path / "patch")


LOADS = """
from transformers import AutoModelForCausalLM
print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).num_parameters())
"""


@pytest.mark.parametrize("option", [["--rank", "8"], ["--uniform-rank"], ["--min-energy", "0"]])
def test_what_is_about_lora_is_refused_beside_a_patch(tmp_path, capsys, option):
    patch = tmp_path / "patch"
    assert main(["export", str(tmp_path), str(patch), "--format", "patch", *option]) == 2
    assert f"{option[0]} is about LoRA" in capsys.readouterr().err and not patch.exists()


def test_the_command_line_in_out_and_loaded_alone(ready, capsys):
    base, patch = str(ready / "base"), str(ready / "new.safetensors")
    before = content(ready / "base")
    assert main(["export", str(ready / "adapter"), patch, "--format", "patch"]) == 0
    assert "values of 14 tensors, old and new" in capsys.readouterr().out
    assert main(["patch", "apply", patch, base]) == 0
    assert "is merged now" in capsys.readouterr().out
    assert main(["patch", "apply", patch, base]) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert int(run_plain(site_without(ready), LOADS, base).stdout) > 0
    assert main(["patch", "revert", patch, base]) == 0
    assert "is as it was, byte for byte" in capsys.readouterr().out
    assert content(ready / "base") == before
    assert main(["patch", "apply", patch, str(ready / "nowhere")]) == 2
    assert main(["patch", "apply", str(ready / "nowhere"), base]) == 2

"""What changed is counted over whole modules, however they are sharded."""

from __future__ import annotations

from launch import HERE, torchrun


def test_fsdp2_counts_what_one_process_counts():
    done = torchrun(HERE / "effective_worker.py")
    assert done.returncode == 0, done.stderr[-4000:]

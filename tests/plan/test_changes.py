"""The three cheapest changes with which a run fits: of dials whose effect is written down here."""

from __future__ import annotations

import pytest

from smt_peft.config import SMTConfig
from smt_peft.plan.changes import Case, Dial, Level, cheapest, dials
from smt_peft.plan.packed import Packing
from smt_peft.plan.setting import Setting

CASE = Case(Setting(sequences=1, tokens=0))


def saving(*savings: int) -> list[Dial]:
    """A dial each, that takes so much off; `tokens` counts what is taken off."""
    return [Dial(f"cost {n}", (Level(f"key{n}=1", smt={f"dial{n}": each}),)) for n, each in enumerate(savings)]


def peak(case: Case) -> int:
    return 100 - sum(value for _, value in case.smt)


def keys(limit: int, offered: list[Dial]) -> list[str]:
    return [change.keys for change in cheapest(CASE, offered, limit, (peak,))]


def test_changes_that_fit_alone_come_in_the_order_of_their_cost():
    assert keys(80, saving(20, 10, 30, 25, 90)) == ["key0=1", "key2=1", "key3=1"]


def test_cheap_changes_together_come_before_a_dear_one_alone():
    assert keys(70, saving(20, 10, 40)) == ["key0=1 key1=1", "key2=1"]


def test_what_a_combination_does_not_need_is_left_out_of_it():
    assert keys(50, saving(5, 20, 45, 90))[0] == "key0=1 key2=1"
    assert keys(50, saving(5, 5, 50))[0] == "key2=1"


def test_a_dial_is_turned_no_further_than_it_has_to_be():
    levels = tuple(Level(f"size={n}", smt={"size": n}) for n in (10, 20, 30))
    assert keys(85, [Dial("cost", levels)]) == ["size=20"]


def test_where_nothing_fits_all_together_is_told():
    (change,) = cheapest(CASE, saving(10, 20), 50, (peak,))
    assert (change.keys, change.peak, change.cost) == ("key0=1 key1=1", 70, "cost 0; cost 1")
    assert cheapest(CASE, [], 50, (peak,)) == ()


def test_every_phase_has_to_fit():
    offered = saving(40, 30)
    assert [c.keys for c in cheapest(CASE, offered, 70, (peak, lambda case: 90 - 10 * len(case.smt)))] == [
        "key0=1 key1=1"
    ]


def offered(setting: Setting, chosen: bool = False, **smt) -> list[str]:
    config = SMTConfig(**({"density": 0.01} | smt))
    return [level.keys for dial in dials(setting, config, chosen, True) for level in dial.levels]


def test_a_batch_is_split_into_equal_ones_of_as_many_rows_together():
    found = offered(Setting(sequences=6, accumulation=2))
    assert [each for each in found if "batch" in each] == [
        f"per_device_train_batch_size={rows} gradient_accumulation_steps={12 // rows}" for rows in (3, 2, 1)
    ]


def test_what_the_run_has_already_is_not_offered():
    found = offered(Setting(optimizer="smt_adamw_8bit", checkpointing=True, packing=Packing("nf4", 4)), chosen=True)
    assert found == ["max_length=256", "max_length=128", "max_length=64"]


@pytest.mark.parametrize(
    ("smt", "expected"),
    [
        ({"density": 0.0084}, "smt.density=0.0042"),
        ({"num_blocks": 863, "density": None, "block_size": 64}, "smt.num_blocks=431"),
    ],
)
def test_fewer_blocks_are_offered_as_the_run_counts_them(smt, expected):
    assert expected in offered(Setting(), **smt)


def test_sums_that_are_kept_are_the_first_to_go():
    assert offered(Setting(), score="grad_sum_abs")[0] == "smt.score=mean_abs"


def test_a_sharded_run_is_offered_no_optimizer_that_refuses_shards():
    assert not any("optim" in each for each in offered(Setting(processes=4, sharded=True)))

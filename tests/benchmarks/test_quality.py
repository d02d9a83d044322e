"""The quality harness: its tasks, the search for a rate, what is kept, and a slice of the grid from end to end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from peft import get_peft_model

from benchmarks.quality import agreement, docstrings, grid, methods, results, skills, studies, task, trial
from benchmarks.quality.__main__ import main
from smt_peft import BlockSelection, SMTConfig, select_blocks
from smt_peft.blocks import BlockGrid


@pytest.fixture(scope="module")
def sort() -> skills.Skill:
    return skills.Skill("sort", steps=3, batch=8, validation=20, test=40, windows=2)


@pytest.mark.parametrize("name", skills.SKILLS)
def test_no_row_of_a_skill_is_in_two_splits(name):
    rows = skills.Skill(name, 1).rows
    splits = [{prompt for prompt, _ in split} for split in (rows.train, rows.validation, rows.test)]
    assert sum(map(len, splits)) == len(set.union(*splits))
    assert [len(split) for split in splits[1:]] == [200, 500]


def test_the_skills_are_what_their_names_say():
    for prompt, answer in skills.reverse()[:5]:
        assert prompt == answer[::-1] + "<"
    for prompt, answer in skills.sort()[:5]:
        assert sorted(prompt[:-1]) == list(answer)
    for prompt, answer in skills.shift()[:5]:
        assert [ord(b) - ord(a) for a, b in zip(prompt[:-1], answer, strict=True)] == [1] * len(answer)


def test_only_the_answer_and_its_end_are_learned():
    batch = skills.encoded([("ab<", "ba"), ("a<", "a")])
    assert batch["input_ids"].tolist() == [
        [skills.BOS, *b"ab<ba", skills.EOS],
        [skills.BOS, *b"a<a", skills.EOS, skills.PAD, skills.PAD],
    ]
    no = skills.IGNORED
    assert batch["labels"].tolist() == [[no] * 4 + [*b"ba", skills.EOS], [no] * 3 + [*b"a", skills.EOS, no, no]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0] * 2]


def test_a_right_answer_is_one_that_greedy_decoding_writes(sort):
    """On rows that the model is trained to know by heart, and on others that it does not know."""
    model = sort.base().requires_grad_(True)
    known = list(sort.rows.test[:8])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(25):
        model(**skills.encoded(known)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    part = skills.Skill("sort", 1)
    part.rows = task.Split(train=[], validation=[], test=[*known, *sort.rows.test[8:16]])
    right = 0
    for prompt, answer in part.rows.test:
        ids = torch.tensor([[skills.BOS, *prompt.encode()]])
        written = model.generate(ids, max_new_tokens=len(answer) + 1, do_sample=False)[0, ids.shape[1] :]
        right += written.tolist() == [*answer.encode(), skills.EOS]
    assert 0 < right < 16
    assert part.score(model, "test").accuracy == right / 16


def test_the_base_is_the_same_every_time_and_is_not_touched_by_a_run(sort):
    before = sort.remembered(sort.base())
    trial.run(trial.Trial("sort", "full", 0, 1e-3, 0), {"sort": sort})
    assert sort.remembered(sort.base()) == before


@pytest.mark.parametrize("method", ["full", "smt", "lora", "dora", "shira"])
def test_a_trial_trains_and_tells_everything(method, sort):
    settings = studies.CHOSEN | {"warmup_batches": 2} if method == "smt" else {}
    asked = trial.Trial("sort", method, 0 if method == "full" else 2, 1e-3, 0, settings)
    found = trial.run(asked, {"sort": sort})
    assert json.loads(json.dumps(found)) == found
    assert found["diverged"] is False and math.isfinite(found["train_loss"])
    assert 0 <= found["test"]["accuracy"] <= 1 and found["remembered"] > 0
    assert found["seconds"]["selection"] >= 0 and found["seconds"]["training"] > 0
    per_rank, weights = methods.per_rank(sort.base())
    if method != "full":
        # DoRA has one more vector per layer.
        assert found["trainable"] == pytest.approx(2 * per_rank, rel=0.3 if method == "dora" else 0.02)
    assert ("selection" in found) == (method == "smt")
    assert weights > 2 * per_rank


def test_the_same_trial_gives_the_same_result_and_another_seed_another(sort):
    asked = trial.Trial("sort", "smt", 2, 1e-2, 0, studies.CHOSEN | {"warmup_batches": 2})
    first, again, other = (trial.run(each, {"sort": sort}) for each in (asked, asked, replace(asked, seed=1)))
    assert first["test"] == again["test"] and first["train_loss"] == again["train_loss"]
    assert first["train_loss"] != other["train_loss"]


def test_a_run_that_diverges_is_told_and_scores_nothing(sort):
    found = trial.run(trial.Trial("sort", "full", 0, 1e30, 0), {"sort": sort})
    assert found["diverged"] is True and found["test"] is None
    assert grid.better(found) < grid.better({"validation": {"accuracy": 0.0, "loss": 9.0}})


def test_every_rival_comes_near_its_budget(sort):
    wanted = 2 * methods.per_rank(sort.base())[0]
    for name in ("lora", "shira", "miss", "fourierft"):
        assert methods.prepare(sort, name, 2, {}, 0).trainable == pytest.approx(wanted, rel=0.1), name


def test_a_rival_that_cannot_be_sized_is_an_error(sort):
    def refuses(size, common):
        raise ValueError("not of this size")

    with pytest.raises(ValueError, match="no size of this method comes near 1000"):
        methods._enough(sort, methods.Rival(refuses, 1.0), {}, 1000)


def test_the_defaults_are_those_that_the_evidence_is_about():
    defaults = SMTConfig()
    assert {name: getattr(defaults, name) for name in studies.CHOSEN} == studies.CHOSEN
    assert defaults.target_modules == methods.MODULES["all"]


def test_all_cells_are_different_and_every_study_has_some():
    for name in studies.STUDIES:
        chosen = studies.cells([name])
        assert chosen
        assert {cell.task for cell in chosen} <= set(studies.TASKS)
    everything = studies.cells(list(studies.STUDIES))
    assert len({(cell.task, cell.name, cell.budget) for cell in everything}) == len(everything)


def cell(start: float = 1.0) -> studies.Cell:
    return studies.Cell("sort", "x", "lora", 2, {}, start)


def measured(best: float, accuracy: float = 0.5):
    """A landscape with one best rate, and the trials that were asked for."""
    asked: list[trial.Trial] = []

    def measure(each: trial.Trial) -> dict:
        asked.append(each)
        away = abs(math.log2(each.rate / best))
        return {"rate": each.rate, "seed": each.seed, "validation": {"accuracy": accuracy, "loss": away}}

    return measure, asked


@pytest.mark.parametrize("best", [0.125, 0.5, 1.0, 2.0, 16.0])
def test_the_search_finds_the_best_rate_and_tries_both_its_neighbours(best):
    measure, asked = measured(best)
    found = grid.settle(cell(), measure, seeds=3)
    assert [(each["rate"], each["seed"]) for each in found] == [(best, 0), (best, 1), (best, 2)]
    tried = {each.rate for each in asked if each.seed == 0}
    assert {best / 2, best, 2 * best} <= tried and len(tried) <= grid.SEARCH_LIMIT


def test_the_search_ends_where_the_rate_never_stops_to_help():
    measure, asked = measured(2.0**40)
    assert grid.settle(cell(), measure, seeds=1)[0]["rate"] == 2.0 ** (grid.SEARCH_LIMIT - 2)
    assert len(asked) == grid.SEARCH_LIMIT


def test_accuracy_comes_before_loss_when_rates_are_compared():
    right = {"validation": {"accuracy": 0.6, "loss": 2.0}}
    sure = {"validation": {"accuracy": 0.5, "loss": 0.1}}
    assert grid.better(right) > grid.better(sure)


def test_what_was_run_is_not_run_again_and_a_cell_reads_back_as_it_was(tmp_path, monkeypatch, sort):
    monkeypatch.setattr(grid, "_task", lambda name: sort)
    monkeypatch.setattr(grid, "SEARCH_LIMIT", 3)
    store = grid.Store(tmp_path / "runs")
    asked = studies.cell("sort", "lora", 2)
    first = grid.settle(asked, lambda each: grid.measured(each, store), seeds=2)

    def never(*_):
        raise AssertionError("a run that is there was run again")

    monkeypatch.setattr(grid, "run", never)
    assert grid.settle(asked, lambda each: grid.measured(each, store), seeds=2) == first
    assert not list((tmp_path / "runs").glob("*.part"))

    grid.collect(store.all(), tmp_path / "results" / "sort.json")
    found = results.Runs.read(tmp_path / "results")
    outcome = found.outcome(asked, seeds=2)
    assert outcome.accuracies == [100 * run["test"]["accuracy"] for run in first]
    assert outcome.rate == first[0]["rate"]
    assert list(found.search(asked)) == sorted({run["rate"] for run in store.all() if run["seed"] == 0})
    assert found.outcome(asked, seeds=3) is None
    shared = json.loads((tmp_path / "results" / "sort.json").read_text())
    assert shared["environment"][0]["commit"].keys() == {"hash", "dirty"}
    assert shared["described"][0]["rows"] == [
        len(part) for part in (sort.rows.train, sort.rows.validation, sort.rows.test)
    ]

    monkeypatch.setattr(
        "sys.argv", ["", "restore", "--out", str(tmp_path / "results"), "--runs", str(tmp_path / "again")]
    )
    assert main() == 0
    assert grid.Store(tmp_path / "again").all() == store.all()
    assert grid.settle(asked, lambda each: grid.measured(each, grid.Store(tmp_path / "again")), seeds=2) == first


def test_a_selection_is_described_by_the_stripes_that_it_reaches():
    grids = {
        "layers.1.a": BlockGrid(8, 4, 2, 2),
        "layers.3.b": BlockGrid(4, 4, 2, 2),
        "layers.3.c": BlockGrid(4, 4, 2, 2),
    }
    blocks = {
        "layers.1.a": torch.tensor([[0, 0], [0, 1], [3, 0]], dtype=torch.int32),
        "layers.3.b": torch.tensor([[1, 1]], dtype=torch.int32),
    }
    found = trial.shape_of(BlockSelection(blocks, grids))
    assert found == {
        "modules": round(2 / 3, 4),
        "rows": round((4 + 2) / 16, 4),
        "cols": round((4 + 2) / 12, 4),
        "top_module": 0.75,
        "lowest": 1,
    }


def test_overlap_is_the_share_of_weights_in_common():
    grids = {"a": BlockGrid(4, 4, 2, 2)}
    one = BlockSelection({"a": torch.tensor([[0, 0], [1, 1]], dtype=torch.int32)}, grids)
    two = BlockSelection({"a": torch.tensor([[0, 1], [1, 1]], dtype=torch.int32)}, grids)
    assert agreement.overlap(one, one) == 1.0
    assert agreement.overlap(one, two) == 0.5


def test_docstrings_are_found_and_the_names_of_packages_masked():
    source = '"""One line of the numpy module that is long enough here."""\ndef f():\n    """Too short."""\n'
    source += "class C:\n    '''Uses pandas and np to do\n    a thing for you.\n\n    More.'''\n"
    assert sorted(docstrings.paragraphs(source)) == [
        "One line of the it module that is long enough here.",
        "Uses it and it to do a thing for you.",
    ]
    assert list(docstrings.paragraphs("not python (")) == []


def test_the_encoder_learns_from_docstrings():
    pytest.importorskip("pandas")
    if docstrings.importlib.util.find_spec(docstrings.MODEL_PACKAGE) is None:
        pytest.skip(f"{docstrings.MODEL_PACKAGE} is not installed (`make quality` brings it)")
    some = docstrings.Docstrings(steps=2, batch=4, validation=12, test=12)
    found = trial.run(
        trial.Trial("docstrings", "smt", 8, 1e-3, 0, studies.CHOSEN | {"warmup_batches": 1}), {"docstrings": some}
    )
    head = some.base().classifier
    config = SMTConfig(density=0.03, task_type="SEQ_CLS", modules_to_save=["classifier"])
    config.selection = select_blocks(some.base(), config, islice(some.batches(0), 1), 1, progress=False)
    model = get_peft_model(some.base(), config)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # The head is trained too, but not counted.
    assert methods.trained(model, some.head) == counted - sum(p.numel() for p in head.parameters())
    assert found["test"]["accuracy"] >= 0 and found["remembered"] is None

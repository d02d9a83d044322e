"""pytest plugin that puts SMT into PEFT's tests without editing them.

After a test module is imported and before its tests are parametrised, the `parametrize` marks whose values are one of
PEFT's lists of methods get SMT's cases instead; where a test names LoRA itself, SMT stands in for it (`stand_in`).
Tests that SMT did not get into are deselected. At the end the skips are held against the table in `skips.md`.
"""

from __future__ import annotations

import collections
import importlib.metadata
import inspect
import json
import os
import sys
from types import FunctionType, ModuleType

import pytest
from peft_suite import cases, stand_in
from peft_suite.table import Skip, read_files, read_skips, stale, unexplained

from smt_peft import SMTConfig

PEFT_VERSION = importlib.metadata.version("peft")
SKIPS = read_skips(PEFT_VERSION)
FILES = read_files()
TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}


def new_values(module: ModuleType, test: str, names: list[str], values: object) -> list | None:
    """What a `parametrize` mark of PEFT's gets in place of its values; None where it stays as it is."""

    def is_list(name: str) -> bool:
        return values is getattr(module, name, None)

    name = module.__name__.rpartition(".")[2]
    if name == "test_custom_models":
        if test == "test_mixed_adapter_batches_different_target_layers":
            return cases.MIXED_LAYERS
        if test == "test_mixed_adapter_batches_multiple_modules_to_save":
            return cases.MIXED_SAVED
        if names == ["config_cls"] and "weighted" not in test:
            return [SMTConfig]
        lists = {
            "TEST_CASES": cases.CUSTOM,
            "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": cases.TWO_ADAPTERS,
            "MIXED_ADAPTER_TEST_CASES": cases.MIXED_BATCHES,
        }
        return next((new for old, new in lists.items() if is_list(old)), None)
    if name in TASKS and is_list("ALL_CONFIGS"):
        return cases.of_task(TASKS[name])
    if name == "test_token_classification_qa":
        if is_list("TOKEN_CLS_CONFIGS"):
            return cases.of_task("TOKEN_CLS")
        return cases.of_task("QUESTION_ANS") if is_list("QA_CONFIGS") else None
    if name == "test_config":
        if is_list("ALL_CONFIG_CLASSES") or is_list("LAYER_INDEXING_CONFIG_CLASSES"):
            return [(SMTConfig, {})]
        return [SMTConfig] if names == ["config_class"] else None
    if name == "test_quantization" and is_list("TEST_CASES"):
        return [(SMTConfig, settings) for settings in cases.QUANTISED]
    if name == "test_target_parameters" and is_list("ALL_CONFIGS"):
        return cases.experts()
    if name == "test_torch_compile" and names == ["settings"]:
        return cases.compiled()
    if name == "test_vision_models" and names == ["config"]:
        return list(cases.VISION.values())
    if name == "test_stablediffusion" and is_list("DIFFUSERS_CONFIGS"):
        return [(SMTConfig, cases.DIFFUSION)]
    return None


def put_in(module: ModuleType, test: FunctionType) -> None:
    """Rewrite the `parametrize` marks of one test."""
    marks = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args[:2]
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            new = new_values(module, test.__name__, names, values)
            if new is not None:
                options = {key: value for key, value in mark.kwargs.items() if key != "ids" or callable(value)}
                mark = getattr(pytest.mark, mark.name)(mark.args[0], new, *mark.args[2:], **options).mark
        marks.append(mark)
    if marks:
        test.pytestmark = marks


def tests_of(module: ModuleType) -> list[FunctionType]:
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    owners = [module, *dict.fromkeys(base for cls in classes for base in cls.__mro__)]
    functions = [value for owner in owners for value in vars(owner).values() if inspect.isfunction(value)]
    return [function for function in functions if function.__name__.startswith("test")]


def lift_allow_lists(module: ModuleType) -> None:
    """PEFT skips some tests unless the class is one of its own that it names; SMT supports what these test."""
    common = sys.modules.get(f"{module.__package__}.testing_common")
    if common is not None:
        common._skip_if_conv1d_not_supported = lambda *args, **kwargs: None
        # The class is named there in these lists only: batches whose rows take different adapters.
        common.RoadConfig = SMTConfig
        # And this one in that of weighted sums, among methods that know one kind of sum.
        common.IA3Config = SMTConfig
    if module.__name__.endswith("test_decoder_models"):
        # The same list again, of one class.
        module.LoraConfig = SMTConfig
    if module.__name__.endswith("test_stablediffusion"):
        module.skip_if_not_lora = lambda config_cls: None


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makemodule(module_path, parent):
    node = yield
    if node is not None and module_path.name in _asked(parent.config):
        module = node.obj
        if patterns := FILES[module_path.name].stand_in:
            stand_in.put_in(module, patterns)
        for test in tests_of(module):
            put_in(module, test)
        lift_allow_lists(module)
    return node


def pytest_addoption(parser):
    parser.addoption("--run-skipped", action="store_true", help="run what skips.md skips here")


def pytest_collection_modifyitems(config, items):
    chosen = [item for item in items if _is_ours(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen
    for item in [] if config.option.run_skipped else items:
        for skip in SKIPS:
            if skip.is_ours and skip.names(_name(item.nodeid)):
                item.add_marker(pytest.mark.skip(reason=skip.reason))
                break


def _asked(config) -> set[str]:
    return {os.path.basename(argument.split("::")[0]) for argument in config.args}


def _name(nodeid: str) -> str:
    """`file.py::Class::test[case]`"""
    return nodeid.removeprefix("tests/")


def _is_ours(item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if any(_holds_smt(value) for value in parameters.values()):
        return True
    file, _, name = _name(item.nodeid).partition("::")
    return any(stand_in.is_in(pattern, name) for pattern in FILES[file].stand_in) and not stand_in.is_of_another(item)


def _holds_smt(value: object) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(one is SMTConfig or isinstance(one, SMTConfig) for one in values)


class Record:
    """What came out, by outcome; filled from reports, which arrive here also from parallel workers."""

    def __init__(self) -> None:
        self.totals: collections.Counter[str] = collections.Counter()
        self.run: set[str] = set()
        self.failed: dict[str, str] = {}
        self.skipped: list[tuple[str, str]] = []

    def add(self, report) -> None:
        if report.when != "call" and (report.when != "setup" or report.outcome == "passed") and not report.failed:
            return
        name = _name(report.nodeid)
        self.run.add(name)
        outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        self.totals[outcome] += 1
        if outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed[name] = getattr(crash, "message", str(report.longrepr)[-300:]).splitlines()[0][:300]
        elif outcome == "skipped":
            self.skipped.append((name, str(report.longrepr[2]).removeprefix("Skipped: ")))

    def faults(self, files: set[str], whole_files: bool) -> list[str]:
        """Where the run and the tables disagree."""
        faults = [f"no line of skips.md explains {why!r} of {test}" for test, why in unexplained(self.skipped, SKIPS)]
        if not whole_files:
            return faults
        faults += [f"this line of skips.md matches nothing: {skip.test} | {skip.message}" for skip in self.stale(files)]
        for file in sorted(files):
            names = [name.partition("::")[2] for name in self.run if name.startswith(file + "::")]
            if not names:
                faults.append(f"SMT got into no test of {file}")
            faults += [
                f"SMT stands in for LoRA in no test of {file} that is called {pattern}"
                for pattern in FILES[file].stand_in
                if not any(stand_in.is_in(pattern, name) for name in names)
            ]
        return faults

    def stale(self, files: set[str]) -> list[Skip]:
        return stale(self.skipped, SKIPS, files)


RECORD = Record()
FAULTS: list[str] = []


def pytest_runtest_logreport(report):
    RECORD.add(report)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    config = session.config
    if hasattr(config, "workerinput"):
        return
    narrowed = (
        config.option.run_skipped
        or config.option.keyword
        or config.option.markexpr
        or any("::" in argument for argument in config.args)
    )
    stopped = session.shouldstop or session.shouldfail
    FAULTS.extend(RECORD.faults(_asked(config), whole_files=not narrowed and not stopped))
    if FAULTS and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if path := os.environ.get("PEFT_SUITE_RESULT"):
        write_result(path)


def write_result(path: str) -> None:
    result = {
        "peft": PEFT_VERSION,
        "totals": RECORD.totals,
        "skipped": collections.Counter(reason for _, reason in RECORD.skipped).most_common(),
        "failed": RECORD.failed,
        "faults": FAULTS,
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)


def pytest_terminal_summary(terminalreporter):
    totals = ", ".join(f"{RECORD.totals[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped", "xfailed"))
    terminalreporter.write_sep("=", f"SMT in the tests of PEFT {PEFT_VERSION}: {totals}")
    for reason, count in collections.Counter(reason for _, reason in RECORD.skipped).most_common():
        terminalreporter.write_line(f"{count:5d} x {reason}")
    for fault, count in collections.Counter(fault.partition("[")[0] for fault in FAULTS).items():
        terminalreporter.write_line(f"FAULT {fault}" + f" (and {count - 1} like it)" * (count > 1))

"""The DSPy plugin against DSPy itself, offline: programs bootstrapped, tuned, merged, and called again."""

# ruff: noqa: E402  (what is imported below needs what is asked for first)

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch

dspy = pytest.importorskip("dspy", reason="make integrations")
pytest.importorskip("trl")

import cloudpickle
from dspy.clients import lm_local
from dspy.clients.provider import TrainingJob
from dspy.clients.utils_finetune import TrainDataFormat, TrainingStatus
from dspy.utils import DummyLM
from openai_server import serving
from peft import LoraConfig, PeftModel, PromptTuningConfig
from sounds import EXAMPLES, QUICK, SMT, SOUNDS, Sounds, right, row, rows, save_model, score, scripted
from transformers import AutoModelForCausalLM

from smt_peft import BlockSelection, SMTConfig, select_blocks
from smt_peft.export.merge import load_adapter
from smt_peft.integrations.dspy import BootstrapFinetune, LocalLM, SMTProvider
from smt_peft.integrations.dspy import settings as plugin_settings
from smt_peft.training.errors import ConfigError

CHAT = TrainDataFormat.CHAT
DOCS = Path(__file__).parents[2] / "docs" / "dspy.md"


@pytest.fixture(scope="module", autouse=True)
def apart(tmp_path_factory):
    """One thread, no cache on the disk, and nothing that DSPy writes lies outside of the tests' directory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dspy.configure_cache(enable_disk_cache=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSPY_FINETUNEDIR", str(tmp_path_factory.mktemp("finetune")))
        yield
    torch.set_num_threads(threads)
    # DSPy loads it when it is needed, and it fetches prices as it is loaded.
    assert "litellm" not in sys.modules


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_model(tmp_path_factory.mktemp("dspy") / "model"))


def student_of(model: str, **settings) -> Sounds:
    program = Sounds()
    program.set_lm(LocalLM(model, **{"max_tokens": 24, "temperature": 0, **settings}))
    return program


@pytest.fixture(scope="module")
def tuned(model) -> Sounds:
    """Bootstrapped from a teacher who is wrong about the cow, and tuned by SMT."""
    compiler = BootstrapFinetune(metric=right, train_kwargs={**QUICK, "smt": SMT})
    return compiler.compile(student_of(model), trainset=EXAMPLES, teacher=scripted(cow="oink"))


def job_of(program: Sounds) -> Path:
    """Where the fine-tuning of the program's last predictor wrote."""
    return Path(program.speak.lm.model).parent


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TestBootstrapping:
    def test_a_tuned_program_answers_where_the_student_could_not(self, model, tuned):
        assert score(student_of(model)) == 0
        # Four of five: nobody taught it the cow.
        assert score(tuned) == 80
        assert {tuned(word=word).sound for word in ("cat", "dog", "car", "bell")} == {"meow", "woof", "vroom", "ding"}

    def test_both_predictors_call_one_tuned_model_beside_their_base(self, model, tuned):
        assert tuned.classify.lm is tuned.speak.lm
        assert tuned.speak.lm.model != model
        assert isinstance(tuned.speak.lm, LocalLM)

    def test_traces_that_fail_the_metric_are_not_trained_on(self, tuned):
        data = (job_of(tuned) / "train.jsonl").read_text()
        assert len(data.splitlines()) == 8
        assert "oink" not in data and "cow" not in data

    def test_the_count_of_traces_is_told(self, model, caplog):
        compiler = BootstrapFinetune(metric=right)
        traces = [
            {"prediction": dspy.Prediction(sound=sound), "trace": [], "score": sound == "moo"}
            for sound in ("moo", "oink")
        ]
        with caplog.at_level("INFO", logger="smt_peft"):
            compiler._prepare_finetune_data(traces, LocalLM(model))
        assert "1 of 2 traces are trained on (0 unreadable, 1 failed by the metric): 0 rows" in caplog.text

    def test_the_model_is_base_plus_delta_bit_for_bit(self, tuned):
        merged = AutoModelForCausalLM.from_pretrained(job_of(tuned) / "model").state_dict()
        expected = load_adapter(job_of(tuned) / "run").merge_and_unload().state_dict()
        assert equal(merged, expected)
        base = AutoModelForCausalLM.from_pretrained(
            json.loads((job_of(tuned) / "run" / "adapter_config.json").read_text())["base_model_name_or_path"]
        ).state_dict()
        changed = [name for name in base if not torch.equal(base[name], merged[name])]
        assert len(changed) == 14 and all("_proj" in name for name in changed)

    def test_each_predictor_may_have_a_model_of_its_own(self, model):
        compiler = BootstrapFinetune(
            metric=right, multitask=False, num_threads=2, train_kwargs={**QUICK, "smt": SMT, "max_steps": 40}
        )
        program = compiler.compile(student_of(model), trainset=EXAMPLES, teacher=scripted())
        assert program.classify.lm.model != program.speak.lm.model
        data = [json.loads(line) for line in (job_of(program) / "train.jsonl").read_text().splitlines()]
        assert len(data) == len(SOUNDS) and all("sound" in item["completion"][0]["content"] for item in data)
        assert score(program) == 100

    def test_an_answer_that_cannot_be_read_is_left_out(self, model):
        teacher = scripted()
        teacher.classify.lm = DummyLM({word: {"kind": kind} for word, (kind, _) in SOUNDS.items() if word != "cow"})
        compiler = BootstrapFinetune(metric=right, train_kwargs={**QUICK, "smt": SMT, "max_steps": 1})
        program = compiler.compile(student_of(model), trainset=EXAMPLES, teacher=teacher)
        assert "cow" not in (job_of(program) / "train.jsonl").read_text()

    def test_a_metric_that_nothing_passes_is_an_error_with_counts(self, model):
        compiler = BootstrapFinetune(metric=right)
        teacher = scripted(**dict.fromkeys(SOUNDS, "oink"))
        with pytest.raises(ValueError, match=r"none of the 5 traces is left .* \(0 unreadable, 5 failed"):
            compiler.compile(student_of(model), trainset=EXAMPLES, teacher=teacher)
        with pytest.raises(ConfigError, match="there is not one row"):
            dspy.BootstrapFinetune(metric=right).compile(student_of(model), trainset=EXAMPLES, teacher=teacher)

    def test_a_saved_program_answers_alike_in_a_fresh_process(self, tuned, tmp_path):
        tuned.save(tmp_path / "program.json")
        code = f"""
import dspy
from sounds import Sounds
dspy.configure_cache(enable_disk_cache=False)
program = Sounds()
program.load({str(tmp_path / "program.json")!r}, allow_unsafe_lm_state=True)
print(program(word="dog").sound, type(program.speak.lm).__name__)
"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )
        assert done.stdout.strip() == "woof LocalLM", done.stderr


@pytest.fixture(scope="module")
def torn(tmp_path_factory) -> dspy.Predict:
    """A predictor that says of a pet now meow, now woof; and what it is told to, when there is a hint."""
    speak = Sounds().speak.signature
    hinted = speak.append("hint_", dspy.InputField(desc="A hint to the module from an earlier run"))
    pet = {"word": "pet", "kind": "animal"}
    calls = [row(speak, pet, {"sound": sound}) for sound in ("meow", "woof")]
    for sound in ("meow", "woof", "moo"):
        calls.append(row(hinted, {**pet, "hint_": f"A pet says {sound}."}, {"sound": sound}))
    texts = [turn["content"] for call in calls for turn in call["messages"]]
    model = str(save_model(tmp_path_factory.mktemp("torn") / "model", texts))
    job = LocalLM(model, max_tokens=24, temperature=0, seed=3).finetune(calls, CHAT, {**QUICK, "smt": SMT})
    speaker = dspy.Predict(speak)
    speaker.set_lm(job.result())
    return speaker


class TestRewards:
    """What dspy.Assert and dspy.Suggest were for: today a reward function around a program."""

    def test_best_of_n_samples_until_the_reward_is_reached(self, torn):
        first = torn(word="pet", kind="animal").sound
        (other,) = {"meow", "woof"} - {first}
        seen = []

        def is_the_other(inputs, prediction):
            seen.append(prediction.sound)
            return float(prediction.sound == other)

        best = dspy.BestOfN(module=torn, N=16, reward_fn=is_the_other, threshold=1.0)
        assert best(word="pet", kind="animal").sound == other
        assert seen[-1] == other and other not in seen[:-1]

    def test_refine_follows_the_advice_that_its_feedback_found(self, torn):
        def moos(inputs, prediction):
            return float(prediction.sound == "moo")

        advisor = DummyLM([{"discussion": "It must moo.", "advice": '{"self": "A pet says moo."}'}] * 8)
        refined = dspy.Refine(module=torn, N=8, reward_fn=moos, threshold=1.0)
        with dspy.context(lm=advisor):
            assert refined(word="pet", kind="animal").sound == "moo"
        assert advisor.history


class TestTrainKwargs:
    def test_any_method_of_peft_trains_and_is_merged(self, model):
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        job = LocalLM(model, max_tokens=24, temperature=0).finetune(rows(), CHAT, {**QUICK, "peft_config": config})
        program = Sounds()
        program.set_lm(lm := job.result())
        assert score(program) == 100
        assert job.status() == TrainingStatus.succeeded
        base = AutoModelForCausalLM.from_pretrained(model)
        adapter = PeftModel.from_pretrained(base, job_of(program) / "run")
        expected = adapter.merge_and_unload(safe_merge=True).state_dict()
        assert equal(AutoModelForCausalLM.from_pretrained(lm.model).state_dict(), expected)
        assert config.base_model_name_or_path is None

    def test_an_smt_config_is_the_block_of_the_run(self, model):
        config = SMTConfig(num_blocks=3, block_size=8, score="magnitude", target_modules=["q_proj", "v_proj"])
        tuner = SMTProvider()
        settings = {**QUICK, "max_steps": 1, "peft_config": config}
        out = tuner.finetune(tuner.TrainingJob(), model, rows(), CHAT, settings)
        saved = json.loads((Path(out).parent / "run" / "adapter_config.json").read_text())
        assert saved["num_blocks"] == 3 and saved["score"] == "magnitude"
        assert all(shape == [3, 8, 8] for shape in saved["block_pattern"].values())

    def test_an_smt_config_may_bring_its_blocks(self, model):
        config = SMTConfig(density=0.1, score="diagonal", target_modules=["q_proj"])
        config.selection = select_blocks(AutoModelForCausalLM.from_pretrained(model), config)
        config.score = lambda weight, grad: grad
        tuner = SMTProvider()
        out = tuner.finetune(tuner.TrainingJob(), model, rows(), CHAT, {**QUICK, "max_steps": 1, "peft_config": config})
        trained = BlockSelection.load(Path(out).parent / "run" / "selection.safetensors")
        assert {name: found.tolist() for name, found in trained.blocks.items()} == {
            name: found.tolist() for name, found in config.selection.blocks.items()
        }

    def test_completions_train_as_text_in_the_directory_that_is_named(self, model, tmp_path):
        data = [{"prompt": "a cat says ", "completion": "meow"}, {"prompt": "a dog says ", "completion": "woof"}]
        tuner = SMTProvider()
        settings = {**QUICK, "max_steps": 1, "smt": SMT, "output_dir": str(tmp_path)}
        out = tuner.finetune(tuner.TrainingJob(), model, data, TrainDataFormat.COMPLETION, settings)
        assert Path(out).parents[1] == tmp_path
        assert SMTProvider.is_provider_model(out) and not SMTProvider.is_provider_model("openai/gpt-4o")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"learning_rat": 1.0}, "unknown key 'learning_rat'; did you mean 'learning_rate'"),
            ({"smt": {"densty": 0.1}}, "did you mean 'smt.density'"),
            ({"dataset_path": "x.jsonl"}, "dataset_path has no place here: the traces are the data"),
            ({"peft_config": {"r": 8}}, "peft_config must be a config of PEFT, got dict"),
            ({"peft_config": PromptTuningConfig(num_virtual_tokens=4)}, "PromptTuningConfig adds a prompt"),
            ({"peft_config": LoraConfig(), "smt": SMT}, "smt beside peft_config=LoraConfig: leave one of them out"),
            ({"peft_config": LoraConfig(target_modules=["nope"])}, "peft_config: .*nope"),
            ({"learning_rate": torch.tensor(1.0)}, "nothing that a YAML can hold"),
            ({"peft_config": SMTConfig(score=lambda weight, grad: grad)}, "a score that is a function"),
        ],
    )
    def test_what_cannot_be_used_is_named(self, model, settings, message):
        job = LocalLM(model).finetune(rows(), CHAT, settings)
        with pytest.raises(ConfigError, match=message):
            raise job.result()
        assert job.status() == TrainingStatus.failed

    @pytest.mark.parametrize(
        ("data", "form", "message"),
        [
            ([], CHAT, "there is not one row"),
            ([{"messages": [{"role": "user", "content": "moo?"}]}], CHAT, "row 0 is no conversation that ends with"),
            ([{}], TrainDataFormat.GRPO_CHAT, "cannot be trained on; CHAT and COMPLETION can"),
        ],
    )
    def test_data_that_cannot_be_used_is_named(self, model, data, form, message):
        with pytest.raises(ConfigError, match=message):
            SMTProvider().finetune(TrainingJob(), model, data, form)

    def test_a_cancelled_job_ends_after_the_step_it_is_at(self, model):
        lm = LocalLM(model)
        job = lm.finetune(rows(), CHAT, {**QUICK, "smt": SMT, "max_steps": 10**6})
        assert job.started.wait(60)
        assert job.cancel()
        assert isinstance(job.result(60), CancelledError)
        assert job.status() == TrainingStatus.cancelled


class TestLocalLM:
    def test_usage_counts_the_tokens_of_prompt_and_answer(self, tuned):
        lm = tuned.speak.lm
        with dspy.track_usage() as usage:
            lm("a fresh question", max_tokens=5, cache=False)
        counted = usage.get_total_tokens()[lm.model]
        loaded = lm.engine._get(lm.model)
        text = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": "a fresh question"}], add_generation_prompt=True, tokenize=False
        )
        assert counted["prompt_tokens"] == len(loaded.tokenizer(text)["input_ids"])
        assert 1 <= counted["completion_tokens"] <= 5

    def test_the_answer_is_that_of_the_model_itself(self, tuned):
        lm = tuned.speak.lm
        loaded = lm.engine._get(lm.model)
        messages = rows()[0]["messages"][:-1]
        ids = loaded.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = loaded.model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
        request = [dspy.lm15.Message.user(messages[1]["content"])]
        answer = lm(dspy.lm15.Request(model=lm.model, system=messages[0]["content"], messages=request))
        assert answer.text == loaded.tokenizer.decode(out, skip_special_tokens=True)
        assert answer.finish_reason == "stop"

    def test_a_call_is_cached_and_a_rollout_is_not_its_repetition(self, model):
        lm = LocalLM(model, temperature=1.0, max_tokens=8)
        first = lm("moo?")
        assert lm("moo?") == first
        others = [lm("moo?", rollout_id=rollout)[0] for rollout in range(1, 5)]
        assert len({first[0], *others}) > 1
        assert [lm("moo?", rollout_id=rollout)[0] for rollout in range(1, 5)] == others

    def test_a_seed_repeats_a_call_and_its_candidates_differ(self, model):
        lm = LocalLM(model, temperature=1.0, max_tokens=8, seed=7, cache=False)
        candidates = lm("moo?", n=4)
        assert lm("moo?", n=4) == candidates
        assert len(set(candidates)) == 4
        assert lm("moo?", rollout_id=1) != lm("moo?")
        assert lm("moo?", seed=8) != lm("moo?")

    def test_a_seeded_call_leaves_the_generator_where_it_was(self, model):
        lm = LocalLM(model, temperature=1.0, max_tokens=8, seed=7, cache=False)
        before = torch.get_rng_state()
        lm("moo?")
        assert torch.equal(torch.get_rng_state(), before)

    def test_temperature_zero_is_greedy(self, model):
        lm = LocalLM(model, temperature=0, max_tokens=8, cache=False)
        assert len(set(lm("moo?", n=3))) == 1

    def test_an_answer_ends_before_a_stop_string(self, tuned):
        lm = tuned.speak.lm
        content = rows()[0]["messages"]
        messages = [dspy.lm15.Message.user(content[1]["content"])]
        config = dspy.lm15.Config(stop=("]]",), temperature=0, max_tokens=24)
        asked = dspy.lm15.Request(model=lm.model, system=content[0]["content"], messages=messages, config=config)
        assert lm(asked).text == "[[ ## kind ## "

    def test_coroutines_are_answered_as_calls_are(self, tuned):
        async def both():
            lm = tuned.speak.lm.copy(cache=False)
            return await asyncio.gather(lm.acall("moo?"), lm.acall("oink?"))

        assert asyncio.run(both()) == [tuned.speak.lm("moo?"), tuned.speak.lm("oink?")]

    def test_a_completion_is_a_stream_of_one_piece(self, tuned):
        lm = tuned.speak.lm
        asked = dspy.lm15.Request(model=lm.model, messages=[dspy.lm15.Message.user("moo?")])
        first, *_, last = lm.engine.stream(asked)
        assert (first.type, last.type) == ("start", "end")

    def test_launch_loads_and_kill_lets_go(self, model):
        lm = LocalLM(model)
        assert lm.engine.loaded() == []
        lm.launch()
        assert lm.engine.loaded() == [model] == lm.copy(temperature=1.0).engine.loaded()
        lm.kill()
        lm.kill()
        assert lm.engine.loaded() == []

    def test_a_pickled_program_answers_alike(self, tuned):
        again = cloudpickle.loads(cloudpickle.dumps(tuned))
        assert again.speak.lm.engine.loaded() == []
        assert again(word="dog").sound == "woof"
        assert again.speak.lm("moo?", cache=False) == tuned.speak.lm("moo?", cache=False)

    def test_copies_of_a_program_share_the_weights(self, tuned):
        copied = tuned.deepcopy()
        assert copied.speak.lm.engine is tuned.speak.lm.engine

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"presence_penalty": 1.0}, "presence_penalty: not to be had of a model in this process"),
            ({"logprobs": True}, "logprobs: not to be had"),
            ({"api_base": "http://localhost:1"}, "a custom engine owns its own"),
        ],
    )
    def test_a_setting_that_is_not_obeyed_is_refused(self, model, settings, message):
        with pytest.raises((dspy.LMError, ValueError), match=message):
            LocalLM(model, **settings)("moo?")

    def test_what_the_model_cannot_answer_is_named(self, model, tmp_path):
        with pytest.raises(dspy.utils.exceptions.ContextWindowExceededError, match="tokens, and .* a context of 512"):
            LocalLM(model)("zebra " * 500)
        with pytest.raises(dspy.LMError, match="cannot be loaded"):
            LocalLM(str(tmp_path / "nothing"))("moo?")
        plain = save_model(tmp_path / "plain", template=None)
        with pytest.raises(dspy.lm15.ConfigurationError, match="has no chat template"):
            LocalLM(str(plain)).launch()
        strict = save_model(tmp_path / "strict", template="{{ raise_exception('no system here') }}")
        with pytest.raises(dspy.LMError, match="refuses the messages: no system here"):
            LocalLM(str(strict))("moo?")


class TestServer:
    def test_a_served_model_is_tuned_and_served_again(self, model):
        served = [model]
        with serving(served) as url:
            program = Sounds()
            program.set_lm(
                dspy.LM(
                    f"openai/{model}",
                    api_base=url,
                    api_key="none",
                    provider=SMTProvider(server="openai/"),
                    temperature=0,
                    max_tokens=24,
                )
            )
            program.speak.lm.launch()
            assert score(program) == 0
            compiler = BootstrapFinetune(metric=right, train_kwargs={**QUICK, "smt": SMT})
            tuned = compiler.compile(program, trainset=EXAMPLES, teacher=scripted())
            path = tuned.speak.lm.model.removeprefix("openai/")
            with pytest.raises(RuntimeError, match=f"serves {model}, not {path}; start one: vllm serve {path}"):
                tuned.speak.lm.launch()
            served.append(path)
            tuned.speak.lm.launch()
            assert score(tuned) == 100
        with pytest.raises(RuntimeError, match="does not say what it serves"):
            tuned.speak.lm.launch()

    def test_a_server_that_is_not_named_is_asked_for(self, model):
        with pytest.raises(RuntimeError, match="pass api_base, or take LocalLM"):
            dspy.LM(f"openai/{model}", provider=SMTProvider(server="openai/")).launch()


class TestDocs:
    """docs/dspy.md, block by block, with a model that can learn its tickets and a teacher that knows them."""

    TICKETS = {
        "no light": {"team": "devices", "reply": "Press power."},
        "no sound": {"team": "devices", "reply": "Unmute."},
        "no bill": {"team": "accounts", "reply": "It is attached."},
    }

    def test_the_blocks_run(self, tmp_path, monkeypatch, capsys):
        first, *blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
        assert "MODEL = " in first and "TEACHER = " in first
        here = f"MODEL = {self.model(tmp_path)!r}\nTEACHER = dspy.utils.DummyLM({self.TICKETS!r})\n"
        blocks = ["import dspy\n", here, *(block for block in blocks if not block.startswith("# needs a server"))]
        # A file, as Refine shows the program's source to its adviser.
        (tmp_path / "how_to.py").write_text("\n".join(blocks).replace('"density": 0.01', '"density": 0.3'))
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(plugin_settings, "DEFAULTS", {**plugin_settings.DEFAULTS, **QUICK})
        how_to = importlib.import_module("how_to")
        answers = [how_to.again(ticket=ticket).reply for ticket in self.TICKETS]
        assert answers == [expected["reply"] for expected in self.TICKETS.values()]
        assert how_to.by_lora(ticket="no bill").reply == "It is attached."
        assert {"Press power.", "It is attached.", "Unmute."} <= set(capsys.readouterr().out.splitlines())

    def model(self, directory: Path) -> str:
        route, answer = dspy.Predict("ticket -> team").signature, dspy.Predict("ticket, team -> reply").signature
        texts = []
        for ticket, said in self.TICKETS.items():
            given = {"ticket": ticket, "team": said["team"]}
            for call in (row(route, {"ticket": ticket}, said), row(answer, given, said)):
                texts += [turn["content"] for turn in call["messages"]]
        return str(save_model(directory / "model", texts))

    def test_what_it_says_of_dspys_own_provider(self):
        source = Path(lm_local.__file__).read_text()
        for said in ("rank_dimension = 32", "lora_alpha = 64", "lora_dropout = 0.05", "float16", '"0.0.0.0"'):
            assert said in source
        import trl

        assert "setup_chat_format" in source and not hasattr(trl, "setup_chat_format")

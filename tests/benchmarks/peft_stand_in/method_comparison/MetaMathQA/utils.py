"""A stand-in for the harness' module of this name: the functions that a run of SMT meets, with their signatures."""

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = os.path.dirname(__file__)
RESULT_PATH = os.path.join(HERE, "results")
RESULT_PATH_TEST = os.path.join(HERE, "temporary_results")
RESULT_PATH_CANCELLED = os.path.join(HERE, "cancelled_results")


@dataclass
class TrainConfig:
    model_id: str
    max_seq_length: int
    batch_size: int
    max_steps: int
    query_template: str
    seed: int
    optimizer_kwargs: dict[str, Any]


def validate_experiment_path(path):
    if not os.path.exists(path):
        raise FileNotFoundError(f"Path {path} does not exist")
    parts = path.split(os.path.sep)
    if len(parts) != 3 or parts[0] != "experiments":
        raise ValueError(f"{path} is not experiments/<method>/<name>")
    return os.path.join(*parts[1:])


def get_train_config(path):
    with open(os.path.join(HERE, "default_training_params.json")) as file:
        settings = json.load(file)
    if os.path.exists(path):
        with open(path) as file:
            settings |= json.load(file)
    return TrainConfig(**settings)


def get_tokenizer(*, model_id, max_seq_length):
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    tokenizer.model_max_length = max_seq_length
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def get_model(*, model_id, dtype, peft_config, autocast_adapter_dtype):
    model = AutoModelForCausalLM.from_pretrained(model_id, dtype=getattr(torch, dtype))
    return get_peft_model(model, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)


class BucketIterator:
    def __init__(self, ds, *, batch_size, bucket_factor, delete_cols):
        self.ds, self.batch_size, self.bucket, self.delete = ds, batch_size, batch_size * bucket_factor, delete_cols

    def __iter__(self):
        for start in range(0, len(self.ds), self.bucket):
            bucket = self.ds[start : start + self.bucket]
            longest_first = sorted(range(len(bucket["input_ids"])), key=lambda i: -len(bucket["input_ids"][i]))
            columns = {name: column for name, column in bucket.items() if name not in self.delete}
            for first in range(0, len(longest_first), self.batch_size):
                chosen = longest_first[first : first + self.batch_size]
                yield {name: [column[i] for i in chosen] for name, column in columns.items()}


def log_to_file(*, log_data, save_dir, experiment_name, timestamp, print_fn):
    name = experiment_name.replace(os.path.sep, "--")
    if not save_dir.endswith(RESULT_PATH):
        name += f"--{timestamp}"
    with open(os.path.join(save_dir, f"{name}.json"), "w") as file:
        json.dump(log_data, file)
    print_fn(f"saved {name}")


def log_results(*, experiment_name, status, error, losses, trainable, train_config, peft_config, print_fn):
    log_data = {
        "run_info": {
            "experiment_name": experiment_name,
            "total_time": 2.0,
            "train_config": train_config,
            "peft_config": {k: sorted(v) if isinstance(v, set) else v for k, v in peft_config.items()},
            "error_msg": error,
        },
        "train_info": {
            "accelerator_memory_max": 3 * 2**30,
            "train_time": 1.0,
            "file_size": 5_000_000,
            "num_trainable_params": trainable,
            "status": status,
            "metrics": [{"step": 1, "test accuracy": 0.25, "train loss": losses[-1], "forgetting": 0.5}],
        },
        "meta_info": {"system_info": {"accelerator": "none"}},
    }
    log_to_file(
        log_data=log_data,
        save_dir=RESULT_PATH_CANCELLED if status == "canceled" else RESULT_PATH_TEST,
        experiment_name=experiment_name,
        timestamp="now",
        print_fn=print_fn,
    )

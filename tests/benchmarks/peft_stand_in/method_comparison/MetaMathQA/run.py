"""A stand-in for the harness' module of this name: a few steps of training, and a log of the same shape."""

import os
from dataclasses import asdict

import torch
from data import get_train_valid_test_datasets
from peft import PeftConfig
from transformers import set_seed
from utils import get_model, get_tokenizer, get_train_config, log_results

BUCKET_FACTOR = 2


def main(*, path_experiment, experiment_name, clean, bucket_name):
    peft_config = PeftConfig.from_pretrained(path_experiment)
    train_config = get_train_config(os.path.join(path_experiment, "training_params.json"))
    set_seed(train_config.seed)
    tokenizer = get_tokenizer(model_id=train_config.model_id, max_seq_length=train_config.max_seq_length)
    model = get_model(
        model_id=train_config.model_id, dtype="float32", peft_config=peft_config, autocast_adapter_dtype=True
    )
    print_verbose(model)  # noqa: F821  (whoever runs this module defines it)
    train_set, _, _ = get_train_valid_test_datasets(
        tokenizer=tokenizer,
        query_template=train_config.query_template,
        print_fn=print_verbose,  # noqa: F821
    )
    optimizer = torch.optim.AdamW(model.parameters(), **train_config.optimizer_kwargs)
    ids = torch.tensor([row["input_ids"][:8] for row in train_set])
    losses, status, error = [], "success", ""
    try:
        for _ in range(train_config.max_steps):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if os.environ.get("STAND_IN_FAILS"):
            raise RuntimeError("out of luck")
    except RuntimeError as caught:
        status, error = "canceled", str(caught)
    if directory := os.environ.get("STAND_IN_SAVES"):
        model.save_pretrained(directory)
    log_results(
        experiment_name=experiment_name,
        status=status,
        error=error,
        losses=losses,
        trainable=model.get_nb_trainable_parameters()[0],
        train_config=asdict(train_config),
        peft_config=peft_config.to_dict(),
        print_fn=print_verbose,  # noqa: F821
    )

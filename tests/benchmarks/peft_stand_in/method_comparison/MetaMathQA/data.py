"""A stand-in for the harness' module of this name: sums instead of MetaMathQA."""

from datasets import Dataset


def get_train_valid_test_datasets(*, tokenizer, query_template, print_fn):
    rows = [{"query": f"{i % 7}+{i % 5}", "response": f" {i % 7 + i % 5}" + "!" * (i % 6)} for i in range(48)]
    texts = [query_template.format(query=row["query"]) + row["response"] for row in rows]
    tokens = tokenizer(texts)
    print_fn(f"Train size: {len(rows)}")
    columns = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    train = Dataset.from_dict(columns | {"response": [row["response"] for row in rows]})
    return train, train, train

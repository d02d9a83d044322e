"""A split of a data set on the Hub, or of a local directory in its layout."""

from __future__ import annotations

from collections.abc import Iterator

from datasets import Dataset, load_dataset

from ..errors import ConfigError


class HubSplit:
    """One split, whole or as a stream.

    Args:
        name: of the data set.
        config: of its configuration; None: the only one.
        split: e.g. `train`, or a part of it, `train[:1000]`.
    """

    suffix = ""

    def __init__(self, name: str, config: str | None, split: str):
        self.name, self.config, self.split = name, config, split
        self.label = f"{name} ({', '.join(part for part in (config, split) if part)})"

    def arrow(self) -> Dataset:
        """All rows, from the cache once they are loaded."""
        return self._load()

    def scan(self) -> Iterator[tuple[str, dict]]:
        """The place of every row and the row, as they are fetched."""
        for number, row in enumerate(self._load(streaming=True), start=1):
            yield f"{self.label}, row {number}", row

    def place(self, index: int) -> str:
        """Where the row is that `arrow` counts as `index`, from 0."""
        return f"{self.label}, row {index + 1}"

    def _load(self, **options):
        try:
            return load_dataset(self.name, self.config, split=self.split, **options)
        except Exception as error:  # the Hub client raises errors of many libraries
            raise ConfigError(
                f"dataset_name: {self.name} (split {self.split}) cannot be read: {error}; check the name, the split "
                "and the network, or use a local file in dataset_path"
            ) from error

"""Rows that are read as they are needed, however many there are."""

from __future__ import annotations

from collections.abc import Iterator

from datasets import IterableDataset

from ..errors import ConfigError
from ..tell import tell
from .broken import SHOWN, Broken
from .features import features_of_row
from .files import LocalFile
from .forms import Form
from .hub import HubSplit
from .read import Reading, scanned_form, sound_rows


class Told(Broken):
    """Broken rows of a stream, whose end may never come: the first are told as they are met, once.

    Args:
        policy: as of `Broken`.
        label: of the stream.
    """

    def __init__(self, policy: str, label: str):
        super().__init__(policy)
        self.label, self.told = label, set()

    def add(self, place: str, fault: str) -> None:
        super().add(place, fault)
        if self.count <= SHOWN and place not in self.told:
            self.told.add(place)
            tell(f"{self.label}: skipped {place}: {fault}")

    def rewind(self) -> None:
        """Another pass begins."""
        self.count, self.first = 0, []

    def close(self) -> None:
        """A pass is over."""
        if self.count > SHOWN and "all" not in self.told:
            self.told.add("all")
            tell(f"{self.label}: {self.count:,} rows skipped in all")

    def __deepcopy__(self, memo) -> Told:
        # Streams are copied whenever they are shuffled or mixed; what was told stays told.
        return self


def stream_parts(parts: list[LocalFile | HubSplit], reading: Reading, label: str) -> tuple[IterableDataset, Form]:
    """The sound rows of files or of a split, one after the other, in the columns TRL reads, and their form.

    Raises:
        ConfigError: as `scanned_form`, or the files have different forms. A broken row that is to stop the run does
            so when it is reached.
    """
    found = [scanned_form(part, reading) for part in parts]
    form = found[0][0]
    for part, (other, _) in zip(parts, found, strict=True):
        if other != form:
            raise ConfigError(
                f"{label}: {parts[0].label} holds {form.name}, {part.label} {other.name}; files of one stream have one "
                "form, so list them as sources of their own in dataset_mixture"
            )
    columns = tuple(dict.fromkeys(name for _, names in found for name in names))
    settings = {"form": form, "columns": columns, "reading": reading, "broken": Told(reading.on_broken_row, label)}
    first = next(_rows(parts, **settings), None)
    if first is None:
        raise ConfigError(f"{label} holds no rows that can be used{settings['broken']}; put at least one into it")
    return IterableDataset.from_generator(
        _rows, features=features_of_row(first, reading.text_field), gen_kwargs={"parts": parts, **settings}
    ), form


def _rows(parts, form: Form, columns: tuple[str, ...], reading: Reading, broken: Told) -> Iterator[dict]:
    broken.rewind()
    for part in parts:
        yield from sound_rows(part, form, columns, reading, broken)
    broken.close()

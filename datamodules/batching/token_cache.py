"""Tokenized rows on disk, found again by all that they follow from."""

import hashlib
import importlib.metadata
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from datamodules.files.writing import Unfinished, checksum

if TYPE_CHECKING:
    import datasets

log = logging.getLogger("proactive")
LIBRARIES = ("tokenizers", "transformers")  # tokenize, and read chat templates


class Notes(BaseModel):
    """What stands beside the file of some rows."""

    digest: str
    counts: dict[str, int]
    checksum: int  # of the file


@dataclass(frozen=True)
class CachedRows:
    """Rows of token ids."""

    rows: "datasets.Dataset"
    digest: str  # of the rows in their order; it knows nothing of how they came into being
    counts: dict[str, int]  # what was counted while they were written


def cached_rows(
    what: Any,
    write: Callable[[Counter[str]], Iterable[Mapping[str, Any]]],
    columns: Mapping[str, str | list[str]],
    folder: Path | None = None,
    label: str = "tokenizing",
) -> CachedRows:
    """Rows from the cache, or written there now, a row at a time.

    Args:
        what: Everything that the rows follow from besides the code, as JSON can write it.
        write: Gives the rows; takes a counter to count in.
        columns: The type of each column, such as "int32" or "string"; of lists in brackets.
        folder: Where to keep the rows; the cache of Hugging Face `datasets` if None.
        label: What the progress bar says.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter
    from datasets.utils import tqdm

    folder = folder or Path(datasets.config.HF_DATASETS_CACHE, "proactive")
    path = folder / f"{hashlib.sha256(json.dumps([what, code_digest()]).encode()).hexdigest()[:32]}.arrow"
    if (found := _kept(path)) is None:
        features = {
            name: datasets.List(datasets.Value(kind[0])) if isinstance(kind, list) else datasets.Value(kind)
            for name, kind in columns.items()
        }
        counts: Counter[str] = Counter()
        digest = hashlib.sha256()
        with Unfinished(path) as rows, Unfinished(path.with_suffix(".json")) as notes:
            with ArrowWriter(path=str(rows.path), features=datasets.Features(features)) as writer:
                for row in tqdm(write(counts), desc=label, unit=" rows"):
                    digest.update(json.dumps([row[name] for name in columns]).encode())
                    writer.write(row)
                writer.finalize()
            found = Notes(digest=digest.hexdigest(), counts=dict(counts), checksum=checksum(rows.path))
            notes.path.write_text(found.model_dump_json())
            for file in (rows, notes):
                file.path.replace(file.target)
    return CachedRows(datasets.Dataset.from_file(str(path)), found.digest, found.counts)


def _kept(path: Path) -> Notes | None:
    """What is known of rows in the cache; None if there are none, or they are damaged and have to be made anew."""
    notes = path.with_suffix(".json")
    try:
        found = Notes.model_validate_json(notes.read_bytes())
        if checksum(path) == found.checksum:
            return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        pass
    log.warning(f"{path} is damaged, so it is made anew")
    return None


@cache
def code_digest() -> str:
    """A digest of the code that renders and tokenizes rows: this package, and the versions of `LIBRARIES`."""
    digest = hashlib.sha256(json.dumps([importlib.metadata.version(name) for name in LIBRARIES]).encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()

"""A cache of tokenized rows on disk, keyed by everything that the rows depend on."""

import hashlib
import importlib.metadata
import json
import logging
import tempfile
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
LIBRARIES = ("tokenizers", "transformers")  # they tokenize, and render chat templates
Columns = Mapping[str, str | list[str]]  # type of each column, such as "int32"; ["int32"] for lists of it


class CacheNote(BaseModel):
    """The JSON file beside a cached file."""

    digest: str
    counts: dict[str, int]
    checksum: int  # CRC-32 of the cached file


@dataclass(frozen=True)
class CachedRows:
    """Rows of token ids.

    Attributes:
        rows: The rows.
        digest: Digest of the rows in their order.
        counts: What `write` counted.
    """

    rows: "datasets.Dataset"
    digest: str
    counts: dict[str, int]


class TokenCache:
    """A cache of tokenized rows on disk.

    Args:
        key: What all rows depend on besides the code, such as the tokenizer. Must be JSON.
        keep: Whether to keep the rows in the cache of Hugging Face `datasets`. If not, they are in a temporary folder
            that is removed with this object.
    """

    def __init__(self, key: Any, *, keep: bool) -> None:
        self.key = key
        self._temporary = None if keep else tempfile.TemporaryDirectory()

    @property
    def folder(self) -> Path:
        """The folder of the cached files."""
        if self._temporary is not None:
            return Path(self._temporary.name)
        import datasets

        return Path(datasets.config.HF_DATASETS_CACHE, "proactive")

    def rows(
        self, key: Any, write: Callable[[Counter[str]], Iterable[Mapping[str, Any]]], columns: Columns, label: str
    ) -> CachedRows:
        """Return rows from the cache, or write them there, one row at a time.

        Args:
            key: What these rows depend on, besides the key of the cache. Must be JSON.
            write: Yields the rows, and counts into its argument.
            columns: Type of each column.
            label: Names the rows in the progress bar.
        """
        digest = hashlib.sha256(json.dumps([key, self.key, code_digest()]).encode()).hexdigest()[:32]
        return _cached_rows(self.folder / f"{digest}.arrow", write, columns, f"tokenizing {label}")


def _cached_rows(
    path: Path, write: Callable[[Counter[str]], Iterable[Mapping[str, Any]]], columns: Columns, label: str
) -> CachedRows:
    """Read the rows of a file; write them first if there is no sound file."""
    import datasets
    from datasets.arrow_writer import ArrowWriter
    from datasets.utils import tqdm

    if (note := _note_of(path)) is None:
        features = {
            name: datasets.List(datasets.Value(kind[0])) if isinstance(kind, list) else datasets.Value(kind)
            for name, kind in columns.items()
        }
        counts: Counter[str] = Counter()
        digest = hashlib.sha256()
        with Unfinished(path) as rows, Unfinished(path.with_suffix(".json")) as note_file:
            with ArrowWriter(path=str(rows.path), features=datasets.Features(features)) as writer:
                for row in tqdm(write(counts), desc=label, unit=" rows"):
                    digest.update(json.dumps([row[name] for name in columns]).encode())
                    writer.write(row)
                writer.finalize()
            note = CacheNote(digest=digest.hexdigest(), counts=dict(counts), checksum=checksum(rows.path))
            note_file.path.write_text(note.model_dump_json())
            for file in (rows, note_file):
                file.path.replace(file.target)
    return CachedRows(datasets.Dataset.from_file(str(path)), note.digest, note.counts)


def _note_of(path: Path) -> CacheNote | None:
    """Read the note of a cached file; None if there is no such file, or if it is damaged."""
    try:
        note = CacheNote.model_validate_json(path.with_suffix(".json").read_bytes())
        if checksum(path) == note.checksum:
            return note
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        pass
    log.warning(f"{path} is damaged and is written again")
    return None


@cache
def code_digest() -> str:
    """Return a digest of the code that renders and tokenizes: this package, and the versions of `LIBRARIES`."""
    digest = hashlib.sha256(json.dumps([importlib.metadata.version(name) for name in LIBRARIES]).encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()

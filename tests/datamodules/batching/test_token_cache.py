"""The cache of tokenized rows: damaged files are written again."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datamodules.batching.token_cache import TokenCache

ROWS = [{"input_ids": list(range(place, place + 40)), "name": f"row {place}"} for place in range(50)]


class Writes:
    """Gives the rows, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, counts: Counter[str]) -> Iterator[dict[str, Any]]:
        self.count += 1
        counts["written"] += len(ROWS)
        yield from ROWS


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "rows cut": (".arrow", cut),
    "a flipped bit": (".arrow", flipped),
    "no rows": (".arrow", lambda path: path.write_bytes(b"")),
    "rows missing": (".arrow", lambda path: path.unlink()),
    "notes cut": (".json", cut),
    "no notes": (".json", lambda path: path.write_text("")),
    "notes of a list": (".json", lambda path: path.write_text("[]")),
    "notes without a checksum": (".json", lambda path: path.write_text('{"digest": "a", "counts": {}}')),
    "notes missing": (".json", lambda path: path.unlink()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_file_is_written_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenCache, "folder", tmp_path)
    write, cache = Writes(), TokenCache("tokenizer", keep=True)

    def rows() -> Any:
        return cache.rows("rows", write, {"input_ids": ["int32"], "name": "string"}, "rows")

    before = rows()
    assert (rows().digest, write.count) == (before.digest, 1), "the cache serves"
    suffix, spoil = DAMAGES[damage]
    spoil(next(tmp_path.glob(f"*{suffix}")))
    again = rows()
    assert write.count == 2
    assert (again.digest, again.counts) == (before.digest, {"written": len(ROWS)})
    assert again.rows.to_list() == ROWS
    rows()
    assert write.count == 2
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".arrow", ".json"]

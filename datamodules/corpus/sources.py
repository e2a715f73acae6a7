"""Sources of rows: the embedded simulator, the published files, a folder in their layout, or tables."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from datamodules.corpus.columns import Columns, table_rows
from datamodules.corpus.json_records import read_json_list, read_jsonl
from datamodules.corpus.records import AnnotatedRow, TestStep
from datamodules.corpus.tables import SPLITS, TRAIN_HINT, open_tables
from datamodules.errors import UserError
from datamodules.escaping import error_text
from datamodules.files.reading import file_digest

PUBLISHED_COMMIT = "86383616ee530e9bcd1e9fe2269703ef3e3d8478"
PUBLISHED_URL = f"https://raw.githubusercontent.com/thunlp/ProactiveAgent/{PUBLISHED_COMMIT}/dataset"
PUBLISHED_SHA256 = {
    "reward_data/test_data.jsonl": "1ce3c041f6ed5e4de1122ef18e71fa151b340b23247737ee7991b00c83978224",
    "reward_data/train_data.jsonl": "e3a7303c469f5a6de4ca28cbeea31adc7232353767fd29de87c914bb4e5b0c53",
    "test_data/code_11.json": "c5c4f0635a207df8248a190760c23af3f23096fc67edaa9e4ec15b934e99bdd7",
    "test_data/code_12.json": "416028bc0fb747b3322592950f718933dac81ed8cae05aa53d71f972ebaf62aa",
    "test_data/code_13.json": "cd6fb734b318272a2f711648b97f0602bf57c237903d8605db2c967f6200214e",
    "test_data/code_14.json": "c2e1810639846588bd026ed3e0470f0a55dfdc6f8cfa3b9eeb56b5401e306c1b",
    "test_data/code_15.json": "de4b9e93c91e969d6094dac159ec5eb9b325c68e2b823f6ba129cc706fe38087",
    "test_data/code_16.json": "0f8feeff9c7755884df8f0753fe58d42b4f00d141ca11d990694e7dc7e9670ad",
    "test_data/splits.json": "8ab113d862e0e5210564a3ac4d11dcce84682540b31f91c05bf4230a3fe98b3d",
    "test_data/writing_11.json": "8033aeef485660a37e36974ff1706c436a02b45db9376d553df5e125882ff074",
    "test_data/writing_12.json": "8d94eb9a5e39a94e129d3ad53b49e1ff2bead571d07fcb04b1c489abc74d0667",
    "test_data/writing_13.json": "35440bb20735c510ec2301a1968472a305dfbff99b75ef2cb8204f754683bb75",
    "test_data/writing_14.json": "3f289083738febd44d9f212a5c3d08c916ea6f56744ac52165bd5028cacd5858",
    "test_data/writing_15.json": "5d5cfa5e45894469458614bb8b260458b84c07a67033082a667f7026e06b14ec",
    "test_data/writing_16.json": "0f97f544da9353e55fe17e7ea5e1cb6d27dd50f2ff1fd74a729a2782d879c213",
}
# `rows_digest` of the rows of test_data.jsonl; `traces_digest` of the 12 test traces, in the test set and as recorded
# with the answers of agents.
PUBLISHED_TEST_DIGEST = "cdeaba8419002d90"
PUBLISHED_TRACES_DIGESTS = ("4345087ce462c492", "62505f22097c41fe")
TRAIN_FILE = "reward_data/train_data.jsonl"
TEST_FILE = "reward_data/test_data.jsonl"
TRACES = "test_data"
SPLITS_FILE = "test_data/splits.json"


@dataclass(frozen=True)
class Corpus:
    """The contents of a root: annotated rows of two files, and the agent's test traces by file name.

    `splits_file` names splits of the traces. It is not read here. `notes` says how tables were read.
    """

    root: str
    train: list[AnnotatedRow]
    test: list[AnnotatedRow]
    traces: dict[str, list[TestStep]] = field(default_factory=dict)
    splits_file: Path | None = None
    notes: tuple[str, ...] = ()

    @cached_property  # accessed thousands of times
    def rows(self) -> list[AnnotatedRow]:
        """The rows of both files."""
        return self.train + self.test


def load_corpus(root: str, seed: int = 0, columns: Columns | None = None, trains: bool = True) -> Corpus:
    """Load the rows of a root.

    Args:
        root: "embedded", "published", a folder in the published layout, or tables; see `open_tables`.
        seed: Seed of the embedded data; files do not depend on it.
        columns: Which columns of a table hold the fields of a row; None for those with the names of the fields.
        trains: Whether the root must have training rows; if not, test rows are enough.

    Raises:
        UserError: A file is missing or a record does not fit.
    """
    path = Path(root)
    needed = (TRAIN_FILE,) if trains else (TRAIN_FILE, TEST_FILE)
    if root not in ("embedded", "published") and not any(Path(path, name).exists() for name in needed):
        return _read_tables(root, columns or Columns(), trains)
    if columns is not None:
        raise UserError(f"data.columns: {root} is no table, and has fixed fields", "Leave data.columns out.")
    if root == "embedded":
        from datamodules.corpus.simulator import simulate

        return Corpus(root, *simulate(seed))
    if root == "published":
        return read_directory(download_published(), root)
    paths = {file.relative_to(path).as_posix(): file for file in sorted(path.glob(f"{TRACES}/*.json"))}
    paths |= {name: path / name for name in (TRAIN_FILE, TEST_FILE) if (path / name).exists()}
    return read_directory(paths, root)


def _read_tables(root: str, columns: Columns, trains: bool) -> Corpus:
    """Read the rows of tables. Those of validation train, because every run makes its own validation split."""
    tables = open_tables(root, "data.root")
    if not tables.of("train") and (trains or not tables.of("test")):
        raise UserError(f"data.root: {root} has no {TRAIN_FILE}, and no table that trains", TRAIN_HINT)
    rows: dict[str, list[AnnotatedRow]] = {"train": [], "test": []}
    notes = tables.origin
    for split, parts in tables.splits.items():
        for table in parts:
            read = list(table_rows(table, columns))
            rows[SPLITS[split]] += read
            how = "" if split in rows else f" ({split}), which train, because every run makes its own validation split"
            unread = table.unread(columns.by_field.values())
            notes.append(f"{table.where}: {len(read)} rows{how}{f'; columns not read: {unread}' if unread else ''}")
    train, test = rows["train"], rows["test"]
    if trains and not train:
        raise UserError(f"data.root: {root} holds no training row", "Give a table with rows, named train.")
    if not train + test:
        raise UserError(f"data.root: {root} holds no row", "Give a table with rows.")
    return Corpus(root, train, test, notes=(*notes, *_repeated_note(train), _scenes_note(train + test, bool(test))))


def _repeated_note(rows: Sequence[AnnotatedRow]) -> list[str]:
    """Say how many rows repeat another one."""
    repeated = len(rows) - len({(row.history_digest, row.proposal, row.accepted) for row in rows})
    return [f"{repeated} training rows repeat history, proposal and judgment of another one"] if repeated else []


def _scenes_note(rows: Sequence[AnnotatedRow], has_test: bool) -> str:
    """Say which splits are possible."""
    scenes = len({row.scene for row in rows})
    told = (
        "rows whose histories begin with the same event are one scene"
        if rows[0].stated_scene is None
        else "named by the column of scenes"
    )
    by_scene = f"by_scene with 3 to {scenes} folds" if scenes >= 3 else "not by_scene, which needs 3 scenes"
    published = "published" if has_test else "not published, which needs test rows"
    return f"{scenes} scenes ({told}); possible splits: {by_scene}; {published}"


def rows_digest(rows: Sequence[AnnotatedRow]) -> str:
    """Return a digest of annotated rows, 16 hexadecimal digits."""
    content = [[row.history_digest, row.proposal, row.accepted] for row in rows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_directory(paths: Mapping[str, Path], root: str) -> Corpus:
    """Read files in the published layout; `paths` maps the name of each in that layout to its path."""
    traces = {
        Path(name).name: read_json_list(path, TestStep)
        for name, path in paths.items()
        if name.startswith(f"{TRACES}/") and name != SPLITS_FILE
    }
    rows = {name: read_jsonl(paths[name], AnnotatedRow) for name in (TRAIN_FILE, TEST_FILE) if name in paths}
    first = next(iter(rows))
    if not rows[first]:
        raise UserError(f"{paths[first]}: holds no row", "Put the annotated rows there, one JSON object per line.")
    return Corpus(root, rows.get(TRAIN_FILE, []), rows.get(TEST_FILE, []), traces, paths.get(SPLITS_FILE))


def download_published(
    url: str = PUBLISHED_URL, sha256: Mapping[str, str] = PUBLISHED_SHA256, cache: Path | None = None
) -> dict[str, Path]:
    """Download the published files through the `datasets` cache, and check their digests.

    Args:
        url: Address of the folder with reward_data/ and test_data/.
        sha256: Expected digest of each file, by its name below `url`.
        cache: Folder to keep the files in; None for the download cache of `datasets`.

    Returns:
        The path of each file in the cache, by name.

    Raises:
        UserError: A file cannot be downloaded, or its digest differs.
    """
    from datasets import DownloadConfig, DownloadManager, are_progress_bars_disabled
    from datasets.utils.logging import set_verbosity_error

    set_verbosity_error()
    manager = DownloadManager(
        download_config=DownloadConfig(
            cache_dir=cache,
            max_retries=3,
            disable_tqdm=are_progress_bars_disabled(),
            use_etag=False,  # digests identify the files, so cached files need no network
        ),
        record_checksums=False,
    )
    try:
        paths = {name: Path(path) for name, path in manager.download({n: f"{url}/{n}" for n in sha256}).items()}
    except Exception as error:  # `datasets` does not wrap the errors of its HTTP client
        reason = error_text(error, 300) or type(error).__name__
        raise UserError(
            f"cannot fetch the published data from {url}: {reason}",
            "Check the network, or give --data.root a directory that holds reward_data/ and test_data/.",
        ) from error
    for name, path in paths.items():
        digest = file_digest(path)
        if digest != sha256[name]:
            raise UserError(
                f"{url}/{name} has SHA-256 {digest}, expected {sha256[name]}: it is not the published file",
                f"Delete {path} and try again; if the digest still differs, do not use that source.",
            )
    return paths

"""The corpus: every video of a run as rows of one table, from paths, globs, folders and manifests.

Keys are kept verbatim: nothing is unquoted, normalised or guessed from a cache. The table is
columnar and holds no Python object per video, so a million rows cost seconds and some hundred MB.

What counts. A path that is an object is that video, whatever its extension, except that ``.csv``,
``.jsonl`` and ``.parquet`` are manifests. A path with ``*``, ``?`` or ``[`` that is no object is a
glob (``*`` stops at ``/``, ``**`` does not; what it matches may be a folder). Any other path is a
folder: everything below it that looks like a video counts, and each folder that directly holds
images is one video. Dot-files are left out, other files are counted and left out. Images that lie
beside container files in one folder are taken for thumbnails and left out too, with a warning.

Names. A video's name is its path below the corpus root, the deepest folder that contains all that
was asked for: a folder given alone is its own root, unless it is itself a folder of frames.
"""

from __future__ import annotations

import functools
import hashlib
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.config import CorpusConfig
from jobs.inventory import Inventory, read_inventory
from jobs.manifest import MANIFEST_SUFFIXES, Rows, read_manifest, video_key, video_keys
from jobs.recency import Window, dated_paths, fixed_folder, has_dates
from workers.decode.frames import folder_identity, is_image
from workers.errors import ConfigError
from workers.messages import SourceKind, StoreOptions, VideoSource
from workers.storage import ObjectStat, Store, canonical_uri, open_store, split_uri
from workers.storage.generic import UNLISTED

__all__ = ["SCHEMA", "VIDEO_SUFFIXES", "Corpus", "list_corpus", "video_key"]

VIDEO_SUFFIXES = frozenset(
    f".{suffix}"
    for line in (
        "mp4 m4v mov qt mkv webm avi ts m2ts mts mpg mpeg vob 3gp 3g2 flv wmv asf ogv mxf dv gif",
        "ivf obu h264 264 hevc h265 265 mjpg mjpeg",
    )
    for suffix in line.split()
)
"""Lower-case extensions of the files that a folder or glob is searched for."""

SCHEMA = pa.schema(
    [
        pa.field("video_key", pa.int64(), nullable=False),
        pa.field("uri", pa.large_string(), nullable=False),
        pa.field("name", pa.large_string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("start_us", pa.int64()),
        pa.field("end_us", pa.int64()),
        pa.field("stride", pa.int32(), nullable=False),
        pa.field("prompts", pa.large_string()),
    ]
)
"""Columns of `Corpus.table`; the meanings are those of `VideoSource`, and ``prompts`` is the
manifest's reference to this video's own prompts, as given."""

LIST_FROM = 16
"""A folder with more manifest rows than this is listed, instead of asking for each object."""

_STAT_THREADS = 16
_FLUSH_ROWS = 1 << 16
_GLOB = re.compile(r"[*?\[]")


_NAMING = ["uri", "name", "kind", "start_us", "end_us"]
"""Columns that say how a video may be called, and which ranges of it there are."""

Range = tuple[int | None, int | None]
"""Start and end in microseconds, half-open; None is the video's own."""


@dataclass(frozen=True, slots=True)
class Match:
    """What a name means.

    Attributes
    ----------
    rows : list of int
        Rows of the corpus, ascending.
    names : dict of str to str
        Name by URI of every listed video that fits; several mean that the name is ambiguous.
    ranges : list of Range
        Of every row that was listed for them, selected or not.
    """

    rows: list[int]
    names: dict[str, str]
    ranges: list[Range]


@dataclass(frozen=True, slots=True, repr=False)
class Corpus:
    """The videos of a run.

    Attributes
    ----------
    table : pyarrow.Table
        One row per video, `SCHEMA`, every column in one chunk, in listed order.
    root : str
        The folder below which names are paths; ends with a slash.
    faults : Mapping of int to str
        Rows known to be unusable before anything is read, each with its reason: a malformed
        manifest row, an object that does not exist.
    num_ignored : int
        Files that were found and are no videos.
    warnings : tuple of str
        What the user should know, a sentence each.
    left_out : pyarrow.Table or None
        The videos that were listed and not selected, without what names do not need.
    has_prompts : bool
        Whether any row that was listed, selected or not, brings its own prompts.
    keys : ndarray of int64, shape (len,)
        Column ``video_key``.
    """

    table: pa.Table
    root: str
    faults: Mapping[int, str] = field(default_factory=dict)
    num_ignored: int = 0
    warnings: tuple[str, ...] = ()
    left_out: pa.Table | None = None
    has_prompts: bool = False
    keys: NDArray[np.int64] = field(init=False)
    _index: list[_NameIndex] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        keys = self.table["video_key"].to_numpy()
        object.__setattr__(self, "keys", np.ascontiguousarray(keys, np.int64))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __repr__(self) -> str:
        return f"Corpus({len(self)} videos below {self.root}, {len(self.faults)} unusable)"

    def source(self, row: int) -> VideoSource:
        """Return one video as the message a worker receives."""
        cell = {
            name: self.table.column(name)[row].as_py()
            for name in self.table.column_names
            if name != "prompts"
        }
        return VideoSource(**cell | {"kind": SourceKind(cell["kind"])})

    def rows_named(self, name: str) -> list[int]:
        """Return the rows that a name means; see `match`."""
        return self.match(name).rows

    def match(self, name: str) -> Match:
        """Return what a name means among everything that was listed.

        What a selection left out counts, so that a name means the same video with ``--limit`` as
        without.

        Parameters
        ----------
        name : str
            A video's URI or its name; of the name, the extension or leading folders, or both, may
            be left out.

        Returns
        -------
        Match
            Empty where nothing fits. The closest fit wins: the whole name, then without its
            extension, then without leading folders, then without both.

        Notes
        -----
        The first call builds an index, seconds for a million videos; every later one costs
        microseconds.
        """
        if not self._index:
            table = self.table.select(_NAMING)
            if self.left_out is not None:
                table = pa.concat_tables([table, self.left_out]).combine_chunks()
            self._index.append(_NameIndex(table))
        return self._index[0].match(name, len(self))


def list_corpus(config: CorpusConfig, *, stat: bool = True) -> Corpus:
    """List the videos that a configuration asks for.

    Parameters
    ----------
    config : CorpusConfig
        Paths, manifest, selection and how to reach them.
    stat : bool
        Ask the store for size and etag of manifest rows that give neither. Without, such rows are
        taken on trust: a name without an extension is then a folder of frames.

    Returns
    -------
    Corpus
        Each video once, however often and in whatever spelling it was asked for.

    Raises
    ------
    ConfigError
        Nothing was asked for or found, a manifest or inventory is unreadable as a whole, or a
        video to pick is not there. With ``--since`` a corpus without news is empty, not wrong,
        as long as there is anything at all in its place.
    StoreError
        The store cannot be reached or refuses.
    """
    options = config.store.options()
    inventory = None
    if config.inventory is not None:
        inventory = read_inventory(config.inventory, options)
    paths = config.paths
    if not paths and config.manifest is None:
        if inventory is None:
            raise ConfigError("no corpus was given: name a folder, a file, a glob or a manifest")
        paths = (f"{inventory.root}/",)
    now = datetime.now(UTC)
    window = Window.parse(config.since, config.until, now)
    found = _Found(options, config.stride, window, inventory)
    for path in paths:
        if window is not None and has_dates(path):
            found.add_dates(path, dated_paths(path, window, now))
        else:
            found.add_path(path)
    if config.manifest is not None:
        found.add_manifest(config.manifest)
    table, faults = found.columns()
    if not table.num_rows and not found.is_news_only:
        raise ConfigError(found.nothing_sentence())
    root = _common_folder(found.bases)
    table, faults = _without_duplicates(table, faults)
    table = table.append_column("name", _names(table["uri"], root))
    has_prompts = table["prompts"].null_count < table.num_rows
    rows = _select(table, config)
    left_out = None
    if len(rows) < table.num_rows:
        others = np.setdiff1d(np.arange(table.num_rows), rows, assume_unique=True)
        left_out = _in_schema(table.select(_NAMING).take(pa.array(others)))
        table, faults = _take(table, faults, rows)
    if stat:
        table, faults = _with_stats(table, faults, options)
    table = _in_schema(table.select(SCHEMA.names))
    warnings = tuple(found.warnings)
    return Corpus(table, root, faults, found.num_ignored, warnings, left_out, has_prompts)


class _Found:
    """What paths and manifests named, gathered into columns."""

    def __init__(
        self,
        options: StoreOptions,
        stride: int,
        window: Window | None = None,
        inventory: Inventory | None = None,
    ) -> None:
        self.options = options
        self.stride = stride
        self.window = window
        self.inventory = inventory
        self.num_ignored = 0
        self.warnings: list[str] = []
        self.bases: list[str] = []
        """One folder per thing asked for, each ending with a slash."""
        self.is_news_only = False
        """Something is there, but it lies outside the window."""
        self._searched: list[str] = []
        self._parts: list[Rows] = []
        self._rows = _ListedRows(stride)
        if inventory is not None and inventory.written is not None:
            self.warnings.append(
                f"the inventory is of {inventory.written:%Y-%m-%dT%H:%MZ}: what came later is not "
                f"in it"
            )

    def add_dates(self, path: str, places: Iterable[str]) -> None:
        """Search the folders that a path with date fields means; those not there yet are empty."""
        fixed = fixed_folder(path) or "./"
        root, key = split_uri(fixed)
        store = open_store(root, self.options)
        if next(self._list(store, key), None) is None:
            raise ConfigError(f"{fixed} holds nothing: correct the path of the corpus")
        self.is_news_only = True
        self.bases.append(store.uri_of(key))
        # The dates in the path say what is new; when a file arrived there does not matter.
        window, self.window = self.window, None
        keys = {place: split_uri(place)[1] for place in places}
        inventory = self.inventory
        if inventory is not None:
            self.inventory = inventory.narrowed([_GLOB.split(key)[0] for key in keys.values()])
        for place, key in keys.items():
            if _GLOB.search(key):
                self._search_glob(store, key, place)
            else:
                self._search(store, key if key.endswith("/") else f"{key}/", place, None)
        self.window, self.inventory = window, inventory

    def add_path(self, path: str) -> None:
        root, key = split_uri(path)
        store = open_store(root, self.options)
        if key and not key.endswith("/"):
            found = store.stat(key)
            if found is not None:
                self._add_object(store, found, path)
                return
        if _GLOB.search(key):
            self._search_glob(store, key, path)
            return
        local = store.local_path(key) if key else None
        if local is not None and not local.exists():
            hint = _dates(path)
            raise ConfigError(f"{path} does not exist: correct the path of the corpus{hint}")
        if key and not key.endswith("/") and store.uri.startswith(UNLISTED):
            raise ConfigError(
                f"{path} does not exist: correct the URL; a web server cannot be listed, so name "
                f"each file"
            )
        self._search(store, key if not key or key.endswith("/") else f"{key}/", path, None)

    def add_manifest(self, path: str) -> None:
        root, key = split_uri(path)
        store = open_store(root, self.options)
        if not key or store.stat(key) is None:
            raise ConfigError(f"the manifest {path} does not exist: correct its path")
        self._add_manifest(store, key)

    def columns(self) -> tuple[pa.Table, dict[int, str]]:
        """Return the rows of everything, with their faults by position."""
        parts = [self._rows.rows(), *self._parts]
        faults: dict[int, str] = {}
        offset = 0
        for part in parts:
            faults |= {offset + row: reason for row, reason in part.faults.items()}
            offset += part.table.num_rows
        return pa.concat_tables([part.table for part in parts]), faults

    def nothing_sentence(self) -> str:
        where = ", ".join(self._searched)
        other = f" ({self.num_ignored} other files)" if self.num_ignored else ""
        return (
            f"no video was found in {where}{other}: looked for files such as .mp4, .mov, .mkv, "
            ".webm, .avi and .ts, and for folders of .jpg or .png images; correct the path, or "
            f"name the files themselves{_dates(where)}"
        )

    def _add_object(self, store: Store, found: ObjectStat, path: str) -> None:
        if _suffix(found.key) in MANIFEST_SUFFIXES:
            self._add_manifest(store, found.key)
            return
        uri = store.uri_of(found.key)
        self.bases.append(uri[: uri.rfind("/") + 1])
        self._searched.append(path)
        self._rows.add(uri, SourceKind.FILE, found.size_bytes, found.identity())

    def _add_manifest(self, store: Store, key: str) -> None:
        rows, base = read_manifest(store, key, self.stride)
        self._searched.append(f"the manifest {store.uri_of(key)}")
        if rows.table.num_rows:
            self._parts.append(rows)
            self.bases.append(base)

    def _list(self, store: Store, prefix: str) -> Iterator[ObjectStat]:
        """List a prefix: from the inventory, where one was given."""
        if self.inventory is None:
            return store.list(prefix)
        if store.uri != self.inventory.root:
            raise ConfigError(
                f"the inventory {self.inventory.uri} is of {self.inventory.root}, not of "
                f"{store.uri}: name paths in that bucket"
            )
        return self.inventory.list(prefix)

    def _search_glob(self, store: Store, key: str, path: str) -> None:
        fixed = _GLOB.split(key, maxsplit=1)[0]
        prefix = fixed[: fixed.rfind("/") + 1]
        self._search(store, prefix, path, _glob_matcher(key.rstrip("/"), len(prefix)))

    def _search(
        self,
        store: Store,
        prefix: str,
        path: str,
        matches: Callable[[str], bool] | None,
    ) -> None:
        self._searched.append(path)
        base = store.uri_of(prefix)
        takes_any = matches is not None and bool(re.search(r"\.[A-Za-z0-9]+$", path))
        folders: dict[str, _Images] = {}
        with_videos: set[str] = set()
        for stat in self._list(store, prefix):
            below = stat.key[len(prefix) :]
            if below.endswith("/") or any(part.startswith(".") for part in below.split("/")):
                continue
            folder = stat.key[: stat.key.rfind("/") + 1]
            chosen = matches is None or matches(stat.key)
            if self.window is not None and not self.window.holds(stat.mtime_ns):
                chosen = False
                self.is_news_only = True
            suffix = _suffix(stat.key)
            if is_image(stat.key[len(folder) :]):
                # the whole folder counts, also where a glob names only some of its images
                images = folders.setdefault(folder, _Images())
                images.add(stat, len(folder), chosen)
            elif chosen and (suffix in VIDEO_SUFFIXES or takes_any):
                with_videos.add(folder)
                uri = store.uri_of(stat.key)
                self._rows.add(uri, SourceKind.FILE, stat.size_bytes, stat.identity())
            elif chosen:
                self.num_ignored += 1
        for folder, images in folders.items():
            if not images.chosen:
                continue
            uri = store.uri_of(folder).rstrip("/")
            if folder in with_videos:
                self.num_ignored += images.num_images
                self.warnings.append(
                    f"{uri} holds videos and images: its {images.num_images} images are taken for "
                    "thumbnails and left out"
                )
                continue
            if folder == prefix and uri.count("/") > 2:
                base = uri[: uri.rfind("/") + 1]
            self._rows.add(uri, SourceKind.FRAMES, images.size_bytes, images.identity())
        self.bases.append(base if base.endswith("/") else f"{base}/")


class _Images:
    """The images of one folder while a listing passes."""

    __slots__ = ("_digest", "chosen", "num_images", "size_bytes")

    def __init__(self) -> None:
        self.num_images = 0
        self.size_bytes = 0
        self.chosen = False
        self._digest: list[tuple[str, str]] = []

    def add(self, stat: ObjectStat, start: int, chosen: bool) -> None:
        self.num_images += 1
        self.size_bytes += stat.size_bytes
        self.chosen |= chosen
        self._digest.append((stat.key[start:], stat.identity()))

    def identity(self) -> str:
        return folder_identity(self._digest)


class _ListedRows:
    """Rows that a listing gives, kept as Arrow arrays but for the newest few."""

    def __init__(self, stride: int) -> None:
        self._stride = stride
        self._done: list[pa.Table] = []
        self._faults: dict[int, str] = {}
        self._num_done = 0
        self._clear()

    def add(self, uri: str, kind: SourceKind, size_bytes: int, etag: str) -> None:
        try:
            uri.encode()
        except UnicodeEncodeError:
            # a local name of bytes that are no text: no table can hold it
            uri = uri.encode(errors="backslashreplace").decode()
            self._faults[self._num_done + len(self._uris)] = (
                f"{uri} has a name that is not valid UTF-8: rename it"
            )
        self._uris.append(uri)
        self._kinds.append(kind.value)
        self._sizes.append(size_bytes)
        self._etags.append(etag)
        if len(self._uris) >= _FLUSH_ROWS:
            self._flush()

    def rows(self) -> Rows:
        self._flush()
        return Rows(pa.concat_tables(self._done), self._faults)

    def _clear(self) -> None:
        self._uris: list[str] = []
        self._kinds: list[str] = []
        self._sizes: list[int] = []
        self._etags: list[str] = []

    def _flush(self) -> None:
        count = len(self._uris)
        keys = video_keys(self._uris)
        self._done.append(
            Rows.build(
                uris=pa.array(self._uris, pa.large_string()),
                keys=keys,
                kinds=pa.array(self._kinds, pa.string()),
                sizes=pa.array(self._sizes, pa.int64()),
                etags=pa.array(self._etags, pa.string()),
                strides=pa.array(np.full(count, self._stride, np.int32)),
            )
        )
        self._num_done += count
        self._clear()


def _glob_matcher(pattern: str, start: int) -> Callable[[str], bool]:
    """Return a test whether a key, or a folder above it, is what a glob means.

    `start` is the length of the pattern's fixed folder, above which nothing is tested.
    """
    expression = re.compile(_glob_expression(pattern), re.DOTALL)

    @functools.lru_cache(maxsize=4096)
    def folder_matches(folder: str) -> bool:
        if len(folder) < start or not folder:
            return False
        return bool(expression.fullmatch(folder)) or folder_matches(folder.rpartition("/")[0])

    return lambda key: bool(expression.fullmatch(key)) or folder_matches(key.rpartition("/")[0])


def _glob_expression(pattern: str) -> str:
    parts: list[str] = []
    position = 0
    while position < len(pattern):
        char = pattern[position]
        if pattern.startswith("**/", position):
            parts.append("(?:.*/)?")
            position += 3
        elif pattern.startswith("**", position):
            parts.append(".*")
            position += 2
        elif char == "[" and (end := pattern.find("]", position + 2)) > 0:
            inside = pattern[position + 1 : end].replace("\\", r"\\")
            negated = inside.startswith(("!", "^"))
            parts.append(f"[{'^/' if negated else ''}{inside[negated:]}]")
            position = end + 1
        else:
            parts.append({"*": "[^/]*", "?": "[^/]"}.get(char, re.escape(char)))
            position += 1
    return "".join(parts)


def _dates(path: str) -> str:
    """Return what else to do about a path that was taken literally; empty for most."""
    return ", or say --since, which gives its date fields their dates" if has_dates(path) else ""


def _without_duplicates(
    table: pa.Table, faults: Mapping[int, str]
) -> tuple[pa.Table, dict[int, str]]:
    """Keep the first row of each key; one listed with two settings becomes a fault."""
    keys = table["video_key"].to_numpy()
    ordered = np.sort(keys)
    if not (ordered[1:] == ordered[:-1]).any():
        return table, dict(faults)
    _, first, inverse, counts = np.unique(
        keys, return_index=True, return_inverse=True, return_counts=True
    )
    faults = dict(faults)
    repeated = np.flatnonzero(counts[inverse] > 1)
    settings = table.select(["stride", "prompts"]).take(repeated)
    strides, prompts = (settings[name].to_pylist() for name in ("stride", "prompts"))
    for row, stride, prompt in zip(repeated.tolist(), strides, prompts, strict=True):
        kept = int(first[inverse[row]])
        if kept == row:
            continue
        if row in faults:
            faults.setdefault(kept, faults[row])
        before = table["stride"][kept].as_py(), table["prompts"][kept].as_py()
        if before != (stride, prompt):
            faults[kept] = (
                f"{table['uri'][kept].as_py()} is listed twice with another stride or other "
                "prompts: keep one of the rows"
            )
    return _take(table, faults, np.sort(first))


def _in_schema(table: pa.Table) -> pa.Table:
    """Return columns in the types of `SCHEMA`, each in one chunk."""
    schema = pa.schema([SCHEMA.field(name) for name in table.column_names])
    return table.cast(schema).combine_chunks()


def _select(table: pa.Table, config: CorpusConfig) -> NDArray[np.int64]:
    """Return the rows that were picked, then sampled, then within the limit, ascending.

    A sample depends on keys and seed only, never on the order.
    """
    rows = np.arange(table.num_rows)
    if config.videos:
        index = _NameIndex(_in_schema(table.select(_NAMING)))
        picked = [_only_match(index.match(name, table.num_rows), name) for name in config.videos]
        rows = np.unique(np.concatenate([match.rows for match in picked]))
    if config.sample is not None and config.sample < len(rows):
        scores = _mix(table["video_key"].to_numpy()[rows].view(np.uint64), config.seed)
        rows = rows[np.sort(np.argsort(scores, kind="stable")[: config.sample])]
    return rows if config.limit is None else rows[: config.limit]


def _only_match(match: Match, name: str) -> Match:
    """Return a match of one video, or refuse."""
    if not match.rows:
        raise ConfigError(
            f"no video of the corpus is named {name!r}: write the path below the corpus root, or "
            "the URI"
        )
    if len(match.names) > 1:
        listed = ", ".join(sorted(match.names.values())[:5])
        more = ", ..." if len(match.names) > 5 else ""
        raise ConfigError(
            f"the name {name!r} fits {len(match.names)} videos ({listed}{more}): write the path "
            "below the corpus root, or the URI"
        )
    return match


def _mix(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Scatter keys by a seed (the finaliser of SplitMix64; Steele, Lea & Flood, 2014)."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    mixed = keys ^ np.uint64(int.from_bytes(digest, "little"))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _take(
    table: pa.Table, faults: Mapping[int, str], rows: NDArray[np.int64]
) -> tuple[pa.Table, dict[int, str]]:
    kept: dict[int, str] = {}
    for row, reason in faults.items():
        position = int(np.searchsorted(rows, row))
        if position < len(rows) and rows[position] == row:
            kept[position] = reason
    return table.take(pa.array(rows)), kept


def _with_stats(
    table: pa.Table, faults: Mapping[int, str], options: StoreOptions
) -> tuple[pa.Table, dict[int, str]]:
    """Fill in kind, size and etag of the rows that give neither size nor etag."""
    faults = dict(faults)
    unknown = pc.and_(pc.is_null(table["size_bytes"]), pc.is_null(table["etag"]))
    asked = unknown.to_numpy().copy()
    asked[list(faults)] = False
    rows = np.flatnonzero(asked)
    if not len(rows):
        return table, faults
    uris = table["uri"].take(pa.array(rows)).to_pylist()
    found = _stat_all(uris, options)
    columns = {name: table[name].to_pylist() for name in ("kind", "size_bytes", "etag")}
    for row, uri in zip(rows.tolist(), uris, strict=True):
        stat = found.get(uri)
        if stat is None:
            faults[row] = f"{uri} does not exist: correct the manifest, or put the video there"
        else:
            columns["kind"][row], columns["size_bytes"][row], columns["etag"][row] = stat
    for name, values in columns.items():
        index = table.schema.get_field_index(name)
        table = table.set_column(index, name, pa.array(values, table.schema.field(name).type))
    return table, faults


Facts = tuple[str, int, str]
"""Kind, size in bytes and identity of one video."""


def _stat_all(uris: Sequence[str], options: StoreOptions) -> dict[str, Facts]:
    """Ask the stores about videos: folders with many of them by listing, others one by one."""
    by_folder: dict[str, list[str]] = {}
    for uri in uris:
        by_folder.setdefault(uri[: uri.rfind("/") + 1], []).append(uri)
    found: dict[str, Facts] = {}
    alone: list[str] = []
    for folder, inside in by_folder.items():
        left = inside
        if len(inside) > LIST_FROM and not folder.startswith(UNLISTED):
            listed, left = _stat_by_listing(folder, inside, options)
            found |= listed
        alone += left
    stores = {root: open_store(root, options) for root in {split_uri(uri)[0] for uri in alone}}
    with ThreadPoolExecutor(_STAT_THREADS, thread_name_prefix="stat") as pool:
        for uri, facts in zip(alone, pool.map(lambda u: _stat_one(u, stores), alone), strict=True):
            if facts is not None:
                found[uri] = facts
    return found


def _stat_by_listing(
    folder: str, uris: Iterable[str], options: StoreOptions
) -> tuple[dict[str, Facts], list[str]]:
    """Return what listing a folder tells, and the videos it did not reach."""
    wanted = set(uris)
    most = 10_000 + 50 * len(wanted)
    root, prefix = split_uri(folder)
    store = open_store(root, options)
    found: dict[str, Facts] = {}
    images: dict[str, _Images] = {}
    for number, stat in enumerate(store.list(prefix)):
        if number > most:
            # the folder is far larger than the manifest: asking for each is cheaper
            return found, sorted(wanted - set(found))
        uri = store.uri_of(stat.key)
        if uri in wanted:
            found[uri] = SourceKind.FILE.value, stat.size_bytes, stat.identity()
        above = uri[: uri.rfind("/")]
        if above in wanted and is_image(uri[len(above) + 1 :]):
            start = stat.key.rfind("/") + 1
            images.setdefault(above, _Images()).add(stat, start, True)
    for uri, some in images.items():
        found.setdefault(uri, (SourceKind.FRAMES.value, some.size_bytes, some.identity()))
    return found, []


def _stat_one(uri: str, stores: Mapping[str, Store]) -> Facts | None:
    root, key = split_uri(uri)
    store = stores[root]
    stat = store.stat(key)
    if stat is not None:
        return SourceKind.FILE.value, stat.size_bytes, stat.identity()
    if store.uri.startswith(UNLISTED):
        return None
    images = _Images()
    prefix = f"{key}/"
    for stat in store.list(prefix):
        name = stat.key[len(prefix) :]
        if "/" not in name and is_image(name):
            images.add(stat, len(prefix), True)
    if not images.num_images:
        return None
    return SourceKind.FRAMES.value, images.size_bytes, images.identity()


def _names(uris: pa.ChunkedArray, root: str) -> pa.ChunkedArray:
    below = pc.utf8_slice_codeunits(uris, start=len(root))
    # a malformed manifest row has no place: its label stays whole
    return pc.if_else(pc.starts_with(uris, pattern=root), below, uris)


def _common_folder(bases: Sequence[str]) -> str:
    low, high = min(bases), max(bases)
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), None)
    common = low if length is None else low[:length]
    return common[: common.rfind("/") + 1]


class _NameIndex:
    """Rows by name and by every shortened form of it, as sorted hashes."""

    def __init__(self, table: pa.Table) -> None:
        self._uris, self._names = table["uri"], table["name"]
        self._kinds = table["kind"]
        self._starts, self._ends = table["start_us"], table["end_us"]
        hashes, rows = array("q"), array("q")
        row = 0
        for batch in table.select(["uri", "name", "kind"]).to_batches(max_chunksize=_FLUSH_ROWS):
            columns = (batch.column(index).to_pylist() for index in range(3))
            for uri, name, kind in zip(*columns, strict=True):
                hashes.append(hash(uri))
                for form in _forms(name, kind):
                    hashes.append(hash(form))
                    rows.append(row)
                rows.append(row)
                row += 1
        order = np.argsort(np.frombuffer(hashes, np.int64), kind="stable")
        self._hashes = np.frombuffer(hashes, np.int64)[order]
        self._rows = np.frombuffer(rows, np.int64)[order]

    def match(self, name: str, num_selected: int) -> Match:
        """Return the closest fits; rows from `num_selected` on were left out of the corpus."""
        rows = self._closest(name)
        names = {self._uris[row].as_py(): self._names[row].as_py() for row in rows}
        ranges = [(self._starts[row].as_py(), self._ends[row].as_py()) for row in rows]
        return Match([row for row in rows if row < num_selected], names, ranges)

    def _closest(self, name: str) -> list[int]:
        text = canonical_uri(name) if "://" in name else name.rstrip("/")
        wanted = hash(text)
        low = int(self._hashes.searchsorted(wanted, "left"))
        high = int(self._hashes.searchsorted(wanted, "right"))
        best, fits = 9, set[int]()
        for row in self._rows[low:high].tolist():
            level = self._level(text, row)
            if level < best:
                best, fits = level, {row}
            elif level == best < 9:
                fits.add(row)
        return sorted(fits)

    def _level(self, text: str, row: int) -> int:
        """Return how far `text` is from the row's name: 0 the same, 9 another."""
        name, kind = self._names[row].as_py(), self._kinds[row].as_py()
        if text in (name, self._uris[row].as_py()):
            return 0
        stem = _without_suffix(name) if kind == SourceKind.FILE.value else name
        if text == stem:
            return 1
        if name.endswith(f"/{text}"):
            return 2
        return 3 if stem.endswith(f"/{text}") else 9


def _forms(name: str, kind: str) -> Iterator[str]:
    """Yield a name and what is left of it without extension, without leading folders."""
    stem = _without_suffix(name) if kind == SourceKind.FILE.value else name
    for text in (name,) if stem == name else (name, stem):
        yield text
        position = text.find("/")
        while position >= 0:
            yield text[position + 1 :]
            position = text.find("/", position + 1)


def _suffix(key: str) -> str:
    name = key[key.rfind("/") + 1 :]
    return Path(name).suffix.lower()


def _without_suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[:dot] if dot > name.rfind("/") + 1 else name

"""The prompts of a run, row by row of its corpus, wherever they come from.

A prompts file names videos, a folder has one folder per video, a manifest gives each video its
own reference, a detector needs nothing beforehand. Whoever plans or dispatches asks one face.
What is wrong with one video's prompts is that video's fault and never stops a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from jobs.config import RunConfig
from jobs.corpus import Corpus, Range
from workers.errors import ConfigError, InputError
from workers.messages import Prompt, StoreOptions
from workers.prompts.folder import folder_digests
from workers.prompts.table import JsonRows, PromptTable, read_prompts

if TYPE_CHECKING:
    import pyarrow as pa

READ_THREADS = 16
"""Prompts files of a manifest that are read at the same time."""
OF_THIS_ROW = "of this row"
"""Stands for the video of prompts that are written into a manifest row itself."""
NO_SOURCE = (
    "no prompts: give --prompts FILE, --prompts-dir DIR or --detector NAME, or pass "
    "--allow-unprompted to commit every video without objects"
)
"""Said before anything starts: without prompts every video would end in quarantine."""


class PromptSource(StrEnum):
    """Where a run's prompts come from."""

    FILE = "file"
    FOLDER = "folder"
    MANIFEST = "manifest"
    DETECTOR = "detector"
    NONE = "none"


class RunPrompts:
    """The prompts of a run.

    Parameters
    ----------
    config : RunConfig
        Names the source.
    corpus : Corpus
        Whose rows the prompts belong to.

    Attributes
    ----------
    kind : PromptSource
        Where they come from.
    labels : list of str
        Sorted category labels; empty where categories come from a detector or there are none.
    warnings : list of str
        Prompts that belong to no video of the corpus.

    Raises
    ------
    ConfigError
        Prompts are given in two ways or not at all, or are unreadable as a whole.
    StoreError
        A store refused or did not answer.
    """

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self.kind = PromptSource(config.prompt_kind)
        self.labels: list[str] = []
        self.warnings: list[str] = []
        self._where = config.prompts.file or (config.prompts.dir or "").rstrip("/")
        self._options = config.corpus.store.options()
        self._table: PromptTable | None = None
        self._tables: dict[int, PromptTable] = {}
        self._digests: dict[str, str] = {}
        self._names: dict[int, str] = {}
        self._faults: dict[int, str] = {}
        self._ranges: dict[int, _Ranges] = {}
        self._parsed: tuple[str, tuple[Prompt, ...]] = "", ()
        if corpus.has_prompts:
            if self.kind is not PromptSource.NONE:
                raise ConfigError(
                    f"prompts come from one place, not from the manifest and a {self.kind}: drop "
                    f"the manifest's column prompts, or the flag"
                )
            self.kind = PromptSource.MANIFEST
            self._read_references(corpus)
        elif self.kind is PromptSource.FILE:
            self._table = read_prompts(self._where, self._options)
            self.labels = self._table.labels()
            self._match(corpus, self._table.names)
        elif self.kind is PromptSource.FOLDER:
            others: list[str] = []
            self._digests = folder_digests(self._where, self._options, on_other=others.append)
            if others:
                self.warnings.append(
                    f"{self._where} holds {len(others)} pictures of other types, for instance "
                    f"{others[0]}: only .png is read as prompts, so save them as .png"
                )
            self._match(corpus, sorted(self._digests))
        elif self.kind is PromptSource.NONE and not config.prompts.allow_unprompted:
            raise ConfigError(NO_SOURCE)

    @property
    def is_per_video(self) -> bool:
        """Whether each video needs prompts of its own, so that one without is at fault."""
        return self.kind in (PromptSource.FILE, PromptSource.FOLDER, PromptSource.MANIFEST)

    def frozen(self) -> pa.Table | None:
        """Return the prompts as they are now, to be stored with the plan.

        Returns
        -------
        pyarrow.Table or None
            A prompts file byte for byte, or the digest of each video's images; None for a
            detector and for a manifest, whose references are in the frozen corpus.
        """
        import pyarrow as pa

        if self._table is not None:
            data = pa.array([self._table.data], pa.large_binary())
            return pa.table({"uri": [self._table.uri], "data": data})
        if self._digests:
            names = sorted(self._digests)
            return pa.table({"video": names, "digest": [self._digests[n] for n in names]})
        return None

    def digest(self, row: int) -> str:
        """Return the hash of the prompts of one corpus row; empty where it has none.

        The ranges of one video share the hash of all its prompts.
        """
        name = self._names.get(row)
        if name is None or self._has_none_in_range(row, name):
            return ""
        table = self._tables.get(row, self._table)
        return table.digest(name) if table is not None else self._digests[name]

    def fault(self, row: int) -> str | None:
        """Return why it is not known which prompts are those of one row, if so."""
        told = self._faults.get(row)
        return self._range_fault(row) if told is None and row in self._ranges else told

    def prompts_for(
        self, row: int, category_ids: Mapping[str, int]
    ) -> tuple[tuple[Prompt, ...] | None, str | None]:
        """Return the prompts of one row, and the URI of its folder of mask images.

        Parameters
        ----------
        row : int
            Row of the corpus.
        category_ids : Mapping of str to int
            Category id per label.

        Returns
        -------
        prompts : tuple of Prompt or None
            None where prompts come from a folder or a detector.
        prompts_dir : str or None
            The video's own folder.

        Raises
        ------
        InputError
            A prompt of this video is malformed.
        """
        name = self._names.get(row)
        table = self._tables.get(row, self._table)
        if table is not None and name is not None:
            prompts = self._in_range(row, name) if row in self._ranges else table.prompts_for(name)
            return tuple(_categorised(prompt, category_ids) for prompt in prompts), None
        if self.kind is PromptSource.FOLDER and name is not None:
            return None, f"{self._where}/{name}"
        return (None if self.kind is PromptSource.DETECTOR else ()), None

    def _match(self, corpus: Corpus, names: Sequence[str]) -> None:
        """Find the rows that names mean; a row that several names mean is at fault."""
        unknown: list[str] = []
        ambiguous: dict[int, str] = {}
        for name in names:
            match = corpus.match(name)
            if not match.names:
                unknown.append(name)
            elif len(match.names) > 1:
                told = ", ".join(list(match.names.values())[:4])
                sentence = (
                    f"the name {name!r} in {self._where} fits several videos ({told}): write the "
                    f"path below the corpus root"
                )
                ambiguous |= dict.fromkeys(match.rows, sentence)
            else:
                for row in match.rows:
                    other = self._names.setdefault(row, name)
                    if other != name:
                        self._faults[row] = (
                            f"{self._where} names {corpus.source(row).name} in two ways, "
                            f"{other!r} and {name!r}: use one of them"
                        )
                    elif len(match.ranges) > 1 and self._table is not None:
                        source = corpus.source(row)
                        own = source.start_us, source.end_us
                        self._ranges[row] = _Ranges(source.name, own, match.ranges)
        self._faults |= {row: told for row, told in ambiguous.items() if row not in self._names}
        if unknown:
            some = (
                f"{unknown[0]!r} in {self._where} fits"
                if len(unknown) == 1
                else (f"{len(unknown)} names in {self._where}, for instance {unknown[0]!r}, fit")
            )
            self.warnings.append(f"{some} no video of the corpus: those prompts are not used")

    def _parse(self, name: str) -> tuple[Prompt, ...]:
        """Return all prompts of one video; the ranges of a video ask for them in turn."""
        assert self._table is not None
        if self._parsed[0] != name:
            self._parsed = name, self._table.prompts_for(name)
        return self._parsed[1]

    def _in_range(self, row: int, name: str) -> tuple[Prompt, ...]:
        """Return the prompts of one range of a video that has several."""
        own = self._ranges[row].own
        return tuple(prompt for prompt in self._parse(name) if _holds(own, prompt))

    def _has_none_in_range(self, row: int, name: str) -> bool:
        if row not in self._ranges:
            return False
        try:
            return not self._in_range(row, name)
        except InputError:
            return False  # there are some, and told about when they are asked for

    def _range_fault(self, row: int) -> str | None:
        """Return why it is not known to which range of a video its prompts belong, if so."""
        ranges = self._ranges[row]
        try:
            prompts = self._parse(self._names[row])
        except InputError:
            return None
        if any(prompt.time_us is None for prompt in prompts):
            return (
                f"{ranges.name} is listed with {len(ranges.listed)} time ranges, and frame_idx in "
                f"{self._where} does not tell to which of them a prompt belongs: give time_s, or "
                f"each range its own prompts in the manifest's column prompts"
            )
        for prompt in prompts:
            if not any(_holds(listed, prompt) for listed in ranges.listed):
                return (
                    f"the prompt for object {prompt.object_id} of {ranges.name} is at "
                    f"{(prompt.time_us or 0) / 1e6:.3f} s, in none of the {len(ranges.listed)} "
                    f"time ranges that are listed: correct time_s in {self._where}"
                )
        return None

    def _read_references(self, corpus: Corpus) -> None:
        """Read what the manifest's column `prompts` refers to, each reference once."""
        by_row = {row: text for row, text in enumerate(corpus.table["prompts"].to_pylist()) if text}
        labels: set[str] = set()
        with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="prompts") as threads:
            texts = list(dict.fromkeys(by_row.values()))
            read = dict(zip(texts, threads.map(self._read_reference, texts), strict=True))
        for row, text in by_row.items():
            table = read[text]
            if isinstance(table, str):
                self._faults[row] = table
                continue
            fitting = [n for n in table.names if n == OF_THIS_ROW or row in corpus.rows_named(n)]
            if len(fitting) == 1:
                self._tables[row], self._names[row] = table, fitting[0]
                labels |= set(table.labels())
            else:
                self._faults[row] = (
                    f"{table.uri} has no row for {corpus.source(row).name}: correct its column "
                    f"video"
                    if not fitting
                    else f"{table.uri} names {corpus.source(row).name} in two ways: use one"
                )
        self.labels = sorted(labels)

    def _read_reference(self, text: str) -> PromptTable | str:
        """Return the table a reference means, or the sentence why there is none."""
        try:
            if text.lstrip()[:1] in ("{", "["):
                return _inline(text, self._options)
            return read_prompts(text, self._options)
        except ConfigError as error:
            return str(error)


@dataclass(frozen=True, slots=True)
class _Ranges:
    """The range of a row whose video is listed with several: its own, and all of them."""

    name: str
    own: Range
    listed: Sequence[Range]


def _holds(within: Range, prompt: Prompt) -> bool:
    """Tell whether a prompt lies in a range; one by frame index lies in none."""
    start_us, end_us = within
    time_us = prompt.time_us
    return (
        time_us is not None and (start_us or 0) <= time_us and not (end_us or math.inf) <= time_us
    )


def _inline(text: str, options: StoreOptions) -> PromptTable:
    """Return the prompts that stand in a manifest row itself: an object or a list of objects."""
    import json

    where = "the prompts in the manifest"
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} are no JSON ({error}): correct them") from error
    rows = value if isinstance(value, list) else [value]
    lines = [json.dumps({"video": OF_THIS_ROW} | row) for row in rows if isinstance(row, dict)]
    if len(lines) != len(rows) or not lines:
        raise ConfigError(f"{where} must be an object or a list of objects, got {text[:60]!r}")
    return PromptTable(where, JsonRows("\n".join(lines).encode(), where), options)


def _categorised(prompt: Prompt, category_ids: Mapping[str, int]) -> Prompt:
    if prompt.label is None:
        return prompt
    return replace(prompt, category_id=category_ids.get(prompt.label))

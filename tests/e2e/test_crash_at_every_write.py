"""Contract: whatever write the driver and its workers die at, the next run makes the dataset whole.

* A run of five videos, one of which replaces an older input, is killed at its k-th write, for
  every k: log records, staged parts, plans, published files, replaced files, snapshots, status.
* Each k is tried twice: the write was lost, or it was done and the process died before it knew.
* After each, the same command again ends with exit code 0, the visible folders equal those of an
  undisturbed run row for row, and `verify` finds nothing wrong.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jobs import driver
from jobs.config import CorpusConfig, OutConfig, PromptConfig, RunConfig, TrackerConfig
from jobs.maintenance import verify
from jobs.progress import SilentReporter
from jobs.threads import ThreadPool
from tests.crashing import Crashed, CrashingStore
from tests.datasets import assert_same, results
from tests.media import write_video
from workers import actor, pipeline
from workers.messages import WorkerSpec
from workers.storage import Store, open_store

NUM_VIDEOS = 5


def config_for(corpus: Path, out: Path) -> RunConfig:
    return RunConfig(
        corpus=CorpusConfig(paths=(str(corpus),)),
        out=OutConfig(uri=str(out)),
        tracker=TrackerConfig(name="fake"),
        prompts=PromptConfig(file=str(corpus.parent / "prompts.jsonl")),
    )


def run(corpus: Path, out: Path, store: Store | None = None) -> int:
    def pool(config: RunConfig, spec: WorkerSpec) -> ThreadPool:
        return ThreadPool(spec, 1)

    summary = driver.run(
        config_for(corpus, out), reporter=SilentReporter(), pool_factory=pool, out=store
    )
    return summary.exit_code


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crash") / "corpus"
    folder.mkdir()
    rows = []
    for i in range(NUM_VIDEOS):
        write_video(folder / f"v{i}.mp4", num_frames=3 + i)
        row = {"video": f"v{i}.mp4", "frame_idx": 0, "object_id": 1, "label": "thing"}
        rows.append(json.dumps(row | {"box_xyxy": [10, 10, 40, 40]}))
    (folder.parent / "prompts.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def history(corpus: Path) -> Path:
    """Return an output of an earlier run, after which one of its videos changed."""
    out = corpus.parent / "history"
    assert run(corpus, out) == 0
    write_video(corpus / "v1.mp4", num_frames=9)
    return out


# The racing threads of the store's probe die with the store, as they should.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_every_write_may_be_the_last(
    corpus: Path, history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given what an undisturbed run over the same history leaves behind
    whole = tmp_path / "whole"
    shutil.copytree(history, whole)
    counting = CrashingStore(open_store(str(whole)))
    share_store(monkeypatch, counting)
    assert run(corpus, whole, counting) == 0
    reference = results(whole)
    assert [len(reference[t]) for t in ("videos", "frames")] == [5, 3 + 9 + 5 + 6 + 7]
    verbs = {verb for verb, _ in counting.log}
    assert verbs == {"write_bytes", "put_file", "create", "delete"}

    for k in range(1, counting.num_writes + 1):
        for performed in (False, True):
            out = tmp_path / f"{k}-{performed}"
            shutil.copytree(history, out)
            # When the process dies at the k-th write
            dying = CrashingStore(open_store(str(out)), k, performed=performed)
            share_store(monkeypatch, dying)
            with pytest.raises(Crashed):
                run(corpus, out, dying)
            # Then the same command makes it whole
            share_store(monkeypatch, None)
            assert run(corpus, out) == 0, dying.log[-1]
            assert_same(out, reference)
            assert not verify(open_store(str(out)), deep=True).problems, dying.log[-1]
            shutil.rmtree(out)


def share_store(monkeypatch: pytest.MonkeyPatch, store: Store | None) -> None:
    """Let workers write through the store of the driver, so that both die at once."""
    monkeypatch.undo()
    if store is not None:
        for module in (actor, pipeline):
            monkeypatch.setattr(module, "open_store", lambda uri, options=None: store)

"""The command line as people meet it.

* `--help` lists the verbs that exist, loads no heavy library, and every verb explains itself;
  `--version` is the distribution's.
* Wrong commands, flags, configuration files and values are exit code 2, with one sentence on
  standard error that names the thing, and no traceback.
* `run` and `plan` without any source of prompts are exit code 2, and write nothing.
* Every flag reaches the key of the configuration that it is a name for; a flag that is not typed
  hides nothing.
* A `MaskmillError` prints its sentence and ends with its exit code; a fault of ours says where the
  traceback is; a full disk is the store's exit code.
* Choosing a YOLO model prints the AGPL-3.0 notice once, SAM 3 that of its weights.
* `retry` takes the stored configuration, with flags for what workers may use on top.
* `status`, `retry`, `verify`, `gc` and `compact` on a place without a run are exit code 2.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from jobs import cli
from jobs.commit_log import CommitLog, Outcome
from jobs.config import RunConfig
from jobs.flags import CORPUS, LIMITS, MODEL, NOTIFY, OUT, PROMPTS, STORES, WORKERS
from jobs.settings import known_keys
from jobs.verbs import running
from tests.jobs.outputs import run_plan
from workers.errors import FencedOut, InputError, MaskmillError, OutageError
from workers.storage import open_store

ROOT = Path(__file__).resolve().parents[1]
VERBS = (
    "plan",
    "run",
    "status",
    "retry",
    "submit",
    "logs",
    "cancel",
    "export",
    "import",
    "render",
    "eval",
    "verify",
    "gc",
    "compact",
    "doctor",
    "models",
    "demo",
)
DETECTOR = ["--detector", "yolo11n", "--detector-checkpoint", "b.pt"]
BOUNDS = ["--min-workers", "1", "--max-workers", "6"]
HEAVY = ("torch", "av", "cv2", "ray", "ultralytics", "pyarrow", "numpy", "scipy", "skimage")


@pytest.fixture
def configurations(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Collect the configurations that `run` would start, and start none.

    Starting Ray for each flag would take minutes; the run itself is tested end to end elsewhere.
    """
    seen: list[RunConfig] = []

    def collect(config: RunConfig, command: str, **options: Any) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr(running, "run_and_report", collect)
    return seen


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for verb in VERBS:
        assert verb in shown


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    assert f"maskmill {verb}" in capsys.readouterr().out


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from jobs.cli import main; code = main(['run', '--help']); "
        f"loaded = set(sys.modules) & set({HEAVY!r}); print(loaded or 'none', code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "none 0"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        installed = metadata.version("maskmill")
    except metadata.PackageNotFoundError:
        if os.environ.get("CI"):
            raise
        pytest.skip("maskmill is not installed, only on the path")
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"maskmill {installed}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["run", "clips", "--out", "o", "--strid", "2"], "No such option: --strid"),
        (
            ["run", "clips", "--out", "o", "--stride", "two"],
            "--stride must be a valid integer, got 'two'",
        ),
        (["run", "clips", "--out", "o", "--stride", "0"], "--stride must be greater than"),
        (["run", "clips", "--out", "o", "--threshold", "7"], "--threshold must be less than"),
        (["run", "clips", "--out", "o", "--option", "speed"], "--option 'speed' is not key=value"),
        (["run", "clips", "--out", "o", "--set", "tracker.nmae=x"], "did you mean 'tracker.name'?"),
        (["run", "clips", "--out", "o", "--config", "none.toml"], "cannot read the configuration"),
        (["run", "clips", "--out", "o", "--workers", "0"], "workers must be at least 1 or auto"),
        (["run", "clips"], "out is missing: give --out URI"),
        (["run", "--out", "o"], "no corpus: name a file"),
        (["run", "clips", "--out", "o", "--max-objects", "3"], "detector.name is missing: give"),
        (["run", "clips", "--out", "o", "--tracker", "flwo"], "there is no tracker 'flwo'"),
        (["run", "clips", "--out", "o", "--tracker", "yolo11n-seg"], "give --checkpoint with"),
        (["run", "clips", "--out", "o", "--detector", "yolo1n"], "there is no detector 'yolo1n'"),
        (["run", "clips", "--out", "o", "--detector", "yolo11n"], "give --detector-checkpoint"),
        (["run", "clips", "--out", "o", "--option", "warp=9"], "tracker flow has no option 'warp'"),
        (
            ["run", "clips", "--out", "o", "--prompts", "p.csv", "--detector", "yolo11n"],
            "prompts come from one place",
        ),
    ],
)
def test_wrong_command_is_exit_2(
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert "Traceback" not in shown.err + shown.out
    assert not list(tmp_path.iterdir()), "a wrong command must not write anything"


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_run_without_prompts_is_refused_before_it_writes(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"listed, and not read")
    out = tmp_path / "out"
    assert cli.main([verb, str(tmp_path / "clips"), "--out", str(out)]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: no prompts: give --prompts FILE, --prompts-dir DIR or")
    assert not out.exists()


def test_every_flag_reaches_its_key(
    configurations: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = (
        "run a.mp4 s3://b/c//d.mp4 --manifest m.csv --video a.mp4 --video x/b --limit 5 --sample 4 "
        "--seed 3 --stride 2 --inventory s3://i/manifest.json --since 7d --until 2d "
        "--out s3://o/p --single-driver --if-running refuse --tracker yolo11-seg:s "
        "--checkpoint w.pt --image-size 512 --dtype float16 --device cuda:1 "
        "--option nms_iou=0.25 --option same_class=true "
        "--detector yolo11n --detector-checkpoint d.pt --detector-classes person,car "
        "--detector-confidence 0.5 --max-objects 7 --forget-after 90 --prompt-mode every_n_frames "
        "--prompt-interval 12 --threshold 0.25 --allow-unprompted --workers 3 "
        "--gpus-per-worker 0.5 --cpus-per-worker 2 --videos-per-worker 4 --stuck-after 60 "
        "--place-within 90 --address ray://head:10001 --spool-dir spool --budget-hours 9 "
        "--deadline 8h --limit-exit-code 0 "
        "--notify http://hook/secret --notify-above 0.2 --endpoint-url http://s3:9000 --path-style "
        "--profile lab --region eu --anonymous --out-endpoint-url http://o:9000 --out-region us"
    )
    assert cli.main(line.split()) == 0
    config = configurations[0]
    here = tmp_path
    assert config.model_dump(mode="json") == {
        "corpus": {
            "paths": [str(here / "a.mp4"), "s3://b/c//d.mp4"],
            "manifest": str(here / "m.csv"),
            "inventory": "s3://i/manifest.json",
            "since": "7d",
            "until": "2d",
            "videos": ["a.mp4", "x/b"],
            "limit": 5,
            "sample": 4,
            "seed": 3,
            "stride": 2,
            "store": {
                "endpoint_url": "http://s3:9000",
                "path_style": True,
                "profile": "lab",
                "region": "eu",
                "anonymous": True,
            },
        },
        "out": {
            "uri": "s3://o/p",
            "store": {
                "endpoint_url": "http://o:9000",
                "path_style": True,
                "profile": "lab",
                "region": "us",
                "anonymous": False,
            },
            "single_driver": True,
            "if_running": "refuse",
        },
        "tracker": {
            "name": "yolo11-seg:s",
            "checkpoint": str(here / "w.pt"),
            "image_size": 512,
            "dtype": "float16",
            "device": "cuda:1",
            "options": {"nms_iou": 0.25, "same_class": True},
        },
        "prompts": {
            "file": None,
            "dir": None,
            "detector": {
                "name": "yolo11n",
                "checkpoint": str(here / "d.pt"),
                "classes": ["person", "car"],
                "confidence": 0.5,
                "max_objects": 7,
                "forget_after": 90,
            },
            "mode": "every_n_frames",
            "interval": 12,
            "threshold": 0.25,
            "allow_unprompted": True,
        },
        "pool": {
            "workers": 3,
            "min_workers": None,
            "max_workers": None,
            "idle_after_s": 60.0,
            "gpus_per_worker": 0.5,
            "cpus_per_worker": 2.0,
            "videos_per_worker": 4,
            "stuck_after_s": 60.0,
            "place_within_s": 90.0,
            "ray_address": "ray://head:10001",
            "spool_dir": str(here / "spool"),
        },
        "limits": {"budget_hours": 9.0, "deadline": "8h", "exit_code": 0},
        "notify": {"above_rate": 0.2},  # the URL is a secret, which no dump of it shows
    }
    assert config.notify.url == "http://hook/secret"

    # A number of workers leaves no room for bounds.
    assert cli.main(["run", "a.mp4", "--allow-unprompted", "--out", "o", *BOUNDS]) == 0
    pool = configurations[1].pool
    assert (pool.workers, pool.min_workers, pool.max_workers) == ("auto", 1, 6)


def test_every_flag_names_a_known_key() -> None:
    keys = set(known_keys())
    for group in (CORPUS, OUT, MODEL, PROMPTS, WORKERS, LIMITS, NOTIFY, STORES):
        for flag in group.flags:
            assert set(flag.keys) <= keys, flag.name


def test_untyped_flags_hide_nothing(configurations: list[RunConfig], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        "[corpus]\npaths = ['clips']\nstride = 3\n[corpus.store]\npath_style = true\n"
        "[out]\nuri = 'masks'\n[prompts]\nmode = 'every_frame'\nallow_unprompted = true\n"
    )
    assert cli.main(["run", "--config", str(file)]) == 0
    config = configurations[0]
    assert config.corpus.stride == 3
    assert config.corpus.store.path_style
    assert config.prompts.mode.value == "every_frame"
    assert config.prompts.allow_unprompted


def test_error_ends_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fenced(*args: Any, **kwargs: Any) -> int:
        raise FencedOut("another driver took over")

    monkeypatch.setattr(running, "run_and_report", fenced)
    assert cli.main(["run", "clips", "--out", "o"]) == 3
    assert capsys.readouterr().err == "error: another driver took over\n"
    assert cli.main(["run", "clips", "--out", "o", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_our_own_fault_says_where_its_traceback_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def faulty(*args: Any, **kwargs: Any) -> int:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(running, "run_and_report", faulty)
    assert cli.main(["run", "clips", "--out", "o"]) == cli.EXIT_FAULT
    sentence = capsys.readouterr().err
    assert len(sentence.splitlines()) == 1
    (kept,) = tmp_path.iterdir()
    assert str(kept) in sentence
    assert "ZeroDivisionError" in kept.read_text()


def test_fault_that_cannot_be_kept_is_still_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def faulty(*args: Any, **kwargs: Any) -> int:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    monkeypatch.setattr(running, "run_and_report", faulty)
    assert cli.main(["run", "clips", "--out", "o"]) == cli.EXIT_FAULT
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "division by zero" in sentence
    assert "cannot be kept" in sentence


@pytest.mark.parametrize(
    ("error", "code"), [(InputError("no frames"), 2), (OutageError("denied"), 3)]
)
def test_error_of_one_video_never_means_that_the_run_finished(
    error: MaskmillError, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> int:
        raise error

    monkeypatch.setattr(running, "run_and_report", fail)
    assert cli.main(["run", "clips", "--out", "o"]) == code


def test_full_disk_is_exit_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/spool/x")

    monkeypatch.setattr(running, "run_and_report", full)
    assert cli.main(["run", "clips", "--out", "o"]) == 3
    told = capsys.readouterr().err
    assert told.startswith("error: /spool/x: No space left on device; free some space and type")


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run_and_report", interrupted)
    assert cli.main(["run", "clips", "--out", "o"]) == 130


@pytest.mark.parametrize(
    ("flags", "notices"),
    [
        ([], []),
        (["--tracker", "yolo11n-seg", "--checkpoint", "a.pt"], ["AGPL-3.0"]),
        (["--tracker", "YOLO11n-seg", "--checkpoint", "a.pt", *DETECTOR], ["AGPL-3.0"]),
        (DETECTOR, ["AGPL-3.0"]),
        (["--tracker", "facebook/sam3", "--checkpoint", "a.pt"], ["SAM License"]),
    ],
)
def test_licences_that_oblige_are_told(
    flags: list[str],
    notices: list[str],
    configurations: list[RunConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["run", "clips", "--out", "o", *flags]) == 0
    told = capsys.readouterr().err
    assert [name for name in ("AGPL-3.0", "SAM License") if name in told] == notices
    assert told.count("notice:") == len(notices)


def test_a_missing_extra_is_refused_before_anything_starts(
    configurations: list[RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Given a machine without the extra: what looks for packages finds no ultralytics
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ultralytics" else found(name)
    )
    # Then the sentence says how to install it, unless the workers are on another cluster
    assert cli.main(["run", "clips", "--out", "o", *DETECTOR]) == 2
    assert "pip install '.[yolo]'" in capsys.readouterr().err
    assert cli.main(["run", "clips", "--out", "o", *DETECTOR, "--address", "ray:6379"]) == 0


def test_retry_takes_flags_of_workers_over_the_stored_configuration(
    configurations: list[RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Given an output whose plan holds a configuration
    out = str(tmp_path / "out")
    line = ["run", str(tmp_path / "clips"), "--out", out, "--prompts", "p.csv", "--workers", "3"]
    assert cli.main(line) == 0
    stored = configurations.pop()
    log = CommitLog.acquire(open_store(out), "host:1:aa")
    log.plan(replace(run_plan(), config=stored.model_dump(mode="json")))
    log.close(Outcome.FINISHED, exit_code=1)
    # When it is retried, it is the same but for what was typed
    assert cli.main(["retry", out]) == 0
    assert configurations.pop() == stored
    assert cli.main(["retry", out, "--stuck-after", "900", "--spool-dir", "s"]) == 0
    changes = {"stuck_after_s": 900.0, "spool_dir": str(Path("s").absolute())}
    pool = stored.pool.model_copy(update=changes)
    assert configurations.pop() == stored.model_copy(update={"pool": pool})
    assert cli.main(["retry", out, "--workers", "0"]) == 2
    assert "workers must be at least 1 or auto" in capsys.readouterr().err


def test_retry_checks_the_stored_models(
    configurations: list[RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig.model_validate(
        {
            "corpus": {"paths": ["clips"]},
            "out": {"uri": str(tmp_path)},
            "tracker": {"options": {"warp": 9}},
        }
    )
    log = CommitLog.acquire(open_store(str(tmp_path)), "host:1:aa")
    log.plan(replace(run_plan(), config=config.model_dump(mode="json")))
    assert cli.main(["retry", str(tmp_path)]) == 2
    assert "tracker flow has no option 'warp'" in capsys.readouterr().err
    assert not configurations


@pytest.mark.parametrize("verb", ["status", "retry", "verify", "gc", "compact"])
def test_no_run_in_this_place(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([verb, str(tmp_path)]) == 2
    sentence = capsys.readouterr().err
    assert str(tmp_path) in sentence
    assert "Traceback" not in sentence

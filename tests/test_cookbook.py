"""The snippets of docs/cookbook.md run, and print what the page shows.

* Every block of Python, SQL and shell runs, in the order of the page, over one real run; Python
  blocks share nothing, shell blocks are command lines of maskmill.
* A block ``text`` is what the snippet before it printed, ``text begins`` the beginning of that. One
  that says ``text varies`` has times in it: only its words are compared.
* No snippet is without its output, no output without its snippet.

After a change of the page run ``python -m tests.test_cookbook``: it writes the outputs anew, to be
read before they are committed.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pytest

from jobs import cli, driver
from jobs.config import RunConfig
from jobs.progress import SilentReporter
from jobs.threads import ThreadPool
from tests.media import write_video

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cookbook.md"
BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = ("python", "sql", "bash")

VIDEOS = {
    "gate.mp4": (96, 64, 24),
    "yard/morning.mp4": (96, 64, 32),
    "yard/evening.mp4": (64, 48, 16),
}
"""Width, height and number of frames."""
PROMPTS = (
    ("gate", 0, 1, "person", [5, 10, 25, 50]),
    ("gate", 0, 2, "car", [20, 20, 60, 45]),
    # Leaves on the right, and comes back.
    ("gate", 0, 3, "dog", [76, 5, 92, 20]),
    ("gate", 18, 3, "dog", [0, 5, 16, 20]),
    ("yard/morning", 0, 1, "person", [2, 2, 14, 40]),
    ("yard/morning", 8, 2, "person", [10, 4, 34, 44]),
    ("yard/evening", 4, 1, "dog", [4, 20, 24, 36]),
    ("broken", 0, 1, "dog", [1, 1, 9, 9]),
)
"""Video, frame, object, label and box."""


@dataclass(frozen=True, slots=True)
class Snippet:
    """One block of the page, and the block of output behind it."""

    line: int
    language: str
    code: str
    shown: str | None
    how: str


def snippets(page: str) -> list[Snippet]:
    found: list[Snippet] = []
    for block in BLOCK.finditer(page):
        language, rest, text = block.groups()
        if language in LANGUAGES:
            line = page.count("\n", 0, block.start()) + 1
            found.append(Snippet(line, language, text, None, ""))
        elif language == "text":
            last = found.pop()
            assert last.shown is None, f"two outputs behind line {last.line}"
            how = rest.strip()
            assert how in ("", "begins", "varies"), f"no test knows text {how}"
            found.append(Snippet(last.line, last.language, last.code, text.rstrip(), how))
        else:
            assert not language, f"no test runs blocks of {language}"
    return found


def make_run(folder: Path) -> None:
    """Write videos and prompts, and track them into `dataset`."""
    for name, (width, height, num_frames) in VIDEOS.items():
        (folder / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        path = folder / "videos" / name
        write_video(path, num_frames=num_frames, width=width, height=height, fps=24)
    (folder / "videos" / "broken.mp4").write_bytes(b"no video")
    columns = ("video", "frame_idx", "object_id", "label", "box_xyxy")
    rows = [json.dumps(dict(zip(columns, prompt, strict=True))) for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    config = RunConfig.model_validate(
        {
            "corpus": {"paths": (str(folder / "videos"),)},
            "out": {"uri": str(folder / "dataset")},
            "tracker": {"name": "fake", "options": {"shift_x": 2}},
            "prompts": {"file": str(folder / "prompts.jsonl")},
        }
    )
    summary = driver.run(
        config, reporter=SilentReporter(), pool_factory=lambda _, spec: ThreadPool(spec, 1)
    )
    assert (summary.num_committed, summary.exit_code) == (3, 1)


def execute(snippet: Snippet) -> str:
    """Run one snippet in the working directory, and return what it printed."""
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        # As in a process of its own, whatever other tests have imported.
        np.printoptions(formatter={}, linewidth=75),
    ):
        if snippet.language == "python":
            exec(compile(snippet.code, f"cookbook.md:{snippet.line}", "exec"), {})
        elif snippet.language == "sql":
            print(duckdb.connect().sql(snippet.code))
        else:
            for line in snippet.code.replace("\\\n", " ").splitlines():
                program, *words = shlex.split(line, comments=True)
                assert program == "maskmill", "only maskmill runs in this process"
                code = cli.main(words)
                assert code == 0, f"{line} ended with {code}: {printed.getvalue()}"
    return printed.getvalue().rstrip()


def words(text: str) -> list[str]:
    """Return the words of an output, without its numbers, in no order of its own."""
    return sorted(re.findall(r"[A-Za-z_]{2,}", text))


@pytest.fixture(scope="module")
def beside_the_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make the run, and stand where the page says that its snippets stand."""
    folder = tmp_path_factory.mktemp("cookbook")
    make_run(folder)
    with contextlib.chdir(folder):
        yield


SNIPPETS = snippets(PAGE.read_text(encoding="utf-8"))


def test_the_page_has_them_all() -> None:
    languages = [snippet.language for snippet in SNIPPETS]
    assert languages.count("sql") >= 10
    assert set(languages) == set(LANGUAGES)
    assert not [snippet.line for snippet in SNIPPETS if snippet.shown is None]


@pytest.mark.usefixtures("beside_the_run")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: f"{s.language}-{s.line}")
def test_a_snippet_prints_what_is_shown(snippet: Snippet) -> None:
    printed = execute(snippet)
    assert snippet.shown is not None
    if snippet.how == "varies":
        assert words(printed) == words(snippet.shown)
    elif snippet.how == "begins":
        assert printed.startswith(snippet.shown)
    else:
        assert printed == snippet.shown


def main() -> None:
    """Write the outputs into the page as they are now."""
    page = PAGE.read_text(encoding="utf-8")
    outputs: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder))
        with contextlib.chdir(folder):
            for snippet in snippets(page):
                printed = execute(snippet)
                if snippet.how == "begins" and snippet.shown is not None:
                    # As many lines as were shown before.
                    printed = "\n".join(printed.splitlines()[: snippet.shown.count("\n") + 1])
                outputs.append(f"```{f'text {snippet.how}'.strip()}\n{printed}\n```")
    waiting = iter(outputs)
    without = re.sub(r"\n```text[^\n]*\n.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)

    def with_output(block: re.Match[str]) -> str:
        return f"{block[0]}\n{next(waiting)}" if block[1] in LANGUAGES else block[0]

    PAGE.write_text(BLOCK.sub(with_output, without), encoding="utf-8")


if __name__ == "__main__":
    main()

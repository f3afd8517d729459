"""What `infra/docker` promises.

* Both Dockerfiles pass hadolint, whose only exception is written down; a planted fault does not.
* What they copy exists and is what .dockerignore lets through; nothing else is sent to a build.
* Nobody is root in the last stage, base images are pinned, no weights are copied in.
* The extras they install exist; the AGPL-3.0 one is not among them unless asked for.
* The bill of materials is made with the pinned tool (`tests/debian/test_bill.py` makes one).
"""

from __future__ import annotations

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tests.infra.files import INFRA, ROOT, pins, run

DOCKERFILES = sorted((INFRA / "docker").glob("Dockerfile*"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return each instruction of a Dockerfile and its arguments, lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", path.read_text()))
    split = (line.partition(" ") for line in text.splitlines() if line.strip())
    return [(word, rest.strip()) for word, _, rest in split]


def hadolint(path: Path) -> tuple[int, str]:
    done = run("hadolint", "--no-color", "--config", ROOT / ".hadolint.yaml", path)
    return done.returncode, done.stdout + done.stderr


def test_there_is_one_for_gpus_and_one_for_cpus() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile", "Dockerfile.cpu"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    assert hadolint(path) == (0, "")


def test_hadolint_finds_a_planted_fault(tmp_path: Path) -> None:
    planted = tmp_path / "Dockerfile"
    planted.write_text(DOCKERFILES[0].read_text() + "RUN cd /tmp && sudo pip install ray\n")
    code, said = hadolint(planted)
    assert code != 0
    assert "DL3042" in said or "DL3004" in said


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_copied_files_exist_and_are_let_through(path: Path) -> None:
    allowed = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copied = [
        word
        for name, rest in instructions(path)
        if name == "COPY" and "--from" not in rest
        for word in shlex.split(rest)[:-1]
    ]
    assert copied
    for word in copied:
        assert (ROOT / word).exists(), word
        assert word in allowed, f".dockerignore leaves {word} out"


def test_nothing_else_is_sent_to_a_build() -> None:
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[0] == "*"
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in sent)
    assert not [name for name in sent if fnmatch.fnmatch(name, "*.pt") or "tests" in name]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_last_stage_is_pinned_and_not_root(path: Path) -> None:
    found = instructions(path)
    image = next(rest for name, rest in found if name == "ARG")
    tag = image.partition(":")[2]
    assert re.match(r"\d+\.\d+\.\d+-", tag), f"{image} is not pinned to a version"
    last = max(idx for idx, (name, _) in enumerate(found) if name == "FROM")
    users = [rest for name, rest in found[last:] if name == "USER"]
    assert users == ["10001"]


def test_extras_exist_and_agpl_is_opt_in() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in DOCKERFILES:
        (asked,) = (
            rest.partition("=")[2]
            for name, rest in instructions(path)
            if name == "ARG" and rest.startswith("EXTRAS=")
        )
        assert set(asked.split(",")) <= set(known)
        assert "yolo" not in asked


def test_the_bill_of_materials_is_made_with_the_pinned_tool() -> None:
    text = (INFRA / "docker" / "Dockerfile").read_text()
    assert f"cyclonedx-bom=={pins()['cyclonedx-bom']}" in text

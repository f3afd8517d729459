"""What an installation promises.

* The distribution can never be uploaded to a public index by accident, since its packages carry
  the generic names `jobs` and `workers`: the classifier that every index refuses is there.
* One console script, `maskmill`, which is `jobs.cli.main`.
* One `cv2` wheel per environment, the headless one: importing cv2 and the models needs no libGL.
* The base installation does not ask for torch, and only the extra that is said to be AGPL-3.0 asks
  for ultralytics.
* `constraints.txt` is plain `name==version` lines that cover every requirement, so that it works
  with any index.
* The licence is Apache-2.0, whole.
* The two set-up commands of the README install with the constraints and run the demo and the tests.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
CV2_WHEELS = {
    "opencv-python",
    "opencv-contrib-python",
    "opencv-python-headless",
    "opencv-contrib-python-headless",
}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """Return the project table."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def names(requirements: list[str]) -> set[str]:
    """Return the normalised names of some requirements."""
    return {re.sub(r"[-_.]+", "-", Requirement(r).name).lower() for r in requirements}


def test_distribution_cannot_be_uploaded(project: dict[str, Any]) -> None:
    assert project["name"] == "maskmill"
    assert "Private :: Do Not Upload" in project["classifiers"]


def test_console_script(project: dict[str, Any]) -> None:
    assert project["scripts"] == {"maskmill": "jobs.cli:main"}


def test_base_needs_no_torch_and_no_agpl(project: dict[str, Any]) -> None:
    base = names(project["dependencies"])
    assert not base & {"torch", "torchvision", "ultralytics", "ultralytics-opencv-headless"}
    extra = names(project["optional-dependencies"]["yolo"])
    assert extra == {"torch", "torchvision", "ultralytics-opencv-headless"}
    assert "AGPL-3.0" in (ROOT / "README.md").read_text()


def test_one_cv2_wheel(project: dict[str, Any]) -> None:
    wanted = names(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted |= names(extra)
    assert wanted & CV2_WHEELS == {"opencv-python-headless"}
    installed = {str(d.metadata["Name"]).lower() for d in metadata.distributions()}
    assert installed & CV2_WHEELS == {"opencv-python-headless"}


def test_cv2_needs_no_libgl() -> None:
    # The loader names every shared library in the process; libGL must not be among them.
    code = "import cv2, pathlib; print('libGL.so' in pathlib.Path('/proc/self/maps').read_text())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_constraints_are_plain_and_complete(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    for line in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line), line
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in pins}
    assert len(pinned) == len(pins)
    asked = names(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        asked |= names(extra)
    assert asked - {"maskmill"} <= pinned


def test_constraints_satisfy_the_requirements(project: dict[str, Any]) -> None:
    versions = {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, _, version in (
            line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
        )
    }
    requirements = [*project["dependencies"], *project["optional-dependencies"]["yolo"]]
    requirements += project["optional-dependencies"]["test"]
    for requirement in map(Requirement, requirements):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name != "maskmill":
            assert requirement.specifier.contains(versions[name]), requirement


def test_licence_is_whole(project: dict[str, Any]) -> None:
    text = (ROOT / "LICENSE").read_text()
    assert project["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_readme_has_the_two_commands() -> None:
    commands = [
        line for line in (ROOT / "README.md").read_text().splitlines() if "pip install -c" in line
    ]
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/maskmill demo")
    assert commands[1].endswith("-e '.[test]' && .venv/bin/python -m pytest")
    assert ".[test]" in (ROOT / ".ci" / "run").read_text()

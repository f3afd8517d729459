"""The bill of materials names the packages of an environment, by the command of the Dockerfile.

With their versions, and licences where they declare one. The tool has an environment of its own, as
in the image: one of its dependencies makes every `import ray` beside it take a second longer.
"""

from __future__ import annotations

import json
import shlex
import sys
import venv
from pathlib import Path

from tests.infra.files import INFRA, ROOT, pins, run
from tests.infra.test_docker import instructions


def test_bill_of_materials(tmp_path: Path) -> None:
    # Given: the Dockerfile's two commands, the second for the environment of these tests
    commands = next(
        rest.split("&& ")
        for name, rest in instructions(INFRA / "docker" / "Dockerfile")
        if name == "RUN" and "cyclonedx-py" in rest
    )
    (tool,) = (word for word in shlex.split(commands[1]) if word.startswith("cyclonedx-bom=="))
    words = shlex.split(commands[-1])
    assert words[0].endswith("/cyclonedx-py")
    venv.create(tmp_path / "tool", with_pip=True)
    programs = tmp_path / "tool" / "bin"
    pip = (programs / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
    assert run(*pip, tool).returncode == 0
    # Holding so large a bill against its schema takes minutes.
    words = [*words[1:-1], "--no-validate", sys.executable]
    words[words.index("/maskmill.cdx.json")] = str(tmp_path / "bill.json")

    # When
    done = run(programs / "cyclonedx-py", *words, cwd=ROOT)

    # Then
    assert done.returncode == 0, done.stderr
    bill = json.loads((tmp_path / "bill.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "maskmill"
    found = {part["name"].lower(): part for part in bill["components"]}
    for name in ("ray", "pyarrow", "torch", "botocore"):
        assert found[name]["version"].partition("+")[0] == pins()[name]
    for name in ("pyarrow", "torch", "botocore"):  # not every package declares its licence
        assert found[name]["licenses"]

"""The pages on infra name files that exist, and every file of infra is named by something.

* Each path below `infra/` that the README writes exists, and each folder has its line.
* Images in overlays and commands carry the version of this tree.
"""

from __future__ import annotations

import re

from tests.infra.files import INFRA, ROOT, documents, version

README = (INFRA / "README.md").read_text()


def test_paths_exist() -> None:
    paths = re.findall(r"(?:infra|docker|kuberay|cluster|schedules|monitoring)/[\w./-]*\w", README)
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists() or (INFRA / path).exists(), path
    folders = {f"`{path.name}/`" for path in INFRA.iterdir() if path.is_dir()}
    assert folders == set(re.findall(r"^\| (`\w+/`)", README, re.MULTILINE))


def test_versions_are_those_of_this_tree() -> None:
    tags = set(re.findall(r"maskmill:(\d[\w.]*)", README))
    for overlay in sorted((INFRA / "kuberay" / "overlays").iterdir()):
        (document,) = documents(overlay / "kustomization.yaml")
        (image,) = document["images"]
        assert image["name"] == "maskmill"
        tags.add(image["newTag"])
    assert tags == {version()}

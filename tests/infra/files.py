"""What the tests of `infra/` share: where the files are, and the checks that need no cluster."""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.media import shared_dir

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
CRD_CHECK = "kuberay/check.py"
RAY_KINDS = ("RayCluster", "RayJob", "RayCronJob")


def version() -> str:
    """Return the version of maskmill that images are tagged with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["version"])


def pins() -> dict[str, str]:
    """Return the version of every pinned package, by its name in small letters."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    split = (line.partition("==") for line in lines if not line.startswith("#"))
    return {name.lower(): version for name, _, version in split}


def documents(path: Path) -> list[dict[str, Any]]:
    """Return the documents of a YAML file."""
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


def run(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program and keep what it prints; the programs of this environment come first."""
    folder = Path(sys.executable).parent
    environment = {**os.environ, **options.pop("env", {})}
    environment["PATH"] = os.pathsep.join(
        [environment.pop("PATH_FIRST", str(folder)), str(folder), environment["PATH"]]
    )
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
        **options,
    )


@cache
def _crd_check() -> ModuleType:
    """Return check.py of the shared folder as a module; it reads its definitions only once."""
    path = shared_dir() / CRD_CHECK
    if not path.exists():
        if os.environ.get("CI"):
            raise FileNotFoundError(f"{path} is not there")
        pytest.skip("KubeRay's resource definitions are not beside this clone (shared/kuberay)")
    spec = importlib.util.spec_from_file_location("kuberay_check", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.validators = cache(module.validators)  # type: ignore[attr-defined]
    return module


def check_crds(*manifests: Path) -> tuple[int, str]:
    """Hold manifests against KubeRay's definitions, which lie beside the clone, not in it.

    Returns
    -------
    tuple of int and str
        Exit code of check.py, and what it prints.
    """
    said = io.StringIO()
    with redirect_stdout(said):
        code = _crd_check().main([str(path) for path in manifests])
    return int(code), said.getvalue()


def problems_of_core(document: dict[str, Any]) -> str:
    """Return what Kubernetes' own schema says against a resource, unknown fields included."""
    import kubernetes_validate

    try:
        kubernetes_validate.validate(document, "1.33", strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return ""


def ray_clusters(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the cluster that a RayCluster is, or that a RayJob or RayCronJob makes."""
    spec = document["spec"]
    match document["kind"]:
        case "RayCluster":
            yield spec
        case "RayJob":
            yield spec["rayClusterSpec"]
        case "RayCronJob":
            yield spec["jobTemplate"]["rayClusterSpec"]


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pods of head and workers as resources of their own."""
    templates = [cluster["headGroupSpec"]["template"]]
    templates += [group["template"] for group in cluster["workerGroupSpecs"]]
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pod", **template.get("metadata", {})},
            "spec": template["spec"],
        }
        for template in templates
    ]


def with_typo(document: dict[str, Any], path: tuple[str | int, ...]) -> dict[str, Any]:
    """Return a document with the last key of a path misspelt."""
    wrong = copy.deepcopy(document)
    place: Any = wrong
    for key in path[:-1]:
        place = place[key]
    place[f"{path[-1]}z"] = place.pop(path[-1])
    return wrong


def write_yaml(path: Path, *written: dict[str, Any]) -> Path:
    """Write documents and return where."""
    path.write_text(yaml.safe_dump_all(written))
    return path

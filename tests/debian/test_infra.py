"""`infra/` under kubectl and promtool, as `.ci/run` provides them.

* kustomize builds every overlay; what comes out passes KubeRay's definitions and Kubernetes' own
  schema, strictly; a planted typo fails.
* The clusters of RayJob and RayCronJob are the RayCluster with what the platform changed: spot, the
  account, the keys of an S3-compatible store from a secret that is not here.
* What is applied for one use is chosen by a label, and everything has one.
* promtool accepts both configurations of Prometheus and the rules, and all unit tests of the rules
  pass; with a threshold changed they do not.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.files import (
    INFRA,
    RAY_KINDS,
    check_crds,
    documents,
    pods,
    problems_of_core,
    ray_clusters,
    run,
    version,
    with_typo,
    write_yaml,
)

MONITORING = INFRA / "monitoring"
OVERLAYS = ("aws", "gcp", "s3")
INSTALL = {
    "kubectl": "run .ci/kubectl DIR and put DIR on the PATH (Debian 12's own kubectl is too old)",
    "promtool": "run .ci/debian-tools DIR prometheus and put DIR/usr/bin on the PATH",
}


def tool(name: str) -> str:
    """Return the path of a program, or fail with how to get it."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is not on the PATH: {INSTALL[name]}")
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return what kustomize builds, by overlay."""
    folder = tmp_path_factory.mktemp("built")
    for overlay in OVERLAYS:
        done = run(tool("kubectl"), "kustomize", INFRA / "kuberay" / "overlays" / overlay)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "kustomize warns of what it will not take any more"
        (folder / f"{overlay}.yaml").write_text(done.stdout)
    return {overlay: folder / f"{overlay}.yaml" for overlay in OVERLAYS}


def by_kind(path: Path) -> dict[str, dict[str, Any]]:
    found = {document["kind"]: document for document in documents(path)}
    assert set(found) == {*RAY_KINDS, "ServiceAccount", "ConfigMap"}
    return found


def test_overlays_pass_the_definitions(built: dict[str, Path]) -> None:
    code, said = check_crds(*built.values())
    assert code == 0, said
    assert said.count(": ok") == 3 * len(OVERLAYS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_kinds_pass_strictly(built: dict[str, Path], overlay: str) -> None:
    found = by_kind(built[overlay])
    core = [found["ServiceAccount"], found["ConfigMap"]]
    core += [pod for kind in RAY_KINDS for c in ray_clusters(found[kind]) for pod in pods(c)]
    assert len(core) == 2 + 2 * len(RAY_KINDS)
    for document in core:
        assert problems_of_core(document) == ""


def test_a_planted_typo_in_an_overlay_fails(built: dict[str, Path], tmp_path: Path) -> None:
    found = by_kind(built["aws"])
    path = ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "tolerations")
    code, said = check_crds(write_yaml(tmp_path / "a.yaml", with_typo(found["RayJob"], path)))
    assert code == 1
    assert "tolerationsz" in said


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_jobs_have_the_cluster_of_the_platform(built: dict[str, Path], overlay: str) -> None:
    found = by_kind(built[overlay])
    (cluster,) = ray_clusters(found["RayCluster"])
    for kind in ("RayJob", "RayCronJob"):
        assert list(ray_clusters(found[kind])) == [cluster]
    head, worker = (pod["spec"] for pod in pods(cluster))
    images = {pod["containers"][0]["image"] for pod in (head, worker)}
    assert images == {f"REGISTRY/maskmill:{version()}"}
    if overlay == "s3":
        for pod in (head, worker):
            (source,) = pod["containers"][0]["envFrom"]
            assert source == {"secretRef": {"name": "maskmill-s3"}}
    else:
        assert found["ServiceAccount"]["metadata"]["annotations"]
        assert worker["nodeSelector"]
        assert (
            worker["nodeSelector"].items()
            <= {
                "karpenter.sh/capacity-type": "spot",
                "cloud.google.com/gke-spot": "true",
                "cloud.google.com/gke-accelerator": "nvidia-l4",
            }.items()
        )
        assert head.get("nodeSelector") in (None, {"karpenter.sh/capacity-type": "on-demand"})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_chosen_by_its_label(built: dict[str, Path], overlay: str) -> None:
    parts = {
        kind: d["metadata"]["labels"]["maskmill/part"]
        for kind, d in by_kind(built[overlay]).items()
    }
    assert parts == {
        "ServiceAccount": "shared",
        "ConfigMap": "shared",
        "RayCluster": "interactive",
        "RayJob": "job",
        "RayCronJob": "nightly",
    }


def test_promtool_accepts_prometheus_on_machines() -> None:
    done = run(tool("promtool"), "check", "config", MONITORING / "prometheus.yaml")
    assert done.returncode == 0, done.stderr


def test_promtool_accepts_prometheus_in_kubernetes(tmp_path: Path) -> None:
    # Debian builds Prometheus without the discovery of pods, so that one key is exchanged.
    (document,) = documents(MONITORING / "prometheus-kubernetes.yaml")
    (job,) = document["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    shutil.copy(MONITORING / "alerts.yaml", tmp_path)
    path = write_yaml(tmp_path / "prometheus.yaml", document)
    done = run(tool("promtool"), "check", "config", path)
    assert done.returncode == 0, done.stderr


def test_the_rules_pass_their_tests() -> None:
    done = run(tool("promtool"), "test", "rules", MONITORING / "alerts_test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_fail_with_another_threshold(tmp_path: Path) -> None:
    shutil.copy(MONITORING / "alerts_test.yaml", tmp_path)
    text = (MONITORING / "alerts.yaml").read_text()
    assert text.count("> 1800") == 1
    (tmp_path / "alerts.yaml").write_text(text.replace("> 1800", "> 7200"))
    yaml.safe_load((tmp_path / "alerts.yaml").read_text())
    done = run(tool("promtool"), "test", "rules", tmp_path / "alerts_test.yaml")
    assert done.returncode != 0
    assert "MaskmillStuck" in done.stdout + done.stderr

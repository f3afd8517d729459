"""What `infra/kuberay` promises, before kustomize puts it together (see tests/debian).

* Every Ray resource passes KubeRay's own definitions, unknown fields being errors; pods and the
  service account pass Kubernetes' own schema, strictly. A planted typo fails in both.
* The cluster: token authentication, GPU workers from zero, a head without GPU that keeps room for
  a driver, spot tolerations in the overlays, and a grace that outlasts the draining of the node.
* It is the image and the Ray of this version; commands that pods run are in the image.
* No secret lies here: no resource of that kind, no credential in an environment.
* Every overlay's run.toml is a valid configuration that refuses to overlap itself and asks for the
  workers that the cluster may grow to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.settings import load_config
from jobs.submission import GRACE_S
from jobs.submitted import GRACE_VARIABLE, METADATA_CPUS
from tests.infra.files import (
    INFRA,
    check_crds,
    documents,
    pins,
    pods,
    problems_of_core,
    ray_clusters,
    version,
    with_typo,
    write_yaml,
)
from workers.trackers.registry import tracker_info

KUBERAY = INFRA / "kuberay"
RAY_FILES = [
    KUBERAY / "base" / "raycluster.yaml",
    KUBERAY / "jobs" / "rayjob.yaml",
    KUBERAY / "jobs" / "raycronjob.yaml",
]
OVERLAYS = ["aws", "gcp", "s3"]
IN_THE_IMAGE = {"maskmill-drain", "maskmill-nightly"}


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """Return the spec of the one cluster."""
    (document,) = documents(RAY_FILES[0])
    return next(ray_clusters(document))


def platform(name: str) -> dict[str, Any]:
    (document,) = documents(KUBERAY / "overlays" / name / "platform" / "kustomization.yaml")
    return document


def patches(name: str, kind: str) -> dict[str, Any]:
    """Return the values that an overlay gives a kind, by path."""
    found: dict[str, Any] = {}
    for patch in platform(name)["patches"]:
        if patch["target"]["kind"] == kind:
            found |= {step["path"]: step["value"] for step in yaml.safe_load(patch["patch"])}
    return found


def test_ray_resources_pass_the_definitions() -> None:
    code, said = check_crds(*RAY_FILES)
    assert code == 0, said
    assert said.count(": ok") == 3


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (RAY_FILES[0], ("spec", "workerGroupSpecs", 0, "minReplicas")),
        (RAY_FILES[0], ("spec", "headGroupSpec", "template", "spec", "serviceAccountName")),
        (RAY_FILES[1], ("spec", "backoffLimit")),
        (RAY_FILES[2], ("spec", "jobTemplate", "entrypoint")),
    ],
)
def test_a_planted_typo_fails(tmp_path: Path, path: Path, key: tuple[str | int, ...]) -> None:
    (document,) = documents(path)
    planted = write_yaml(tmp_path / "planted.yaml", with_typo(document, key))
    code, said = check_crds(planted)
    assert code == 1
    assert f"{key[-1]}z" in said


def test_core_kinds_pass_strictly(cluster: dict[str, Any]) -> None:
    core = [*documents(KUBERAY / "base" / "serviceaccount.yaml"), *pods(cluster)]
    assert [document["kind"] for document in core] == ["ServiceAccount", "Pod", "Pod"]
    for document in core:
        assert problems_of_core(document) == ""
    assert "tolerationsz" in problems_of_core(with_typo(core[-1], ("spec", "tolerations")))


def test_the_cluster_wants_a_token_and_starts_from_zero(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"]
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"]) == (0, 0)
    head, worker = pods(cluster)
    assert worker["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in head["spec"]["containers"][0]["resources"]["limits"]
    assert int(cluster["headGroupSpec"]["rayStartParams"]["num-cpus"]) >= 1


def test_pods_are_maskmill_without_rights(cluster: dict[str, Any]) -> None:
    for pod in pods(cluster):
        assert pod["spec"]["serviceAccountName"] == "maskmill"
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        (container,) = pod["spec"]["containers"]
        assert container["image"] == f"maskmill:{version()}"
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert cluster["rayVersion"] == pins()["ray"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_grace_outlasts_the_draining(cluster: dict[str, Any], overlay: str) -> None:
    worker = pods(cluster)[-1]["spec"]
    there = "/spec/workerGroupSpecs/0/template/spec"
    changed = patches(overlay, "RayCluster")
    grace_s = changed.get(
        f"{there}/terminationGracePeriodSeconds", worker["terminationGracePeriodSeconds"]
    )
    command = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    drain_s = int(changed.get(f"{there}/containers/0/lifecycle/preStop/exec/command/1", command[1]))
    assert command[0] == "maskmill-drain"
    assert 0 < drain_s < grace_s


@pytest.mark.parametrize("overlay", ["aws", "gcp"])
def test_clouds_put_workers_on_spot_and_tie_the_account(overlay: str) -> None:
    changed = patches(overlay, "RayCluster")
    there = "/spec/workerGroupSpecs/0/template/spec"
    (spot,) = [key for key in changed[f"{there}/nodeSelector"] if re.search("spot|capacity", key)]
    assert changed[f"{there}/tolerations/-"]["key"] == spot
    assert patches(overlay, "ServiceAccount")["/metadata/annotations"]


def test_commands_are_in_the_image() -> None:
    text = (INFRA / "docker" / "Dockerfile").read_text()
    for path in RAY_FILES:
        used = set(re.findall(r"maskmill-[a-z]+(?=[ ,])", path.read_text()))
        assert used <= IN_THE_IMAGE, used
    assert all(f"/{name}" in text for name in IN_THE_IMAGE)


def test_no_secret_lies_here() -> None:
    for path in KUBERAY.rglob("*.yaml"):
        for document in documents(path):
            assert document["kind"] != "Secret", path
        text = path.read_text()
        for name in re.findall(r"AWS_SECRET_ACCESS_KEY=(\S+)", text):
            assert name == "...", path
        assert not re.search(r"(AKIA|ASIA)[0-9A-Z]{16}|BEGIN .*PRIVATE KEY", text), path


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_configuration_of_an_overlay_is_valid(cluster: dict[str, Any], overlay: str) -> None:
    path = KUBERAY / "overlays" / overlay / "platform" / "run.toml"
    config = load_config(flags={}, file=str(path), assignments=[])
    assert config.out.if_running == "refuse"
    assert config.pool.gpus_per_worker == 1
    assert config.pool.max_workers == cluster["workerGroupSpecs"][0]["maxReplicas"]
    assert tracker_info(config.tracker.name)
    for uri in (*config.corpus.paths, config.out.uri, config.prompts.file):
        assert str(uri).startswith("gs://" if overlay == "gcp" else "s3://")
    assert (config.out.store.endpoint_url is not None) == (overlay == "s3")


def test_jobs_run_the_nightly_command_on_the_head() -> None:
    (job,) = documents(RAY_FILES[1])
    (cron,) = documents(RAY_FILES[2])
    for spec in (job["spec"], cron["spec"]["jobTemplate"]):
        assert spec["entrypoint"] == "maskmill-nightly run --config /etc/maskmill/run.toml"
        assert spec["entrypointNumCpus"] == 1
        assert spec["metadata"] == {METADATA_CPUS: "1"}
        variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
        assert variables == {GRACE_VARIABLE: str(GRACE_S)}
        assert spec["shutdownAfterJobFinishes"]

"""What `infra/cluster` promises.

* Ray itself accepts the launcher files: its own schema and its own preparation; a planted typo is
  refused.
* GPU workers are spot, start from zero and watch for the cloud's notice; the head has no GPU.
* Nodes install nothing: the image has everything. Nobody joins without the token, and none lies
  in the file.
* The policy for AWS lets workers do what a run does on a bucket, and nothing on others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.infra.files import INFRA, documents, version, with_typo

FILES = sorted((INFRA / "cluster").glob("*.yaml"))


def launcher(path: Path) -> dict[str, Any]:
    (document,) = documents(path)
    return document


def prepare(document: dict[str, Any]) -> dict[str, Any]:
    """Return what Ray makes of a launcher file; it checks it before and after."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(document)
    validate_config(prepared)
    return prepared


def test_there_is_one_for_each_cloud() -> None:
    assert [path.stem for path in FILES] == ["aws", "gcp"]
    assert [launcher(path)["provider"]["type"] for path in FILES] == ["aws", "gcp"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_accepts_it(path: Path) -> None:
    prepared = prepare(launcher(path))
    assert prepared["available_node_types"]["gpu"]["max_workers"] == prepared["max_workers"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "key",
    [
        ("idle_timeout_minutes",),
        ("docker", "pull_before_run"),
        ("available_node_types", "gpu", "resources"),
    ],
)
def test_a_planted_typo_is_refused(path: Path, key: tuple[str | int, ...]) -> None:
    with pytest.raises(jsonschema.ValidationError, match=r"z|required"):
        prepare(with_typo(launcher(path), key))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_workers_are_spot_from_zero_and_watch(path: Path) -> None:
    document = launcher(path)
    head = document["available_node_types"][document["head_node_type"]]
    worker = document["available_node_types"]["gpu"]
    assert worker["min_workers"] == 0
    assert worker["resources"]["GPU"] == 1
    assert "GPU" not in head["resources"]
    spot = {
        "aws": worker["node_config"].get("InstanceMarketOptions", {}).get("MarketType"),
        "gcp": worker["node_config"].get("scheduling", {}).get("provisioningModel"),
    }[path.stem]
    assert str(spot).lower() == "spot"
    watch = document["worker_start_ray_commands"][-1]
    assert f"maskmill-spot-watch {path.stem}" in watch
    assert "RAY_ADDRESS=$RAY_HEAD_IP:6379" in watch


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nodes_install_nothing_and_want_a_token(path: Path) -> None:
    document = launcher(path)
    for commands in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert document[commands] == []
    assert document["docker"]["image"].endswith(f"/maskmill:{version()}")
    options = document["docker"]["run_options"]
    (token,) = [o.partition("TOKEN_PATH=")[2] for o in options if "TOKEN_PATH=" in o]
    assert "--env RAY_AUTH_MODE=token" in options
    assert document["file_mounts"] == {token: "~/.ray/auth_token"}


def test_the_policy_is_what_a_run_needs() -> None:
    policy = json.loads((INFRA / "cluster" / "aws-bucket-access.json").read_text())
    corpus, output = policy["Statement"]
    assert set(corpus["Action"]) == {"s3:GetObject", "s3:ListBucket"}
    assert {"s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"} <= set(output["Action"])
    for statement in (corpus, output):
        assert all(r.startswith("arn:aws:s3:::") and "BUCKET" in r for r in statement["Resource"])

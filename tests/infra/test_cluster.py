"""What `infra/cluster` promises.

* Ray itself accepts the launcher files: its own schema and its own preparation; a planted typo is
  refused.
* GPU workers are spot, start from zero and watch for the cloud's notice; the head has no GPU.
* Nodes install nothing: the image has everything. Nobody joins without the token, and none lies
  in the file.
* The policy for AWS lets nodes do what a run does on a bucket, and nothing on others.
* Whoever launches workers may do so: on AWS the head has a role of its own, which may give workers
  theirs and no other role; the README makes both. On Google Cloud Ray's account for the head may.
"""

from __future__ import annotations

import ast
import json
import re
from importlib.util import find_spec
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


def profile(node_type: str) -> str:
    """Return the name of the instance profile, and of its role, that a kind of node has on AWS."""
    node = launcher(FILES[0])["available_node_types"][node_type]["node_config"]
    arn = re.fullmatch(
        r"arn:aws:iam::ACCOUNT:instance-profile/([\w-]+)", node["IamInstanceProfile"]["Arn"]
    )
    assert arn is not None
    return arn[1]


def test_the_head_may_launch_workers_with_their_role() -> None:
    policy = json.loads((INFRA / "cluster" / "aws-pass-role.json").read_text())
    (statement,) = policy["Statement"]
    assert statement["Effect"] == "Allow"
    assert statement["Action"] == "iam:PassRole"
    assert statement["Resource"] == f"arn:aws:iam::ACCOUNT:role/{profile('gpu')}"
    assert profile("head") != profile("gpu")


def test_the_readme_makes_the_roles() -> None:
    page = re.sub(r"\\\n\s*", "", (INFRA / "README.md").read_text())
    roles = re.search(r"for role in (.*); do\n(.*?)\ndone\n", page, re.DOTALL)
    assert roles is not None
    assert roles[1].split() == [profile("head"), profile("gpu")]
    made = [line.split(" --")[0].split()[2] for line in roles[2].splitlines()]
    assert made == [
        "create-role",
        "attach-role-policy",
        "create-instance-profile",
        "add-role-to-instance-profile",
    ]
    assert "file://infra/cluster/aws-ec2-trust.json" in roles[2]
    of_head = rf"aws iam (\S+) --role-name {profile('head')} (.*)"
    given = dict(re.findall(of_head, page))
    assert given["attach-role-policy"].endswith("aws:policy/AmazonEC2FullAccess")
    assert given["put-role-policy"].endswith("file://infra/cluster/aws-pass-role.json")
    trust = json.loads((INFRA / "cluster" / "aws-ec2-trust.json").read_text())
    assert trust["Statement"][0]["Principal"] == {"Service": "ec2.amazonaws.com"}


def test_rays_account_for_heads_on_google_cloud_may_launch_workers() -> None:
    head = launcher(FILES[1])["available_node_types"]["head"]["node_config"]
    assert "serviceAccounts" not in head, "it has one of its own, which needs the roles below"
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    # Read, since importing it needs Google's libraries.
    module = ast.parse((Path(spec.origin).parent / "autoscaler/_private/gcp/config.py").read_text())
    (roles,) = (
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "DEFAULT_SERVICE_ACCOUNT_ROLES"
    )
    assert {"roles/iam.serviceAccountUser", "roles/storage.objectAdmin"} <= set(roles)

"""What `infra/schedules` promises.

* All schedulers run one command, `maskmill-nightly run --config FILE`, at the same time of night,
  and none starts a night while the last one is at work.
* maskmill-nightly passes arguments, output and exit codes through, but for 1 (finished, some videos
  in quarantine) and for a limit that is met, which are good nights.
* A signal reaches maskmill once, and maskmill-nightly waits for its end, whether a scheduler tells
  the one process that it started, a whole group, or every process of a Ray job.
* The configuration is valid and refuses to overlap itself.
* Argo's own schema accepts the CronWorkflow, unknown fields being errors; a planted typo does not
  pass. Its pods pass Kubernetes' schema, as do the rights that Argo needs in them, and get the keys
  of a store and the token of the cluster from where the other files put them.
* The DAG and the asset name nothing that changes from night to night. (They run under the real
  schedulers in `infra/schedules/check.sh`.)
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from jobs.settings import load_config
from tests.infra.files import INFRA, documents, problems_of_core, run, version, with_typo
from workers.trackers.registry import tracker_info

SCHEDULES = INFRA / "schedules"
NIGHTLY = SCHEDULES / "maskmill-nightly"
TIME = "17 2 * * *"
PYTHON_FILES = ["airflow_dag.py", "dagster_asset.py"]


def argo() -> dict[str, dict[str, Any]]:
    return {d["kind"]: d for d in documents(SCHEDULES / "argo-cronworkflow.yaml")}


def workflow() -> dict[str, Any]:
    return argo()["CronWorkflow"]


def templates() -> dict[str, dict[str, Any]]:
    return {
        template["name"]: template for template in workflow()["spec"]["workflowSpec"]["templates"]
    }


def crontab_line() -> str:
    lines = (SCHEDULES / "maskmill.crontab").read_text().splitlines()
    (line,) = [line for line in lines if re.match(r"[\d*]", line)]
    return line


def default_arguments(name: str) -> str:
    """Return what a Python schedule runs when the environment says nothing."""
    for node in ast.walk(ast.parse((SCHEDULES / name).read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.environ.get":
            key, default = (ast.literal_eval(argument) for argument in node.args)
            assert key == "MASKMILL_NIGHTLY"
            return str(default)
    raise AssertionError(f"{name} does not read MASKMILL_NIGHTLY")


def test_all_run_one_command() -> None:
    commands = [crontab_line().split(maxsplit=5)[5]]
    commands += [f"maskmill-nightly {default_arguments(name)}" for name in PYTHON_FILES]
    first = workflow()["spec"]["workflowSpec"]["entrypoint"]
    commands.append(shlex.join(templates()[first]["container"]["command"]))
    for kind in ("rayjob", "raycronjob"):
        (document,) = documents(INFRA / "kuberay" / "jobs" / f"{kind}.yaml")
        spec = document["spec"]
        commands.append(spec.get("jobTemplate", spec)["entrypoint"])
    assert {re.sub(r"\S+\.toml$", "FILE", command) for command in commands} == {
        "maskmill-nightly run --config FILE"
    }


def test_all_run_at_the_same_time_and_not_twice() -> None:
    assert crontab_line().startswith(f"{TIME} ")
    assert workflow()["spec"]["schedules"] == [TIME]
    assert workflow()["spec"]["concurrencyPolicy"] == "Forbid"
    (cron,) = documents(INFRA / "kuberay" / "jobs" / "raycronjob.yaml")
    assert cron["spec"]["schedule"] == TIME
    dag, asset = ((SCHEDULES / name).read_text() for name in PYTHON_FILES)
    assert f'schedule="{TIME}"' in dag
    assert "catchup=False" in dag
    assert "max_active_runs=1" in dag
    assert f'cron_schedule="{TIME}"' in asset
    assert "pool=" in asset


@pytest.mark.parametrize("name", PYTHON_FILES)
def test_nothing_depends_on_the_night(name: str) -> None:
    text = (SCHEDULES / name).read_text()
    assert not re.search(r"\{\{|partition_key|logical_date|now\(\)|today\(\)", text)


@pytest.fixture
def scripted_maskmill(tmp_path: Path) -> dict[str, str]:
    """Return an environment whose maskmill ends as its last argument says.

    Only the exit code matters to the wrapper, and a real run cannot be made to end with each.
    """
    program = tmp_path / "maskmill"
    program.write_text('#!/bin/sh\necho "maskmill $*"\nfor code in "$@"; do :; done\nexit $code\n')
    program.chmod(0o755)
    return {"PATH_FIRST": str(tmp_path)}


@pytest.mark.parametrize(
    ("code", "told"), [(0, 0), (1, 0), (2, 2), (3, 3), (70, 70), (130, 130), (143, 143)]
)
def test_exit_codes(scripted_maskmill: dict[str, str], code: int, told: int) -> None:
    done = run(NIGHTLY, "run", "--config", "a b.toml", str(code), env=scripted_maskmill)
    assert done.returncode == told
    assert done.stdout == f"maskmill run --limit-exit-code 0 --config a b.toml {code}\n"
    assert ("quarantine" in done.stderr) == (code == 1)


@pytest.mark.parametrize("verb", ["run", "submit", "retry"])
def test_a_limit_is_a_good_night_to_the_real_command(verb: str) -> None:
    # That the run then ends with 0 is tested with the limits.
    done = run(NIGHTLY, verb, "--help")
    assert done.returncode == 0
    assert "--limit-exit-code" in done.stdout


@dataclass
class Night:
    """maskmill-nightly at work, before a maskmill that notes each signal and ends when told to.

    A stand-in, since a real run cannot be held at this point.
    """

    folder: Path
    shell: subprocess.Popen[bytes]
    pid: int

    def notes_signal(self) -> None:
        """Wait until maskmill has been told to stop; it goes on, and so must the shell."""
        wait_for(self.folder / "told")
        assert self.shell.poll() is None

    def ends(self) -> tuple[int, int]:
        """Let maskmill end; return the shell's exit code and how often maskmill was told."""
        (self.folder / "end").touch()
        code = self.shell.wait(30)
        with pytest.raises(ProcessLookupError):
            os.kill(self.pid, 0)
        return code, len((self.folder / "told").read_text().splitlines())


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.01)


@contextmanager
def night(folder: Path, **environment: str) -> Iterator[Night]:
    """Start a night, in a group of its own as schedulers do, and leave nothing of it behind."""
    program = folder / "maskmill"
    program.write_text(
        f"#!/bin/sh\ncd {folder}\ntrap 'echo told >>told' TERM\necho $$ >starts\nmv starts pid\n"
        "until [ -e end ]; do sleep 0.02; done\nexit 130\n"
    )
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(folder), os.environ["PATH"]]),
        **environment,
    }
    with subprocess.Popen(
        [NIGHTLY, "run"], env=environment, start_new_session=True, preexec_fn=_heed_signals
    ) as shell:
        try:
            wait_for(folder / "pid")
            yield Night(folder, shell, int((folder / "pid").read_text()))
        finally:
            (folder / "end").touch()
            shell.kill()


def _heed_signals() -> None:
    """Take signals as a scheduler's child does; what runs in the background may ignore some."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_for_the_shell_alone_is_passed_on(tmp_path: Path, number: signal.Signals) -> None:
    with night(tmp_path) as running:
        running.shell.send_signal(number)
        running.notes_signal()
        assert running.ends() == (130, 1)


def test_a_signal_for_the_group_comes_once(tmp_path: Path) -> None:
    with night(tmp_path) as running:
        os.killpg(running.shell.pid, signal.SIGTERM)
        running.notes_signal()
        assert os.getpgid(running.pid) != running.shell.pid
        assert running.ends() == (130, 1)


def test_in_a_job_of_ray_the_signal_is_ray_s(tmp_path: Path) -> None:
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    with night(tmp_path, **{RAY_JOB_CONFIG_JSON_ENV_VAR: "{}"}) as running:
        # Where a supervisor dies, Ray kills the group of its job.
        assert os.getpgid(running.pid) == running.shell.pid
        os.kill(running.pid, signal.SIGTERM)
        running.notes_signal()
        running.shell.send_signal(signal.SIGTERM)
        assert running.ends() == (130, 1)


def test_the_real_command_is_found_and_its_sentence_kept(tmp_path: Path) -> None:
    done = run(NIGHTLY, "run", "--config", tmp_path / "missing.toml")
    assert done.returncode == 2
    assert "missing.toml" in done.stdout + done.stderr


def test_the_programs_can_be_started() -> None:
    for path in (NIGHTLY, SCHEDULES / "check.sh", *(INFRA / "docker").glob("maskmill-*")):
        assert os.access(path, os.X_OK), path


def test_the_configuration_is_valid() -> None:
    config = load_config(flags={}, file=str(SCHEDULES / "nightly.toml"), assignments=[])
    assert config.out.if_running == "refuse"
    assert tracker_info(config.tracker.name)


@cache
def strict_schema() -> dict[str, Any]:
    """Return Argo's schema of a CronWorkflow, with unknown fields forbidden."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hera.workflows.models import CronWorkflow

        schema: dict[str, Any] = CronWorkflow.model_json_schema(by_alias=True)
    for part in (schema, *schema["$defs"].values()):
        if "properties" in part:
            part.setdefault("additionalProperties", False)
    return schema


def test_argo_accepts_the_workflow() -> None:
    jsonschema.validate(workflow(), strict_schema())


@pytest.mark.parametrize(
    "key",
    [
        ("spec", "concurrencyPolicy"),
        ("spec", "workflowSpec", "templates", 0, "retryStrategy", "expression"),
        ("spec", "workflowSpec", "templates", 0, "container", "volumeMounts"),
    ],
)
def test_argo_refuses_a_planted_typo(key: tuple[str | int, ...]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
        jsonschema.validate(with_typo(workflow(), key), strict_schema())


@pytest.mark.parametrize("name", ["track", "submit"])
def test_a_pod_of_the_workflow_is_one(name: str) -> None:
    spec = workflow()["spec"]["workflowSpec"]
    template = templates()[name]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "serviceAccountName": spec["serviceAccountName"],
            "securityContext": spec["securityContext"],
            "volumes": spec["volumes"],
            "tolerations": template.get("tolerations", []),
            "containers": [{"name": "main", **template["container"]}],
        },
    }
    assert problems_of_core(pod) == ""
    assert template["container"]["image"] == f"REGISTRY/maskmill:{version()}"


def test_argo_may_report_from_the_pods() -> None:
    found = argo()
    role, binding = found["Role"], found["RoleBinding"]
    assert problems_of_core(role) == problems_of_core(binding) == ""
    assert "resourcesz" in problems_of_core(with_typo(role, ("rules", 0, "resources")))
    assert role["rules"] == [
        {
            "apiGroups": ["argoproj.io"],
            "resources": ["workflowtaskresults"],
            "verbs": ["create", "patch"],
        }
    ]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    account = workflow()["spec"]["workflowSpec"]["serviceAccountName"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    (base,) = documents(INFRA / "kuberay" / "base" / "serviceaccount.yaml")
    assert base["metadata"]["name"] == account


def test_pods_of_argo_get_the_keys_of_a_store_where_there_are_some() -> None:
    overlay = (
        INFRA / "kuberay" / "overlays" / "s3" / "platform" / "kustomization.yaml"
    ).read_text()
    (secret,) = set(re.findall(r"secretRef: \{name: ([\w-]+)\}", overlay))
    for template in templates().values():
        (source,) = template["container"]["envFrom"]
        assert source == {"secretRef": {"name": secret, "optional": True}}


def test_argo_submits_with_the_token_of_the_cluster() -> None:
    container = templates()["submit"]["container"]
    (cluster,) = documents(INFRA / "kuberay" / "base" / "raycluster.yaml")
    name = cluster["metadata"]["name"]
    assert container["command"][:2] == ["maskmill-nightly", "submit"]
    assert container["command"][-1] == f"http://{name}-head-svc:8265"
    (token,) = container["env"]
    assert token["name"] == "RAY_AUTH_TOKEN"
    # The operator names the secret after the cluster.
    assert token["valueFrom"] == {"secretKeyRef": {"name": name, "key": "auth_token"}}
    assert "nvidia.com/gpu" not in container["resources"]["limits"]

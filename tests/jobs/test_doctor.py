"""The contract of the doctor.

* It tells versions, the machine, GPUs, decoders, weights and spool space, and raises nothing.
* A store is tried, not believed: one that creates exclusively is fit for an output; one that
  ignores conditions fails with exit code 3, a sentence and a way out.
* What cannot be reached, is denied, or does not exist is exit code 3; a wrong URI is exit code 2.
* A store that is only read-only is told apart from one that is shut.
* A missing or wrong package is exit code 2 and names the pip command.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.doctor import Finding, Level, check_store, diagnose, exit_code
from tests.servers import S3Server, free_ports
from workers.messages import StoreOptions
from workers.storage import open_store


def one(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_this_machine_is_fit() -> None:
    findings = diagnose()
    subjects = {finding.subject for finding in findings}
    assert subjects >= {"versions", "opencv", "machine", "gpu", "decoders", "weights", "spool"}
    assert [finding for finding in findings if finding.level is Level.FAIL] == []
    assert exit_code(findings) == 0
    decoders = one([finding for finding in findings if finding.subject == "decoders"])
    assert decoders.level is Level.OK
    assert "AV1" in decoders.message


def test_a_folder_and_a_faithful_server_are_fit(seaweedfs: S3Server, tmp_path: Path) -> None:
    for uri, options in (
        (str(tmp_path), StoreOptions()),
        (seaweedfs.new_bucket(), seaweedfs.options),
    ):
        finding = one(check_store(uri, options))
        assert (finding.level, finding.exit_code) == (Level.OK, 0)
        assert f"{uri} is fit for an output: it creates exclusively" in finding.message
        assert list(open_store(uri, options).list()) == []


def test_a_server_that_ignores_conditions_fails(rclone: S3Server) -> None:
    uri = rclone.new_bucket()
    findings = diagnose([uri], rclone.options)
    assert exit_code(findings) == 3
    about = [finding for finding in findings if finding.subject == uri]
    assert about[0].level is Level.FAIL
    assert f"{uri} ignores the condition" in about[0].message
    assert "--single-driver" in about[0].message


def test_read_only_is_told_apart_from_shut(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = seaweedfs.new_bucket()
    for name, value in seaweedfs.environment(reader=True).items():
        monkeypatch.setenv(name, value)
    finding = one(check_store(uri, seaweedfs.options))
    assert (finding.level, finding.exit_code) == (Level.FAIL, 3)
    assert "can be read but not written" in finding.message
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-at-all")
    finding = one(check_store(uri, seaweedfs.options))
    assert (finding.level, finding.exit_code) == (Level.FAIL, 3)
    assert "can be read" not in finding.message
    assert "not-the-secret-at-all" not in finding.message


def test_what_is_not_there(seaweedfs: S3Server) -> None:
    finding = one(check_store("s3://no-such-bucket", seaweedfs.options))
    assert (finding.exit_code, finding.level) == (3, Level.FAIL)
    assert "no-such-bucket does not exist" in finding.message
    nobody = StoreOptions(endpoint_url=f"http://127.0.0.1:{free_ports(1)[0]}")
    finding = one(check_store("s3://bucket", nobody))
    assert (finding.exit_code, finding.level) == (3, Level.FAIL)
    assert "cannot be reached" in finding.message


def test_a_wrong_uri_is_a_wrong_command() -> None:
    finding = one(check_store("nosuch://bucket"))
    assert (finding.exit_code, finding.level) == (2, Level.FAIL)
    assert exit_code([finding]) == 2


def test_a_missing_and_an_old_package_are_named(tmp_path: Path) -> None:
    # Given an environment whose maskmill wants packages that are missing or too old
    metadata = tmp_path / "maskmill-9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: maskmill\nVersion: 9\nRequires-Dist: av>=9999\n"
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import jobs.doctor as doctor\n"
        "doctor._REQUIRED = ('av', 'no-such-package')\n"
        "for f in doctor.diagnose(): print(f.level, f.exit_code, f.message)\n"
    )
    # When it is looked at
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout
    # Then both are told, with what to type
    assert "does not satisfy av>=9999: pip install 'av>=9999'" in told
    assert "fail 2 no-such-package is not installed: pip install no-such-package" in told

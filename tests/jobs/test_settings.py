"""From a file, flags and `--set` to one checked configuration.

* The file comes first, then flags, then `--set`; a flag replaces its key, not the section.
* TOML and YAML say the same thing; what `to_toml` prints reads back as the same configuration.
* Each fault is one sentence that names where the value came from; an unknown key suggests the
  nearest known one; several faults are several lines.
* Local paths become absolute, URLs stay verbatim.
* Flags change single keys of a stored configuration, checked as if they were typed first.
* Without any corpus, and without the things a detector needs, it says what to type.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from jobs.config import RunConfig
from jobs.settings import (
    Given,
    format_value,
    known_keys,
    load_config,
    parse_value,
    to_toml,
    with_flags,
)
from workers.errors import ConfigError

FLAGS = {
    "corpus.paths": Given(["clips"], "CORPUS"),
    "out.uri": Given("masks", "--out"),
}


def test_order_file_flag_assignment(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[pool]\nworkers = 2\ncpus_per_worker = 3\n[tracker]\nname = "flow"\n')
    flags = FLAGS | {"pool.workers": Given("5", "--workers")}
    config = load_config(file=str(file), flags=flags)
    assert (config.pool.workers, config.pool.cpus_per_worker) == (5, 3)
    config = load_config(file=str(file), flags=flags, assignments=["pool.workers=7"])
    assert config.pool.workers == 7


def test_yaml_equals_toml(tmp_path: Path) -> None:
    toml, yaml = tmp_path / "a.toml", tmp_path / "a.yaml"
    toml.write_text('[prompts.detector]\nname = "yolo11n"\nclasses = ["car"]\n')
    yaml.write_text("prompts:\n  detector:\n    name: yolo11n\n    classes: [car]\n")
    assert load_config(file=str(toml), flags=FLAGS) == load_config(file=str(yaml), flags=FLAGS)


def test_printed_configuration_reads_back() -> None:
    config = load_config(
        flags=FLAGS,
        assignments=[
            "tracker.options.scale=0.5",
            'prompts.detector.name="yolo11n"',
            "prompts.detector.classes=['traffic light']",
            r"corpus.manifest='C:\odd \"name\".csv'",
        ],
    )
    assert RunConfig.model_validate(tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        (
            "pool.wrokers=2",
            "--set pool.wrokers: unknown key 'pool.wrokers': did you mean 'pool.workers'?",
        ),
        ("corpus.stride=0", "--set corpus.stride must be greater than or equal to 1, got 0"),
        (
            "prompts.mode=sometimes",
            "--set prompts.mode must be 'first_frame', 'every_n_frames' or 'every_frame', "
            "got 'sometimes'",
        ),
        ("pool.workers", "--set 'pool.workers' is not key=value: write for instance"),
        ("prompts.detector.confidence=0.5", "prompts.detector.name is missing: give --detector"),
        ("out.uri.deeper=1", "--set out.uri.deeper: out.uri is a value and has no part 'deeper'"),
    ],
)
def test_fault_is_one_sentence(assignment: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(flags=FLAGS, assignments=[assignment])
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_a_union_is_one_fault_and_two_faults_are_two_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(flags=FLAGS, assignments=["pool.workers=many", "corpus.stride=0"])
    assert len(str(caught.value).splitlines()) == 2
    assert "'auto', got 'many'" in str(caught.value)


def test_two_prompt_sources() -> None:
    with pytest.raises(ConfigError, match="prompts come from one place, not from file and dir"):
        load_config(flags=FLAGS, assignments=["prompts.file='a'", "prompts.dir='b'"])


def test_faults_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*No such file"):
        load_config(file=str(file), flags=FLAGS)
    file.write_text("[pool\n")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(file=str(file), flags=FLAGS)
    file.write_text("[pool]\nworker = 2\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file=str(file), flags=FLAGS)
    assert str(caught.value) == (
        f"{file}: pool.worker: unknown key 'pool.worker': did you mean 'pool.workers'?"
    )
    broken = tmp_path / "run.yaml"
    broken.write_text("pool: [1\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(file=str(broken), flags=FLAGS)
    with pytest.raises(ConfigError, match=r"not a \.toml, \.yaml or \.yml file"):
        load_config(file=str(tmp_path / "run.ini"), flags=FLAGS)


def test_paths_become_absolute_and_urls_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = FLAGS | {"corpus.paths": Given(["clips/*.mp4", "s3://bucket/a//b.mp4"], "CORPUS")}
    config = load_config(flags=flags)
    assert config.corpus.paths == (str(tmp_path / "clips/*.mp4"), "s3://bucket/a//b.mp4")
    assert config.out.uri == str(tmp_path / "masks")


def test_no_corpus_says_what_to_type() -> None:
    with pytest.raises(ConfigError, match="no corpus: name a file, a folder"):
        load_config(flags={"out.uri": Given("masks", "--out")})


def test_known_keys_reach_every_section() -> None:
    keys = known_keys()
    assert {"corpus.store.endpoint_url", "prompts.detector.name", "pool.stuck_after_s"} <= set(keys)


def test_flags_change_single_keys_of_a_stored_configuration() -> None:
    stored = load_config(
        flags=FLAGS,
        assignments=[
            "tracker.options.scale=0.5",
            "pool.workers=3",
            "prompts.detector.name=yolo11n",
        ],
    )
    assert with_flags(stored, {}) == stored
    changed = with_flags(stored, {"pool.stuck_after_s": Given("900", "--stuck-after")})
    assert changed.pool == stored.pool.model_copy(update={"stuck_after_s": 900})
    assert changed.model_copy(update={"pool": stored.pool}) == stored
    with pytest.raises(ConfigError, match=r"^--stuck-after must be greater than 0, got '0'"):
        with_flags(stored, {"pool.stuck_after_s": Given("0", "--stuck-after")})


@pytest.mark.parametrize(
    "value",
    [
        "a",
        " a ",
        "",
        "null",
        "true",
        "2",
        "[1]",
        'say "no"',
        "1e3",
        2,
        -0.5,
        True,
        None,
        ["a", "2"],
    ],
)
def test_formatted_value_is_parsed_back(value: object) -> None:
    assert parse_value(format_value(value).strip()) == value

"""From what people typed to a `RunConfig`: a file, then flags, then `--set`, checked once.

All three speak of the same dotted keys (`tracker.name`, `pool.workers`), so a flag is nothing but
a short name for a key. Each fault is one sentence that says where the value came from.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jobs.config import RunConfig
from workers.errors import ConfigError, how_to_install
from workers.hub import is_hub_id

LOCAL_PATH_KEYS = (
    "out.uri",
    "corpus.manifest",
    "corpus.paths",
    "tracker.checkpoint",
    "prompts.file",
    "prompts.dir",
    "prompts.detector.checkpoint",
    "pool.spool_dir",
)
"""Keys that may hold a path; workers have another working directory, so it is made absolute."""
FLAG_OF_KEY = {
    "out": "--out URI",
    "out.uri": "--out URI",
    "corpus": "a file, a folder, a URL or --manifest FILE",
    "prompts.detector.name": "--detector NAME",
}
"""What to type for a key that must be given."""
EXTRA_OF_FAMILY = {
    "yolo": ("yolo", ("ultralytics", "torch")),
    "sam2video": ("transformers", ("transformers", "torch")),
    "sam3": ("transformers", ("transformers", "torch")),
    "sam": ("sam2", ("sam2", "torch")),
}
"""How the names of some models begin, the extra they need, and packages it brings."""


@dataclass(frozen=True, slots=True)
class Given:
    """A value and where it came from, for error sentences.

    Attributes
    ----------
    value : object
        As typed or read.
    origin : str
        ``--stride``, ``--set corpus.stride`` or ``run.toml: corpus.stride``.
    """

    value: Any
    origin: str


def load_config(
    *,
    flags: Mapping[str, Given] | None = None,
    file: str | None = None,
    assignments: Sequence[str] = (),
    with_out: bool = True,
) -> RunConfig:
    """Return the configuration that a command line describes.

    Parameters
    ----------
    flags : Mapping of dotted key to Given
        Flags that were typed; they win over the file.
    file : str, optional
        Path of a TOML or YAML file.
    assignments : sequence of str
        ``key=value`` of ``--set``; they win over everything.
    with_out : bool
        Whether an output is needed; without, ``out.uri`` may stay empty.

    Returns
    -------
    RunConfig
        Checked, local paths absolute.

    Raises
    ------
    ConfigError
        One sentence per fault, one per line.
    """
    given: dict[str, Given] = {}
    if file is not None:
        given |= _read_file(file)
    given |= flags or {}
    for text in assignments:
        given |= _read_assignment(text)
    if not with_out:
        given.setdefault("out.uri", Given("", "--out"))
    if not any(key.split(".")[0] == "corpus" for key in given):
        raise ConfigError("no corpus: name a file, a folder, a glob or a URL, or give --manifest")
    tree = _nest(given)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentences(error, given))) from error
    if with_out and not config.out.uri:
        raise ConfigError("out.uri is empty: give --out URI")
    corpus = config.corpus
    if not corpus.paths and corpus.manifest is None and corpus.inventory is None:
        raise ConfigError("no corpus: name a file, a folder, a glob or a URL, or give --manifest")
    return config


def check_models(config: RunConfig) -> None:
    """Refuse a tracker or detector that no worker could ever make.

    Only names, options and what must be given are looked at, and whether the packages of a model
    are installed where the workers are on this machine; weights are read where they are used.

    Parameters
    ----------
    config : RunConfig
        The run.

    Raises
    ------
    ConfigError
        An unknown name or option, weights that must be given, or a package that is missing.
    """
    from workers.messages import DetectorSpec
    from workers.prompts.detector import create_detector
    from workers.trackers.base import TrackingConfig
    from workers.trackers.registry import create_tracking_loader, tracker_info

    tracker, detector = config.tracker, config.prompts.detector
    try:
        info = tracker_info(tracker.name)
        create_tracking_loader(
            tracker.name,
            TrackingConfig(
                model_id=tracker.name,
                device=tracker.device,
                checkpoint_path=tracker.checkpoint,
                image_size=tracker.image_size,
                dtype=tracker.dtype,
                options=dict(tracker.options),
            ),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if info.weights and tracker.checkpoint is None:
        raise ConfigError(
            f"tracker {info.name} needs its weights: give --checkpoint with the path or URL of "
            f"{info.weights}" + (f", or the hub id {info.hub_id}" if info.hub_id else "")
        )
    if detector is not None:
        create_detector(DetectorSpec(**detector.model_dump()))
        if detector.checkpoint is None:
            raise ConfigError(
                f"detector {detector.name} needs its weights: give --detector-checkpoint with the "
                f"path or URL of {detector.name}.pt"
            )
    # Another cluster's nodes have packages of their own.
    if (config.pool.ray_address or os.environ.get("RAY_ADDRESS") or "local") == "local":
        _check_packages(info.name, f"tracker {info.name}")
        if detector is not None:
            _check_packages(detector.name, f"detector {detector.name}")


def _check_packages(name: str, model: str) -> None:
    """Refuse a model whose packages are missing; they are looked for, never imported."""
    family = next((f for f in EXTRA_OF_FAMILY if name.lower().startswith(f)), None)
    if family is None:
        return
    extra, packages = EXTRA_OF_FAMILY[family]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{model} needs the package {package}, which is not installed: "
                f"{how_to_install(extra)}"
            )


def to_toml(config: BaseModel) -> str:
    """Return a configuration as TOML, without the values that are None.

    Examples
    --------
    >>> from jobs.config import TrackerConfig
    >>> print(to_toml(TrackerConfig(name="flow")))
    name = "flow"
    device = "auto"
    """
    lines: list[str] = []
    _write_table(config.model_dump(mode="json"), "", lines)
    return "\n".join(lines).strip()


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Return every dotted key of the configuration, sections included."""
    keys: list[str] = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        section = _section_of(info.annotation)
        if section is not None:
            keys += known_keys(section, f"{prefix}{name}.")
    return keys


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the model behind ``Model`` or ``Model | None``."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _read_file(path: str) -> dict[str, Given]:
    suffix = Path(path).suffix.lower()
    if suffix not in (".toml", ".yaml", ".yml"):
        raise ConfigError(f"{path} is not a .toml, .yaml or .yml file: rename or convert it")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    try:
        tree = tomllib.loads(text) if suffix == ".toml" else _load_yaml(text)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid {suffix[1:].upper()}: {reason}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as corpus and tracker, not a bare value")
    return {key: Given(value, f"{path}: {key}") for key, value in _flatten(tree)}


def _load_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _read_assignment(text: str) -> dict[str, Given]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"--set {text!r} is not key=value: write for instance pool.workers=2")
    origin = f"--set {key}"
    return {k: Given(v, origin) for k, v in _flatten_one(key, parse_value(value.strip()))}


def parse_value(text: str) -> Any:
    """Return a value as TOML reads it, ``null`` as None, anything else as the text itself.

    Examples
    --------
    >>> parse_value("2"), parse_value("true"), parse_value("['person']"), parse_value("samurai")
    (2, True, ['person'], 'samurai')
    """
    if text == "null":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def format_value(value: Any) -> str:
    """Return the text that `parse_value` reads as a value.

    Examples
    --------
    >>> [format_value(value) for value in (2, True, ["person"], "samurai", "2", None)]
    ['2', 'true', '["person"]', 'samurai', '"2"', 'null']
    """
    if value is None:
        return "null"
    is_bare = isinstance(value, str) and bool(value) and parse_value(value.strip()) == value
    return value if is_bare else _toml_value(value)


def flat_keys(config: BaseModel) -> dict[str, Any]:
    """Return a configuration as JSON values by dotted key, those of options included."""
    return dict(_flatten(config.model_dump(mode="json")))


def with_flags(config: RunConfig, flags: Mapping[str, Given]) -> RunConfig:
    """Return a stored configuration with some keys replaced by flags, checked again.

    Parameters
    ----------
    config : RunConfig
        As it was stored.
    flags : Mapping of dotted key to Given
        Flags that were typed.

    Returns
    -------
    RunConfig
        Everything else as it was.

    Raises
    ------
    ConfigError
        One sentence per fault, one per line.
    """
    stored = {key: Given(value, f"the stored {key}") for key, value in flat_keys(config).items()}
    return load_config(flags=stored | dict(flags))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        yield from _flatten_one(f"{prefix}{name}", value)


def _flatten_one(key: str, value: Any) -> Iterable[tuple[str, Any]]:
    """Split sections into dotted keys, so that a flag replaces one key and not its section."""
    if isinstance(value, Mapping) and value:
        yield from _flatten(value, f"{key}.")
    else:
        yield key, value


def _nest(given: Mapping[str, Given]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, item in given.items():
        *sections, name = key.split(".")
        node = tree
        for depth, section in enumerate(sections):
            child = node.setdefault(section, {})
            if child is None:
                child = node[section] = {}  # a later, longer key fills a section set to null
            if not isinstance(child, dict):
                where = ".".join(sections[: depth + 1])
                raise ConfigError(f"{item.origin}: {where} is a value and has no part {name!r}")
            node = child
        is_path = key in LOCAL_PATH_KEYS and not (key == "tracker.checkpoint" and _is_hub(item))
        node[name] = _absolute(item.value) if is_path else item.value
    return tree


def _is_hub(item: Given) -> bool:
    return isinstance(item.value, str) and is_hub_id(item.value)


def _absolute(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_absolute(item) for item in value]
    if not isinstance(value, str) or not value or "://" in value:
        return value
    return os.path.abspath(os.path.expanduser(value))  # noqa: PTH100, PTH111 - resolve() would follow links


def _sentences(error: ValidationError, given: Mapping[str, Given]) -> list[str]:
    """Return one sentence per fault; the branches of a union are one fault."""
    faults: dict[str, list[ErrorDetails]] = {}
    known = set(known_keys())
    for details in error.errors(include_url=False):
        key = ".".join(str(part) for part in details["loc"])
        if details["type"] not in ("extra_forbidden", "missing"):
            # Beyond the key itself pydantic names list positions and branches of a union.
            while key and key not in known and not key.startswith("tracker.options"):
                key = key.rpartition(".")[0]
        faults.setdefault(key, []).append(details)
    return [_sentence(key, details, given) for key, details in faults.items()]


def _sentence(key: str, faults: list[ErrorDetails], given: Mapping[str, Given]) -> str:
    first = faults[0]
    origin = given[key].origin if key in given else _origin_below(key, given)
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.6)
        if close:
            hint = f"did you mean {close[0]!r}?"
        else:
            section = key.rpartition(".")[0]
            names = [k for k in known_keys() if k.rpartition(".")[0] == section]
            hint = f"the keys here are {', '.join(names) or 'none'}"
        return f"{origin}: unknown key {key!r}: {hint}"
    if first["type"] == "missing":
        return f"{key} is missing: give {FLAG_OF_KEY.get(key, f'--set {key}=...')}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    reasons = " or ".join(_reason(details["msg"]) for details in faults)
    return f"{origin} {reasons}, got {first['input']!r}"


def _origin_below(key: str, given: Mapping[str, Given]) -> str:
    """Return where a section came from: the origin of any key in it."""
    return next((g.origin for k, g in given.items() if k.startswith(f"{key}.")), key)


def _reason(message: str) -> str:
    return message.replace("Input should be", "must be", 1).partition(", unable to parse")[0]


def _write_table(tree: Mapping[str, Any], prefix: str, lines: list[str]) -> None:
    for name, value in tree.items():
        if value is not None and not isinstance(value, Mapping):
            lines.append(f"{name} = {_toml_value(value)}")
    for name, value in tree.items():
        if isinstance(value, Mapping) and any(v is not None for v in value.values()):
            lines += ["", f"[{prefix}{name}]"]
            _write_table(value, f"{prefix}{name}.", lines)


def _toml_value(value: Any) -> str:
    import json

    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    # A JSON string is a TOML basic string, and JSON numbers are TOML numbers.
    return json.dumps(value, ensure_ascii=False)

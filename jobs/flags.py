"""The flags of the command line as a table: each is a short name for a key of the configuration.

A verb takes whole groups of them (`@configured(CORPUS, MODEL, ...)`) and receives one value, the
`CommandLine`; no function has forty parameters, and a flag cannot mean something else than its
key does in a configuration file.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from workers.errors import ConfigError
from workers.messages import PromptMode

if TYPE_CHECKING:
    from jobs.config import RunConfig, StoreConfig
    from jobs.settings import Given

Verb = Callable[..., Any]
Body = TypeVar("Body", bound=Verb)


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag.

    Attributes
    ----------
    name : str
        As typed, for instance ``--tracker``.
    keys : tuple of str
        Dotted keys that receive the value.
    kind : object
        Type of the value. Numbers stay text until the configuration is checked, so that a flag
        and a key of a file fail with the same sentence.
    help : str
        One sentence for ``--help``.
    default : str
        What holds without the flag, as ``--help`` shows it.
    metavar : str
        Placeholder of the value in ``--help``.
    parse : callable, optional
        From the parsed value to the configuration's.
    """

    name: str
    keys: tuple[str, ...]
    kind: Any
    help: str
    default: str = ""
    metavar: str = ""
    parse: Callable[[Any], Any] | None = None

    @property
    def parameter(self) -> str:
        """Name of the parameter that typer passes."""
        return "flag_" + self.name.lstrip("-").replace("-", "_").lower()


@dataclass(frozen=True, slots=True)
class Group:
    """Flags that `--help` shows together."""

    title: str
    flags: tuple[Flag, ...]


@dataclass(slots=True)
class CommandLine:
    """What was typed, before it is checked.

    Attributes
    ----------
    flags : dict of dotted key to Given
        Flags that were typed.
    file : str or None
        ``--config``.
    assignments : list of str
        ``--set``, in order.
    """

    flags: dict[str, Given] = field(default_factory=dict)
    file: str | None = None
    assignments: list[str] = field(default_factory=list)

    def config(self, *, with_out: bool = True) -> RunConfig:
        """Return the checked configuration (see `jobs.settings.load_config`)."""
        from jobs.settings import load_config

        return load_config(
            flags=self.flags, file=self.file, assignments=self.assignments, with_out=with_out
        )

    def out_store(self) -> StoreConfig:
        """Return how to reach an output, for verbs that need nothing else."""
        from jobs.config import StoreConfig

        prefix = "out.store."
        return StoreConfig(
            **{k.removeprefix(prefix): g.value for k, g in self.flags.items() if prefix in k}
        )


def _pairs(texts: list[str]) -> dict[str, Any]:
    """Return ``--option key=value`` as a mapping."""
    from jobs.settings import parse_value

    pairs: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--option {text!r} is not key=value")
        pairs[key.strip()] = parse_value(value.strip())
    return pairs


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


CORPUS = Group(
    "Corpus",
    (
        Flag(
            "--manifest",
            ("corpus.manifest",),
            str,
            "CSV, JSONL or Parquet with a column video, and optionally start_s, end_s, stride, "
            "prompts.",
            metavar="FILE",
        ),
        Flag(
            "--inventory",
            ("corpus.inventory",),
            str,
            "The manifest.json of a bucket inventory, read instead of listing the bucket.",
            metavar="URI",
        ),
        Flag(
            "--since",
            ("corpus.since",),
            str,
            "Only what changed from here on: 2026-11-19, 2026-11-19T22:00 (UTC), 36h, 7d. A CORPUS "
            "with date fields, s3://bucket/day=%Y-%m-%d/, is listed for those dates alone.",
            metavar="TIME",
        ),
        Flag("--until", ("corpus.until",), str, "Only what changed before this.", metavar="TIME"),
        Flag(
            "--video",
            ("corpus.videos",),
            list[str],
            "Only this video of the corpus, by name or URL; may be repeated.",
            metavar="NAME",
        ),
        Flag("--limit", ("corpus.limit",), int, "Only the first N videos.", metavar="N"),
        Flag(
            "--sample",
            ("corpus.sample",),
            int,
            "Only N videos, drawn by the seed; the whole corpus can resume from them.",
            metavar="N",
        ),
        Flag("--seed", ("corpus.seed",), int, "Seed of --sample.", "0", "N"),
        Flag("--stride", ("corpus.stride",), int, "Track every Nth frame.", "1", "N"),
    ),
)
OUT = Group(
    "Output",
    (
        Flag(
            "--out",
            ("out.uri",),
            str,
            "Folder or URL of the dataset. Running again with the same one resumes.",
            metavar="URI",
        ),
        Flag(
            "--single-driver",
            ("out.single_driver",),
            bool,
            "Accept a store without conditional writes; you promise that no other driver runs.",
        ),
        Flag(
            "--if-running",
            ("out.if_running",),
            Literal["take-over", "refuse"],
            "While another driver is at work on this output: fence it out, or refuse to start.",
            "take-over",
        ),
    ),
)
MODEL = Group(
    "Models",
    (
        Flag(
            "--tracker",
            ("tracker.name",),
            str,
            "Tracker; `maskmill models` lists them.",
            "flow",
            "NAME[:SIZE]",
        ),
        Flag("--checkpoint", ("tracker.checkpoint",), str, "Its weights.", metavar="FILE"),
        Flag(
            "--image-size",
            ("tracker.image_size",),
            int,
            "Side of its square input, in pixels.",
            "the model's own",
            "PX",
        ),
        Flag(
            "--dtype",
            ("tracker.dtype",),
            Literal["float32", "bfloat16", "float16"],
            "Precision.",
            "the tracker's own",
        ),
        Flag("--device", ("tracker.device",), str, "auto, cpu, cuda or cuda:N.", "auto"),
        Flag(
            "--option",
            ("tracker.options",),
            list[str],
            "An option of the tracker; may be repeated.",
            metavar="KEY=VALUE",
            parse=_pairs,
        ),
        Flag(
            "--detector",
            ("prompts.detector.name",),
            str,
            "Prompt the objects that this detector finds.",
            metavar="NAME",
        ),
        Flag(
            "--detector-checkpoint",
            ("prompts.detector.checkpoint",),
            str,
            "Its weights.",
            metavar="FILE",
        ),
        Flag(
            "--detector-classes",
            ("prompts.detector.classes",),
            str,
            "Only these classes, by name or index.",
            "all",
            "A,B,...",
            parse=_words,
        ),
        Flag(
            "--detector-confidence",
            ("prompts.detector.confidence",),
            float,
            "Smallest confidence that counts, 0 to 1.",
            "0.25",
        ),
        Flag(
            "--max-objects",
            ("prompts.detector.max_objects",),
            int,
            "At most N detections of a frame, the most confident first.",
            "no limit",
            "N",
        ),
        Flag(
            "--forget-after",
            ("prompts.detector.forget_after",),
            int,
            "Track an object no more that was out of sight for N tracked frames.",
            "never",
            "N",
        ),
    ),
)
PROMPTS = Group(
    "Prompts",
    (
        Flag(
            "--prompts",
            ("prompts.file",),
            str,
            "JSONL, CSV or Parquet with boxes, points or masks.",
            metavar="FILE",
        ),
        Flag(
            "--prompts-dir",
            ("prompts.dir",),
            str,
            "Mask images, DIR/<video>/<frame>.png.",
            metavar="DIR",
        ),
        Flag(
            "--prompt-mode",
            ("prompts.mode",),
            PromptMode,
            "When prompts are taken.",
            "first_frame",
            parse=lambda mode: mode.value,
        ),
        Flag(
            "--prompt-interval",
            ("prompts.interval",),
            int,
            "Period of every_n_frames, in tracked frames.",
            "30",
            "N",
        ),
        Flag(
            "--threshold",
            ("prompts.threshold",),
            float,
            "Leave out masks with a lower confidence, 0 to 1.",
            "0",
        ),
        Flag(
            "--allow-unprompted",
            ("prompts.allow_unprompted",),
            bool,
            "Commit a video without any prompt with zero objects, instead of quarantining it.",
        ),
    ),
)
WORKERS = Group(
    "Workers",
    (
        Flag(
            "--workers",
            ("pool.workers",),
            str,
            "Exactly so many, or auto: as many as the nodes hold, and fewer when little is left.",
            "auto",
            "auto|N",
        ),
        Flag(
            "--min-workers",
            ("pool.min_workers",),
            int,
            "With auto: ask for so many even where no node can hold them yet, and keep them.",
            metavar="N",
        ),
        Flag(
            "--max-workers",
            ("pool.max_workers",),
            int,
            "With auto: the most. On a cluster that grows on demand, this is the demand.",
            "what the nodes hold",
            "N",
        ),
        Flag(
            "--gpus-per-worker",
            ("pool.gpus_per_worker",),
            str,
            "A fraction shares a GPU; auto: the fraction that the measured memory allows.",
            "1 where there are GPUs and the tracker uses them",
            "auto|NUMBER",
        ),
        Flag("--cpus-per-worker", ("pool.cpus_per_worker",), float, "CPU cores.", "1"),
        Flag(
            "--videos-per-worker",
            ("pool.videos_per_worker",),
            int,
            "Videos one worker tracks at the same time.",
            "1",
            "N",
        ),
        Flag(
            "--stuck-after",
            ("pool.stuck_after_s",),
            float,
            "Stop an attempt without progress for this many seconds.",
            "300",
            "SECONDS",
        ),
        Flag(
            "--place-within",
            ("pool.place_within_s",),
            float,
            "End when a cluster has had no place for any worker for this many seconds.",
            "1800",
            "SECONDS",
        ),
        Flag(
            "--address",
            ("pool.ray_address",),
            str,
            "Ray cluster to run on.",
            "$RAY_ADDRESS, else this machine",
        ),
        Flag(
            "--spool-dir",
            ("pool.spool_dir",),
            str,
            "Where workers keep downloaded videos and finished masks until they are uploaded, and "
            "the driver the files that it makes of them.",
            "the temporary directory",
            "DIR",
        ),
    ),
)
LIMITS = Group(
    "Limits",
    (
        Flag(
            "--budget-hours",
            ("limits.budget_hours",),
            float,
            "Stop, resumably, when this start has used so many worker-hours.",
            metavar="HOURS",
        ),
        Flag(
            "--deadline",
            ("limits.deadline",),
            str,
            "Stop, resumably, at this time: 8h, 06:30 (UTC), 06:30+01:00, 2026-11-21T06:30.",
            metavar="TIME",
        ),
        Flag(
            "--limit-exit-code",
            ("limits.exit_code",),
            int,
            "Exit code after such a stop: 0 for schedulers, which would try again at once.",
            "130",
            "0|130",
        ),
        Flag(
            "--notify-above",
            ("notify.above_rate",),
            float,
            "Also notify when more than this share of the videos is in quarantine, 0 to 1.",
            "0.1",
            "RATE",
        ),
    ),
)
NOTIFY = Group(
    "Limits",
    (
        Flag(
            "--notify",
            ("notify.url",),
            str,
            "Post a message here when the run has ended. Others can see a command line: "
            "a URL that is secret goes into the environment.",
            "$MASKMILL_NOTIFY_URL",
            "URL",
        ),
    ),
)
_STORE_FIELDS = (
    ("endpoint-url", "endpoint_url", str, "S3-compatible endpoint.", "$AWS_ENDPOINT_URL", "URL"),
    ("path-style", "path_style", bool, "Address buckets as endpoint/bucket.", "", ""),
    ("profile", "profile", str, "Named profile of the AWS configuration.", "", "NAME"),
    ("region", "region", str, "Region to sign for.", "", "NAME"),
)
STORES = Group(
    "Object stores",
    (
        *(
            Flag(
                f"--{flag}",
                (f"corpus.store.{key}", f"out.store.{key}"),
                kind,
                f"{text} For corpus and output.",
                default,
                metavar,
            )
            for flag, key, kind, text, default, metavar in _STORE_FIELDS
        ),
        Flag(
            "--anonymous",
            ("corpus.store.anonymous",),
            bool,
            "Read the corpus without credentials.",
        ),
        *(
            Flag(
                f"--out-{flag}",
                (f"out.store.{key}",),
                kind,
                "The same for the output alone.",
                "",
                metavar,
            )
            for flag, key, kind, _, _, metavar in _STORE_FIELDS
        ),
    ),
)
OUT_STORE = Group(
    "Object stores",
    (
        *(
            Flag(f"--{flag}", (f"out.store.{key}",), kind, text, default, metavar)
            for flag, key, kind, text, default, metavar in _STORE_FIELDS
        ),
        Flag("--anonymous", ("out.store.anonymous",), bool, "Send unsigned requests."),
    ),
)


def command_words(config: RunConfig) -> list[str]:
    """Return what to type after ``maskmill run`` for a configuration.

    Parameters
    ----------
    config : RunConfig
        Any configuration.

    Returns
    -------
    list of str
        The corpus, a flag for each key that is not at its default, and ``--set`` for what no flag
        can say.
    """
    from jobs.config import CorpusConfig, DetectorConfig, OutConfig, PromptConfig, RunConfig
    from jobs.settings import flat_keys, format_value

    defaults = flat_keys(
        RunConfig(
            corpus=CorpusConfig(),
            out=OutConfig(uri=""),
            prompts=PromptConfig(detector=DetectorConfig(name="")),
        )
    )
    left = {key: v for key, v in flat_keys(config).items() if v != defaults.get(key)}
    words: list[str] = left.pop("corpus.paths", [])
    for group in (CORPUS, OUT, MODEL, PROMPTS, WORKERS, LIMITS, STORES):
        for flag in group.flags:
            words += _flag_words(flag, left)
    return words + [w for key, v in left.items() for w in ("--set", f"{key}={format_value(v)}")]


def _flag_words(flag: Flag, left: dict[str, Any]) -> list[str]:
    """Return the words of one flag, and take what they say out of `left`."""
    from jobs.settings import format_value

    if flag.parse is _pairs:
        prefix = f"{flag.keys[0]}."
        pairs = {key: left.pop(key) for key in list(left) if key.startswith(prefix)}
        texts = [f"{key.removeprefix(prefix)}={format_value(v)}" for key, v in pairs.items()]
        return [word for text in texts for word in (flag.name, text)]
    values = [left.get(key) for key in flag.keys]
    if values[0] is None or any(value != values[0] for value in values):
        return []
    value = values[0]
    if flag.kind is bool:
        words = [flag.name]
    elif isinstance(value, list) and flag.parse is None:
        words = [word for item in value for word in (flag.name, item)]
    else:
        text = ",".join(value) if isinstance(value, list) else str(value)
        if flag.parse is _words and _words(text) != value:
            return []
        words = [flag.name, text]
    for key in flag.keys:
        del left[key]
    return words


def configured(*groups: Group, corpus: bool = False) -> Callable[[Verb], Verb]:
    """Give a verb the flags of some groups.

    Parameters
    ----------
    *groups : Group
        Flags to add.
    corpus : bool
        Also take the CORPUS arguments, ``--config`` and ``--set``.

    Returns
    -------
    callable
        Decorates a function whose first parameter is the `CommandLine`; its other parameters
        stay what they are to typer.
    """

    def decorate(body: Verb) -> Verb:
        own = list(inspect.signature(body).parameters.values())[1:]
        hints = typing.get_type_hints(body, include_extras=True)
        parameters = [
            p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in own
        ]
        if corpus:
            parameters = [*_CORPUS_PARAMETERS, *parameters]
        parameters += [_parameter(flag, group.title) for group in groups for flag in group.flags]

        def verb(**values: Any) -> Any:
            command = _command_line(values, groups)
            return body(command, **{p.name: values[p.name] for p in own})

        verb.__name__ = body.__name__
        verb.__doc__ = body.__doc__
        verb.__annotations__ = {p.name: p.annotation for p in parameters}
        verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return verb

    return decorate


def _parameter(flag: Flag, panel: str) -> inspect.Parameter:
    option = typer.Option(
        flag.name,
        help=f"{flag.help} Default: {flag.default}." if flag.default else flag.help,
        rich_help_panel=panel,
        show_default=False,
        metavar=flag.metavar or {int: "N", float: "NUMBER", str: "TEXT"}.get(flag.kind),
    )
    kind: Any = str if flag.kind in (int, float) else flag.kind
    return inspect.Parameter(
        flag.parameter,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if kind is bool else None,
        annotation=Annotated[kind if kind is bool else kind | None, option],
    )


_CORPUS_PARAMETERS = [
    inspect.Parameter(
        "corpus_paths",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            list[str] | None,
            typer.Argument(
                metavar="CORPUS",
                help="Videos: files, folders, globs or URLs (s3://...), folders of frames.",
                show_default=False,
            ),
        ],
    ),
    inspect.Parameter(
        "config_file",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            str | None,
            typer.Option("--config", metavar="FILE", help="TOML or YAML file; flags win over it."),
        ],
    ),
    inspect.Parameter(
        "assignments",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            list[str] | None,
            typer.Option(
                "--set", metavar="KEY=VALUE", help="Set any configuration key; may be repeated."
            ),
        ],
    ),
]


def _command_line(values: dict[str, Any], groups: tuple[Group, ...]) -> CommandLine:
    from jobs.settings import Given

    command = CommandLine(
        file=values.get("config_file"), assignments=values.get("assignments") or []
    )
    if values.get("corpus_paths"):
        command.flags["corpus.paths"] = Given(values["corpus_paths"], "CORPUS")
    for group in groups:
        for flag in group.flags:
            value = values[flag.parameter]
            # A flag that was not typed is absent, so that it cannot hide a key of the file.
            if value is None or value is False or value == []:
                continue
            if flag.parse is not None:
                value = flag.parse(value)
            for key in flag.keys:
                command.flags |= _given(key, value, flag.name)
    return command


def _given(key: str, value: Any, origin: str) -> dict[str, Given]:
    from jobs.settings import Given

    if isinstance(value, dict):
        return {f"{key}.{name}": Given(item, f"{origin} {name}") for name, item in value.items()}
    return {key: Given(value, origin)}

"""`maskmill report`: one HTML file about a run, which needs nothing but a browser.

Numbers come from `facts`, plots from `plots`, pictures from `pictures`; the words and the order are
in ``page.html.j2``, the looks in ``page.css``, both beside this file.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from jobs.evaluation.tables import read_scores
from jobs.progress import format_duration
from jobs.quality import Measuring, RunQuality, measure_run, read_review, read_summary
from jobs.report_page.facts import Facts, Histogram, gather, top
from jobs.report_page.pictures import Pictures, take_pictures
from jobs.report_page.plots import Plots
from workers.logs import redact

if TYPE_CHECKING:
    from jobs.dataset import Dataset
    from jobs.quality import ReviewItem
    from workers.messages import StoreOptions
    from workers.storage import Store

MAX_REVIEW_ROWS = 60
MAX_SCORE_ROWS = 40
"""Objects of an evaluation, or of a comparison, that are shown: the worst."""
MAX_MESSAGE = 600
"""Characters of a failure's message."""
MEASURED_MASKS = 1_000_000
"""A run that nobody has measured is measured for the page when it has no more masks than this;
that takes about a minute at most."""


@dataclass(frozen=True, slots=True)
class Quality:
    """What is known without ground truth.

    Attributes
    ----------
    summary : RunQuality or None
        None where it was not measured.
    review : list of ReviewItem
        What to look at first.
    """

    summary: RunQuality | None
    review: list[ReviewItem]


def make_page(
    dataset: Dataset,
    store: Store,
    options: StoreOptions,
    *,
    num_pictured: int = 12,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Return the report of a run.

    Parameters
    ----------
    dataset : Dataset
        The run.
    store : Store
        Its output.
    options : StoreOptions
        How to reach the corpus, for pictures.
    num_pictured : int
        Videos whose sources are read for pictures; 0 for none.
    progress : callable, optional
        Told after each of these videos how many are done.

    Returns
    -------
    str
        One HTML document without references to the outside.

    Raises
    ------
    StoreError
        The dataset is damaged, or was rewritten meanwhile.
    """
    facts = gather(dataset, store)
    quality = _quality(dataset, store, facts)
    pictures = take_pictures(dataset, quality.review, options, num_pictured, progress)
    return render_page(facts, quality, pictures, read_scores(store))


def render_page(
    facts: Facts, quality: Quality, pictures: Pictures, scores: Mapping[str, Any] | None
) -> str:
    """Return a page about what was gathered.

    Parameters
    ----------
    facts : Facts
        From tables and log.
    quality : Quality
        Without ground truth.
    pictures : Pictures
        Of what to look at first.
    scores : Mapping or None
        The last evaluation, in the form of `jobs.evaluation.tables`.

    Returns
    -------
    str
        One HTML document.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("jobs.report_page", package_path=""),
        autoescape=True,
        finalize=_shareable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": format_duration,
        "day": _day,
        "size": _size,
        "clipped": _clipped,
        "number": lambda value: "" if value is None else f"{value:,.3f}",
    }
    loader = environment.loader
    assert loader is not None, "given above"
    css, _, _ = loader.get_source(environment, "page.css")
    plots = {name: Markup(svg) for name, svg in _plots(facts, quality).items()}
    return environment.get_template("page.html.j2").render(
        css=Markup(css),
        facts=facts,
        quality=quality,
        review=quality.review,
        pictures=pictures,
        plots=plots,
        run=facts.executions[0] if facts.executions else None,
        configuration=_configuration(facts),
        categories=_category_rows(facts),
        kinds={name: top(counts) for name, counts in facts.videos.kinds.items()},
        scores=scores,
        score_rows=_score_rows(scores),
        quoted_out=shlex.quote(facts.uri),
        quote=shlex.quote,
    )


def _shareable(value: Any) -> Any:
    """Return a value of the template without the secrets of signed URLs: pages are sent around."""
    from markupsafe import Markup

    is_text = isinstance(value, str) and not isinstance(value, Markup)
    # Pictures are long, and might hold the name of a secret by chance.
    return redact(value) if is_text and not value.startswith("data:") else value


def _quality(dataset: Dataset, store: Store, facts: Facts) -> Quality:
    """Return what was kept, or measure a run that is not too large for that."""
    summary = read_summary(store)
    if summary is not None:
        return Quality(summary, _telling(read_review(store)))
    if not 0 < facts.videos.num_masks <= MEASURED_MASKS:
        return Quality(None, [])
    with Measuring() as measuring:
        measure_run(dataset, measuring)
        return Quality(measuring.summary(), _telling(measuring.review()))


def _telling(review: Sequence[ReviewItem]) -> list[ReviewItem]:
    """Return what there is a reason to look at."""
    return [item for item in review if item.reason][:MAX_REVIEW_ROWS]


def _plots(facts: Facts, quality: Quality) -> dict[str, str]:
    """Return the plots that there is something to show on."""
    plots, made = Plots(), {}
    if facts.throughput is not None:
        made["throughput"] = plots.throughput(facts.throughput)
    if facts.stages:
        made["stages"] = plots.stages(facts.stages)
    if facts.workers:
        made["workers"] = plots.workers(facts.workers)
    if facts.videos.num_videos:
        made["objects"] = plots.bins(facts.videos.objects, "Objects per video", "objects", "videos")
    objects = facts.objects
    if objects.area.total:
        made["area"] = plots.histogram(objects.area, "Mean area", "pixels", log10=True)
        made["visible"] = plots.histogram(objects.visible, "Masks per object", "masks", log10=True)
        made["score"] = plots.histogram(objects.score, "Mean score", "score, 0 to 1")
    if objects.stability.total:
        made["stability"] = plots.histogram(
            objects.stability, "Stability", "overlap of consecutive boxes"
        )
    named = {row["name"]: row["num_objects"] for row in _category_rows(facts)}
    if len(named) > 1:
        made["categories"] = plots.ranked(top(named), "Objects per category", "objects")
    if quality.summary is not None and quality.summary.num_objects:
        counts = quality.summary.concern_histogram
        concern = Histogram([at / len(counts) for at in range(len(counts) + 1)])
        concern.counts[:] = counts
        made["concern"] = plots.histogram(concern, "Concern", "concern, 0 to 1")
    return made


def _category_rows(facts: Facts) -> list[dict[str, Any]]:
    """Return the sums of each category, the commonest first."""
    rows = [
        {
            "name": facts.categories.get(category, f"category {category}")
            if category is not None
            else "without a category",
            "num_objects": int(objects),
            "num_masks": int(masks),
            "mean_score": score / masks if masks else None,
        }
        for category, (objects, masks, score) in facts.objects.by_category.items()
    ]
    return sorted(rows, key=lambda row: (-row["num_objects"], row["name"]))


def _configuration(facts: Facts) -> dict[str, str]:
    """Return the newest configuration as a file, and as a command where that can be said."""
    from pydantic import ValidationError

    from jobs.config import RunConfig
    from jobs.flags import command_words
    from jobs.settings import to_toml

    if not facts.executions:
        return {}
    stored = facts.executions[0]["config"]
    try:
        config = RunConfig.model_validate(stored)
    except ValidationError:
        # Written by another version of maskmill: shown as it is.
        return {"text": json.dumps(stored, indent=1)}
    command = shlex.join(["maskmill", "run", *command_words(config)])
    return {"text": to_toml(config), "command": command}


def _score_rows(scores: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the objects of an evaluation, the worst first."""
    if scores is None:
        return []
    rows = [
        {"video": sequence["video"], **each}
        for sequence in scores["sequences"]
        for each in sequence["objects"]
    ]

    def main_score(row: Mapping[str, Any]) -> float:
        known: Sequence[Any] = [row.get("j_and_f"), row.get("success_auc")]
        return next((float(value) for value in known if value is not None), -1.0)

    return sorted(rows, key=main_score)[:MAX_SCORE_ROWS]


def _day(seconds: float | None) -> str:
    if seconds is None:
        return "—"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _size(num_bytes: float) -> str:
    """Return a number of bytes as people say it.

    Examples
    --------
    >>> _size(999), _size(12_345_678)
    ('999 B', '12.3 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def _clipped(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}…"

"""Read what Ray's exporter tells, as Prometheus would, and sum it by label."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

REPORT_EVERY_S = 1
EXPORT_ENVIRONMENT = {"RAY_metrics_report_interval_ms": f"{1000 * REPORT_EVERY_S}"}
"""For drivers and nodes: metrics reach the exporter after a second instead of ten."""


@dataclass(frozen=True)
class Sample:
    """One series at one moment."""

    name: str
    labels: Mapping[str, str]
    value: float


class Scrape:
    """Everything of ours that an exporter told at one moment.

    Parameters
    ----------
    text : str
        What it answered.
    """

    def __init__(self, text: str) -> None:
        self.samples = [
            Sample(sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("ray_maskmill_")
        ]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over all series with these labels."""
        return sum(
            s.value
            for s in self.samples
            if s.name == name and labels.items() <= dict(s.labels).items()
        )


def scrape(ip: str, port: int) -> Scrape:
    """Ask an exporter once."""
    with urllib.request.urlopen(f"http://{ip}:{port}/metrics", timeout=20) as answer:
        return Scrape(answer.read().decode())

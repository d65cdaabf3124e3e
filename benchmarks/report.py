"""What the benchmarks found: kept as JSON, section by section, and shown as RESULTS.md and a chart."""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
STORE = FOLDER / "results.json"
RESULTS = FOLDER / "RESULTS.md"

Rows = Sequence[Sequence[str]]


@dataclass
class Target:
    """A figure that was aimed at, and what was measured of it."""

    figure: str
    aim: str
    measured: str
    is_met: bool


@dataclass
class Section:
    """What one benchmark found."""

    title: str
    #: how it was measured, in a few sentences
    text: str
    #: tables, each with its head as the first row
    tables: list[Rows]
    targets: list[Target] = field(default_factory=list)
    #: what it was measured with, by name
    versions: dict[str, str] = field(default_factory=dict)
    #: bars of the chart: name and figure
    bars: dict[str, float] = field(default_factory=dict)


def describe_machine() -> str:
    """Processor, cores, memory, kernel and Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{models[0] if models else platform.machine()}, {os.cpu_count()} shared cores, {gigabytes:.0f} GiB; "
        f"{platform.system()} {platform.release()}, CPython {platform.python_version()}"
    )


def save(name: str, section: Section) -> None:
    """Keep what a benchmark found, in place of what it found before."""
    stored = _load()
    stored[name] = {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine(), **asdict(section)}
    STORE.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")


def _load() -> dict[str, Any]:
    return dict(json.loads(STORE.read_text())) if STORE.exists() else {}


def _table(rows: Rows) -> list[str]:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + " --- |" * len(rows[0]), *body, ""]


def render(order: Sequence[str]) -> None:
    """Write RESULTS.md: the targets first, then each section in this order."""
    stored = _load()
    sections = [stored[name] for name in order if name in stored]
    head = ("figure", "target", "measured", "met")
    targets = [
        (target["figure"], target["aim"], target["measured"], "yes" if target["is_met"] else "**no**")
        for section in sections
        for target in section["targets"]
    ]
    lines = [
        "# Measured",
        "",
        "Made by `pipenv run bench`. Contestants take turns in one run, and only their ratios are claimed: a figure is"
        " the median of the rounds, with the least and the most of them in brackets.",
        "",
        *_table([head, *targets]),
    ]
    for section in sections:
        lines += [f"## {section['title']}", "", section["text"], ""]
        for table in section["tables"]:
            lines += _table(table)
        versions = "".join(f", {name} {version}" for name, version in section["versions"].items())
        lines += [f"{section['date']}; {section['machine']}{versions}.", ""]
    RESULTS.write_text("\n".join(lines))

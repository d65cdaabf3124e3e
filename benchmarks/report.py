"""What the benchmarks found: kept as JSON, section by section, and shown as RESULTS.md and a chart."""

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

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


def draw_chart(title: str, bars: Mapping[str, float]) -> str:
    """An SVG of horizontal bars with widths to scale, this service's in another colour; for light and dark pages."""
    names, longest, row = 250, 390, 28  # pixels: the space for names, the longest bar, the height of a row
    shapes = []
    for number, (name, figure) in enumerate(bars.items()):
        top, width = 40 + number * row, longest * figure / max(bars.values())
        kind = "own" if name.startswith("this service") else "peer"
        shapes += [
            f'<text x="{names - 10}" y="{top + 15}" text-anchor="end">{escape(name.replace("`", ""))}</text>',
            f'<rect x="{names}" y="{top}" width="{width:.1f}" height="{row - 8}" rx="2" class="{kind}"/>',
            f'<text x="{names + width + 8:.1f}" y="{top + 15}">{figure:,.0f}</text>',
        ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {48 + len(bars) * row}" role="img">',
            f"<title>{escape(title)}</title>",
            "<style>",
            "text { font: 13px system-ui, sans-serif; fill: #1f2328 } .own { fill: #1a7f37 } .peer { fill: #8c959f }",
            ".title { font-weight: 600 }",
            "@media (prefers-color-scheme: dark) {",
            "text { fill: #e6edf3 } .own { fill: #3fb950 } .peer { fill: #6e7681 }",
            "}",
            "</style>",
            f'<text x="10" y="24" class="title">{escape(title)}</text>',
            *shapes,
            "</svg>",
            "",
        ]
    )


def render(order: Sequence[str]) -> None:
    """Write RESULTS.md: the targets first, then each section in this order, with a chart of its own if it has bars."""
    stored = _load()
    sections = {name: stored[name] for name in order if name in stored}
    head = ("figure", "target", "measured", "met")
    targets = [
        (target["figure"], target["aim"], target["measured"], "yes" if target["is_met"] else "**no**")
        for section in sections.values()
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
    for name, section in sections.items():
        lines += [f"## {section['title']}", "", section["text"], ""]
        if section["bars"]:
            chart = FOLDER / f"{name}.svg"
            chart.write_text(draw_chart(section["title"], section["bars"]))
            lines += [f"![{section['title']}]({chart.name})", ""]
        for table in section["tables"]:
            lines += _table(table)
        versions = "".join(f", {name} {version}" for name, version in section["versions"].items())
        lines += [f"{section['date']}; {section['machine']}{versions}.", ""]
    RESULTS.write_text("\n".join(lines))

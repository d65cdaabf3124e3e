"""The results of the benchmarks: stored as JSON, section by section, and shown as RESULTS.md and a chart."""

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

#: The reasons for missed targets, by benchmark. RESULTS.md shows the reason if a target is missed.
WHY = {
    "workers": "The multiple of `rq worker`, and of Huey: a job costs one script, which ends it and takes the next, and"
    " the way to the work-horse and back. The script keeps what is promised of jobs (lease, fence, registries as RQ"
    " has them, the index of `/jobs`, counts, the event log), and takes most of what Valkey does here; the"
    " work-horse keeps a job that dies from taking the worker with it. Worker, work-horse and Valkey share two cores."
    " Huey runs the function in its one process, and a job has left Redis before it runs: one that dies is lost.",
    "http": "The multiples of the tutorial: gunicorn, Flask and one round trip to Redis, which do nothing, hardly reach"
    " the one and not the other (the third table), so what is built on them cannot. The shares of that floor, where"
    " one is missed: what is above it is the query and the payload, parsed and validated, an id that proves itself,"
    " the arguments of the script, the status object as JSON, the key, the limits, and that requests are counted and"
    " followed by an id. Requests of one moment share a round trip, which the floor's do not: some 80 µs less each.",
    "waiting": "Memory: each request that waits is a greenlet, with 8 kB of the interpreter's stack and 5 kB of C's,"
    " and some 20 kB of small objects: gunicorn's connection, parser and buffers, Flask's contexts, the options, the"
    " status, and what wakes it. The multiple of the echo: a job is enqueued, taken, ended, told in the event log, and"
    " read, each a word with Redis; the echo's two lists are two. The 5 ms: where the echo took 1.2 ms, on 2026-11-25,"
    " it was 3.1 ms; what was measured in turns beside it on 2026-11-26 was no slower than that version.",
    "size": "RSS counts what the three processes of a worker share three times. By PSS, which does not, they are below"
    " the target.",
}


@dataclass
class Target:
    """A target for a figure, and the measured value."""

    figure: str
    aim: str
    measured: str
    is_met: bool


@dataclass
class Section:
    """The results of one benchmark."""

    title: str
    #: the method, in a few sentences
    text: str
    #: tables, each with its head as the first row
    tables: list[Rows]
    targets: list[Target] = field(default_factory=list)
    #: the version of each tool, by name
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
    """Store the results of a benchmark in place of its earlier ones."""
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
    missed = [name for name in sections if any(not target["is_met"] for target in sections[name]["targets"])]
    if missed:
        lines += ["**Why some are missed.**", "", *(f"- {WHY[name]}" for name in missed), ""]
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

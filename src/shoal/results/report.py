"""The derived files of a study: results.json, claims.json, figures/*.svg, report.html (one file, no request to anywhere) and report.md.

Works at any time, also on an unfinished study, and says so; what is missing is named, never a crash.

    write_report(Store.read("runs/grokking"), "grokking", "When does ...?", figures, claims, "val/accuracy")
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from shoal.results import tables
from shoal.results.claims import Claim, judge
from shoal.results.figures import Figure
from shoal.results.rows import Rows
from shoal.results.store import Store, write_atomic, write_json
from shoal.results.wording import duration, interval, magnitude, number

APART = ("study", "question", "config", "settings", "claims", "tables", "figures", "command", "preset")  # of study.yaml, told in their own places


def write_report(
    store: Store,
    study_name: str,
    question: str,
    figures: Sequence[Figure] = (),
    claims: Sequence[Claim] = (),
    main_metric: str = "val/accuracy",
    notes: str | Sequence[str] = (),
    own_tables: Sequence[tables.Table] = (),
) -> Path:
    """Write all derived files into the study's directory. Returns the path of report.html."""
    rows, fleets = store.rows(), store.fleets()
    verdicts = [judge(claim, rows) for claim in claims]
    table = tables.results(rows, main_metric)
    drawn = [_draw(figure, rows) for figure in figures]
    write_json(store.directory / "results.json", result_records(rows))
    write_json(store.directory / "claims.json", verdicts)
    for figure in drawn:
        if figure["svg"]:
            write_atomic(store.directory / "figures" / f"{figure['name']}.svg", figure["svg"].encode())
    span = tables.scale([x for line in table for x in (line["mean"].value, line["mean"].low, line["mean"].high)])
    content = {
        "name": study_name,
        "question": question,
        "preset": store.record.get("preset"),
        "rows": rows,
        "statuses": tables.statuses(rows),
        "unfinished": tables.statuses(rows).get("running", 0),
        "planned": store.record.get("num_runs"),
        "summary": tables.summary(rows, table, verdicts, main_metric),
        "notes": [notes] if isinstance(notes, str) else list(notes),
        "claims": [
            (verdict, tables.bar(verdict, tables.scale([verdict["value"], *verdict["interval"], *verdict["holds"]]), verdict["holds"])) for verdict in verdicts
        ],
        "main": tables.main_key(main_metric)[1],
        "results": [(line, tables.bar(line["mean"], span)) for line in table],
        "span": span,
        "tables": [tables.own(one, rows) for one in own_tables],
        "figures": drawn,
        "measures": tables.measures(rows),
        "setup": tables.setup(rows),
        "changes": tables.changes(rows),
        "data": tables.data(rows),
        "cost": tables.cost(rows, fleets),
        "environment": list(tables.flat({key: value for key, value in store.record.items() if key not in APART}).items()),
        "command": _command(store, study_name),
        "shown": tables.SHOWN,
    }
    write_atomic(store.directory / "report.md", _environment(html=False).get_template("report.md.j2").render(content).encode())
    page = store.directory / "report.html"
    write_atomic(page, _environment(html=True).get_template("report.html.j2").render(content).encode())
    return page


def result_records(rows: Rows) -> list[dict[str, Any]]:
    """results.json: one object per run; "config" is what differs between the runs, without the seeds."""
    paths = tables.settings(rows)
    records = []
    for row in rows:
        keys = list(row)
        record = {key: row.get(key) for key in ("id", "fleet", "status", "steps", "seconds", "parameters")}
        record |= {
            "seeds": {path.removeprefix("seeds."): row[path] for path in keys if path.startswith("seeds.")},
            "config": {path: row.get(path) for path in paths},
        }
        records.append(
            record | {kind: {key.removeprefix(f"{kind}."): row[key] for key in keys if key.startswith(f"{kind}.")} for kind in ("flops", "final", "best")}
        )
    return records


def _draw(figure: Figure, rows: Rows) -> dict[str, Any]:
    """The figure, or why there is none: a figure that fails must not cost the report of a long training."""
    try:
        return {"name": figure.name, "caption": figure.caption, "svg": figure.svg(rows), "error": None}
    except Exception as error:
        return {"name": figure.name, "caption": figure.caption, "svg": None, "error": f"{type(error).__name__}: {error}"}


def _command(store: Store, study_name: str) -> str:
    command = store.record.get("command")
    if command:
        return command if isinstance(command, str) else shlex.join(map(str, command))
    preset = store.record.get("preset")
    return shlex.join(["shoal", "run", study_name, *(["--preset", str(preset)] if preset else []), "--out", str(store.directory)])


@functools.cache
def _environment(html: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=html, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "duration": duration, "magnitude": magnitude, "cell": _cell, "estimate": tables.bounds}
    environment.globals |= {"interval": interval, "status_words": tables.STATUS_WORDS}
    return environment


def _cell(text: Any) -> str:
    """Text that stays inside one cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")

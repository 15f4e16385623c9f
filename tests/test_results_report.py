"""The report and the figures on an invented study: grokking-like curves, two settings, eight seeds, one dead run, some that never get there."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from invented import invented

from shoal.config import AdamW, DecoderConfig, ModularConfig, RunConfig, StudyConfig, flatten, run_id, with_seed, with_values
from shoal.config.load import override
from shoal.results import Claim, Estimate, Figure, Rows, Sample, Store, curves, dots, survival, tables, write_report
from shoal.results import figures as figures_module
from shoal.results.claims import record as record_claims
from shoal.results.tables import Table

BUDGET, EVERY = 10_000, 50


def base() -> RunConfig:
    return RunConfig(
        task=ModularConfig(), model=DecoderConfig(norm_place="post"), optimizer=AdamW(beta2=0.98), steps=BUDGET, stop_metric="val/accuracy", stop_at=0.99
    )


def wd_share(rows: Any) -> Sample:
    return Sample(rows.where({"optimizer.wd": 1.0}).reached("val/accuracy", 0.99)[1], kind="proportion")


def claims() -> list[Claim]:
    return [
        Claim("With weight decay 1, more than half of the seeds generalise within 10,000 steps.", wd_share, (0.5, 1)),
        Claim(
            "Weight decay 1 takes fewer than 3,000 steps to 99 %, in the median.",
            lambda rows: Sample(*rows.where({"optimizer.wd": 1.0}).reached("val/accuracy", 0.99), kind="survival"),
            (0, 3000),
        ),
        Claim(
            "Without weight decay, at least nine seeds in ten generalise.",
            lambda rows: Sample(rows.where({"optimizer.wd": 0.0}).reached("val/accuracy", 0.99)[1], kind="proportion"),
            (0.9, 1),
        ),
        Claim("Test accuracy is above 99 % on average.", lambda rows: Sample(rows.column("final.test/accuracy"), bounds=(0, 1)), (0.99, 1)),
        Claim("Every run learns its training table.", lambda rows: Sample(rows.column("best.train/accuracy"), bounds=(0, 1)), (0.8, 1)),
    ]


def invent(directory: Path, seeds: int = 8, unfinished: bool = False) -> Store:
    """Two fleets' worth of a study, from a fixed generator."""
    generator = np.random.default_rng(7)
    runs = [with_seed(with_values(base(), {"optimizer.wd": wd}), seed) for wd in (0.0, 1.0) for seed in range(seeds)]
    store = Store.open(
        directory,
        {
            "study": "grokking", "preset": "paper", "config": {"grid": {"optimizer.wd": [0.0, 1.0]}, "seeds": seeds}, "claims": record_claims(claims()),
            "command": ["shoal", "run", "grokking", "--preset", "paper", "--seeds", str(seeds)], "num_runs": len(runs),
            "versions": {"shoal": "0.1.0", "torch": "2.13.0", "python": "3.11.9"}, "device": "cpu (2 cores)", "git": {"commit": "0123abcd", "dirty": False},
        },
    )  # fmt: skip
    describe = [
        {"rows": 9312, "train": 4656, "val": 4656, "test": 0, "split": f"{generator.integers(2**48):012x}", "definition": "3c1f9a77b2e0"} for _ in range(seeds)
    ] * 2
    record = {
        "runs": [{"id": run_id(run), "config": flatten(run)} for run in runs],
        "choices": {"device": "cpu", "runs": len(runs), "compiled": False, "attention": "short"}, "data": describe,
        "model": {"parameters": 422_784, "flops": {"assignment": 3.1e9, "products": 2.0e9, "hardware": 2.2e9}},
    }  # fmt: skip
    store.start_fleet("a1b2c3d4", record)
    steps = np.arange(0, BUDGET + 1, EVERY)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("step", "run", "train/accuracy", "val/accuracy", "train/loss", "val/loss", "batch/loss")}
    outcome = []
    for r, run in enumerate(runs):
        wd = run.optimizer.wd
        memorised, groks = generator.normal(2.2, 0.06), generator.normal(3.12 if wd else 3.9, 0.09 if wd else 0.12)
        noise = generator.normal(0, 0.012, (4, steps.size)).cumsum(axis=1) * 0.12 + generator.normal(0, 0.004, (4, steps.size))
        x = np.log10(np.maximum(steps, 1))
        train, val = (1 / (1 + np.exp(-np.clip(slope * (x - middle), -50, 50))) for slope, middle in ((14, memorised), (16, groks)))
        val = np.clip(0.01 + 0.99 * val + noise[1] * val * (1 - val) * 4, 0, 1)
        last = BUDGET
        status = "completed"
        hits = np.convolve(val >= 0.99, np.ones(5), "valid") > 4.5
        if hits.any():
            last, status = int(steps[hits.argmax() + 4]), "finished"
        if r == 3:
            last, status = 1500, "dead"
        if unfinished and r % 5 == 0:
            last, status = 1200, "running"
        kept = steps <= last
        values = {
            "train/accuracy": np.clip(0.01 + 0.99 * train, 0, 1), "val/accuracy": val, "train/loss": 4.6 * (1 - train) + 0.002,
            "val/loss": 4.6 + 6 * train * (1 - val) - 4.58 * val, "batch/loss": 4.6 * (1 - train) + 0.004,
        }  # fmt: skip
        columns["step"].append(steps[kept])
        columns["run"].append(np.full(kept.sum(), r))
        for name, v in values.items():
            columns[name].append(v[kept])
        outcome.append({"status": status, "steps": last, "seconds": last / 90})
    table = {name: np.concatenate(parts) for name, parts in columns.items()}
    for low in range(0, BUDGET + 1, 2000):
        chunk = (table["step"] >= low) & (table["step"] < low + 2000)
        store.append("a1b2c3d4", {name: column[chunk] for name, column in table.items()})
    if not unfinished:
        store.finish_fleet("a1b2c3d4", {"runs": outcome, "seconds": 431.7, "rate": 612.4})
    for run in runs[:3]:
        store.add_measure(run_id(run), "samples", [{"prompt": "12 / 7 =", "text": "12 / 7 = 43", "right": True, "probability": 0.9987}])
    store.add_measure(run_id(runs[0]), "long samples", [{"temperature": 0.8, "text": "def distance(a, b):\n    <b>return</b> (a - b) % 97 & 1\n"}])
    return store


def figures() -> list[Figure]:
    return [
        curves(("train/accuracy", "val/accuracy"), by=("optimizer.wd",), logx=True, threshold=0.99, name="accuracy"),
        curves("val/loss", by=("optimizer.wd",), logx=True, name="loss"),
        survival("val/accuracy", 0.99, by=("optimizer.wd",)),
        dots("val/accuracy", by=("optimizer.wd",)),
    ]


QUESTION = "A small transformer learns half of a division table by heart. When, if ever, does it work out the other half, and what does weight decay change?"


class Page(HTMLParser):
    """What a browser would fetch, ids, and whether tags close."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "img"), tag
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                (self.links if (value or "").startswith("#") else self.fetched).append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in self.VOID:
            self.tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.tags.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.tags and self.tags.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    store = invent(tmp_path_factory.mktemp("study"))
    return store, write_report(store, "grokking", QUESTION, figures(), claims(), "val/accuracy", "Both halves of the table are whole.")


def test_page_is_self_contained_and_well_formed(study: tuple[Store, Path]) -> None:
    text = study[1].read_text()
    page = Page(text)
    assert page.fetched == [] and page.tags == []
    assert not re.search(r"""(src|href|url\(|@import)\s*=?\s*["'(]?\s*(https?:)?//""", text)
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # namespaces, never fetched
    assert len(page.ids) == len(set(page.ids)), "two figures share an id"
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert all(f"url(#{name})" not in text or name in page.ids for name in re.findall(r"url\(#([^)]+)\)", text))
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert len(text.encode()) < 1_000_000


def test_page_says_what_the_numbers_say(study: tuple[Store, Path]) -> None:
    store, path = study
    words = Page(path.read_text()).text
    rows = store.rows()
    assert "16 runs in 2 settings: 8 met the stop rule, 7 made all their steps without meeting the stop rule and 1 died" in words
    assert "Of 5 claims, 2 held, 1 not held and 2 undecided." in words and QUESTION in words and "Both halves" in words
    times, observed = rows.where({"optimizer.wd": 1.0}).reached("val/accuracy", 0.99)
    assert f"8 of 8 reached val/accuracy ≥ 0.99, median {np.sort(times)[3]:,.0f} steps" in words and observed.all()
    mean = rows.where({"optimizer.wd": 0.0}).column("final.val/accuracy").mean()
    assert f"mean {mean:.4g}, 95 % interval [" in words and "Unfinished" not in words
    for expected in (
        "beta2",
        "0.98",
        "linear_init",
        "3c1f9a77b2e0",
        "422,784",
        "2e9 products",
        "7.2 min",
        "versions.torch",
        "0123abcd",
        "shoal run grokking --preset paper --seeds 8",
    ):
        assert expected in words, expected
    assert "<b>return</b> (a - b) % 97 & 1" in words  # a sample is text, never markup
    assert "did you mean 'final.train/accuracy'" in words


def test_markdown_has_the_same_numbers(study: tuple[Store, Path]) -> None:
    text = study[1].with_name("report.md").read_text()
    for expected in (
        "16 runs in 2 settings",
        "| **held** |",
        "![",
        "figures/accuracy.svg",
        "| **optimizer.wd** | 0 \\| 1 |",
        "8 of 8 [0.6306, 1]",
        "    shoal run grokking",
    ):
        assert expected in text, expected
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert "\n\n\n\n" not in text


def test_json_files(study: tuple[Store, Path]) -> None:
    store, path = study

    def no_constants(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    records = json.loads(path.with_name("results.json").read_text(), parse_constant=no_constants)
    assert len(records) == 16
    first = records[0]
    assert (
        first["config"] == {"optimizer.wd": 0.0}
        and first["seeds"] == {"split": 0, "init": 0, "order": 0}
        and first["flops"] == {"assignment": 3.1e9, "products": 2.0e9, "hardware": 2.2e9}
    )
    assert first["final"].keys() >= {"val/accuracy", "train/loss"} and first["best"]["val/accuracy"] >= first["final"]["val/accuracy"]
    assert [record["status"] for record in records].count("dead") == 1 and records[3]["steps"] == 1500
    assert [record["id"] for record in records] == [row["id"] for row in store.rows()]
    verdicts = json.loads(path.with_name("claims.json").read_text(), parse_constant=no_constants)
    assert [verdict["verdict"] for verdict in verdicts] == ["held", "undecided", "not held", "undecided", "held"]
    assert all({"claim", "verdict", "value", "interval", "n", "rule"} <= verdict.keys() for verdict in verdicts)
    assert verdicts[3]["value"] is None and verdicts[3]["interval"] == [None, None]


def test_report_again_gives_the_same_bytes(study: tuple[Store, Path]) -> None:
    store, path = study
    names = ("report.html", "report.md", "results.json", "claims.json")
    before = [path.with_name(name).read_bytes() for name in names]
    write_report(Store.read(store.directory), "grokking", QUESTION, figures(), claims(), "val/accuracy", "Both halves of the table are whole.")
    assert [path.with_name(name).read_bytes() for name in names] == before


def test_figures_are_deterministic_small_and_ours(study: tuple[Store, Path]) -> None:
    rows = study[0].rows()
    settings_before = dict(matplotlib.rcParams)
    for figure in figures():
        with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30}):  # a user's own settings do not matter
            first = figure.svg(rows)
        assert first == figure.svg(study[0].rows())
        assert len(first.encode()) < 200_000 and "<metadata" not in first and "<image" not in first
        ElementTree.fromstring(first)
    assert dict(matplotlib.rcParams) == settings_before


def test_figures_of_many_long_runs_stay_small(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    runs = [
        with_seed(with_values(base(), {"optimizer.wd": wd, "optimizer.lr": lr}), s)
        for wd in (0.0, 0.1, 0.3, 1.0)
        for lr in (1e-3, 3e-3, 1e-2)
        for s in range(8)
    ]
    store = Store.open(tmp_path, {"study": "many"})
    store.start_fleet("aa", {"runs": [{"id": run_id(run), "config": flatten(run)} for run in runs]})
    step, run = np.repeat(np.arange(1, 1501) * 10, len(runs)), np.tile(np.arange(len(runs)), 1500)
    store.append("aa", {"step": step, "run": run, "train/accuracy": generator.random(step.size), "val/accuracy": generator.random(step.size)})
    both, by = ("train/accuracy", "val/accuracy"), ("optimizer.wd", "optimizer.lr")
    for figure in (
        curves(both, by=by),
        curves(both, logx=True),
        curves("val/accuracy", by=by),
        survival("val/accuracy", 0.9, by=by, sustained=1),
        dots("val/accuracy", by=by),
    ):
        assert len(figure.svg(store.rows()).encode()) < 200_000, figure.name


def test_carried_values_and_thinning() -> None:
    steps, values = np.array([10, 20, 30]), np.array([1.0, 2.0, 3.0])
    grid = np.array([5, 10, 25, 30, 90])
    assert np.array_equal(figures_module._carried(grid, steps, values, ends=True), [np.nan, 1, 2, 3, 3], equal_nan=True)
    assert np.array_equal(figures_module._carried(grid, steps, values, ends=False), [np.nan, 1, 2, 3, np.nan], equal_nan=True)
    long = np.arange(1, 100_001)
    for logx in (True, False):
        kept = figures_module._thin(long, 400, logx)
        assert kept.size <= 401 and kept[0] == 1 and kept[-1] == 100_000 and np.isin(kept, long).all()


def test_log_axis_begins_after_step_zero(study: tuple[Store, Path]) -> None:
    drawing = curves("val/accuracy", logx=True).draw(study[0].rows())
    assert drawing.axes[0].get_xscale() == "log" and all(line.get_xdata().min() > 0 for line in drawing.axes[0].lines[:1])  # pyright: ignore
    median = drawing.axes[0].lines[0]
    assert median.get_xdata()[0] == EVERY  # pyright: ignore
    table = np.array([row.curve("val/accuracy")[1][1] for row in study[0].rows()])
    assert median.get_ydata()[0] == pytest.approx(np.median(table))  # pyright: ignore


def test_unfinished_study(tmp_path: Path) -> None:
    store = invent(tmp_path, unfinished=True)
    path = write_report(store, "grokking", QUESTION, figures(), claims(), "val/accuracy")
    words = Page(path.read_text()).text
    assert "Unfinished. 16 of 16 runs" in words and "16 runs in 2 settings: 16 unfinished." in words
    assert "**Unfinished.**" in path.with_name("report.md").read_text()
    assert {verdict["verdict"] for verdict in json.loads(path.with_name("claims.json").read_text())} == {"undecided"}


def test_study_without_anything(tmp_path: Path) -> None:
    store = Store.open(tmp_path, {"study": "empty"})
    path = write_report(store, "empty", "Does <nothing> matter?", figures(), claims())
    page = Page(path.read_text())
    assert "No run has written anything yet." in page.text and "Does <nothing> matter?" in page.text and page.tags == []
    assert json.loads(path.with_name("results.json").read_text()) == []
    runs = [with_seed(RunConfig(), seed) for seed in range(2)]
    store.start_fleet("aa", {"runs": [{"id": run_id(run), "config": flatten(run)} for run in runs]})
    page = Page(write_report(store, "empty", "?").read_text())
    assert "No run has a value of val/accuracy yet." in page.text
    store.append("aa", {"step": np.zeros(2), "run": np.arange(2), "val/accuracy": np.array([0.5, 0.6])})  # one evaluation, at step 0: nothing for a log axis
    page = Page(write_report(store, "empty", "?", figures(), claims()).read_text())
    assert page.tags == [] and "Could not be drawn" not in page.text


def test_a_figure_that_fails_is_named_and_costs_nothing_else(tmp_path: Path) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("no <ruler>")

    path = write_report(invent(tmp_path, seeds=2), "grokking", QUESTION, [Figure("broken", broken, "a caption"), *figures()[:1]])
    words = Page(path.read_text()).text
    assert (
        "Could not be drawn. RuntimeError: no <ruler>" in words
        and (tmp_path / "figures/accuracy.svg").exists()
        and not (tmp_path / "figures/broken.svg").exists()
    )


def test_a_studys_own_tables(tmp_path: Path) -> None:
    cells = {
        "what": "a | b <i>",
        "nothing": None,
        "number": 12_345.0,
        "steps": Estimate("survival median", 4400.0, 4300.0, 4700.0, 9),
        "late": Estimate("survival median", np.inf, 4300.0, np.inf, 9),
        "share": Estimate("proportion", 0.8, 0.44, 0.97, 10),
        "open": Estimate("median", 3.5, -np.inf, np.inf, 2),
        "none": Estimate("survival median", np.nan, 0.0, np.inf, 0),
    }
    own = [
        Table("first", lambda rows: [cells, {"what": "second line", "only here": 7}], "What it <shows>."),
        Table("broken", lambda rows: [{"x": rows.column("final.train/acuracy")}]),
        Table("empty", lambda rows: []),
    ]
    path = write_report(invent(tmp_path, seeds=2), "grokking", QUESTION, figures()[:1], own_tables=own)
    page = Page(path.read_text())
    assert page.tags == [] and page.text.index("What it <shows>.") > page.text.index("Results")
    assert "a | b <i> – 12,345 4,400 [4,300, 4,700] not reached [4,300, ∞] 8 of 10 [0.44, 0.97] 3.5 – –" in page.text
    assert "second line – – – – – – – 7" in page.text
    assert "Could not be made. KeyError: \"no run has 'final.train/acuracy'; did you mean 'final.train/accuracy'?\"" in page.text
    assert "Nothing to show yet." in page.text and (tmp_path / "figures/accuracy.svg").exists()
    text = path.with_name("report.md").read_text()
    assert text.index("## Results") < text.index("## Tables") < text.index("## Figures")
    assert "| a \\| b <i> | – | 12,345 | 4,400 [4,300, 4,700] | not reached [4,300, ∞] | 8 of 10 [0.44, 0.97] | 3.5 | – | – |" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert "\n\n\n\n" not in text


def test_settings_with_most_runs_come_first(tmp_path: Path) -> None:
    """What was tried on a seed or two stands behind what it was tried for."""
    tried = override(StudyConfig(run=base(), grid={"optimizer.lr": [1e-4, 1e-3]}, seeds=1), {}).runs()
    chosen = override(StudyConfig(run=base(), variants={"chosen": {"optimizer.lr": 1e-3}}, seeds=3), {}).runs()
    _, rows = invented(tmp_path, [(run, 500.0) for run in (*tried, *chosen)])
    assert [(line["n"], line["setting"]["optimizer.lr"]) for line in tables.results(rows, "val/accuracy")] == [(3, 1e-3), (1, 1e-4), (1, 1e-3)]


def test_variants_are_told_by_what_they_change(tmp_path: Path) -> None:
    """In the study's order; the set-up is the first one's, and each other one's changes stand by its name, though it has another optimizer."""
    changes: dict[str, dict[str, Any]] = {
        "usual": {}, "no decay": {"optimizer.wd": 0.0}, "Adam": {"optimizer.type": "adam", "optimizer.lr": 0.01, "optimizer.eps": 1e-7}, "again": {},
    }  # fmt: skip
    config = override(StudyConfig(run=base(), variants=changes, grid={"task.train_fraction": [0.3, 0.4]}, seeds=2), {})
    runs = config.runs()
    store, rows = invented(tmp_path, [(runs[i], 500.0) for i in np.random.default_rng(0).permutation(len(runs))], record={"config": {"variant": list(changes)}})
    assert [line["label"] for line in tables.results(rows, "val/accuracy")] == [f"{name}, train_fraction = {share}" for name in changes for share in (0.3, 0.4)]
    assert tables.changes(rows) == [("no decay", "wd = 0"), ("Adam", "optimizer = adam, lr = 0.01, eps = 1e-7"), ("again", "nothing")]
    told = {line["path"]: (line["values"], line["differs"]) for section in tables.setup(rows) for line in section["lines"]}
    assert told["optimizer.wd"] == ("0.01", False) and told["task.train_fraction"] == ("0.3 | 0.4", True) and told["variant"] == ("usual", False)
    path = write_report(store, "invented", QUESTION, [curves("val/accuracy", by=["variant"])])
    page = Page(path.read_text())
    assert page.tags == [] and "Adam optimizer = adam, lr = 0.01, eps = 1e-7" in page.text and "of the first variant" in page.text
    assert "| no decay | wd = 0 |" in path.with_name("report.md").read_text()
    assert tables.changes(rows.where({"variant": "usual"})) == [] == tables.changes(Rows())


def test_planned_runs_that_have_not_started_are_said(tmp_path: Path) -> None:
    store = invent(tmp_path, seeds=2)
    store.record["num_runs"] = 10
    assert "6 have not started" in Page(write_report(store, "grokking", QUESTION).read_text()).text

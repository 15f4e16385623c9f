"""Every study: its presets are configs, its claims are written down before training, and a shrunken version of it goes all the way to a report."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.config import StudyConfig, run_id
from shoal.config.load import override
from shoal.results.claims import fingerprint, record
from shoal.studies import STUDIES
from shoal.studies.study import about, cells

MODULES = {name: importlib.import_module(path) for name, path in STUDIES.items()}
PRESETS = [(name, preset) for name, module in MODULES.items() for preset in module.PRESETS]
SMALL = {
    "run.model.width": 16,
    "run.model.num_heads": 2,
    "run.model.feed_forward": 16,
    "run.model.num_layers": 1,
    "run.steps": 8,
    "run.evaluate_every": 2,
    "run.log_every": 2,
    "seeds": 2,
}
LANGUAGE = {
    "run.task.corpus": str(Path(__file__).parent / "corpus.jsonl"),  # sixteen short documents
    "run.task.tokenizer": "bytes",
    "run.task.reindex": False,
    "run.task.max_bytes": 0,
    "run.task.length": 16,
    "run.batch_size": 4,
}
ENCODER = {  # of random weights, and sixty sentences; None: the encoder has no such field
    **dict.fromkeys(("run.model.width", "run.model.num_heads", "run.model.feed_forward", "run.model.num_layers")),
    "run.task.train": str(Path(__file__).parent / "sentences.tsv"),
    "run.task.encoder": str(Path(__file__).parent / "encoder"),
    "run.model.encoder": str(Path(__file__).parent / "encoder"),
    "run.task.max_length": 16,
    "run.batch_size": 16,
    "variants": {
        "AdamW": {},
        "head tuned (lr 0.1)": {"model.frozen": True, "optimizer.lr": 0.1},
        "head tuned (lr 0.01)": {"model.frozen": True, "optimizer.lr": 0.01},
    },
}
RECALL = {"run.batch_size": 8, "run.task.length": 12, "run.task.test_size": 32, "grid.optimizer.lr": [0.01]}
SHRUNKEN: dict[str, dict[str, Any]] = {
    "sanity": {"run.task.strings": ["hello", "help me"]},
    "arithmetic": {"run.batch_size": 16, "grid.task.p": [7, 11], "grid.task.operation": ["add", "sub"]},
    "grokking": {"run.batch_size": 16, "run.task.p": 7},
    "grokking-ablations": {"run.batch_size": 16, "run.task.p": 7},
    "grokking-interventions": {"run.batch_size": 16, "run.task.p": 7},
    "grokking-stability": {"run.model.type": "decoder", "run.task.p": 7},
    "grokking-init": {"run.batch_size": 16, "run.task.p": 7},
    "grokking-fractions": {"run.batch_size": 16, "run.task.p": 7},
    "grokking-operations": {"run.batch_size": 16, "run.task.p": 7},
    "grokking-heatmap": {"run.batch_size": 16, "run.task.p": 7},
    "grokking-mixtures": {"run.batch_size": 16, "run.task.p": 7},
    "grokking-optimizers": {"grid.batch_size": [16], "grid.model.width": [16], "run.task.p": 7},
    "grokking-tokens": {"run.batch_size": 16, "run.task.p": 7},
    "grokking-progress": {
        "variants": ["division", "random addition"],
        "run.model.type": "decoder",
        "run.batch_size": 16,
        "run.task.p": 7,
        "run.snapshots": [0, 4],
    },
    "recall-induction": {"variants": ["rotary", "Mamba"], **RECALL},
    "recall-capacity": {"variants": ["rotary", "hybrid"], **RECALL},
    "recall-width": {"variants": ["16 queries", "16 queries delay 10"], **RECALL},
    "recall-state": {"grid.model.width": [8, 16], "grid.model.state_size": [2, 4], **RECALL},
    "recall-mamba-paper": {"variants": ["rotary", "Mamba"], **RECALL},
    "ladder": {"variants": ["many heads", "one head", "averaging", "bigram through an embedding", "bigram table"], **LANGUAGE},
    "ladder-beyond": {"variants": ["transformer, lr 0.003", "transformer, lr 0.01", "GRU, lr 0.003", "HMM, lr 0.03"], "run.budget": 0.0, **LANGUAGE},
    "gpt-tiny": LANGUAGE,
    "finetune": ENCODER,
    "broken-runs": {"variants": ["healthy", "learning rate too low", "leak from the future", "unmasked padding"], **LANGUAGE},
    "flop-search": {"variants": ["plain 32 x 2, lr 0.004", "Muon 32 x 2, lr 0.02 and 0.008"], "run.budget": 0.0, **LANGUAGE},
    "flop-final": {"run.budget": 0.0, **LANGUAGE},
    "attention-variants": {"variants": ["attention", "ALiBi", "zeroed", "renormalised"], "grid.optimizer.lr": [0.01], **LANGUAGE},
}


STAGED = (
    "grokking-optimizers",
    "ladder-beyond",
    "flop-search",
    "attention-variants",
    "finetune",
    *(name for name in STUDIES if name.startswith("recall-")),
)  # whose first runs are not its config's


def shrunken(name: str, **changes: Any) -> StudyConfig:
    module = MODULES[name]
    values = SMALL | SHRUNKEN[name] | changes
    config = module.PRESETS[module.DEFAULT[0]]()
    varied = {*config.grid, *(path.removeprefix("grid.") for path in changes)}
    return override(config, {path: value for path, value in values.items() if value is not None and path.removeprefix("run.") not in varied})


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_presets(name: str, preset: str) -> None:
    module = MODULES[name]
    config = module.PRESETS[preset]()
    assert override(config, {}) == config == module.PRESETS[preset]()
    study = module.study(config)
    assert study.name == name and study.question.endswith("?") and "\n" not in study.question
    assert study.config == config and (name in STAGED or study.wanted(shoal.Rows()) == config.runs())
    assert len({run_id(run) for run in config.runs()}) == config.num_runs
    assert len(study.claims) == len({claim.text for claim in study.claims}) > 0 and all(claim.text.endswith(".") for claim in study.claims)
    assert len(study.figures) == len({figure.name for figure in study.figures}) > 0
    assert record(study.claims) == record(module.study(config).claims), "made again, the same hashes"
    assert len({fingerprint(claim) for claim in study.claims}) == len(study.claims)


@pytest.mark.parametrize("name", STUDIES)
def test_presets_every_study_has(name: str) -> None:
    module = MODULES[name]
    assert {"quick", "full", *module.DEFAULT} <= module.PRESETS.keys() and len(module.DEFAULT) == 2
    quick, full = (module.PRESETS[preset] for preset in module.DEFAULT)
    assert (quick(), full()) == (module.PRESETS["quick"](), module.PRESETS["full"]())
    assert all(preset.__doc__ for preset in module.PRESETS.values())


def test_claims_have_the_same_hash_in_every_process() -> None:
    code = (
        "import importlib, shoal.studies; from shoal.results.claims import record\n"
        "for path in shoal.studies.STUDIES.values():\n"
        "    module = importlib.import_module(path)\n"
        "    for preset in module.PRESETS.values(): print(record(module.study(preset()).claims))\n"
    )
    printed = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        printed.append(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout)
    assert printed[0] == printed[1] and printed[0].count("hash") > 10


def judged(claim: Mapping[str, Any], seeds: int) -> bool:
    """On a value for every seed; about who was sooner, or a slope, on those of which it can be said, here often none."""
    return (
        claim["n"] == seeds
        or claim["note"].startswith(("asked of C4", "asked of SST-2"))
        or ("named correctly" in claim["claim"] and claim["n"] % seeds == 0)  # several settings together
        or (("sooner" in claim["claim"] or "slope" in claim["claim"]) and claim["n"] < seeds and (claim["n"] > 0 or claim["note"] == "no values"))
    )


@pytest.mark.parametrize("name", STUDIES)
def test_from_config_to_report(name: str, tmp_path: Path) -> None:
    config = shrunken(name)
    study = MODULES[name].study(config)
    result = shoal.run(study, tmp_path, progress=False, preset="tiny", command=f"shoal run {name}")
    assert (name in STAGED or len(result.rows) == config.num_runs) and {row["status"] for row in result.rows} <= {"completed", "finished"}
    assert all(row["measures"].keys() == study.measures.keys() for row in result.rows)
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(result.rows)
    claims = json.loads((tmp_path / "claims.json").read_text())
    assert [claim["claim"] for claim in claims] == [claim.text for claim in study.claims]
    assert all(judged(claim, config.seeds) for claim in claims), [claim["note"] for claim in claims]
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {figure.name for figure in study.figures}
    page = result.report.read_text()
    assert "Could not be drawn" not in page and study.question in page and "preset tiny" in page and (tmp_path / "report.md").stat().st_size > 2000

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    before = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    assert shoal.report(tmp_path) == result.report, "made again from study.yaml alone"
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in files] == before


@pytest.mark.parametrize("name", STUDIES)
def test_a_varied_setting_is_not_pooled(name: str, tmp_path: Path) -> None:
    """--grid on anything: claims are of one setting each."""
    small = {"grid.task.p": [7], "grid.task.operation": ["add"]} if name == "arithmetic" else {}
    study = MODULES[name].study(shrunken(name, **small, **{"grid.clip": [0.5, 2.0], "grid.steps": [4, 8]}))  # what no variant changes
    assert study.config is not None
    texts = [claim.text for claim in study.claims]
    assert len(set(texts)) == len(texts)
    assert [sum(word in text.replace(")", ",") for text in texts) for word in ("clip = 0.5,", "clip = 2,")] == [len(texts) / 2] * 2
    result = shoal.run(study, tmp_path, progress=False)
    assert all(judged(claim, study.config.seeds) for claim in result.claims), [claim["note"] for claim in result.claims]
    assert {row["steps"] for row in result.rows} == {4, 8}


def test_cells() -> None:
    config = override(StudyConfig(), {"grid.task.p": [5, 7], "grid.steps": [10]})
    assert cells(config) == [{"task.p": 5, "config.steps": 10}, {"task.p": 7, "config.steps": 10}]
    assert cells(StudyConfig()) == [{}]
    assert about("It learns.", {"task.p": 5, "optimizer.lr": 0.1}, ["task.p"]) == "It learns (lr = 0.1)."
    assert about("It learns.", {"task.p": 5}, ["task.p"]) == about("It learns.", {}) == "It learns."


def test_sanity_learns_the_sentence(tmp_path: Path) -> None:
    """The quick preset itself, with two seeds: every run writes what its loss asked for, and knows nothing of what it did not ask for."""
    config = override(MODULES["sanity"].PRESETS["quick"](), {"seeds": 2})
    result = shoal.run(MODULES["sanity"].study(config), tmp_path, progress=False)
    sentence = "I love machine learning"
    for row in result.rows:
        assert row["final.train/loss"] < 1e-3 and row["final.train/exact"] == 1
        run, unscored = result.load(row["id"]), row["task.unscored"]
        assert shoal.generate(run, sentence[:unscored]) == sentence[unscored:]
        assert shoal.generate(run, sentence[:-5]) == sentence[-5:]
        assert [line["exact"] for line in row["measures"]["samples"]] == ([False, True] if unscored else [True])
        known = [line["p(right)"] for line in row["measures"]["positions"]]
        assert len(known) == len(sentence) + 1 and min(known[unscored:]) > 0.99 and max([*known[:unscored], 0]) < 0.5
    verdicts = [claim["verdict"] for claim in result.claims]
    assert verdicts == ["held", "undecided", "held", "undecided", "held"], "two seeds of two say nothing about half of all"


def test_sanity_with_strings_of_many_lengths(tmp_path: Path) -> None:
    strings = ["to be", "or not to be", "that is the question"]
    config = override(MODULES["sanity"].PRESETS["quick"](), {"seeds": 1, "run.task.strings": strings, "run.steps": 150, "run.model.width": 32})
    result = shoal.run(MODULES["sanity"].study(config), tmp_path, progress=False)
    for row in result.rows:
        assert row["measures"]["samples"][-1]["exact"] and len(row["measures"]["positions"]) == len(strings[0]) + 1
        run = result.load(row["id"])
        assert [shoal.generate(run, text[:4]) for text in strings] == [text[4:] for text in strings]


def test_grokking_generalises(tmp_path: Path) -> None:
    """The embedding network with full batches and lr x wd = 0.04: all of the unseen half of division modulo 31."""
    values = {
        "run.model.type": "embedding_mlp",
        "run.model.num_inputs": 2,
        "run.model.embedding": 64,
        "run.model.hidden": [128, 128],
        "run.task.operator_token": False,
        "run.task.p": 31,
        "run.batch_size": 0,
        "run.optimizer.lr": 0.01,
        "run.optimizer.wd": 4.0,
        "run.schedule.warmup": 0.0,
        "run.steps": 600,
        "run.evaluate_every": 10,
        "seeds": 3,
    }
    study = MODULES["grokking"].study(override(MODULES["grokking"].PRESETS["paper"](), values))
    result = shoal.run(study, tmp_path, progress=False)
    assert all(row["status"] == "finished" and row["final.val/accuracy"] > 0.99 for row in result.rows)
    before, _ = result.rows.reached("train/accuracy", 0.99, sustained=1)
    after, observed = result.rows.reached("val/accuracy", 0.99)
    assert observed.all() and (before < after).all()
    assert {claim["n"] for claim in result.claims} == {3}
    right = sum(shoal.generate(result.load(), f"{a} {b} =") == str(a * pow(b, -1, 31) % 31) for a in range(31) for b in (1, 2, 30))
    assert right >= 91, "of 93, seen and unseen, asked one by one"

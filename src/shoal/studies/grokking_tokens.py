"""How much harder is a table when its residues are written in digits, and does it matter which tokens the loss scores?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from shoal.config import StudyConfig, flatten
from shoal.results.claims import Claim, Sample
from shoal.results.comparisons import times
from shoal.results.figures import Figure, curves
from shoal.results.tables import Table
from shoal.studies.shared import GROKKED, Published, order_claims, paper_run, percent, published_table, ratio, reached_table, small_run, sooner
from shoal.studies.study import Study, about, cells

METRIC = "val/exact"  # of a row all tokens of the answer, each given the right ones before it: what greedy decoding writes exactly
RESIDUES, DIGITS, BITS, REVERSED = "residues", "digits", "binary digits", "digits reversed"
END, ALL, BARE = "residues scored with the end", "residues scored throughout", "residues without operator"
KINDS = {"residue": "residues, a token each", "digits": "digits, a token each"}
VARIANTS: dict[str, dict[str, Any]] = {
    RESIDUES: {},
    END: {"task.loss": "answer+end"},
    ALL: {"task.loss": "all"},
    BARE: {"task.operator_token": False},
    DIGITS: {"task.tokens": "digits"},
    REVERSED: {"task.tokens": "digits", "task.least_significant_first": True},
    BITS: {"task.tokens": "digits", "task.base": 2},
    "binary digits reversed": {"task.tokens": "digits", "task.base": 2, "task.least_significant_first": True},
}
PARITY = (0.8, 1.25)


def full() -> StudyConfig:
    """The paper's run on division and on addition, residues and digits; 6 seeds, at most 20,000 steps, bfloat16."""
    run = paper_run(20_000, precision="bfloat16", stop_metric=METRIC, evaluate_every=100, log_every=100)
    return StudyConfig(run=run, variants=VARIANTS, grid={"task.operation": ["div", "add"]}, seeds=6)


def quick() -> StudyConfig:
    """Minutes on two cores: division with a small model and table, 6 seeds, at most 1,200 steps."""
    run = small_run(1_200, stop_metric=METRIC)
    run = replace(run, task=replace(run.task, operator_token=True))
    chosen = {name: VARIANTS[name] for name in (RESIDUES, END, ALL, BARE, DIGITS)}
    return StudyConfig(run=run, variants=chosen, grid={"task.operation": ["div"]}, seeds=6)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")

HERE = {"task.p": 97, "task.operation": "div"}
PUBLISHED = [
    Published(
        setting="/ mod 97, 50 %, AdamW wd 0.5, answer scored", source="AI-Scientist, templates/grokking", steps="4,200 ± 76 (99 %)", seeds="3",
        conditions={"variant": RESIDUES, **HERE}, differs="Ours: wd 1, ReLU, sinusoidal positions, the split is seeded, bfloat16 (all ours).",
    ),
    Published(
        setting="/ mod 97, 50 %, Adam, no decay, answer and end scored", source="Power et al., figure 1 left (openai/grok)",
        steps="near 1,000,000 (read off a plot)", seeds="1 shown", conditions={"variant": END, **HERE},
        differs="Ours: AdamW with decay 1, the recipe of their other figures.",
    ),
    Published(setting="digits of residues", source="none found", steps="–", seeds="–", differs="Modular tables in digits seem to be new."),
]  # fmt: skip

ORDER = [
    (RESIDUES, DIGITS, "digits make it compute the residue that a symbol names"),
    (DIGITS, BITS, "more tokens to read, and more of an answer to have right"),
    (RESIDUES, ALL, "the operands are noise that cannot be predicted, and it fills the gradient"),
]
SAME = [(END, RESIDUES, "the end is learned at once"), (BARE, RESIDUES, "with one operation its token says nothing")]
KIND = TypeVar("KIND", Figure, Table)


def _claims(config: StudyConfig, cell: dict[str, Any]) -> list[Claim]:
    def at(name: str) -> dict[str, Any]:
        return {**cell, "variant": name}

    def same(name: str, other: str, because: str) -> Claim:
        text = f"“{name}” takes as many steps as “{other}”, {PARITY[0]:g} to {PARITY[1]:g} times, in the median: {because}."
        return Claim(about(text, cell), lambda rows: ratio(rows.where(at(other)), rows.where(at(name)), METRIC), PARITY)

    def known(name: str) -> Claim:
        text = f"“{name}”: more than half of the seeds come to write {percent(GROKKED)} of the unseen answers exactly."
        return Claim(about(text, cell), lambda rows: Sample(rows.where(at(name)).reached(METRIC, GROKKED)[1], kind="proportion"), (0.5, 1.0))

    claims = [same(*names) for names in SAME if {*names[:2]} <= config.variants.keys()]
    claims += [known(name) for name in (RESIDUES, DIGITS, BITS) if name in config.variants]
    if {DIGITS, REVERSED} <= config.variants.keys() and cell.get("task.operation", flatten(config.run)["task.operation"]) == "add":
        text = "Addition is known sooner with the least significant digit first, as carries go that way, in more than half of the seeds."
        claims.append(Claim(about(text, cell), lambda rows: sooner(rows.where(at(REVERSED)), rows.where(at(DIGITS)), METRIC), (0.5, 1.0)))
    return claims


def apart(one: KIND, tokens: str) -> KIND:
    """The same of one kind of tokens, and it says so: residues and digits are two problems, not two speeds of one."""
    changes: dict[str, Any] = {"name": f"{one.name}-{tokens}", "caption": f"{KINDS[tokens][0].upper()}{KINDS[tokens][1:]}. {one.caption}"}
    function = one.draw if isinstance(one, Figure) else one.make
    changes["draw" if isinstance(one, Figure) else "make"] = lambda rows: function(rows.where({"task.tokens": tokens}))
    return replace(one, **changes)


def study(config: StudyConfig) -> Study:
    others, by = cells(replace(config, variants={})), list(cells(config)[0])
    kinds = [tokens for tokens in KINDS if tokens in {flatten(run)["task.tokens"] for _, run in config.settings()}]
    return Study(
        name="grokking-tokens",
        question=__doc__ or "",
        main_metric=METRIC,
        config=config,
        wanted=lambda rows: config.runs(),
        figures=[apart(figure, kind) for kind in kinds for figure in (times(METRIC, GROKKED, by=by), curves(METRIC, by=by, logx=True, threshold=GROKKED))],
        tables=[*(apart(reached_table(by, METRIC), kind) for kind in kinds), published_table(PUBLISHED)],
        claims=[*order_claims(config, ORDER, METRIC), *(claim for cell in others for claim in _claims(config, cell))],
    )

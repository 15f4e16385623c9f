"""Strict loading: what goes through comes back equal, what is wrong says where and how to fix it."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shoal.config import SGD, AdamW, DecoderConfig, ModularConfig, Muon, RunConfig, StudyConfig, fields_per_run, flatten, run_id
from shoal.config.fields import ConfigError
from shoal.config.load import difference, load_run, nearest, override, parse_overrides, structure, to_yaml, unstructure

settings.register_profile("shoal", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("shoal")

CHARACTERS = st.characters(exclude_categories=["Cs"])
LOOK_ALIKES = ["yes", "1e-3", "null", "~", "12", "1:30", "- a", "#", "2024-01-01", "*x", "0.5", "<<", "="]  # texts YAML takes for something else
FEW = {  # fields whose values hang together
    "width": st.sampled_from([8, 24, 64]),
    "num_heads": st.sampled_from([1, 2, 4]),
    "batch_size": st.sampled_from([0, 8, 512]),
    "accumulate": st.sampled_from([1, 2]),
    "unscored": st.just(0),
    "strings": st.lists(st.text(CHARACTERS, min_size=1), min_size=1, max_size=3).map(tuple),
    "hidden": st.lists(st.integers(1, 300), max_size=3).map(tuple),
    "operation": st.sampled_from(["div", "cubic", "s5", "add+mul"]),
    "operator_token": st.just(True),
    "base": st.integers(2, 36),
    "module": st.sampled_from(["model.py:Model", "package.models:Net"]),
    "arguments": st.sampled_from(["{}", '{"width": 64}']),
    "grid": st.just({}),
    "variants": st.sampled_from([{}, {"clipped": {"clip": 0.1, "schedule.floor": 0.5}, "baseline": {}}]),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    if get_origin(hint) is Annotated:
        return values(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return st.one_of([values(kind) for kind in get_args(hint)])
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.lists(values(get_args(hint)[0]), min_size=1, max_size=3).map(tuple)
    if dataclasses.is_dataclass(hint):
        return configs(hint)
    texts = st.text(CHARACTERS, max_size=9) | st.sampled_from(LOOK_ALIKES)
    return {float: st.floats(0, 0.4), int: st.integers(1, 99), bool: st.booleans(), type(None): st.none(), str: texts}[hint]


@st.composite
def configs(draw: st.DrawFn, cls: Any) -> Any:
    """Any valid config of a class: each field its default or a drawn value of its declared type."""
    hints = get_type_hints(cls, include_extras=True)
    chosen = {
        f.name: draw(FEW[f.name] if f.name in FEW else values(hints[f.name]))
        for f in dataclasses.fields(cls)
        if draw(st.booleans()) or dataclasses.is_dataclass(hints[f.name])
    }
    try:
        return cls(**chosen)
    except ConfigError:
        assume(False)


def message(function: Any, *args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args)
    return str(caught.value)


@pytest.fixture
def gpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """write(text or bytes) -> "gpt.yaml", a relative path, so that messages can be compared as a whole."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> str:
        Path("gpt.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "gpt.yaml"

    return write


# --- round trips ---


@given(configs(RunConfig))
def test_round_trips(config: RunConfig) -> None:
    assert structure(RunConfig, unstructure(config)) == config
    assert structure(RunConfig, yaml.safe_load(to_yaml(config))) == config
    assert override(RunConfig(), flatten(config)) == config, "every path of flatten can be overridden, whatever class is there"
    assert run_id(structure(RunConfig, unstructure(config))) == run_id(config)


@given(configs(StudyConfig), st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=4, unique=True))
def test_study_round_trips(config: StudyConfig, rates: list[float]) -> None:
    config = dataclasses.replace(config, grid={"optimizer.lr": rates, "schedule.kind": ["cosine"], "evaluate": [["train"], ["val", "train"]]})
    assert structure(StudyConfig, unstructure(config)) == config
    assert structure(StudyConfig, yaml.safe_load(to_yaml(config))) == config


def test_variants() -> None:
    study = override(StudyConfig(), {"variants": {"baseline": {}, "sgd": {"optimizer.type": "sgd", "optimizer.lr": 1}}, "grid.clip": [0, 1], "seeds": 2})
    assert study.num_runs == len(study.runs()) == 8 and len({run_id(run) for run in study.runs()}) == 8
    told, runs = zip(*study.settings(), strict=True)
    assert told == tuple({"variant": name, "clip": clip} for name in ("baseline", "sgd") for clip in (0.0, 1.0))
    assert [(run.variant, type(run.optimizer), run.optimizer.lr, run.clip) for run in runs[1:3]] == [("baseline", AdamW, 1e-3, 1), ("sgd", SGD, 1, 0)]
    assert [name for name in override(study, {"variants": "sgd"}).variants] == ["sgd"] == list(override(study, {"variants": ["sgd"]}).variants)
    assert message(override, study, {"variants": "sdg"}) == "variants: there is no variant 'sdg'; did you mean sgd?"
    assert message(override, StudyConfig(), {"variants": {"a": {"optimizer.lrr": 1}}}) == "variants.a.optimizer.lrr: unknown key; did you mean lr?"
    assert message(override, StudyConfig(), {"variants": {"a": {"steps": "x"}}}) == 'variants.a.steps: expected a whole number, not "x"'
    assert "which the grid varies too" in message(override, study, {"variants": {"a": {"clip": 1.0}}})
    assert "cannot set a variant's name or seeds" in message(override, study, {"variants": {"a": {"seeds.init": 1}}})
    assert "expected a mapping of names to changes" in message(structure, StudyConfig, {"variants": [1]})


@given(configs(RunConfig))
def test_file_round_trips(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> None:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_run(path) == config


def test_file_and_overrides(gpt: Any) -> None:
    run = load_run(gpt("task: {type: modular, p: 113}\noptimizer:\n  type: muon\n  lr: 1e-2  # text to YAML 1.1\nsteps: 20\n"), {"steps": 30, "clip": 1})
    assert run == RunConfig(task=ModularConfig(p=113), optimizer=Muon(lr=0.01), steps=30, clip=1.0)
    assert isinstance(run.clip, float)
    assert load_run(gpt("\ufeffsteps: 7\n")).steps == 7, "a byte order mark is no part of the first key"


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", ".1e-2", "1.e-3", "0.001", "1.0e-3"])
def test_every_way_to_write_a_float(gpt: Any, text: str) -> None:
    assert load_run(gpt(f"optimizer: {{type: adamw, lr: {text}}}")).optimizer.lr == 1e-3
    assert override(RunConfig(), parse_overrides([f"--optimizer.lr={text}"])).optimizer.lr == 1e-3


# --- every kind of error, by its full text ---

RUN_FIELDS = ", ".join(f.name for f in dataclasses.fields(RunConfig))
BAD_FILES = {
    "optimizer:\n  type: adamw\n  weight_decay: 3": "gpt.yaml:3: optimizer.weight_decay: unknown key; did you mean wd?",
    "steps: 5\noptimzer: {}": "gpt.yaml:2: optimzer: unknown key; did you mean optimizer?",
    "zzz: 5": f"gpt.yaml:1: zzz: unknown key; known here: {RUN_FIELDS}",
    "on: 5": f"gpt.yaml:1: on: unknown key; known here: {RUN_FIELDS}",  # to YAML 1.1 a key `true`
    "steps: abc": 'gpt.yaml:1: steps: expected a whole number, not "abc"',
    "steps: 1.5": "gpt.yaml:1: steps: expected a whole number, not 1.5",
    "steps: 100.0": "gpt.yaml:1: steps: expected a whole number, not 100.0; write 100",
    "steps: 1e4": 'gpt.yaml:1: steps: expected a whole number, not "1e4"; write 10000',
    "steps: true": "gpt.yaml:1: steps: expected a whole number, not true",
    "steps:": "gpt.yaml:1: steps: expected a whole number, not null",
    "steps: 9223372036854775808": "gpt.yaml:1: steps: expected a whole number of at most 64 bits, not 9223372036854775808",
    f"steps: {'9' * 5000}": "gpt.yaml:1: steps: cannot be read: Exceeds the limit (4300 digits) for integer string conversion",
    "steps: 2024-13-45": "gpt.yaml:1: steps: cannot be read: month must be in 1..12",
    "steps: 2024-01-01": 'gpt.yaml:1: steps: expected a whole number, not "2024-01-01"',
    "clip: abc": 'gpt.yaml:1: clip: expected a number, not "abc"',
    'clip: "0.5"': 'gpt.yaml:1: clip: expected a number, not "0.5"',
    "clip: true": "gpt.yaml:1: clip: expected a number, not true",
    "clip: 1e999": 'gpt.yaml:1: clip: expected a finite number, not "1e999"',
    f"clip: 1{'0' * 400}": f"gpt.yaml:1: clip: expected a finite number, not 1{'0' * 56}...",
    "optimizer: {type: muon, lr: .nan}": "gpt.yaml:1: optimizer.lr: expected a finite number, not NaN",
    "optimizer: {type: muon,\n lr: .inf}": "gpt.yaml:2: optimizer.lr: expected a finite number, not Infinity",
    "optimizer: {type: sgd, nesterov: 1}": "gpt.yaml:1: optimizer.nesterov: expected true or false, not 1",
    "precision: float23": 'gpt.yaml:1: precision: expected one of float32, bfloat16, not "float23"; did you mean float32?',
    "precision: [float32]": 'gpt.yaml:1: precision: expected one of float32, bfloat16, not ["float32"]; did you mean float32?',
    "stop_metric: 5": "gpt.yaml:1: stop_metric: expected text or null, not 5",
    "task: {type: modular, test_fraction: x}": 'gpt.yaml:1: task.test_fraction: expected a number or null, not "x"',
    "evaluate: train": 'gpt.yaml:1: evaluate: expected a list, not "train"; write [train]',
    "evaluate: {a: 1}": 'gpt.yaml:1: evaluate: expected a list, not {"a": 1}',
    "evaluate:\n- train\n- 3": "gpt.yaml:3: evaluate[1]: expected text, not 3",
    "schedule: cosine": 'gpt.yaml:1: schedule: expected a mapping, not "cosine"',
    "optimizer: {lr: 1}": "gpt.yaml:1: optimizer.type: missing; one of sgd, adam, adamw, adagrad, muon, baumwelch",
    "optimizer: muon": 'gpt.yaml:1: optimizer: expected a mapping with `type: sgd|adam|adamw|adagrad|muon|baumwelch`, not "muon"',
    "optimizer: {type: mun}": 'gpt.yaml:1: optimizer.type: unknown type "mun"; did you mean muon?',
    "optimizer: {type: [muon]}": 'gpt.yaml:1: optimizer.type: unknown type ["muon"]; did you mean muon?',
    "optimizer: {type: 3}": "gpt.yaml:1: optimizer.type: unknown type 3; known here: sgd, adam, adamw, adagrad, muon, baumwelch",
    "steps: 1\nmodel:\n  type: decoder\n  width: 10\n  num_heads: 4": "gpt.yaml:5: model.num_heads: 4 heads do not divide the width 10; possible: 1, 2, 5, 10",
    "steps: 1\nmodel:\n  type: decoder\n  width: 10": "gpt.yaml:2: model.num_heads: 4 heads do not divide the width 10; possible: 1, 2, 5, 10",
    "seeds: {init: -1}": "gpt.yaml:1: seeds.init: a seed is a whole number from 0 to 2**31 - 1, not -1",
    "batch_size: 7\naccumulate: 2": "gpt.yaml:2: accumulate: 2 pieces do not divide the batch of 7",
    "foo: 1\nsteps: x\nclip: y": f"gpt.yaml:1: foo: unknown key; known here: {RUN_FIELDS}",  # several: the first in the file
    "clip: 1\nsteps: x\nfoo: 1": 'gpt.yaml:2: steps: expected a whole number, not "x"',
    "steps: 1\nclip: 0\nsteps: 2": "gpt.yaml:3: steps: given twice (first on line 1)",
    "schedule: {kind: cosine, kind: linear}": "gpt.yaml:1: schedule.kind: given twice (first on line 1)",
    "? [1]\n: 2": "gpt.yaml:1: a key must be plain text",
    "steps: 1\nclip: &a 1\nlog_every: *a": "gpt.yaml:3: aliases (*a) are not read; write the value out",
    "steps: !!python/name:os.system x": "gpt.yaml:1: not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'",
    "steps: 1\n  clip: [": "gpt.yaml:2: not YAML: mapping values are not allowed here",
    "steps: 1\x00": "gpt.yaml:1: not YAML: special characters are not allowed",
    "--- {steps: 1}\n--- {steps: 2}": "gpt.yaml:2: not YAML: but found another document",
    "[" * 900 + "]" * 900: "gpt.yaml: not read: nested too deeply",
    "": "gpt.yaml: is empty; a config has at least one setting, such as `steps: 1000`",
    "# only a remark\n": "gpt.yaml: is empty; a config has at least one setting, such as `steps: 1000`",
    "[1, 2]": "gpt.yaml:1: expected a mapping (`key: value` lines), not [1, 2]",
    "steps": 'gpt.yaml:1: expected a mapping (`key: value` lines), not "steps"',
}


@pytest.mark.parametrize("text", BAD_FILES, ids=lambda text: repr(text[:40]))
def test_bad_file(gpt: Any, text: str) -> None:
    assert message(load_run, gpt(text)) == BAD_FILES[text]


def test_no_file(gpt: Any, tmp_path: Path) -> None:
    assert message(load_run, "nope.yaml") == "nope.yaml: no such file or directory"
    assert message(load_run, ".") == ".: is a directory; name a YAML file in it"
    assert message(load_run, gpt(b"steps: 1\nclip: \xff")) == "gpt.yaml: is not UTF-8 text (byte 15)"


BAD_OVERRIDES = {  # of a run
    "steps": "steps: not expected here; a setting is given as --a.b value",
    "--": "--: not expected here; a setting is given as --a.b value",
    "--steps": "steps: needs a value: --steps VALUE",
    "--steps --clip 1": "steps: needs a value: --steps VALUE",
    "--optimizer.type": "optimizer.type: needs a value: --optimizer.type VALUE",
    "--steps 1 --steps=2": "steps: given twice",
    "--steps x": 'steps: expected a whole number, not "x"',
    "--steps -3": "steps: must be 1 or more, not -3",
    "--steps [": "steps: cannot read \"[\" (not YAML: expected the node content, but found '<stream end>'); put text in quotes, a list in [ ]",
    "--steps= ": 'steps: expected a whole number, not ""',
    "--lr 1": "lr: unknown key; did you mean optimizer.lr?",
    "--optimizer.weight-decay 1": "optimizer.weight_decay: unknown key; did you mean wd?",
    "--optimzer.lr 1": "optimzer: unknown key; did you mean optimizer?",
    "--optimizer.lr.x 1": "optimizer.lr: has no fields of its own, so x is no setting",
    "--optimizer. 1": "optimizer: unknown key; known here: lr, wd, beta1, beta2, eps, decay, decay_to",
    "--optimizer muon": 'optimizer: expected a mapping with `type: sgd|adam|adamw|adagrad|muon|baumwelch`, not "muon"',
    "--optimizer.type mun": 'optimizer.type: unknown type "mun"; did you mean muon?',
    "--optimizer.type muon --optimizer.beta1 0": "optimizer.beta1: unknown key; did you mean adam_beta1?",
    "--model.num-heads 3": "model.num_heads: 3 heads do not divide the width 128; possible: 1, 2, 4, 8, 16, 32, 64, 128",
    "--evaluate train": 'evaluate: expected a list, not "train"; write [train]',
    "--grid.steps 1,2": f"grid: unknown key; known here: {RUN_FIELDS}",
}


@pytest.mark.parametrize("line", BAD_OVERRIDES)
def test_bad_override(line: str) -> None:
    assert message(lambda: override(RunConfig(), parse_overrides(line.replace("= ", "=").split()))) == BAD_OVERRIDES[line]


BAD_STUDY_OVERRIDES = {
    "--seeds 0": "seeds: at least 1 seed is needed, not 0",
    "--optimizer.lr 1": "optimizer.lr: unknown key; did you mean run.optimizer.lr?",
    "--run.task.p 7": "run.task.p: has no effect, the grid varies it; use --grid.task.p VALUE,VALUE",
    "--run.seeds.init 7": "run.seeds.init: has no effect, a study numbers its seeds; use --seeds and --first_seed",
    "--grid.optimizer.lr": "grid.optimizer.lr: needs a list of values: --grid.optimizer.lr VALUE,VALUE",
    "--grid.optimizer.lr []": "grid.optimizer.lr: the list of values is empty; give at least one or remove the line",
    "--grid.optimizer.lr 1,1.0": "grid.optimizer.lr: a value is listed twice",
    "--grid.optimizer.lr 1,x": 'grid.optimizer.lr: expected a number, not "x"',
    "--grid.optimizer.lrr 1": "grid.optimizer.lrr: unknown key; did you mean lr?",
    "--grid.lr 1": "grid.lr: unknown key; did you mean grid.optimizer.lr?",
    "--grid.run.optimizer.lr 1": f"grid.run: unknown key; known here: {RUN_FIELDS}",
    "--grid.optimizer 1": "grid.optimizer: is a group of fields; vary one of them",
    "--grid.optimizer.type sgd,adam": "grid.optimizer.type: a type cannot be varied in a grid; run the study once for each",
    "--grid.seeds.init 1,2": "grid.seeds.init: has no effect, a study numbers its seeds; set seeds and first_seed",
    "--grid 5": "grid: expected a mapping of dotted paths to lists, not 5",
    "--grid={steps:5}": "grid.steps:5: expected a list of values, not null",
    "--grid.evaluate train": 'grid.evaluate: expected a list, not "train"; write [train]',
    "--grid.model.width 8,30": "grid: task.p 5, model.width 30: num_heads: 4 heads do not divide the width 30; possible: 1, 2, 3, 5, 6, 10, 15, 30",
}


@pytest.mark.parametrize("line", BAD_STUDY_OVERRIDES)
def test_bad_study_override(line: str) -> None:
    study = StudyConfig(grid={"task.p": [5, 7]})
    assert message(lambda: override(study, parse_overrides(line.split()))) == BAD_STUDY_OVERRIDES[line]


@given(st.binary(max_size=60) | st.text("steps: clp[]{},-&*!|>'\"%@\n\t~1e.#?", max_size=40).map(str.encode))
@settings(max_examples=300)
def test_any_file_is_a_config_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    try:
        load_run(path)
    except ConfigError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*flatten(StudyConfig()), "type", "x", "optimizer", "optimizer.lr"]), inner, max_size=3)
    ),
)


@given(st.sampled_from([*flatten(StudyConfig()), "run.optimizer", "grid.optimizer.lr", "grid.task.p", "run", "x"]), PLAIN)
@settings(max_examples=300)
def test_any_override_is_a_config_or_a_config_error(path: str, value: Any) -> None:
    try:
        changed = override(StudyConfig(), {path: value})
    except ConfigError:
        return
    assert structure(StudyConfig, unstructure(changed)) == changed


# --- overrides ---


def test_parse_overrides() -> None:
    args = [
        "--optimizer.lr",
        "3e-3",
        "--task.p=113",
        "--model.num-heads",
        "2",
        "--grid.optimizer.lr",
        "1e-3,1e-2",
        "--grid.steps",
        "[1, 2]",
        "--grid.task.p",
        "5",
    ]
    assert parse_overrides(args) == {
        "optimizer.lr": "3e-3", "task.p": 113, "model.num_heads": 2, "grid.optimizer.lr": ["1e-3", "1e-2"], "grid.steps": [1, 2], "grid.task.p": [5],
    }  # fmt: skip
    assert parse_overrides(["--a", "-3", "--b", "null", "--c=x=y", "--d", "[a, b]", "--e=", "--f", '"3"']) == {
        "a": -3,
        "b": None,
        "c": "x=y",
        "d": ["a", "b"],
        "e": "",
        "f": "3",
    }


def test_override() -> None:
    run = override(RunConfig(), parse_overrides(["--model.tied", "--model.width", "30", "--model.num_heads", "3", "--evaluate", "[train]", "--clip", "1"]))
    assert run == RunConfig(model=DecoderConfig(tied=True, width=30, num_heads=3), evaluate=("train",), clip=1.0), (
        "all at once: neither width nor heads alone would do"
    )
    assert isinstance(run.clip, float)
    assert RunConfig() == override(RunConfig(), {})


def test_override_type_keeps_common_fields() -> None:
    run = RunConfig(optimizer=AdamW(lr=0.5, wd=0.25, beta1=0.1))
    assert override(run, {"optimizer.type": "muon"}).optimizer == Muon(lr=0.5, wd=0.25)
    assert override(run, {"optimizer.momentum": 0.5, "optimizer.type": "muon"}).optimizer == Muon(lr=0.5, wd=0.25, momentum=0.5)
    assert override(run, {"optimizer.type": "adamw"}) == run
    assert override(run, {"optimizer": {"type": "muon"}}).optimizer == Muon(), "a whole group is replaced"


def test_override_grid() -> None:
    study = override(
        StudyConfig(grid={"task.p": [5, 7]}), parse_overrides(["--grid.optimizer.lr", "1e-3,1", "--grid.task.operation", "add,div", "--seeds", "2"])
    )
    assert study.grid == {"task.p": [5, 7], "optimizer.lr": [0.001, 1.0], "task.operation": ["add", "div"]}
    assert isinstance(study.grid["optimizer.lr"][1], float), "1 and 1.0 must not be two run ids"
    assert study.num_runs == len(study.runs()) == 16
    assert override(study, {"grid": {}, "run.task.p": 7}).run.task == ModularConfig(p=7)
    assert override(study, {"grid.task.p": [11]}).grid["task.p"] == [11]


def test_difference() -> None:
    old = flatten(RunConfig())
    new = flatten(RunConfig(optimizer=AdamW(lr=0.003), evaluate=("train",)))
    assert difference(old, new) == ["optimizer.lr: 0.001 -> 0.003", 'evaluate: ["train", "val"] -> ["train"]']
    assert difference({"a": 1, "b": None}, {"b": None, "c": "x"}) == ["a: 1 -> not set", 'c: not set -> "x"']
    assert difference(old, dict(old)) == []


def test_nearest() -> None:
    assert nearest("weight_decay", ["decay", "wd", "lr"]) == "did you mean wd?"
    assert nearest("learning_rate", ["lr", "wd"]) == "did you mean lr?"
    assert nearest("heads", ["num_heads", "width"]) == "did you mean num_heads?"
    assert nearest("zzz", ["a", "b"]) == "known here: a, b"
    assert nearest("zzz", []) == "known here: none"


# --- configs ---


def test_fields_per_run_are_fields() -> None:
    paths = set(fields_per_run(RunConfig()))
    assert {"optimizer.lr", "seeds.init", "task.operation", "task.test_fraction", "steps"} <= paths <= set(flatten(RunConfig()))
    assert not {"batch_size", "task.p", "model.width", "precision"} & paths


def test_run_ids() -> None:
    ids = {run_id(run) for run in StudyConfig(grid={"optimizer.lr": [1e-3, 1e-2]}, seeds=3).runs()}
    assert len(ids) == 6 and all(len(i) == 12 for i in ids)
    assert run_id(RunConfig()) == run_id(structure(RunConfig, {"steps": 1000}))

"""The study of fine-tuning: what competes and what is reported, the test by hand, the command and what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shoal
from shoal import cli
from shoal.config import EncoderConfig, StudyConfig
from shoal.config.load import override
from shoal.results.rows import Rows
from shoal.studies import finetune
from shoal.studies import finetune_report as shown

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
HERE = Path(__file__).parent
TINY = {
    "run.task.train": str(HERE / "sentences.tsv"),
    "run.task.encoder": str(HERE / "encoder"),
    "run.model.encoder": str(HERE / "encoder"),
    "run.task.max_length": 16,
    "run.task.val_fraction": 0.3,
    "run.task.test_fraction": 0.3,
    "run.steps": 6,
    "run.evaluate_every": 2,
    "run.log_every": 2,
    "run.batch_size": 16,
    "seeds": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer.lr": 1e-3},
    "head tuned (lr 0.001)": {"model.frozen": True, "optimizer.lr": 1e-3},
    "head tuned (lr 0.3)": {"model.frozen": True, "optimizer.lr": 0.3},
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = override(finetune.quick(), TINY | {"variants": VARIANTS})
    return shoal.run(finetune.study(config), tmp_path_factory.mktemp("finetune"), progress=False, preset="tiny")


def test_stages(result: Any) -> None:
    """The tuning seed for what has rivals; fresh seeds for the best of them, for as many steps as were best; the test is theirs alone."""
    tried, fresh = finetune.TUNING.tried(result.rows), finetune.TUNING.fresh(result.rows)
    assert sorted(row["variant"] for row in tried) == ["head tuned (lr 0.001)", "head tuned (lr 0.3)"]
    assert sorted((row["variant"], row["seeds.split"]) for row in fresh) == [("AdamW", 0), ("AdamW", 1), ("head tuned", 0), ("head tuned", 1)]
    best: dict[tuple[float, int], str] = {}
    for row in tried:
        steps, values = row.curve("val/accuracy")
        for step, value in zip(steps.tolist(), values.tolist(), strict=True):
            if step:
                best.setdefault((1 - value, step), row["variant"])
    (_, steps), name = min(best.items())
    assert {(row["steps"], row["optimizer.lr"]) for row in fresh.where({"variant": "head tuned"})} == {(steps, VARIANTS[name]["optimizer.lr"])}
    assert {row["steps"] for row in fresh.where({"variant": "AdamW"})} == {6}
    assert all(bool(row["measures"]["test"]) == (row["seeds.split"] < 1000) for row in result.rows)
    assert [len(row["measures"]["mistakes"]) > 0 for row in fresh] == [row["seeds.split"] == 0 for row in fresh], "of the first seed alone"


def test_a_run_holds_the_shorter_ones_only_where_its_rate_is_constant(tmp_path: Path) -> None:
    """Where it falls, runs of several lengths compete, each by its end."""
    variants = {f"head tuned (lr 0.1 epochs {steps})": {"model.frozen": True, "optimizer.lr": 0.1, "steps": steps} for steps in (2, 4, 6)}
    config = override(finetune.quick(), TINY | {"variants": variants, "run.schedule.kind": "linear"})
    study = finetune.study(config)
    result = shoal.run(study, tmp_path, progress=False)
    tried, fresh = finetune.TUNING.tried(result.rows), finetune.TUNING.fresh(result.rows)
    ends = {row["steps"]: row["final.val/accuracy"] for row in tried}
    assert [len(row.curve("val/accuracy")[0]) for row in tried] == [2, 3, 4]
    best = min(ends, key=lambda steps: (-ends[steps], steps))
    assert ends.keys() == {2, 4, 6} and {row["steps"] for row in fresh} == {best}
    (table,) = [table for table in study.tables if table.name == "grid"]
    lines = table.make(result.rows)
    assert [line["chosen"] for line in lines].count("no") == 2 and all(line["best validation accuracy"] == line["at the end"] for line in lines)
    _, steps, values = shown._column(tried)
    assert dict(zip(steps.tolist(), values.tolist(), strict=True)) == ends and list(ends) == [2, 4, 6], "a line of the heat map for each length"


def test_epochs_are_chosen_along_a_run(result: Any) -> None:
    config = override(finetune.quick(), TINY | {"variants": VARIANTS})
    assert finetune.wanted(config, Rows()) == [run for run in finetune.wanted(config, result.rows) if run.variant != "head tuned"]
    varied = StudyConfig(run=config.run, variants=config.variants, grid={"steps": [6]}, seeds=1)
    assert {run.steps for run in finetune.wanted(varied, result.rows)} == {6}
    with pytest.raises(shoal.config.fields.ConfigError, match="seeds 1000 to 1000 are for tuning"):
        finetune.study(replace(config, first_seed=1000))


def alone(run: Any, split: str) -> list[tuple[str, int, np.ndarray]]:
    """Sentence by sentence with the library's own classes: text, class, probabilities of the classes in float64."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(HERE / "encoder")
    encoder = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(HERE / "encoder"))
    weights = {name.removeprefix("module.encoder."): p.double() for name, p in [*run.model.named_parameters(), *run.model.named_buffers()]}
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict() if name in weights}, strict=False)
    encoder = encoder.double().eval()
    found = []
    for text, label in zip(run.task.data.texts[split], run.task.data.labels[split], strict=True):
        hidden = encoder(**tokenizer(text, truncation=True, max_length=16, return_tensors="pt")).last_hidden_state[0].mean(0)
        logits = hidden @ run.model.head.weight.double() + run.model.head.bias.double()
        found.append((text, label, logits.softmax(-1).detach().numpy()))
    return found


def test_the_test_by_hand(result: Any) -> None:
    fresh = finetune.TUNING.fresh(result.rows)
    for variant in ("AdamW", "head tuned"):
        row = fresh.where({"variant": variant, "seeds.split": 0})[0]
        run = result.load(row["id"])
        by_hand, measures = alone(run, "test"), row["measures"]
        assert all(abs(p[0] - p[1]) > 1e-6 for _, _, p in by_hand), "no tie that rounding decides"
        right = [bool(p.argmax() == label) for _, label, p in by_hand]
        assert measures["test"] == [{"sentences": len(right), "right": sum(right), "accuracy": sum(right) / len(right)}]
        pairs = Counter((label, int(p.argmax())) for _, label, p in by_hand)
        assert [line["sentences"] for line in measures["confusion"]] == [pairs[i, j] for i in (0, 1) for j in (0, 1)]
        wrong = sorted((-p.max(), text, str(label)) for text, label, p in by_hand if p.argmax() != label)
        assert [(line["sentence"], line["class"]) for line in measures["mistakes"]] == [(text, label) for _, text, label in wrong[:8]]
        assert np.allclose([line["p of that"] for line in measures["mistakes"]], [-p for p, _, _ in wrong[:8]], atol=1e-4)
        common = Counter(run.task.data.labels["train"]).most_common(1)[0][0]
        theirs = [label == common for label in run.task.data.labels["test"]]
        line = measures["baselines"][0]
        assert (line["right"], line["sentences"]) == (sum(theirs), len(theirs))
        assert line["only the run right"] == sum(a and not b for a, b in zip(right, theirs, strict=True))
        assert line["only the baseline right"] == sum(b and not a for a, b in zip(right, theirs, strict=True))


def test_features_are_those_of_the_untrained_encoder() -> None:
    import transformers

    from shoal.finetune.tested import features
    from shoal.models.pretrained import network
    from shoal.tasks.sentences import SentencesTask

    task = SentencesTask(override(finetune.quick(), TINY).run.task)  # pyright: ignore[reportArgumentType]
    found = features(task, str(HERE / "encoder"), "mean")
    module: Any = network(str(HERE / "encoder"), 2, "mean", False).module
    tokenizer = transformers.AutoTokenizer.from_pretrained(HERE / "encoder")
    for split in ("val", "train"):
        assert found[split].shape == (len(task.data.texts[split]), 8)
        for text, row in zip(task.data.texts[split], found[split], strict=True):
            tokens = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")["input_ids"]
            assert np.allclose(module(tokens, torch.ones_like(tokens, dtype=torch.bool))[0].detach().numpy(), row, atol=1e-5)


def test_claims_and_tables(result: Any) -> None:
    fresh = finetune.TUNING.fresh(result.rows)
    mine = [row["measures"]["test"][0]["accuracy"] for row in fresh.where({"variant": "AdamW"})]
    theirs = {line["baseline"]: line["test"] for line in fresh[0]["measures"]["baselines"]}
    values = [claim["value"] for claim in result.claims]
    assert values[:2] == pytest.approx([np.mean(mine) - theirs["linear probe"], np.mean(mine) - theirs["bag of words"]])
    assert result.claims[2]["note"].startswith("asked of SST-2")
    lines = {line["setting"]: line for line in finetune.TUNING.of_fresh(shown.results(["variant"])).make(result.rows)}
    assert lines["AdamW"]["test accuracy"].value == pytest.approx(np.mean(mine)) and lines["AdamW"]["epochs"] == 3
    assert lines["bag of words"]["test accuracy"] == theirs["bag of words"] and lines[shown.TEXT["setting"]]["test accuracy"] == 0.933
    [train, *_] = shown.data().make(fresh)
    run = result.load(fresh[0]["id"])
    whole = [len(ids) for ids in run.task.tokenizer._tokenizer(run.task.data.texts["train"])["input_ids"]]
    assert train["sentences"] == len(whole) and train["share truncated"] == np.mean(np.array(whole) > 16) and train["longest"] == max(whole)
    [shape] = shown.shapes().make(fresh)
    assert shape["steps an epoch"] == 2 and shape["tokens"] == "16 x 8 to 16 x 16" and shape["logits"] == "16 x 1 x 2"


def test_presets_count_epochs_in_the_sentences_there_are() -> None:
    for preset in (finetune.full, finetune.roberta, finetune.plain):
        for _, run in preset(1000, 3).settings():
            assert run.evaluate_every == -(-1000 // run.batch_size) and run.steps == 3 * run.evaluate_every
    given = {told["variant"]: run for told, run in finetune.full().settings()}
    adamw = given["AdamW at the defaults"]
    assert (adamw.batch_size, adamw.optimizer.lr, adamw.steps, adamw.task.max_length) == (64, 5e-5, 20 * 109, 512)  # pyright: ignore[reportAttributeAccessIssue]
    assert adamw.optimizer.eps == 1e-8 and isinstance(adamw.model, EncoderConfig) and not adamw.model.frozen  # pyright: ignore[reportAttributeAccessIssue]
    assert any(run.batch_size == 64 and run.optimizer.lr == 2e-6 for _, run in finetune.roberta().settings())  # the text's best; pyright: ignore


# --- the command


def options(**changes: Any) -> list[str]:
    values = {
        "encoder": str(HERE / "encoder"),
        "device": "cpu",
        "preset": "plain",
        "epochs": 1,
        "run.model.pooling": "mean",
        "run.task.max-length": 16,
        "seeds": 2,
    }
    return [word for name, value in (values | changes).items() for word in (f"--{name}", str(value))]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On data with three classes by name; again it resumes, and with other sentences it is refused."""
    import transformers

    monkeypatch.chdir(tmp_path)
    lines = (HERE / "sentences.tsv").read_text().splitlines()[1:]
    data = Path("data.csv")
    classes = ["bad", "good", "strange"]
    data.write_text("review,verdict\n" + "".join(f"{line.split(chr(9))[0]},{classes[i % 3]}\n" for i, line in enumerate(lines)))
    command = ["finetune", "data.csv", *options(), "--run.task.label-column", "verdict", "--run.optimizer.lr", "1e-4"]
    assert cli.main([*command, "--fields"]) == 0 and not Path("runs").exists()
    assert "run.model.num_classes" in capsys.readouterr().out
    assert cli.main([*command, "--save", "best"]) == 0
    printed = capsys.readouterr()
    assert "runs/finetune-plain/report.html" in printed.out and "best holds the encoder" in printed.out
    assert "classes, from 'verdict': bad -> 0, good -> 1, strange -> 2" in printed.err
    assert isinstance(transformers.AutoModel.from_pretrained("best"), transformers.BertModel | transformers.RobertaModel)
    results = json.loads(Path("runs/finetune-plain/results.json").read_text())
    assert [one["seeds"]["split"] for one in results] == [0, 1] and {one["steps"] for one in results} == {2}
    assert cli.main(command) == 0 and "all trained already" in capsys.readouterr().err
    data.write_text(data.read_text().replace("strange", "good"))
    assert cli.main(command) == 2 and "holds this study with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "best"}, "--preset: there is no 'best'; known: quick, full, roberta, plain"),
        ({"epochs": -1}, "--epochs: must be 0"),
        ({"save": "."}, "--save: . exists already"),
        ({"val": "none.tsv"}, "task.val: there is no file none.tsv"),
        ({"encoder": "./none"}, "there is no directory ./none; name one with config.json, tokenizer and weights, minilm, or"),
        ({"run.task.max-length": 4096}, "task.max_length: 4096 tokens are more than"),
        ({"run.task.text-column": "review"}, "task.text_column: "),
        ({"run.model.num-classes": 3}, "model.num_classes: "),
        ({"run.modle.pooling": "mean"}, "run.modle"),
    ],
)
def test_what_the_command_refuses(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["finetune", str(HERE / "sentences.tsv"), *options(**changes)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == "" and not [*tmp_path.iterdir()]


def test_one_class_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.tsv").write_text("text\tlabel\n" + "a film\t1\n" * 30)
    assert cli.main(["finetune", "a.tsv", *options()]) == 2
    assert "all 30 training sentences have the same class, '1'" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["a.tsv"]

"""Scoring: every token once, given what its window has; the sums, perplexity and bits per byte that follow; what the command prints and refuses."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shoal
from shoal import cli
from shoal.config import BigramConfig, DecoderConfig, HMMConfig, LanguageConfig, RunConfig
from shoal.config.fields import ConfigError
from shoal.contracts import Context
from shoal.inference.score import ROWS, Score, page, pieces, score, score_file, table, together, windows
from shoal.studies import driver
from shoal.train.fleet import Fleet
from shoal.train.run import Run

MODELS: dict[str, Any] = {
    "attention": DecoderConfig(width=16, num_heads=2, num_layers=2, positions="learned"),
    "rotary": DecoderConfig(width=16, num_heads=2, num_layers=1, positions="rotary", softcap=3.0),
    "mamba": DecoderConfig(width=16, mixers=("mamba",), num_layers=1, positions="none"),
    "lstm": DecoderConfig(width=16, mixers=("lstm",), num_layers=1, positions="none"),
    "bigram": BigramConfig(),
    "hmm": HMMConfig(num_states=5),
}


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    draw = random.Random(5)
    texts = ["".join(draw.choices("abcdé漢 \n", k=draw.randint(5, 90))) for _ in range(30)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


def config(model: Any = MODELS["attention"], tokenizer: str = "bytes") -> RunConfig:
    return RunConfig(task=LanguageConfig(corpus="texts.jsonl", tokenizer=tokenizer, length=16, val_fraction=0.2), model=model, steps=2, batch_size=4)


def untrained(model: Any = MODELS["attention"], tokenizer: str = "bytes") -> Run:
    run = Fleet.build([config(model, tokenizer)]).one(0)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
    return run


def alone(run: Run, row: list[int], start: int, place: int) -> tuple[float, int]:
    """-log p(row[place]) given row[start:place], in float64 from the logits; and the likeliest token."""
    hidden, _ = run.model(torch.tensor([row[start:place]]), Context())
    logits = run.model.logits(hidden)[0, -1].double()
    return float(logits.logsumexp(-1) - logits[row[place]]), int(logits.argmax())


@pytest.mark.parametrize("name", MODELS)
def test_every_token_given_what_its_window_has(name: str) -> None:
    """Texts shorter and longer than the positions, side by side and overlapping, against one pass a token."""
    run = untrained(MODELS[name])
    texts, prompts = ["ab", "c" + "abdé漢" * 6, "d" * 16], ["", "acca b", "x" * 30]
    for stride in (0, 5):
        found = score(run, texts, prompts, stride=stride, ends=True)
        for text, prompt, one in zip(texts, prompts, found, strict=True):
            given, own = [*run.task.start, *prompt.encode()], [*text.encode(), run.task.end]
            row, length, step = [*given, *own], 16, stride or 16
            assert one.tokens.tolist() == own and one.num_bytes == len(text.encode())
            for place in range(len(given), len(row)):
                start = max(0, -(-(place - length) // step) * step)  # the first window that has it
                assert place - start <= length
                nll, best = alone(run, row, start, place)
                assert one.nll[place - len(given)] == pytest.approx(nll, abs=2e-5)
                assert one.best[place - len(given)] == best
    assert shoal.score is score


def test_windows_score_each_once() -> None:
    draw = random.Random(11)
    for _ in range(300):
        length = draw.randint(1, 9)
        stride, total = draw.randint(1, length), draw.randint(1, 60)
        first = draw.randint(1, total)
        found = windows([total], [first], length, stride)
        assert [place for _, _, scored, stop in found for place in range(scored, stop)] == list(range(first, total))
        assert all(start < scored < stop <= start + length + 1 and start % stride == 0 for _, start, scored, stop in found)
    lengths = [draw.randint(1, 50) for _ in range(700)]
    parts = list(pieces(lengths, 200))
    assert sorted(i for part in parts for i in part) == list(range(700))
    assert all(len(part) <= ROWS and (len(part) == 1 or len(part) * max(lengths[i] for i in part) <= 200) for part in parts)


def test_sums() -> None:
    run = untrained()
    one, two = score(run, ["héllo", "ab"])
    both = together([one, two])
    assert one.num_bytes == 6 and both.num_bytes == 8 and len(both.tokens) == 8
    assert both.log_probability == pytest.approx(one.log_probability + two.log_probability) == -both.nll.sum()
    assert one.perplexity == pytest.approx(math.exp(-one.log_probability / 6))
    assert one.bits_per_byte == pytest.approx(-one.log_probability / math.log(2) / 6)
    assert math.isnan(Score("", one.tokens, one.nll, one.best, 0).bits_per_byte)
    [whole] = score(run, "abcd")
    parts = [score(run, "abcd"[i], "abcd"[:i])[0].log_probability for i in range(4)]
    assert sum(parts) == pytest.approx(whole.log_probability, abs=1e-5)  # the chain rule
    likely = score(run, list("abcdefgh"), "ab")
    assert sum(math.exp(x.log_probability) for x in likely) < 1


def test_a_file(room: Path) -> None:
    run = untrained()
    for name, field in (("a.jsonl", "document"), ("b.jsonl", "text")):
        (room / name).write_text("".join(json.dumps({field: text}) + "\n" for text in ("first\n", "second one, longer than the positions")))
        found = score_file(run, name)
        assert [one.name for one in found] == [f"{name}:1", f"{name}:2"]
        assert [one.tokens[-1] for one in found] == [run.task.end] * 2 and found[0].num_bytes == 6
    (room / "c.txt").write_text("first\n")
    assert np.allclose(score_file(run, "c.txt")[0].nll, found[0].nll, atol=1e-5)


def test_table_and_page() -> None:
    run = untrained()
    scores = score(run, ["a\tb\n<i>", "漢"])
    lines = [line.split("\t") for line in table(scores, run.task.tokenizer).splitlines()]
    assert lines[0] == ["text", "place", "token", "piece", "nats", "bits", "likeliest"] and len(lines) == 1 + 7 + 3
    assert [json.loads(line[3]) for line in lines[1:8]] == list("a\tb\n<i>") and lines[8][0] == "2"
    assert float(lines[1][5]) == pytest.approx(float(lines[1][4]) / math.log(2), abs=1e-5)
    text = page(scores, run.task.tokenizer, run.task.vocab_size)
    assert text.count("<span") == 7 + 1 and ">漢</span>" in text and "&lt;</span>" in text and "http" not in text and "<i>&" not in text


def test_the_command(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trained run, from its directory: what is printed is what the function says; bad requests are one line."""
    driver.train(config(), "runs/x", device="cpu")
    capsys.readouterr()
    run = shoal.load("runs/x")
    [own] = run.score("abba", "cd")
    assert cli.main(["score", "runs/x", "--text", "abba", "--prompt", "cd", "--out", "t.tsv", "--page", "p.html", "--device", "cpu"]) == 0
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert float(printed["log-probability"].split()[0]) == pytest.approx(own.log_probability, rel=1e-4) and printed["tokens"] == "4"
    assert float(printed["perplexity"]) == pytest.approx(own.perplexity, rel=1e-4)
    assert len((room / "t.tsv").read_text().splitlines()) == 5 and "<span" in (room / "p.html").read_text()
    for line, message in (
        ("--text a --file texts.jsonl", "--text: give a text, or --file FILE"),
        ("", "--text: give a text, or --file FILE"),
        ("--file none.txt", "--file: there is no file none.txt"),
        ("--file texts.jsonl --prompt a", "--prompt: goes before a --text"),
        ("--text a --stride 17", "stride: must be 0 (windows side by side) to 16"),
        ("--text a --stride -1", "--stride: must be 0"),
        ("--text a --out there/t.tsv", "--out: there is no directory there"),
        ("--text a --page runs", "--page: runs exists already"),
        ("--text=", "text: text 1 of 1 is empty"),
    ):
        assert cli.main(["score", "runs/x", "--device", "cpu", *line.split()]) == 2, line
        assert message in capsys.readouterr().err
    state = next(Path("runs/x/fleets").glob("*/checkpoint/corpus.json"))
    state.unlink()
    assert cli.main(["score", "runs/x", "--text", "a", "--device", "cpu"]) == 2 and "corpus.json: is missing" in capsys.readouterr().err


def test_refusals() -> None:
    run = untrained(tokenizer="characters")
    with pytest.raises(ConfigError, match="unknown character 'X'"):
        score(run, "aX")
    with pytest.raises(ConfigError, match="give one for all texts, or 2"):
        score(run, ["a", "b"], ["a"])
    with pytest.raises(ConfigError, match="gives no probability of the next token"):
        score(replace(run, config=replace(run.config, objective="stablemax")), "a")

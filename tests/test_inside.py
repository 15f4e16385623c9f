"""Looking inside: maps are the model's own weights, scores what they are defined as, the lens a model with fewer layers; exports, figures, the command."""

from __future__ import annotations

import copy
import json
import random
import warnings
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import shoal
from shoal import cli
from shoal.config import BigramConfig, DecoderConfig, LanguageConfig, ModularConfig, RecallConfig, RunConfig, StudyConfig
from shoal.config.fields import ConfigError
from shoal.config.models import MixerName
from shoal.contracts import Context
from shoal.inference import heads
from shoal.inference import look as inference_look
from shoal.inference.evaluate import batches
from shoal.inference.heads import SCORES, head_scores
from shoal.inference.inside import attending, attention, lens, weights_of
from shoal.inference.look import look
from shoal.mixers.attention import Attention
from shoal.models.decoder import Decoder
from shoal.results import inside as figures
from shoal.results.rows import Rows
from shoal.studies import driver, recall_heads, recall_induction
from shoal.train.fleet import Fleet
from shoal.train.run import Run

MODELS: dict[str, DecoderConfig] = {
    "learned": DecoderConfig(width=16, num_heads=2, num_layers=3, bias=True),
    "rotary": DecoderConfig(width=16, num_heads=4, num_layers=2, positions="rotary", qk_norm=True, norm="rms", softcap=3.0),
    "post": DecoderConfig(width=16, num_heads=2, num_layers=2, norm_place="post", tied=True),
    "hybrid": DecoderConfig(width=16, num_heads=2, num_layers=3, mixers=("mamba", "attention"), positions="none"),
    "alibi": DecoderConfig(width=16, num_heads=2, num_layers=2, positions="alibi", feed_forward=0),
}
PNG = b"\x89PNG\r\n"


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    draw = random.Random(3)
    texts = ["".join(draw.choices("abcdefghé \n", k=draw.randint(5, 60))) for _ in range(30)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


def config(model: Any = MODELS["learned"], tokenizer: str = "characters", **other: Any) -> RunConfig:
    task = LanguageConfig(corpus="texts.jsonl", tokenizer=tokenizer, length=24, val_fraction=0.2, mask_token=other.pop("mask_token", False))
    return RunConfig(**{"task": task, "model": model, "steps": 2, "batch_size": 4, **other})


def untrained(model: Any = MODELS["learned"], tokenizer: str = "characters", **other: Any) -> Run:
    run = Fleet.build([config(model, tokenizer, **other)]).one(0)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(torch.randn(p.shape) * 0.4)
    return run


def decoder(run: Run) -> Decoder:
    assert isinstance(run.model, Decoder)
    return run.model


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_the_model_uses(name: str) -> None:
    """Times the values, through ``out``: what the mixer gives. Rows sum to 1, nothing looks ahead, and no hook stays behind."""
    run, text = untrained(MODELS[name]), "abé bad\nhe"
    tokens = torch.tensor([[*run.task.start, *run.task.tokenizer.encode(text)]])
    seen: dict[int, Any] = {}

    def note(layer: int) -> Any:
        return lambda module, given, result: seen.update({layer: (module, given[0], result[0])})

    hooks = [mixer.register_forward_hook(note(layer)) for layer, mixer in attending(run).items()]
    run.model(tokens)
    for hook in hooks:
        hook.remove()
    maps = attention(run, text)
    assert maps.tokens == ["<s>", *text] and maps.layers == tuple(seen) == ((1,) if name == "hybrid" else tuple(range(len(decoder(run).blocks))))
    assert maps.weights.dtype == np.float32 and maps.weights.shape == (len(seen), MODELS[name].num_heads, 11, 11)
    assert np.allclose(maps.weights.sum(-1), 1, atol=1e-6) and np.all(np.triu(maps.weights, 1) == 0) and np.all(maps.weights >= 0)
    for weights, (mixer, x, y) in zip(maps.weights, seen.values(), strict=True):
        values = mixer.value(x)[0].unflatten(-1, (mixer.num_heads, -1))
        mixed = torch.einsum("hst,thk->shk", torch.from_numpy(weights), values)
        torch.testing.assert_close(mixer.out(mixed.flatten(-2)), y[0], atol=2e-6, rtol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules())


def test_every_mixer_with_weights_has_maps() -> None:
    """And every one without is refused by name. What is zeroed after the softmax is missing from the sums."""
    for name in get_args(MixerName):
        run = untrained(DecoderConfig(width=8, num_heads=2, num_layers=1, mixers=(name,), positions="none", window=3, feed_forward=0))
        if not isinstance(decoder(run).blocks[0].mixer, Attention):
            with pytest.raises(ConfigError, match=f"its mixers are {name};"):
                attention(run, "ab")
            continue
        short, long = attention(run, ["ab", "bad cafe"])
        sums = long.weights.sum(-1)
        assert short.weights.shape == (1, 2, 3, 3) and long.weights.shape == (1, 2, 9, 9) and not np.triu(long.weights, 1).any()
        assert np.all(sums[..., :-1] < 1) if name == "zeroed" else np.allclose(sums, 1, atol=1e-6), name


def test_one_layer_from_its_equations() -> None:
    """softmax(q k / sqrt K) in float64 from the parameters, one query at a time."""
    run, text = untrained(DecoderConfig(width=12, num_heads=3, num_layers=1)), "badcafe"
    p = {name: value.detach().double().numpy() for name, value in run.model.named_parameters()}
    row = [*run.task.start, *run.task.tokenizer.encode(text)]
    x = p["embedding.weight"][row] + p["position.weight"][: len(row)]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["blocks.0.mixer_norm.weight"] + p["blocks.0.mixer_norm.bias"]
    q, k = (x @ p[f"blocks.0.mixer.{part}.weight"] + p[f"blocks.0.mixer.{part}.bias"] for part in ("query", "key"))
    found = attention(run, text).weights[0]
    for head in range(3):
        own = slice(4 * head, 4 * head + 4)
        for t in range(len(row)):
            e = np.exp(k[: t + 1, own] @ q[t, own] / 2)
            assert np.allclose(found[head, t, : t + 1], e / e.sum(), atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_several_texts_are_each_as_alone(name: str) -> None:
    run, texts = untrained(MODELS[name]), ["abc", "h", "bad cafe\nabc", "abc", "gé"]
    for text, together in zip(texts, attention(run, texts), strict=True):
        alone = attention(run, text)
        assert together.tokens == alone.tokens and together.layers == alone.layers
        assert np.allclose(together.weights, alone.weights, atol=2e-6)
    assert len(attention(run, ["abc"])) == 1


@pytest.mark.parametrize("name", MODELS)
def test_the_lens_is_a_model_with_fewer_layers(name: str) -> None:
    run, text = untrained(MODELS[name]), "abé bad\nhe"
    found, last = lens(run, text), len(decoder(run).blocks)
    tokens = torch.tensor([[*run.task.start, *run.task.tokenizer.encode(text)]])
    for number, after in enumerate(found.after):
        short = copy.deepcopy(decoder(run))
        short.blocks = short.blocks[:number]
        log_p = short.logits(short(tokens)[0])[0].detach().double().log_softmax(-1)
        assert after == ("embedding" if number == 0 else f"layer {number - 1}")
        assert np.allclose(found.nll[number], -log_p[:-1].gather(-1, tokens[0, 1:, None])[:, 0], atol=2e-5)
        assert np.allclose(found.probability[number], log_p.max(-1).values.exp(), atol=2e-5)
        assert found.top[number] == [run.task.tokenizer.decode([i]) or {run.task.end: "</s>"}.get(i, "<s>") for i in log_p.argmax(-1).tolist()]
        assert found.loss[number] == pytest.approx(found.nll[number].mean())
    assert len(found.after) == last + 1
    assert np.allclose(found.nll[-1], shoal.score(run, text)[0].nll, atol=2e-5)
    lines = found.table().splitlines()
    assert len(lines) == last + 2 and f"{found.loss[1]:.4f}" in lines[2]


def test_scores_are_what_they_are_defined_as(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ideal heads, made place by place from the sequences themselves, score 1 on what they are and 0 on the rest; an even one what is called even."""
    run = untrained(MODELS["rotary"])

    def ideal(_: Any, tokens: torch.Tensor, __: Any) -> dict[int, torch.Tensor]:
        rows, time = tokens.tolist(), tokens.shape[1]
        half = (time - 1) // 2
        assert len(rows) == heads.SEQUENCES and len({tuple(row) for row in rows}) > 1
        weights = torch.zeros(len(rows), 5, time, time)
        for b, row in enumerate(rows):
            assert row[0] == run.task.start[0] and row[1 : half + 1] == row[half + 1 :] and len(set(row)) == half + 1
            for t, token in enumerate(row):
                before = row.index(token)
                weights[b, 0, t, max(t - 1, 0)] = 1
                weights[b, 1, t, before] = 1
                weights[b, 2, t, before + 2 if before < t else 0] = 1
                weights[b, 3, t, 0] = 1
                weights[b, 4, t, : t + 1] = 1 / (t + 1)
        return {3: weights}

    monkeypatch.setattr(heads, "weights_of", ideal)
    found = head_scores(run, offset=2, length=6)
    assert [(row["layer"], row["head"]) for row in found.rows] == [(3, head) for head in range(5)] and found.length == 6
    table = np.array([[row[name] for name in SCORES] for row in found.rows])
    assert (
        np.array_equal(table[:4], np.eye(4)) and np.allclose(table[4], found.even) and found.even == pytest.approx(np.mean([1 / (t + 1) for t in range(8, 13)]))
    )


def test_scores_of_a_model_by_hand() -> None:
    """Against loops over its own weights; the same again, other ones for another seed; together at most 1."""
    run = untrained(MODELS["hybrid"], tokenizer="bytes")
    found, n = head_scores(run, length=5), 5
    kept: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "weights_of", lambda run, tokens, context: kept.append(tokens) or weights_of(run, tokens, context))
        assert head_scores(run, length=5).rows == found.rows
        assert head_scores(run, length=5, seed=1).rows != found.rows
    assert int(kept[0][:, 1:].max()) < 256 and not kept[0].equal(kept[1])  # bytes, no token without a spelling but the one that begins a text
    weights = weights_of(run, kept[0], Context())[1].double().numpy()
    for row in found.rows:
        w = weights[:, row["head"]]
        expected = {name: [] for name in SCORES}
        for b in range(len(w)):
            for i in range(2, n + 1):
                t = n + i  # the begin token stands at 0
                for name, place in zip(SCORES, (t - 1, i, i + 1, 0), strict=True):
                    expected[name].append(w[b, t, place])
        for name in SCORES:
            assert row[name] == pytest.approx(np.mean(expected[name]), abs=1e-7)
        assert sum(row[name] for name in SCORES) <= 1 + 1e-6
    assert head_scores(run).length == 24 // 4
    lines = found.table().splitlines()
    assert len(lines) == 1 + len(found.rows) + 1 and lines[-1].split() == ["even", *[f"{found.even:.3f}"] * 4]


def test_export() -> None:
    maps = attention(untrained(MODELS["hybrid"]), "abc é")
    layers = maps.circuitsvis()
    assert len(layers) == 1 and set(layers[0]) == {"tokens", "attention"} and layers[0]["attention"].shape == (2, 6, 6)
    assert layers[0]["tokens"] == maps.tokens and np.array_equal(layers[0]["attention"], maps.weights[0])
    given = maps.bertviz()
    assert set(given) == {"attention", "tokens"} and isinstance(given["attention"], tuple) and given["tokens"] == maps.tokens
    assert [x.shape for x in given["attention"]] == [(1, 2, 6, 6)] and torch.equal(given["attention"][0][0], torch.from_numpy(maps.weights[0]))


def test_figures() -> None:
    """Of one map and of many, of short and long texts, of characters no font has; nothing warns, and the same is the same bytes."""
    maps = attention(untrained(), "abc é\nh")
    assert maps.png(1) == maps.png(1) != maps.png(1, 0) and maps.png().startswith(PNG)
    assert maps.chosen() == ([0, 1, 2], [0, 1]) and maps.chosen(2, 1) == ([2], [1])
    for layer, head, message in (
        (3, None, "layer 3 has no attention weights; layers that have: 0, 1, 2"),
        (None, 2, "must be 0 to 1, not 2"),
        (0, -1, "not -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            maps.png(layer, head)
    assert figures.words([" the", "\n", "\t", "漢", "\0", "$x$", "a" * 30]) == ["␣the", "↵", "⇥", "<6f22>", "<0>", "$x$", "a" * 13 + "…"]
    odd = ["$", "\u202e", "\ud7ff", "漢", "\ufffd", "_", "^{"] * 30
    assert figures.png(lambda: figures.grid(odd, np.full((2, 1, 210, 210), 0.1), [0, 3], [1])).startswith(PNG)
    for names, after in ((odd, 3), (["a"], 14)):
        p = np.random.default_rng(0).uniform(size=(after, len(names)))
        assert figures.png(lambda n=names, a=after, p=p: figures.lens(n, [f"layer {i}" for i in range(a)], [n] * a, p, [1.0] * a)).startswith(PNG)
    rows = [{"layer": 0, "head": head, **dict.fromkeys(SCORES, 0.2)} for head in range(4)]
    assert figures.png(lambda: figures.scores(rows, SCORES, 0.1)).startswith(PNG)


def test_refusals() -> None:
    run = untrained()
    for text in ("", [], ["a", ""]):
        with pytest.raises(ConfigError, match=r"is empty|there is none"):
            attention(run, text)
    with pytest.raises(ConfigError, match="prompt 2: unknown character 'X'"):
        attention(run, ["a", "X"])
    with pytest.warns(UserWarning, match="31 tokens are more than the model's 24 positions; the first 24 are read, the others cut"):
        assert len(attention(run, "abcde" * 6).tokens) == 24
    with pytest.warns(UserWarning, match="6 tokens are more than 4; the first 4 are read"):
        assert attention(run, "abcde", most=4).tokens == ["<s>", "a", "b", "c"]
    with pytest.raises(ConfigError, match="most: must be 2 or more"):
        lens(run, "abc", most=1)
    for length, offset, message in (
        (2, 1, "length: must be 3 to 11"),
        (12, 1, "must be 3 to 11"),
        (5, 4, "offset: must be 1 to 3"),
        (5, 0, "offset: must be 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            head_scores(run, length=length, offset=offset)
    with pytest.raises(ConfigError, match="has no attention weights to look at: its mixers are mamba, lstm;"):
        attention(untrained(DecoderConfig(width=16, num_layers=2, mixers=("mamba", "lstm"))), "a")
    with pytest.raises(ConfigError, match="is no decoder but a model of kind Bigram"):
        attention(untrained(BigramConfig()), "a")
    with pytest.raises(ConfigError, match="has no layers to look into"):
        lens(untrained(DecoderConfig(width=16, num_layers=0)), "a")
    with pytest.raises(ConfigError, match="has no residual connections"):
        lens(untrained(DecoderConfig(width=16, num_layers=1, residual=False)), "a")


def test_what_cannot_be_had_is_left_out() -> None:
    """A model that sees everything has maps and scores, and no lens; sequences of four tokens have no scores."""
    run = untrained(DecoderConfig(width=16, num_heads=2, num_layers=1, causal=False), objective="masked_diffusion", mask_token=True)
    maps = attention(run, "abc")
    assert np.allclose(maps.weights.sum(-1), 1) and maps.weights[..., 0, -1].min() > 0
    with pytest.warns(UserWarning, match="no logit lens: .* gives no probability of the next token"):
        found = look(run, "abc")
    assert found.lens is None and found.heads is not None and found.heads.even == pytest.approx(1 / (1 + 2 * found.heads.length))
    small = RunConfig(task=ModularConfig(p=7), model=DecoderConfig(width=8, num_heads=2, num_layers=1), steps=1, batch_size=0)
    with pytest.warns(UserWarning, match="at least 3 different tokens are needed, twice"):
        found = look(Fleet.build([small]).one(0), "3 / 4 =")
    assert found.heads is None and found.lens is not None and found.maps.tokens == ["3", "/", "4", "="]


def test_long_texts_make_no_large_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_look, "NUMBERS", 3 * 2 * 10**2)
    with pytest.warns(UserWarning, match="21 tokens are more than 10") as told:
        found = look(untrained(), "abcde" * 4)
    assert len(told) == 1 and found.maps.weights.shape == (3, 2, 10, 10) and found.lens is not None and found.lens.tokens == found.maps.tokens


def test_the_command(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    driver.train(config(MODELS["hybrid"]), "runs/x", device="cpu")
    capsys.readouterr()
    run = shoal.load("runs/x")
    assert cli.main(["inspect", "runs/x", "--prompt", "bad cafe", "--out", "there", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "9 tokens; attention in layer 1, 2 heads each" in printed and run.head_scores().table() in printed and run.lens("bad cafe").table() in printed
    for name in ("attention", "heads", "lens"):
        assert (room / "there" / f"{name}.png").read_bytes().startswith(PNG)
    record = json.loads((room / "there" / "inside.json").read_text())
    maps = run.attention("bad cafe")
    assert record["tokens"] == maps.tokens and record["layers"] == [1] and np.allclose(record["attention"], maps.weights, atol=1e-6)
    assert record["heads"]["scores"] == run.head_scores().rows and record["lens"]["loss"] == run.lens("bad cafe").loss
    for line, message in (
        ("", "Missing from shoal inspect: --prompt TEXT"),
        ("--prompt=", "prompt: is empty; give a text of at least one token"),
        ("--prompt X", "prompt: unknown character 'X'"),
        ("--prompt a --layer 0", "layer: layer 0 has no attention weights; layers that have: 1"),
        ("--prompt a --head 2", "head: must be 0 to 1, not 2"),
        ("--prompt a --out there", "--out: there exists already"),
        ("--prompt a --layers 1", "--layers: unknown option; did you mean"),
    ):
        assert cli.main(["inspect", "runs/x", "--device", "cpu", *line.split()]) == 2, line
        assert message in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cli.main(["inspect", "runs/x", "--prompt", "abcde" * 9, "--device", "cpu", "--out", "more", "--layer", "1", "--head", "0"]) == 0
    assert capsys.readouterr().err.count("46 tokens are more than the model's 24 positions") == 1


@pytest.mark.parametrize(("mixers", "delay"), [(("attention",), 1), (("mamba", "attention"), 3)])
def test_heads_of_recall(mixers: tuple[MixerName, ...], delay: int) -> None:
    """What the study measures, against loops over its test sequences; and its figure."""
    task = RecallConfig(num_tokens=6, num_queries=3, length=9, delay=delay, test_size=1000)
    run = Fleet.build([RunConfig(task=task, model=DecoderConfig(width=8, num_heads=2, num_layers=2, mixers=mixers), steps=1, batch_size=4)]).one(0)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(torch.randn(p.shape) * 0.4)
    found = recall_heads.measured(run)
    assert {row["layer"] for row in found} == ({1} if "mamba" in mixers else {0, 1}) and len(found) % 2 == 0
    rows = [row for batch in batches(run, "test") for row in batch.tokens.tolist() if row[:-1].count(row[-1]) == 1]
    weights = weights_of(run, torch.tensor(rows), Context())
    for entry in found:
        w = weights[entry["layer"]][:, entry["head"]].double()
        places = [row.index(row[-1]) for row in rows]
        assert entry["binding"] == pytest.approx(np.mean([w[b, place + delay, place] for b, place in enumerate(places)]), abs=1e-6)
        assert entry["induction"] == pytest.approx(np.mean([w[b, -1, place + delay] for b, place in enumerate(places)]), abs=1e-6)
    one: Any = [{"id": str(seed), "variant": "one", "task.delay": delay, "measures": {"heads": found}} for seed in range(3)]
    drawn = Rows(one)
    assert "<svg" in recall_heads.figure("variant", ["variant", "task.delay"]).svg(drawn) and "<svg" in recall_heads.figure("variant", []).svg(Rows())
    bare = Fleet.build([RunConfig(task=task, model=DecoderConfig(width=8, num_heads=2, mixers=("mamba",)), steps=1, batch_size=4)]).one(0)
    assert recall_heads.measured(bare) == []


def test_the_study_has_them() -> None:
    study = recall_induction.study(StudyConfig(run=recall_induction.quick().run, variants=recall_induction.quick().variants, seeds=3))
    assert "heads" in study.measures and "heads" in [figure.name for figure in study.figures]


def test_nothing_is_drawn_without_being_asked(capsys: pytest.CaptureFixture[str]) -> None:
    """Three texts at once warn of each that is cut, by number."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        attention(untrained(), ["a", "ab" * 20, "b" * 30])
    assert [str(one.message)[:9] for one in told] == ["prompt 2:", "prompt 3:"] and capsys.readouterr().out == ""

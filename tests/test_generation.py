"""Many prompts at once and models of every kind: the cache beside no cache, a batch beside one at a time, where positions end, text as it comes."""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import close, filled, generator
from laws_training import CORPUS, MLP, MODULAR, SMALL
from torch.utils._pytree import tree_leaves

from shoal import cli, rng
from shoal.config import BigramConfig, HMMConfig, LanguageConfig, ModuleConfig, RunConfig
from shoal.config.fields import ConfigError
from shoal.contracts import Context
from shoal.data.subword import ByteTokenizer
from shoal.inference import generate
from shoal.inference import prompts as prompt_files
from shoal.inference.compare import measures, side_by_side, table
from shoal.inference.generate import LAST, continued, each_token, reach, sample, stream, whole_characters
from shoal.inference.prompts import left_padded
from shoal.inference.sampling import Sampling
from shoal.mixers import LEAKY, MIXERS
from shoal.studies import driver
from shoal.train.fleet import Fleet
from shoal.train.run import Run

BYTES = LanguageConfig(corpus=str(CORPUS), tokenizer="bytes", length=24, val_fraction=0.2)
POSITIONS = ("learned", "sinusoidal", "rotary", "none")
RECURRENT = ("average", "rnn", "gru", "lstm", "mamba", "ssd", "s4d")
PROMPTS = ["", "a", "The boats", "in the end"]
WIDE = replace(SMALL, num_layers=2, init_std=0.5, embedding_std=1.0)
KINDS: dict[str, Any] = {
    "decoder": WIDE,
    "rotary": replace(WIDE, positions="rotary"),
    "mixed": replace(WIDE, mixers=("mamba", "attention"), positions="none"),
    "bigram": BigramConfig(embedding_std=2.0),
    "hmm": HMMConfig(num_states=5, init_std=2.0),
    "module": ModuleConfig(module="own_models:Transformer"),
    "diffusion": replace(WIDE, causal=False),
}


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def untrained(model: Any, task: Any = BYTES, **changes: Any) -> Run:
    config = replace(MODULAR, task=task, model=model, evaluate=("val",), **changes)
    return Fleet.build([config]).one(0)


def of_kind(kind: str) -> Run:
    if kind == "diffusion":
        return untrained(KINDS[kind], replace(BYTES, mask_token=True), objective="masked_diffusion")
    return untrained(KINDS[kind])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mixer", [name for name in MIXERS if name not in LEAKY])
def test_the_cache_changes_nothing(mixer: str, positions: Any) -> None:
    """In float32, to 1e-5: logits of prompts of different lengths, left-padded, read at once and then token by token = of each whole row without a cache."""
    config = replace(SMALL, num_layers=2, width=16, num_heads=2, mixers=(mixer,), positions=positions)
    model = filled(untrained(config).model, seed=1).float()
    rows = [torch.randint(model.vocab_size, (n,), generator=generator(n)).tolist() for n in (3, 9, 6)]
    added = torch.randint(model.vocab_size, (3, 12), generator=generator(1))
    tokens, context = left_padded(rows)
    assert context.positions is not None
    with torch.inference_mode():
        hidden, cache = model(tokens, context, model.init_cache(3, 9 + 12))
        found, place = [model.logits(hidden)[:, -1]], context.positions[:, -1:]
        for step in range(12):
            hidden, cache = model(added[:, step : step + 1], Context(positions=place + 1 + step), cache)
            found.append(model.logits(hidden)[:, -1])
        for row, given in enumerate(rows):
            whole, _ = model(torch.tensor([[*given, *added[row].tolist()]]))
            expected = model.logits(whole)[0, len(given) - 1 :]
            scale = expected.abs().max()
            close(torch.stack([x[row] for x in found]) / scale, expected / scale, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_one_at_a_time(kind: str) -> None:
    """Greedy and at random, with cuts and a penalty; as far as positions reach, and so many tokens."""
    run, given = of_kind(kind), [*PROMPTS, PROMPTS[1]]
    settings: list[dict[str, Any]] = [{}, {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "seed": 3}, {"penalty": 1.5}]
    for options in settings:
        for max_tokens in (None, 7):
            together = generate(run, given, max_tokens, **options)
            assert together == [generate(run, prompt, max_tokens, **options) for prompt in given]
            assert together[1] == together[-1]
    rooms = [24 - (kind == "diffusion") - len(prompt) for prompt in given]
    lengths = [len(row) for row in continued(run, given, None, Sampling(temperature=1.0), [0] * 5)]
    assert all(length <= room for length, room in zip(lengths, rooms, strict=True)) and any(map(int.__eq__, lengths, rooms))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("module", "diffusion")])
@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_steps_that_write_in_place_are_the_same(kind: str, penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph would replay, and a plain loop without a cache, give the same tokens."""
    run, how = of_kind(kind), Sampling(temperature=1.0, penalty=penalty)
    rows = [[*run.task.start, *run.task.tokenizer.encode(prompt)] for prompt in PROMPTS]
    tokens, context = left_padded(rows)
    keys = rng.key(torch.arange(4), "sample")
    plain = list(each_token(run, tokens, 9, how, keys, context))
    monkeypatch.setattr(sys.modules["shoal.inference.generate"], "CAPTURED", ("cpu",))  # the package has a function of that name
    assert torch.stack(list(each_token(run, tokens, 9, how, keys, context))).equal(torch.stack(plain))
    with torch.inference_mode():
        for row, key, produced in zip(rows, keys, torch.stack(plain, dim=-1).tolist(), strict=True):
            for step, token in enumerate(produced):
                so_far = torch.tensor([row + produced[:step]])
                hidden, _ = run.model(so_far, Context(at=LAST))
                said = how.said(so_far, None, run.model.vocab_size)
                assert int(how.pick(run.model.logits(hidden)[:, -1].float(), rng.fold(key[None], step), said)) == token


def test_frequencies_of_a_model() -> None:
    """Tokens after one prompt, 20,000 seeds: each below its probability times 20,000 by no more than five standard deviations."""
    run, count = of_kind("decoder"), 20_000
    tokens = torch.tensor([[*run.task.start, 97]])
    with torch.inference_mode():
        p = run.model.logits(run.model(tokens)[0])[0, -1].double().div(0.8).softmax(-1)
    drawn = sample(run, tokens.expand(count, -1), 1, Sampling(temperature=0.8), rng.key(torch.arange(count), "sample"))
    counts = torch.bincount(drawn[:, 0], minlength=len(p))
    assert ((counts - count * p).abs() < 5 * (count * p * (1 - p)).sqrt() + 1).all()


def test_memory_of_recurrent_mixers_is_constant() -> None:
    """What is remembered after 4 and after 40 tokens takes the same room; attention's grows."""

    def remembered(model: Any, length: int) -> int:
        with torch.inference_mode():
            _, cache = model(torch.zeros(1, length, dtype=torch.int64), Context(at=LAST), model.init_cache(1, length))
        return sum(leaf.nbytes for leaf in tree_leaves(cache))

    for mixer in RECURRENT:
        model = untrained(replace(SMALL, width=8, num_heads=2, mixers=(mixer,), positions="none")).model
        assert remembered(model, 4) == remembered(model, 40) > 0
    for kind in ("bigram", "hmm"):
        model = of_kind(kind).model
        assert remembered(model, 4) == remembered(model, 40)
    model = of_kind("rotary").model
    assert remembered(model, 40) > 5 * remembered(model, 4)


def test_where_positions_end() -> None:
    """A language model with learned positions reads the end of what is too long, and says so; others read it all, or go on, and say so."""
    learned, rotary, long = of_kind("decoder"), of_kind("rotary"), "a long prompt, and more of it"
    tokens = [*learned.task.start, *long.encode()]  # 30, of 24
    keys, how = rng.key(torch.tensor([0]), "sample"), Sampling()

    def expected(run: Run, kept: int, count: int) -> str:
        return run.task.tokenizer.decode(sample(run, torch.tensor([tokens[-kept:]]), count, how, keys)[0].tolist())

    with pytest.warns(UserWarning, match="prompt: 30 tokens are more than the model's 24 positions; the first 18 were cut, the last 12 read"):
        assert expected(learned, 12, 13).startswith(generate(learned, long))
    with pytest.warns(UserWarning, match="prompt: 30 tokens and 20 more are more than the model's 24 positions; the first 25 were cut, the last 5 read"):
        assert expected(learned, 5, 20).startswith(generate(learned, long, 20))
    with pytest.warns(UserWarning, match="30 tokens and 20 more are longer than the 24 this model was trained on"):
        assert expected(rotary, 30, 20).startswith(generate(rotary, long, 20))
    with pytest.warns(UserWarning, match="the prompt's 30 tokens are more than the 24"):
        assert expected(rotary, 30, 24).startswith(generate(rotary, long))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert expected(learned, 1, 24).startswith(generate(learned, long, 24))
        for kind in ("bigram", "hmm", "mixed", "decoder", "module", "diffusion"):
            run = of_kind(kind)
            assert generate(run, ["a", long]) == [generate(run, "a"), generate(run, long)]
    assert {kind: reach(of_kind(kind)) for kind in KINDS} == dict.fromkeys(KINDS) | dict.fromkeys(("decoder", "module", "diffusion"), 24)
    for max_tokens in (25, 0, -3):
        with pytest.raises(ConfigError, match="tokens: must lie between 1 and 24, as the model has 24 positions"):
            generate(learned, "a", max_tokens)


def test_text_as_it_comes() -> None:
    """The pieces are the text, and whole characters; of masked diffusion one piece. It stops where the text ends."""
    for kind in KINDS:
        run = of_kind(kind)
        for seed in range(3):
            pieces = list(stream(run, "a", how=Sampling(temperature=1.0), seed=seed))
            assert "".join(pieces) == generate(run, "a", temperature=1.0, seed=seed)
            assert kind != "diffusion" or len(pieces) == 1
    draw, decode = random.Random(0), ByteTokenizer().decode
    for text in ("a漢字é and 🐟🐟!\ufffd?", "\ufffd", ""):
        assert list(whole_characters(decode, iter(text.encode()))) == ([*text[:-2], text[-2:]] if "!" in text else [*text])
    for _ in range(300):  # bytes that are no text
        tokens = [draw.choice([*b"\xf0\x9f\x90\x9f\xe6\xbc\xa2\xc3\xa9ab"]) for _ in range(draw.randint(0, 12))]
        assert "".join(whole_characters(decode, iter(tokens))) == decode(tokens)


def test_streaming_is_lazy() -> None:
    """The first piece is there before the others are computed."""
    run, calls = of_kind("decoder"), []
    run.model.register_forward_hook(lambda *_: calls.append(1))
    pieces = stream(run, "a", how=Sampling(temperature=0.5, top_k=5))
    next(pieces)
    assert len(calls) < len("".join(pieces)) + 1 and len(calls) > 4


def test_measures() -> None:
    """Beside counts by hand: "abab abab": of its 4-grams abab, baba one comes again at each."""
    found = measures([[1, 2, 1, 2, 1, 2, 1], [1, 2, 3]])
    assert found == {"repetition": 2 / 4, "distinct-1": 3 / 10, "distinct-2": 3 / 8}
    assert all(value != value for value in measures([[], []]).values()) and measures([[7]])["distinct-1"] == 1
    assert measures([[5] * 13])["repetition"] == 0.9 and measures([list(range(13))])["repetition"] == 0


def test_side_by_side() -> None:
    """Every cell is what ``generate`` gives; the table has them all, with brackets as they are, and the measures of each temperature."""
    run = of_kind("rotary")
    lines = side_by_side(run, ["a", "[b]"], (0.0, 0.5, 2.0), samples=2, max_tokens=8, seed=5, top_k=9)
    assert [(line["prompt"], line["seed"], line["temperature"]) for line in lines] == [(p, s, t) for p in ("a", "[b]") for s in (5, 6) for t in (0.0, 0.5, 2.0)]
    for line in lines:
        assert line["text"] == generate(run, line["prompt"], 8, line["temperature"], line["seed"], top_k=9) == run.task.tokenizer.decode(line["tokens"])
    shown = [{**line, "text": f"<{line['text'].encode().hex()[:10]}>"} for line in lines]
    text = table(shown, width=200)
    assert all(line["text"] in text for line in shown) and "[b]" in text and text.count("temperature") == 3
    for name, value in measures([line["tokens"] for line in lines if line["temperature"] == 2.0]).items():
        assert next(row for row in text.splitlines() if row.strip().startswith(name)).endswith(f"{value:.3f}")
    assert "none" in table([{**line, "tokens": []} for line in lines], width=80)


def test_prompts_of_tasks_without_a_begin_token() -> None:
    """Tables, in one batch: models that cannot be told of padding are asked by length. Which prompt is wrong is said."""
    run = Fleet.build([MLP]).one(0)
    asked = [f"{a} + {b} =" for a, b in ((1, 2), (3, 3), (0, 4))]
    assert generate(run, asked) == [generate(run, prompt) for prompt in asked]
    with pytest.raises(ConfigError, match="prompt 2: this task has no begin token"):
        generate(run, [asked[0], ""])
    with pytest.raises(ConfigError, match="prompt: there is none"):
        generate(run, [])
    with pytest.raises(ConfigError, match="steps: only masked diffusion takes steps"):
        generate(run, asked, steps=3)


# --- files and the command line


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(directory / "cache"))
        task = replace(BYTES, tokenizer="characters")
        config = RunConfig(task=task, model=replace(SMALL, num_layers=1), batch_size=4, steps=2, log_every=2, evaluate_every=2, evaluate=("val",))
        driver.train(config, directory / "run", device="cpu")
        yield directory / "run"


FORMS = {
    "a.json": '["the", {"text": "in"}, {"prompt": "an", "text": "no"}]',
    "a.jsonl": '"the"\n\n{"text": "in"}\n{"prompt": "an", "more": 3}\n',
    "a.txt": "the\n\nin\nan",
}


@pytest.mark.parametrize("name", FORMS)
def test_files_of_prompts(name: str, out: Path, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (room / name).write_text(FORMS[name])
    assert prompt_files.read(room / name) == ["the", "in", "an"]
    if name != "a.json":
        (room / f"wide.{name}").write_text(json.dumps("one\u2028line", ensure_ascii=False) + "\n", encoding="utf-8")
        assert len(prompt_files.read(room / f"wide.{name}")) == 1
    options = ["--temperature", "0,1", "--tokens", "6", "--samples", "2", "--device", "cpu", "--seed", "4"]
    assert cli.main(["generate", str(out), "--prompts", name, "--out", "new.jsonl", *options]) == 0
    lines = [json.loads(line) for line in (room / "new.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and capsys.readouterr().out == table(lines) + "\n"
    assert lines == side_by_side(driver.load(out), ["the", "in", "an"], (0, 1), 2, 6, 4)


@pytest.mark.filterwarnings("default")
def test_one_prompt_streams(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["generate", str(out), "--prompt", "the", "--temperature", "0.9", "--top-k", "20", "--top-p", "0.9", "--repetition-penalty", "1.2"]
    assert cli.main([*line, "--device", "cpu"]) == 0
    text = generate(driver.load(out), "the", temperature=0.9, top_k=20, top_p=0.9, penalty=1.2)
    assert capsys.readouterr().out == text + "\n"
    assert cli.main([*line, "--device", "cpu", "--out", "one.jsonl"]) == 0
    assert capsys.readouterr().out == text + "\n" and json.loads(Path("one.jsonl").read_text())["text"] == text
    assert cli.main(["generate", str(out), "--prompt", "the " * 30, "--device", "cpu"]) == 0
    assert "shoal: note: prompt: 121 tokens are more than the model's 24 positions; the first 109 were cut, the last 12 read" in capsys.readouterr().err


REFUSED = {
    "": "--prompt: give a text, or a file of them with --prompts; one of the two",
    "--prompt a --prompts a.txt": "--prompt: give a text, or a file of them with --prompts; one of the two",
    "--prompts missing.json": "--prompts: there is no file missing.json; give a .json list of texts",
    "--prompts .": "--prompts: there is no file .; give",
    "--prompts object.json": "--prompts: object.json is no JSON list; give",
    "--prompts broken.json": "--prompts: broken.json is no JSON (Expecting value: line 1 column 2 (char 1)); give",
    "--prompts broken.jsonl": "--prompts: broken.jsonl, line 2 is no JSON (Expecting value: line 1 column 1 (char 0)); give",
    "--prompts numbers.json": '--prompts: numbers.json, entry 2 is neither a text nor an object with a text as "prompt" or "text"; give',
    "--prompts fields.jsonl": "--prompts: fields.jsonl, line 1 is neither a text nor",
    "--prompts empty.txt": "--prompts: empty.txt has no prompt in it; give",
    "--prompts latin.txt": "--prompts: latin.txt is no UTF-8 text (invalid continuation byte at byte 0); give",
    "--prompts strange.txt": "prompt 2: unknown character '☃'; known:",
    "--prompt ☃": "prompt: unknown character '☃'; known:",
    "--prompt a --temperature -0.5": "--temperature: must be 0 (the likeliest token) or more, not -0.5",
    "--prompt a --temperature 0,nan": "--temperature: must be 0 (the likeliest token) or more, not nan",
    "--prompt a --temperature hot": "--temperature: give a number, or several such as 0,0.7,1, not 'hot'",
    "--prompt a --temperature 1,1.0": "--temperature: give each once, not 1,1.0",
    "--prompt a --top-p 0": "--top-p: must lie above 0 and not above 1 (all tokens), not 0.0",
    "--prompt a --top-p 1.01": "--top-p: must lie above 0 and not above 1 (all tokens), not 1.01",
    "--prompt a --top-k -1": "--top-k: must be 0 (all tokens) or more, not -1",
    "--prompt a --repetition-penalty 0": "--repetition-penalty: must be above 0 (1 = none), not 0.0",
    "--prompt a --samples 0": "--samples: must be 1 or more, not 0",
    "--prompt a --steps -1": "--steps: must be 0 (one for each token) or more, not -1",
    "--prompt a --steps 3": "steps: only masked diffusion takes steps; leave it out",
    "--prompt a --tokens 25": "tokens: must lie between 1 and 24, as the model has 24 positions, not 25",
    "--prompt a --out empty.txt": "--out: empty.txt exists already; name another file or remove this one",
    "--prompt a --out nowhere/x.jsonl": "--out: there is no directory nowhere",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refusals(line: str, out: Path, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (
        ("object.json", '{"prompt": "a"}'),
        ("broken.json", "[a]"),
        ("broken.jsonl", '{"text": "a"}\na\n'),
        ("numbers.json", '["a", 3]'),
        ("fields.jsonl", '{"document": "a"}'),
        ("empty.txt", "\n\n"),
        ("strange.txt", "a\n☃\n"),
        ("a.txt", "a"),
    ):
        (room / name).write_text(text)
    (room / "latin.txt").write_bytes("école".encode("latin-1"))
    assert cli.main(["generate", str(out), "--device", "cpu", *line.split()]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"shoal: {REFUSED[line]}") and said.err.count("\n") == 1 and said.out == ""

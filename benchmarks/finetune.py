"""Sentences per second of a fine-tuned encoder beside Hugging Face's Trainer: the same weights, sentences, batch size, padding, learning rate and precision.

    python benchmarks/finetune.py --device cpu --train train.tsv --val dev.tsv --steps 8 --rows 300 --batch 16     # a minute
    python benchmarks/finetune.py --device cuda --precision bfloat16 --runs 1 3 --steps 400       # the GPU table
    python benchmarks/finetune.py --device cuda --accuracy 3 --epochs 3                            # the same accuracy? three seeds of each

Both group sentences by length and pad to multiples of 8; both drop at the same rate; neither decays. Each is timed from its fourth step on (shoal on a GPU
after an epoch, in which every length is captured), to the end of the last. Trainer needs the package accelerate; without it a plain loop stands in its place,
which does the same without callbacks. Few steps are of other lengths on either side: then compare tokens/s, padding included. On a CPU a second is one of
processor time, all threads together, so that what else runs there does not count. "real" is the share of an epoch that is no padding. ``--encoder made`` is a
random one of MiniLM's size with its own words, where there is neither the package nor a network. No timing is asserted anywhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from shoal import rng
from shoal.config import AdamW, EncoderConfig, RunConfig, SentencesConfig, with_seed
from shoal.data import encoders
from shoal.tasks.sentences import SentencesTask
from shoal.train.fleet import Fleet

WARM = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--train", default="hub:SetFit/sst2", help="as `shoal finetune` takes it")
    parser.add_argument("--val", default="", help="where --train has none")
    parser.add_argument("--rows", type=int, default=0, help="of a training file; 0 = all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--runs", type=int, nargs="+", default=[1], help="of a fleet")
    parser.add_argument("--accuracy", type=int, default=0, help="seeds to compare validation accuracies of, instead of rates")
    parser.add_argument("--epochs", type=int, default=1, help="of --accuracy")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if asked.encoder == "made":
            asked.encoder, asked.train, asked.val = made(Path(place))
        if asked.rows:
            lines = Path(asked.train).read_text(encoding="utf-8").splitlines(keepends=True)[: asked.rows + 1]
            asked.train = str(Path(place) / "some.tsv")
            Path(asked.train).write_text("".join(lines), encoding="utf-8")
        run = RunConfig(
            task=SentencesConfig(train=asked.train, val=asked.val, test=asked.val, encoder=asked.encoder),
            model=EncoderConfig(encoder=asked.encoder, pooling="first", dropout=asked.dropout),
            optimizer=AdamW(lr=asked.lr, wd=0.0),
            batch_size=asked.batch,
            precision=asked.precision,
            evaluate=(),
            evaluate_every=1_000_000,
            log_every=1_000_000,
            steps=1_000_000,
        )
        compare(run, asked) if asked.accuracy else rates(run, asked)


def rates(run: RunConfig, asked: Any) -> None:
    theirs, their_tokens = trainer_rates(run, asked)
    print(f"{'Trainer' if has_trainer() else 'plain loop':<12}{theirs:10.1f} sentences/s, {their_tokens:,.0f} tokens/s")
    for count in asked.runs:
        fleet = Fleet.build([with_seed(run, s) for s in range(count)], asked.device)
        began, task = clock(asked.device), fleet.task
        assert isinstance(task, SentencesTask)
        first = task.steps_per_epoch(asked.batch) if asked.device == "cuda" else WARM
        fleet.advance(first)
        wait(asked.device)
        captured, began = clock(asked.device) - began, clock(asked.device)
        fleet.advance(asked.steps)
        wait(asked.device)
        rate = count * asked.steps * asked.batch / (clock(asked.device) - began)
        tokens = rate * statistics.mean(task.length_at(step, asked.batch) for step in range(first, first + asked.steps))
        epoch = [task.length_at(step, asked.batch) for step in range(task.steps_per_epoch(asked.batch))]
        told = f"{tokens:,.0f} tokens/s: {rate / theirs:.2f} and {tokens / their_tokens:.2f} times; first {first} steps {captured:.1f} s"
        real = float(task.encoded["train"].lengths.mean()) / statistics.mean(epoch)
        print(f"{f'shoal x {count}':<12}{rate:10.1f} sentences/s, {told}; {len(set(epoch))} lengths, {real:.0%} real")


def compare(run: RunConfig, asked: Any) -> None:
    """Accuracy on the validation sentences after so many epochs, constant learning rate."""
    for seed in range(asked.accuracy):
        fleet = Fleet.build([with_seed(replace(run, evaluate=("val",)), seed)], asked.device)
        task = fleet.task
        assert isinstance(task, SentencesTask)
        fleet.advance(asked.epochs * task.steps_per_epoch(asked.batch))
        ours = float(fleet.evaluate("val")["accuracy"][0])
        steps = asked.epochs * task.steps_per_epoch(asked.batch)
        model = trained(run, asked, steps, seed)
        print(f"seed {seed}: shoal {ours:.4f}, {'Trainer' if has_trainer() else 'plain loop'} {accuracy(model, task, asked):.4f} of {len(task.texts('val'))}")


def accuracy(model: Any, task: SentencesTask, asked: Any) -> float:
    tables, right = task.setup({"split_seed": [0]}, asked.device), 0.0
    with torch.no_grad():
        for batch in task.evaluation(tables, "val", 256):
            assert batch.mask is not None
            best = model.eval()(input_ids=batch.tokens[0], attention_mask=batch.mask[0].long()).logits.argmax(-1)
            right += float(((best == batch.targets[0, :, 0]) * batch.weights[0, :, 0]).sum())
    return right / len(task.texts("val"))


# --- what is compared with


def has_trainer() -> bool:
    return importlib.util.find_spec("accelerate") is not None


def trainer_rates(run: RunConfig, asked: Any) -> tuple[float, float]:
    """Sentences and tokens a second."""
    marks: list[float] = []
    sizes: list[int] = []
    trained(run, asked, asked.steps + WARM, 0, marks, sizes)
    took = marks[-1] - marks[WARM - 1]
    return asked.steps * asked.batch / took, sum(sizes[WARM : WARM + asked.steps]) / took


def trained(run: RunConfig, asked: Any, steps: int, seed: int, marks: list[float] | None = None, sizes: list[int] | None = None) -> Any:
    """The library's model after so many steps of Trainer, or of a plain loop. ``marks`` is given the end of each step, ``sizes`` its batch's tokens."""
    task = SentencesTask(run.task)  # pyright: ignore[reportArgumentType]
    tokenizer, data = encoders.tokenizer(asked.encoder, "encoder"), task.data
    rows = tokenizer(data.texts["train"], truncation=True, max_length=128)["input_ids"]
    items: Any = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label} for ids, label in zip(rows, data.labels["train"], strict=True)]
    pad, marks, sizes = transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8), [] if marks is None else marks, [] if sizes is None else sizes

    def collate(rows: list[Any]) -> Any:
        batch = pad(rows)
        sizes.append(batch["input_ids"].numel())
        return batch

    torch.manual_seed(seed)
    place, dropped = encoders.source(asked.encoder, "encoder"), {"hidden_dropout_prob": asked.dropout, "attention_probs_dropout_prob": asked.dropout}
    config = transformers.AutoConfig.from_pretrained(place.place, num_labels=len(data.classes), **dropped)
    kind = transformers.AutoModelForSequenceClassification
    with encoders.quiet():
        model = kind.from_pretrained(place.place, config=config) if place.has_weights else kind.from_config(config)

    def mark(step: int) -> None:
        if step in (WARM, steps):
            wait(asked.device)
        marks.append(clock(asked.device))

    if has_trainer():

        class Clock(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                mark(state.global_step)

        with tempfile.TemporaryDirectory() as out:
            arguments = transformers.TrainingArguments(
                out, per_device_train_batch_size=asked.batch, max_steps=steps, learning_rate=asked.lr, lr_scheduler_type="constant", weight_decay=0.0,
                max_grad_norm=0.0, bf16=asked.precision == "bfloat16", logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
                train_sampling_strategy="group_by_length", seed=seed, use_cpu=asked.device == "cpu", dataloader_pin_memory=asked.device == "cuda",
            )  # fmt: skip
            transformers.logging.set_verbosity_error()
            transformers.Trainer(model=model, args=arguments, train_dataset=items, data_collator=collate, callbacks=[Clock()]).train()
        return model
    optimizer = torch.optim.AdamW(model.to(asked.device).train().parameters(), lr=asked.lr, weight_decay=0.0, fused=asked.device == "cuda")
    for step, batch in zip(range(1, steps + 1), batches(items, collate, asked.batch, seed), strict=False):
        with torch.autocast(asked.device, torch.bfloat16, enabled=asked.precision == "bfloat16"):
            there = {name: x.to(asked.device) for name, x in batch.items()}
            loss = F.cross_entropy(model(input_ids=there["input_ids"], attention_mask=there["attention_mask"]).logits.float(), there["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mark(step)
    return model


def batches(items: list[Any], collate: Any, size: int, seed: int) -> Iterator[Any]:
    """Epochs without end: sorted by length within fifty batches, as Trainer does."""
    for epoch in range(1_000_000):
        order = rng.permutation(rng.key(torch.tensor(seed), "benchmark", epoch), len(items)).tolist()
        mega = [sorted(order[i : i + 50 * size], key=lambda j: -len(items[j]["input_ids"])) for i in range(0, len(order), 50 * size)]
        cut = [part[i : i + size] for part in mega for i in range(0, len(part), size)]
        for k in rng.permutation(rng.key(torch.tensor(seed), "benchmark steps", epoch), len(cut)).tolist():
            yield collate([items[j] for j in cut[k]])


def clock(device: str) -> float:
    return time.perf_counter() if device == "cuda" else time.process_time()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def made(place: Path) -> tuple[str, str, str]:
    """A random encoder of MiniLM's size, and sentences of about SST-2's lengths, in words of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(30_000))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])  # pyright: ignore
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(place)
    transformers.BertConfig(
        vocab_size=len(words), hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, max_position_embeddings=512
    ).save_pretrained(place)
    key = rng.key(torch.tensor(0), "benchmark sentences")
    for name, count in (("train", 6920), ("val", 872)):
        lengths = (rng.uniform(rng.fold(key, count), 3 * count).view(3, -1).sum(0) * 14).long() + 1  # mean 22, 1 to 42
        lines = [" ".join(f"w{i}" for i in rng.randint(rng.fold(key, i), int(n), 30_000).tolist()) + f"\t{i % 2}\n" for i, n in enumerate(lengths)]
        (place / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    return str(place), str(place / "train.tsv"), str(place / "val.tsv")


if __name__ == "__main__":
    main()

"""A user's module as a fleet: it trains as plain PyTorch trains it, and what it must not do is refused before anything is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import own_models
import pytest
import torch
from laws import close, same
from laws_training import MEMORIZE, MLP, MODULAR, OWN, facts, finished
from torch import Tensor, nn
from torch.nn import functional as F

import shoal
from shoal import cli, rng
from shoal.config import AdamW, ModularConfig, ModuleConfig, Muon, RunConfig, with_seed, with_values
from shoal.config.fields import ConfigError
from shoal.config.load import load_run
from shoal.contracts import Batch, Context
from shoal.models import module, trial
from shoal.models.module import Lifted, construct, failed, locate
from shoal.studies import driver
from shoal.train import checkpoint
from shoal.train.fleet import Fleet
from shoal.train.objectives import cross_entropy
from shoal.train.plan import validate


def own(name: str, **arguments: Any) -> ModuleConfig:
    return ModuleConfig(module=f"own_models:{name}", arguments=json.dumps(arguments))


def single(batch: Batch, r: int) -> Batch:
    return batch.each(lambda x: x[r])


def refused(run: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(run)
    assert caught.value.path == "model"
    return caught.value.message


# --- it trains as plain PyTorch would train it


@pytest.mark.parametrize("tied", [False, True])
def test_equals_plain_loops(tied: bool) -> None:
    """Four runs with their own seeds, rates and decays, and four ordinary loops over the same batches: every loss, and every weight at the end."""
    runs = [
        with_values(with_seed(replace(OWN, model=own("Transformer", tied=tied), steps=50), s), {"optimizer.lr": 1e-3 * (s + 1), "optimizer.wd": 0.1 * s})
        for s in range(4)
    ]
    fleet = Fleet.build(runs)
    batches = [fleet.task.batch(fleet.tables, fleet.order_key, torch.tensor(step), 32) for step in range(50)]
    fleet, rows = finished(fleet)
    for r, run in enumerate(runs):
        with torch.random.fork_rng():
            torch.manual_seed(int(rng.key(torch.tensor(r), "init module")))
            plain = own_models.Transformer(vocab_size=fleet.task.vocab_size, max_length=fleet.task.max_length, tied=tied)
        assert isinstance(run.optimizer, AdamW)
        optimizer = torch.optim.AdamW(plain.parameters(), lr=run.optimizer.lr, weight_decay=run.optimizer.wd)
        for step, batch in enumerate(batches):
            loss = F.cross_entropy(plain(batch.tokens[r])[:, -1], batch.targets[r, :, 0])
            assert rows[r, step, "batch/loss"] == pytest.approx(loss.item(), rel=1e-5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trained = dict(fleet.one(r).model.named_parameters())
        assert trained.keys() == {f"module.{name}" for name, _ in plain.named_parameters()}
        for name, p in plain.named_parameters():
            close(trained[f"module.{name}"], p.detach(), 1e-4)


def test_equals_our_own_model() -> None:
    """The embedding MLP in plain PyTorch, lifted, from the weights of shoal's: the same losses and evaluations over 50 steps."""
    model = MLP.model
    copy = own("MLP", num_inputs=3, embedding=8, hidden=[16, 12])
    runs = [with_seed(replace(MLP, steps=50), s) for s in range(4)]
    ours, theirs = Fleet.build(runs), Fleet.build([replace(run, model=copy) for run in runs])
    with torch.no_grad():
        for name, p in ours.parameters.items():
            theirs.parameters[f"module.{name}"].copy_(p if name.startswith("embedding") else p.mT)
    (_, expected), (_, got) = finished(ours), finished(theirs)
    assert model != copy and got.keys() == expected.keys()
    for key, value in got.items():
        assert value == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key


def test_each_run_begins_as_the_module_alone() -> None:
    """Whatever the fleet; torch's own generator is not touched."""
    before = torch.get_rng_state()
    fleet, alone = Fleet.build([with_seed(OWN, s) for s in (3, 0, 7)]), Fleet.build([with_seed(OWN, 7)])
    assert same(fleet.flat[2], alone.flat[0]) and not same(fleet.flat[1], alone.flat[0])
    validate(OWN)
    assert torch.get_rng_state().equal(before)


def test_compiles_whole() -> None:
    """One graph, no question asked by the host; values and gradients as without."""
    model = Fleet.build([with_seed(replace(OWN, model=own("Transformer", tied=True)), s) for s in range(3)])
    batch = model.task.batch(model.tables, model.order_key, torch.tensor(0), 8)
    torch.compiler.reset()
    compiled = torch.compile(cross_entropy, fullgraph=True, dynamic=False, backend="eager")
    got, expected = compiled(model.model, batch, None), cross_entropy(model.model, batch, None)
    close(got.loss, expected.loss, 1e-6)
    for a, b in zip(*(torch.autograd.grad(sums.loss.sum(), list(model.parameters.values())) for sums in (got, expected)), strict=True):
        close(a, b, 1e-5)


def test_nothing_stays_behind_or_asks_the_host() -> None:
    """On the meta device, where a tensor left on the CPU and a value asked for are errors: forward, objective and gradient."""
    for name in ("Transformer", "Answer", "ByAttention"):
        with torch.device("meta"):
            model: Any = Lifted(own(name), 13, 4, (3,)).to("meta")
            tokens, one = torch.zeros(3, 5, 4, dtype=torch.int64), torch.zeros(3, 5, 1, dtype=torch.int64)
        sums = cross_entropy(model, Batch(tokens, one, one.float(), at=slice(3, 4)), None)
        assert all(x.is_meta for x in (sums.loss, *torch.autograd.grad(sums.loss.sum(), list(model.parameters()))))


def test_bfloat16() -> None:
    """Buffers follow the weights; the losses stay near those of float32."""
    runs = [with_seed(replace(OWN, steps=10), s) for s in range(3)]
    (_, expected), (low, got) = finished(Fleet.build(runs)), finished(Fleet.build([replace(run, precision="bfloat16") for run in runs]))
    assert low.weights.dtype == torch.bfloat16
    assert all(value == pytest.approx(expected[key], rel=0.03) for key, value in got.items() if key[-1] == "batch/loss")
    logits, _ = low.model(torch.zeros(3, 1, 4, dtype=torch.int64))
    assert logits.dtype == torch.bfloat16


def test_buffers_are_shared() -> None:
    fleet = Fleet.build([with_seed(OWN, s) for s in range(3)])
    shapes = {name: tuple(buffer.shape) for name, buffer in fleet.model.named_buffers()}
    assert shapes == {"module.mask": (4, 4), "module.gain": ()}
    assert not any("mask" in name or "gain" in name for name in fleet.parameters)


def test_scalars_and_frames_survive_a_checkpoint(tmp_path: Path) -> None:
    """A parameter without dimensions, and one per run of a fleet of one."""
    runs = [with_seed(replace(OWN, model=own("Scaled"), steps=4), s) for s in range(3)]
    fleet, _ = finished(Fleet.build(runs))
    checkpoint.save(fleet, tmp_path / "checkpoint", {})
    again, _ = checkpoint.load(runs, tmp_path / "checkpoint", "cpu")
    assert same(again.flat, fleet.flat)
    for r, config in enumerate(runs):
        loaded, here = checkpoint.load_run(config, r, tmp_path / "checkpoint"), fleet.one(r)
        assert all(same(a.detach(), b.detach()) for a, b in zip(loaded.model.parameters(), here.model.parameters(), strict=True))


# --- what cannot become a fleet

ALL = {"task.tokens": "digits"}  # scores several positions
REFUSED: dict[str, list[tuple[Any, dict[str, Any], str]]] = {
    "values": [
        (own("Item"), {}, "(return x * x.sum().item()): the value of a tensor is asked for"),
        (own("Branch"), {}, "(if x.sum() > 0:): the value of a tensor is asked for"),
        (own("Numpy"), {}, "the value of a tensor is asked for (.item(), .tolist(), .numpy(), if, while)"),
        (own("Chosen"), {}, "the shape of a tensor depends on values, which differ by run; use torch.where"),
    ],
    "operations": [
        (own("Histogram"), {}, "aten::histc has no batching rule, so it cannot be run for many runs at once"),
        (own("Recurrent"), {}, "(return self.lstm(x)[0]): aten::lstm has no batching rule"),
        (own("InPlace"), {}, "(out[:, t] = x[:, t]): a tensor that all runs share is changed in place"),
    ],
    "chance": [
        (own("Dropped"), {}, "(return self.drop(x)): random numbers are drawn; set dropout to 0, or remove it"),
        (own("Noisy"), {}, "gives other logits when the same tokens come again"),
        (own("Unseeded"), {}, "parameter head.weight differs although the seed is the same"),
        (own("RandomBuffer"), {}, "buffer features is drawn at random, and runs share their buffers"),
    ],
    "state": [
        (own("Normed"), {}, "changes its buffer norm.running_mean, norm.running_var, norm.num_batches_tracked as it computes"),
        (own("Normed", track=False), {}, "the rows of a batch see each other, as in BatchNorm"),
        (own("Loose"), {}, "tensor scale would stay behind on the CPU; keep it with self.register_buffer"),
    ],
    "parameters": [
        (own("Empty"), {}, "has no parameters to train"),
        (own("Forgotten"), {}, "does not use its parameter unused.weight, unused.bias; remove it"),
        (own("Double"), {}, "parameter head.weight, head.bias is not float32"),
        (own("Frozen"), {}, "parameter embedding.weight is frozen (requires_grad False)"),
        (own("Lazy"), {}, "the size of head.weight, head.bias is not known until the first call"),
    ],
    "logits": [
        (own("Transposed"), {}, "gives [2, 13, 4] for tokens [2, 4]; it must give a tensor of logits [2, 4, 13] or [2, 13]"),
        (own("Pair"), {}, "gives a tuple for tokens [2, 4]; it must give a tensor of logits"),
        (own("Last"), ALL, "it must give a tensor of logits [2, 7, 12]; this task scores more than the last position"),
        (own("Argmax"), {}, "gives torch.int64; it must give a tensor of logits"),
        (own("Endless"), {}, "gives logits that are not finite"),
        (own("Narrow"), {}, "fails in own_models.py"),
    ],
    "future": [
        (own("Leaky"), ALL, "the logits at position 5 change with the tokens after it; mask the future"),
        (own("ByAttention"), ALL, "the logits at position 5 change with the tokens after it; mask the future"),
    ],
    "the rest of the run": [
        (own("Plain"), {"task": MEMORIZE.task, "evaluate": ["train"]}, "this task pads its sequences, and own_models:Plain cannot be told where"),
        (own("Plain"), {"optimizer": Muon()}, "muon is for hidden matrices, and which of a module's are hidden is not known; set optimizer.type to adamw"),
        (own("Upcast"), {"precision": "bfloat16"}, "make what it creates of its input's type (dtype=x.dtype), or set precision to float32"),
    ],
    "what it is": [
        (own("Function"), {}, "own_models:Function makes a Function; it must be a torch.nn.Module"),
        (own("NUMBER"), {}, "own_models has no class NUMBER"),
        (own("Missing"), {}, "own_models has no class Missing"),
        (own("Answer", widht=3), {}, "made from vocab_size, max_length, widht: TypeError: Answer.__init__() got an unexpected keyword argument 'widht'"),
        (own("Answer", width=-3), {}, "cannot be made from vocab_size, max_length, width"),
        (ModuleConfig(module="no_such_place.at:All"), {}, "there is no module 'no_such_place' to import from"),
        (ModuleConfig(module="nowhere/model.py:Net"), {}, "there is no file "),
        (ModuleConfig(module="__main__:Net"), {}, "Net was defined in a notebook or script that is not running now; put it into a file"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("model", "changes", "message"), [case for cases in REFUSED.values() for case in cases])
def test_refusals(model: ModuleConfig, changes: dict[str, Any], message: str) -> None:
    before = torch.get_rng_state()
    said = refused(replace(with_values(MODULAR, changes), model=model))
    assert message in said and "\n" not in said
    assert torch.get_rng_state().equal(before) and torch._C._functorch._is_vmap_fallback_enabled()  # type: ignore[attr-defined]


def test_accepted() -> None:
    """Causal or not where only the last position is scored; causal where several are; no dropout by its rate."""
    for name in ("Transformer", "Answer", "Bag", "ByAttention", "Leaky", "Last", "Plain", "Scaled", "Upcast"):
        validate(replace(MODULAR, model=own(name)))
    validate(replace(MODULAR, model=own("Dropped", p=0.0)))
    for name in ("Transformer", "Plain"):
        validate(replace(with_values(MODULAR, ALL), model=own(name)))
        validate(replace(MODULAR, model=own(name), precision="bfloat16"))
        validate(replace(MODULAR, model=own(name), task=replace(MEMORIZE.task, strings=("abc", "bca")), evaluate=("train",)))


def test_leaks_are_found_at_scored_positions_only() -> None:
    """A module that looks two tokens ahead, in tasks that score single positions: near the end nothing is left to see."""
    config = own("Ahead", by=2)

    def batch(at: Any, count: int = 1) -> Batch:
        return Batch(torch.zeros(1, 4, 8, dtype=torch.int64), torch.zeros(1, 4, count, dtype=torch.int64), torch.ones(1, 4, count), at=at)

    for at in (slice(7, 8), slice(6, 8)):
        trial.try_out(config, [batch(at)], 5, 8)
    for at in (slice(5, 8), slice(2, 3), None, torch.full((1, 4, 1), 3)):
        with pytest.raises(ConfigError, match="change with the tokens after it"):
            trial.try_out(config, [batch(slice(7, 8)), batch(at)], 5, 8)


def test_padding_is_refused_by_the_model_too() -> None:
    fleet = Fleet.build([OWN])
    tokens = torch.zeros(1, 2, 4, dtype=torch.int64)
    for context in (Context(mask=tokens == 0), Context(positions=tokens)):
        with pytest.raises(ConfigError, match="cannot be told about padding"):
            fleet.model(tokens, context)


def test_what_only_a_compiler_objects_to() -> None:
    config = own("Broken")
    validate(replace(MODULAR, model=config))
    fleet = Fleet.build([replace(MODULAR, model=config)])
    batch = fleet.task.batch(fleet.tables, fleet.order_key, torch.tensor(0), 8)
    torch.compiler.reset()
    with pytest.raises(RuntimeError) as caught:
        torch.compile(cross_entropy, fullgraph=True, backend="eager")(fleet.model, batch, None)
    said = str(failed(config, caught.value))
    assert said.startswith("model: own_models:Broken cannot be compiled: Unsupported") and said.endswith(
        'use --compile off (shoal run), or compile="off" (shoal.run)'
    )
    assert "\n" not in said


# --- where the code is

FILE = """
from dataclasses import dataclass
from torch import nn
from near import WIDTH

@dataclass
class Sizes:
    width: int = WIDTH

class Net(nn.Module):
    def __init__(self, vocab_size, max_length, layers=1):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, Sizes().width)
        self.head = nn.Linear(Sizes().width, vocab_size)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory to start from, with a module in ``mine/net.py``, and what that imports beside it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "net.py").write_text(FILE)
    (tmp_path / "mine" / "near.py").write_text("WIDTH = 6\n")
    monkeypatch.chdir(tmp_path)
    known, path = set(sys.modules), list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_a_file_is_found_and_read_again_when_a_study_begins(place: Path) -> None:
    """Not before: a fleet that loses runs is assembled again, with the code it began with."""
    net = locate("mine/net.py:Net")
    assert locate("mine/net.py:Net") is net and locate(f"{place}/mine/net.py:Net", again=True) is net
    (place / "mine" / "net.py").write_text(FILE.replace("layers=1", "layers=1, more=2"))
    assert locate("mine/net.py:Net") is net
    validate(replace(MODULAR, model=ModuleConfig(module="mine/net.py:Net")))
    assert locate("mine/net.py:Net") is not net
    (place / "top.py").write_text("from torch import nn\nclass Net(nn.Module): ...\n")
    assert locate("top:Net").__name__ == "Net", "a module in the directory shoal is started in"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "net.py cannot be imported: SyntaxError: invalid syntax"),
        ("import no_such_thing\n", "net.py cannot be imported in net.py, line 1 (import no_such_thing): ModuleNotFoundError: No module named 'no_such_thing'"),
        ("1 / 0\n", "net.py cannot be imported in net.py, line 1 (1 / 0): ZeroDivisionError"),
        ("raise SystemExit(3)\n", "net.py cannot be imported in net.py, line 1"),
        ("x = 1\n", "net.py has no class Net"),
    ],
)
def test_files_that_cannot_be_read(text: str, message: str, place: Path) -> None:
    (place / "mine" / "net.py").write_text(text)
    assert message in refused(replace(MODULAR, model=ModuleConfig(module="mine/net.py:Net")))


def test_a_class_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: __main__ has it."""
    monkeypatch.setattr(sys.modules["__main__"], "Net", own_models.Bag, raising=False)
    config = replace(MODULAR, model=ModuleConfig(module="__main__:Net"), steps=3)
    validate(config)
    fleet, _ = finished(Fleet.build([config]))
    assert isinstance(construct(fleet.one(0).model.config, 5, 4, 0), own_models.Bag)  # type: ignore[arg-type]


# --- from a study or a file to a trained run


def test_a_study_of_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, loaded, asked; without its code, or with other code, refused by name; a bad module leaves nothing behind."""
    run = shoal.RunConfig(
        task=ModularConfig(p=7, val_fraction=0.3), model=shoal.ModuleConfig(module="mine/net.py:Net"), steps=6, batch_size=8, evaluate_every=3, log_every=1
    )
    study = shoal.Study(name="mine", question="Does it train?", main_metric="val/loss", wanted=shoal.grid(run, {"optimizer.lr": [1e-3, 1e-2]}, seeds=2))
    result = shoal.run(study, place / "out", device="cpu", progress=False)
    assert len(result.rows) == 4
    loaded = result.load()
    assert isinstance(loaded.model, Lifted) and shoal.evaluate(loaded, "val").keys() >= {"loss", "accuracy"}
    assert shoal.generate(loaded, "3 / 4 =").strip() in {*map(str, range(7)), "=", "/"}

    module._files.clear()  # as another process begins
    code = (place / "mine" / "net.py").read_text()
    (place / "mine" / "net.py").write_text(code.replace("Sizes().width", "9"))
    with pytest.raises(ConfigError, match=r"does not fit the model as it is now \(module.embedding.weight, module.head.weight differ\)"):
        result.load()
    (place / "mine" / "net.py").unlink()
    module._files.clear()
    with pytest.raises(ConfigError, match=r"there is no file .*net\.py, and a module's code is read whenever"):
        result.load()
    with pytest.raises(ConfigError, match="there is no file"):
        shoal.run(study, place / "other", device="cpu", progress=False)
    assert not (place / "other").exists()
    assert cli.main(["generate", str(place / "out"), "--prompt", "3 / 4 ="]) == 2
    assert capsys.readouterr().err.rpartition("shoal: ")[2].startswith("model: there is no file")


def test_every_optimizer_and_precision_of_a_study_is_tried(tmp_path: Path) -> None:
    runs = [replace(MODULAR, model=own("Upcast"), steps=2), replace(MODULAR, model=own("Upcast"), steps=2, precision="bfloat16")]
    for bad, message in ((runs[1], "set precision to float32"), (replace(runs[0], optimizer=Muon()), "muon is for hidden matrices")):
        for order in ([runs[0], bad], [bad, runs[0]]):
            study = shoal.Study(name="mine", question="?", main_metric="val/loss", wanted=lambda rows, order=order: order)
            with pytest.raises(ConfigError, match=message):
                shoal.run(study, tmp_path / "out", device="cpu", progress=False)
    assert not (tmp_path / "out").exists()


def test_what_fails_in_training_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a trial on the CPU cannot see, as on a GPU a tensor left on the CPU."""
    monkeypatch.setattr(own_models.Plain, "mix", lambda self, x: x)
    monkeypatch.setattr(driver, "validate", lambda run, device: monkeypatch.setattr(own_models.Plain, "mix", lambda self, x: x @ torch.ones(3)))
    with pytest.raises(ConfigError, match=r"model: own_models:Plain fails in .*(line \d+).*; make what it creates on its input's device"):
        driver.train(replace(MODULAR, model=own("Plain"), steps=2), tmp_path / "out", device="cpu")


def test_arguments_in_a_file_and_on_the_command_line(place: Path) -> None:
    """A mapping, or its JSON."""
    for text in ("{layers: 2}", "'{\"layers\": 2}'"):
        (place / "run.yaml").write_text(
            f"model:\n  type: module\n  module: mine/net.py:Net\n  arguments: {text}\ntask: {{type: modular, p: 7, val_fraction: 0.3}}\n"
        )
        assert load_run("run.yaml").model == ModuleConfig(module="mine/net.py:Net", arguments='{"layers": 2}')
    line = ["train", "run.yaml", "--device", "cpu", "--steps", "2", "--batch_size", "8", "--model.arguments", "{layers: 3}"]
    assert cli.main(line) == 0
    assert cli.main([*line[:-1], "{depth: 3}", "--out", "bad"]) == 2 and not Path("bad").exists()


# --- the trial itself


def test_fused_attention_is_not_needed() -> None:
    """Under vmap the attention of PyTorch's own layers is computed without fused kernels; the same numbers."""
    config = own("ByAttention")
    model, plain = Lifted(config, 7, 5, (1,)), construct(config, 7, 5, seed=4)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            model.get_parameter(f"module.{name}").copy_(p[None])
    tokens = torch.randint(7, (1, 3, 5), generator=torch.Generator().manual_seed(1))
    logits, cache = model(tokens)
    assert cache is None
    close(logits[0].detach(), plain(tokens[0]).detach(), 1e-5)


def test_flops_count_one_run() -> None:
    """Linear in the rows, as counted by hand for two layers; attention is counted, which on a CPU a fused kernel hides."""
    model: Any = Lifted(own("Answer"), 11, 4)
    assert model.flops(5, 4, 1) == 5 * 2 * (4 * 8 * 16 + 16 * 11)
    width, time, rows = 8, 6, 5
    attention, feed_forward = 2 * time * width * 4 * width + 4 * time * time * width, 2 * time * width * 16 * 2
    model = Lifted(own("ByAttention"), 11, time)
    assert model.flops(rows, time, 1) == rows * (attention + feed_forward + 2 * time * width * 11)


def test_names_of_any_kind() -> None:
    """A name may be a pattern, and one may stand inside another."""

    class Odd(nn.Module):
        def __init__(self, vocab_size: int, max_length: int) -> None:
            super().__init__()
            self.module = nn.Embedding(vocab_size, 3)
            self.weight = nn.ModuleDict({"*": nn.Linear(3, 3), "a[0]": nn.Linear(3, vocab_size)})

        def forward(self, tokens: Tensor) -> Tensor:
            return self.weight["a[0]"](self.weight["*"](self.module(tokens)))

    own_models.Odd = Odd  # type: ignore[attr-defined]
    try:
        run = replace(MODULAR, model=own("Odd"), steps=2)
        validate(run)
        assert facts(Fleet.build([run]).advance(2))
    finally:
        del own_models.Odd  # type: ignore[attr-defined]

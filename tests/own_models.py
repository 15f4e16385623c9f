"""Modules as a user would write them, for one run, in plain PyTorch; and modules that cannot become a fleet."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Transformer(nn.Module):
    """Causal, pre-norm, learned positions; logits at every position."""

    def __init__(self, vocab_size: int, max_length: int, width: int = 8, num_layers: int = 1, num_heads: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.embedding = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(torch.randn(max_length, width) * 0.1)
        self.blocks = nn.ModuleList()
        for _ in range(num_layers):
            parts = {
                "qkv": nn.Linear(width, 3 * width, bias=False),
                "out": nn.Linear(width, width),
                "up": nn.Linear(width, 2 * width),
                "down": nn.Linear(2 * width, width),
            }
            self.blocks.append(nn.ModuleDict(parts | {"norm": nn.LayerNorm(width), "norm2": nn.LayerNorm(width)}))
        self.head = nn.Linear(width, vocab_size, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(max_length, max_length, dtype=torch.bool).tril())
        self.register_buffer("gain", torch.full((), 0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        batch, time = tokens.shape
        x = self.embedding(tokens) + self.position[:time] * self.gain
        for block in self.blocks:
            q, k, v = (y.view(batch, time, self.num_heads, -1).transpose(1, 2) for y in block["qkv"](block["norm"](x)).chunk(3, dim=-1))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:time, :time])
            x = x + block["out"](y.transpose(1, 2).reshape(x.shape))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        return self.head(x)


class Answer(nn.Module):
    """Reads all tokens at once; logits of the last position alone."""

    def __init__(self, vocab_size: int, max_length: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.first = nn.Linear(max_length * width, 16)
        self.second = nn.Linear(16, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(self.embedding(tokens).flatten(1))))


class MLP(nn.Module):
    """What shoal's EmbeddingMLP is, in plain PyTorch."""

    def __init__(self, vocab_size: int, max_length: int, num_inputs: int, embedding: int, hidden: list[int]) -> None:
        super().__init__()
        self.num_inputs = num_inputs
        self.embedding = nn.Embedding(vocab_size, embedding)
        widths = [num_inputs * embedding, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))
        self.head = nn.Linear(widths[-1], vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens[:, : self.num_inputs]).flatten(1)
        for layer in self.hidden:
            x = layer(x).relu()
        return self.head(x)


class Bag(nn.Module):
    """The tokens in no order, as many as there are; logits of the last position alone."""

    def __init__(self, vocab_size: int, max_length: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)).mean(1))


class ByAttention(nn.Module):
    """PyTorch's own encoder layer, in which every token sees every other: good where only the last position is scored."""

    def __init__(self, vocab_size: int, max_length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)))


class Scaled(nn.Module):
    """A parameter without dimensions."""

    def __init__(self, vocab_size: int, max_length: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocab_size, vocab_size))
        self.gain = nn.Parameter(torch.rand(()))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens] * self.gain


class Ahead(nn.Module):
    """Sees the token ``by`` places after each position, and nothing between."""

    def __init__(self, vocab_size: int, max_length: int, by: int) -> None:
        super().__init__()
        self.by = by
        self.embedding = nn.Embedding(vocab_size, 8)
        self.head = nn.Linear(8, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + F.pad(x, (0, 0, 0, self.by))[:, self.by :])


# --- refused: a small causal module, and one thing wrong with it


class Plain(nn.Module):
    def __init__(self, vocab_size: int, max_length: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, 8)
        self.head = nn.Linear(8, vocab_size)

    def mix(self, x: Tensor) -> Tensor:
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.embedding(tokens)))


class Item(Plain):
    def mix(self, x: Tensor) -> Tensor:
        return x * x.sum().item()


class Branch(Plain):
    def mix(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Numpy(Plain):
    def mix(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(np.tanh(x.detach().numpy()))


class Histogram(Plain):
    def mix(self, x: Tensor) -> Tensor:
        return x + torch.histc(x.detach(), 4)[0]


class Recurrent(Plain):
    def __init__(self, vocab_size: int, max_length: int) -> None:
        super().__init__(vocab_size, max_length)
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def mix(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Dropped(Plain):
    def __init__(self, vocab_size: int, max_length: int, p: float = 0.1) -> None:
        super().__init__(vocab_size, max_length)
        self.drop = nn.Dropout(p)

    def mix(self, x: Tensor) -> Tensor:
        return self.drop(x)


class Noisy(Plain):
    def mix(self, x: Tensor) -> Tensor:
        return x + float(np.random.rand())


class InPlace(Plain):
    def mix(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape)
        for t in range(x.shape[1]):
            out[:, t] = x[:, t]
        return out


class Chosen(Plain):
    def mix(self, x: Tensor) -> Tensor:
        return x + x[x > 0].mean()


class Normed(Plain):
    def __init__(self, vocab_size: int, max_length: int, track: bool = True) -> None:
        super().__init__(vocab_size, max_length)
        self.norm = nn.BatchNorm1d(8, track_running_stats=track)

    def mix(self, x: Tensor) -> Tensor:
        return self.norm(x.mT).mT


class Leaky(Plain):
    """Through a projection that begins at zero, so that its first logits do not show it."""

    def __init__(self, vocab_size: int, max_length: int) -> None:
        super().__init__(vocab_size, max_length)
        self.out = nn.Linear(8, 8)
        nn.init.zeros_(self.out.weight)

    def mix(self, x: Tensor) -> Tensor:
        return x + self.out(x.mean(1, keepdim=True))


class Transposed(Plain):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).mT


class Pair(Plain):
    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(tokens), None


class Last(Plain):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)[:, -1]


class Narrow(Plain):
    def mix(self, x: Tensor) -> Tensor:
        return x[..., :5]


class Argmax(Plain):
    def forward(self, tokens: Tensor) -> Tensor:
        return F.one_hot(super().forward(tokens).argmax(-1), self.vocab_size)


class Endless(Plain):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * math.inf


class Forgotten(Plain):
    def __init__(self, vocab_size: int, max_length: int) -> None:
        super().__init__(vocab_size, max_length)
        self.unused = nn.Linear(8, 8)


class Double(Plain):
    def __init__(self, vocab_size: int, max_length: int) -> None:
        super().__init__(vocab_size, max_length)
        self.head = nn.Linear(8, vocab_size, dtype=torch.float64)

    def mix(self, x: Tensor) -> Tensor:
        return x.double()


class Frozen(Plain):
    def __init__(self, vocab_size: int, max_length: int) -> None:
        super().__init__(vocab_size, max_length)
        self.embedding.weight.requires_grad_(False)


class Lazy(Plain):
    def __init__(self, vocab_size: int, max_length: int) -> None:
        super().__init__(vocab_size, max_length)
        self.head = nn.LazyLinear(vocab_size)


class Loose(Plain):
    def __init__(self, vocab_size: int, max_length: int) -> None:
        super().__init__(vocab_size, max_length)
        self.scale = torch.ones(8)

    def mix(self, x: Tensor) -> Tensor:
        return x * self.scale


class RandomBuffer(Plain):
    def __init__(self, vocab_size: int, max_length: int) -> None:
        super().__init__(vocab_size, max_length)
        self.register_buffer("features", torch.randn(8))

    def mix(self, x: Tensor) -> Tensor:
        return x * self.features


class Unseeded(Plain):
    def __init__(self, vocab_size: int, max_length: int) -> None:
        super().__init__(vocab_size, max_length)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(np.random.randn(vocab_size, 8)))


class Empty(nn.Module):
    def __init__(self, vocab_size: int, max_length: int) -> None:
        super().__init__()


class Function:
    def __init__(self, vocab_size: int, max_length: int) -> None: ...


class Upcast(Plain):
    """Right in float32; in bfloat16 what it makes is still float32."""

    def mix(self, x: Tensor) -> Tensor:
        return x + torch.linspace(0, 1, x.shape[1])[:, None]


NUMBER = 3


class Broken(Plain):
    """Good in a fleet, but no graph for a compiler."""

    def mix(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

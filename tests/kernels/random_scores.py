"""Random score mods, drawn as source text, with captured tensors that want gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

EXTENT = 24  # queries and keys
HEADS = 3


class RandomScore(NamedTuple):
    """A score mod's source and what it captures; `learned` are the tensors that want gradients."""

    text: str
    captured: dict[str, Tensor]
    learned: tuple[str, ...]

    def function(self, device: torch.device) -> Callable[..., Tensor]:
        """The mod over copies of its tensors."""
        copies = {name: x.detach().clone().to(device) for name, x in self.captured.items()}
        for name in self.learned:
            copies[name].requires_grad_()
        names = {"torch": torch, "F": torch.nn.functional, **copies}
        score_mod: Callable[..., Tensor] = eval(
            f"lambda s, b, h, q_idx, kv_idx: {self.text}", names
        )
        return score_mod


class ScoreText:
    """Draws expressions whose values stay moderate, so that an error in one shows."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw = draw
        self.captured: dict[str, Tensor] = {}
        self.learned: list[str] = []

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def capture(self, *shape: int, integers: bool = False) -> str:
        name = f"t{len(self.captured)}"
        generator = torch.Generator().manual_seed(self.draw(st.integers(0, 999)))
        if integers:
            dtype = self.pick(torch.int64, torch.int32, torch.int16, torch.uint8)
            self.captured[name] = torch.randint(0, 9, shape, generator=generator).to(dtype)
            return name
        table = torch.randn(shape, generator=generator)
        if len(shape) > 1 and self.pick(False, True):  # not contiguous
            table = torch.randn(*shape, 2, generator=generator)[..., 1]
        self.captured[name] = table
        if self.pick(False, False, True):
            self.captured[name] = table.to(torch.bfloat16)
            return f"{name}.float()"  # or the arithmetic would be in bf16
        self.learned.append(name)
        return name

    def place(self) -> str:
        return str(
            self.pick(
                "q_idx", "kv_idx", "q_idx // 2", "(kv_idx - q_idx) % 7", "(q_idx * 3) % 11",
                "torch.clamp(q_idx - kv_idx, -5, 5) + 5", "-1 - q_idx // 3",
                f"{self.capture(EXTENT, integers=True)}[kv_idx].long()",
            )
        )  # fmt: skip

    def read(self) -> str:
        kind = self.pick("1d", "1d", "2d", "nested", "0d", "row", "square")
        if kind == "0d":
            return self.capture()
        if kind == "1d":
            return f"{self.capture(EXTENT)}[{self.place()}]"
        if kind == "square":
            return f"{self.capture(EXTENT, EXTENT)}[q_idx, kv_idx]"
        if kind == "row":
            left, right = self.capture(EXTENT, 4), self.capture(EXTENT, 4)
            reduce = self.pick("({} * {}).sum(-1)", "torch.dot({}, {})", "({} - {}).amax(-1)")
            return str(reduce.format(f"{left}[q_idx]", f"{right}[kv_idx]"))
        name = self.capture(HEADS, EXTENT)
        place = self.place()
        return f"{name}[h][{place}]" if kind == "nested" else f"{name}[h, {place}]"

    def number(self) -> str:
        return str(self.pick(0.5, -1.5, 2, 0.1, 3.0, -1))

    def condition(self) -> str:
        return str(
            self.pick(
                "q_idx >= kv_idx", "(q_idx - kv_idx) % 3 == 0", "s > 0.2", "kv_idx < 11",
                "(q_idx > 4) & ~(kv_idx % 2 == 1)", "h == 1",
            )
        )  # fmt: skip

    def real(self, depth: int) -> str:
        if depth <= 0:
            return str(self.pick("s", "s", self.read(), "(q_idx - kv_idx) * 0.1", "h * 0.5"))
        x = f"({self.real(depth - 1)})"
        kind = self.pick(*"ccbbuffdwm")
        if kind == "c":
            return f"{x} {self.pick('+', '-', '*', '/')} {self.number()}"
        if kind == "b":
            return f"{x} {self.pick('+', '-', '*')} ({self.real(depth - 1)})"
        if kind == "u":
            return str(self.pick("-{}", "{}.abs()", "{} ** 2", "{} ** 3", "{} * {}").format(x, x))
        if kind == "f":
            function = self.pick(
                "torch.tanh({})", "torch.sigmoid({})", "torch.sin({})", "torch.cos({})",
                "torch.exp(-{}.abs())", "torch.exp2(-{}.abs())", "torch.log(1.5 + {}.abs())",
                "torch.log2(1.5 + {}.abs())", "torch.sqrt(0.5 + {}.abs())",
                "torch.rsqrt(0.5 + {}.abs())", "torch.erf({})", "F.softplus({})", "F.gelu({})",
                "F.silu({})", "F.relu({})", "F.gelu({}, approximate='tanh')",
                "torch.log1p({}.abs())", "torch.expm1(-{}.abs())",
                "F.elu({})", "F.leaky_relu({})", "F.logsigmoid({})",
                "torch.pow(1.2 + {}.abs(), 1.7)", "F.mish({})", "torch.square({})",
            )  # fmt: skip
            return str(function.format(x))
        if kind == "d":
            return f"{x} / (1.5 + ({self.real(depth - 2)}).abs())"
        if kind == "w":
            return f"torch.where({self.condition()}, {x}, {self.pick(self.number(), 's')})"
        other = f"({self.real(depth - 1)})"
        return str(
            self.pick(
                f"torch.minimum({x}, {other})",
                f"torch.maximum({x}, {other})",
                f"torch.clamp({x}, -1.5, 2.0)",
                f"{x}.masked_fill({self.condition()}, 0.25)",
            )
        )


@st.composite
def random_scores(draw: Callable[[st.SearchStrategy[Any]], Any]) -> RandomScore:
    source = ScoreText(draw)
    text = f"s + torch.tanh({source.real(draw(st.integers(1, 4)))})"
    return RandomScore(text, source.captured, tuple(source.learned))

"""A wrapped model made by hand: one linear layer with its exact response, to test the steps without a compiler.

It has the part of `SelfTuningModule` that `stn_fx.bilevel` uses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from stn_fx.errors import StnError
from stn_fx.hparams import HyperparameterSpace, parse_hparams, resolve
from stn_fx.rules.structure import Exact
from stn_fx.transform import LinearizedPass


class FakeSelfTuningModule(nn.Module):
    """f(x; W + DeltaW) = (W + DeltaW) x, with DeltaW_i = G delta_i, G (O, I, H), from zero."""

    def __init__(self, model: nn.Linear, hparams: str = "weight_decay", captured: bool = True) -> None:
        super().__init__()
        self.model = model
        self.selections = parse_hparams(hparams)
        self._generator = torch.Generator().manual_seed(0)
        self.calls: list[tuple[str, bool]] = []
        self._compiled: SimpleNamespace | None = None
        if captured:
            self.compile_for(())

    @property
    def compiled(self) -> SimpleNamespace:
        if self._compiled is None:
            raise StnError("not captured yet")
        return self._compiled

    def compile_for(self, inputs: tuple[Tensor, ...]) -> None:
        resolved = [each for selection in self.selections for each in resolve(selection)]
        weight = self.model.weight
        self.hparams = HyperparameterSpace(resolved, dtype=weight.dtype)
        self.exact = Exact(weight.shape, len(resolved)).to(weight.dtype)
        captured, plan = SimpleNamespace(batch_axes=(0,)), SimpleNamespace(sites=())
        self._compiled = SimpleNamespace(captured=captured, plan=plan, examples_lead=True, takes_batch_statistics=False)

    @property
    def G(self) -> nn.Parameter:
        return self.exact.G

    def generator(self, device: str | None = None) -> torch.Generator:
        return self._generator

    @contextmanager
    def drawing_from(self, generators: dict[str, torch.Generator]) -> Iterator[None]:
        own, self._generator = self._generator, generators["cpu"]
        yield
        self._generator = own

    @contextmanager
    def in_groups(self, size: int | None, before: int = 0) -> Iterator[None]:
        yield  # there are no batch norms

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        yield []  # no term of the loss looks at activations here

    def base_parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def response_parameters(self) -> list[nn.Parameter]:
        return [self.G]

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(("base" if self.training else "evaluation", self.training))
        return self.model(x)

    def linearize(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append(("linearize", self.training))
        with torch.no_grad():
            primal = self.model(x)
        return primal, torch.einsum("boi,bi->bo", self._change(raw), x)

    def linearize_with_activations(self, x: Tensor, raw: Tensor) -> LinearizedPass:
        return LinearizedPass(*self.linearize(x, raw), [], [])

    def respond_with_statistics(self, x: Tensor, raw: Tensor) -> Tensor:
        """There are none."""
        return self.respond(x, raw)

    def respond(self, x: Tensor, raw: Tensor) -> Tensor:
        self.calls.append(("respond", self.training))
        return self.model(x) + torch.einsum("boi,bi->bo", self._change(raw), x)

    def penalized(self, names: list[str] | None = None) -> dict[str, nn.Parameter]:
        return {"weight": self.model.weight}

    def responses_of_parameters(self, names: object) -> list[tuple[str, Exact]]:
        return [("weight", self.exact)]

    def _change(self, raw_BH: Tensor) -> Tensor:
        return torch.einsum("oih,bh->boi", self.G, raw_BH - self.hparams.raw.detach())


def regression_batches(
    seed: int, examples: int, features: int = 8, outputs: int = 1, noise: float = 0.5, batch_size: int = 32
) -> list[tuple[Tensor, Tensor]]:
    """Batches (x, y) of a linear problem in float64; the true weights are the same for every seed."""
    truth = torch.randn(outputs, features, generator=torch.Generator().manual_seed(123), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, features, generator=generator, dtype=torch.float64)
    y = x @ truth.t() + noise * torch.randn(examples, outputs, generator=generator, dtype=torch.float64)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def classification_batches(
    seed: int, examples: int = 64, features: int = 8, classes: int = 3, batch_size: int = 16
) -> list[tuple[Tensor, Tensor]]:
    """Batches (x, class index) of a nearly linear problem in float64."""
    scores = [
        (x, y) for x, y in regression_batches(seed, examples, features, classes, noise=0.5, batch_size=batch_size)
    ]
    return [(x, y.argmax(1)) for x, y in scores]

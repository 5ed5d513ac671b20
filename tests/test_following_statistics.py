"""The response pass as outer steps differentiate it: its running statistics follow the weights.

The judge is the user's own model in evaluation mode with the weights that answer hyperparameters, while torch's norms
are patched to move their running statistics as those of their input move; derivatives by central differences.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from oracles import randomised, spread
from torch import Tensor, nn
from torch.func import functional_call

import stn_fx
from stn_fx.bilevel import STN, DeltaSTN, PerExample

B = 6
IMAGES = functools.partial(torch.randn, B, 3, 16, 16, dtype=torch.float64)


class Dense(nn.Module):
    """Batch norms over (B, C) and over (B, C, T), one of them with a cumulative average."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm1 = nn.Linear(12, 10), nn.BatchNorm1d(10)
        self.conv, self.norm2 = nn.Conv1d(2, 3, 3, bias=False), nn.BatchNorm1d(3, momentum=None)
        self.fc2 = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm1(self.fc1(x))).reshape(-1, 2, 5)
        return self.fc2(torch.tanh(self.norm2(self.conv(x))).flatten(1))  # type: ignore[no-any-return]


class WithInstanceNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=5), IMAGES),
    "timm test_resnet": (lambda: timm.create_model("test_resnet", num_classes=5), IMAGES),
    "timm test_efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=5), IMAGES),
    "dense": (Dense, lambda: torch.randn(B, 12, dtype=torch.float64)),
    "instance norm": (WithInstanceNorm, IMAGES),
}


class MovingStatistics:
    """Stands in for torch's norms; their statistics move as those of their input have since the first pass."""

    def __init__(self) -> None:
        self.origins: list[tuple[Tensor, Tensor]] = []
        self.position = 0

    @contextmanager
    def acting(self) -> Iterator[None]:
        self.position = 0
        with mock.patch.object(F, "batch_norm", self.batch_norm), mock.patch.object(F, "instance_norm", self.instances):
            yield
        assert self.position == len(self.origins) > 0

    def batch_norm(
        self, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, training: bool, _: float,
        eps: float,
    ) -> Tensor:  # fmt: skip
        assert not training
        axes = [0, *range(2, x.ndim)]
        return self._norm(x, x.mean(axes), x.var(axes, correction=0), mean, variance, weight, bias, eps)

    def instances(
        self, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, use_input: bool, _: float,
        eps: float,
    ) -> Tensor:  # fmt: skip
        assert not use_input
        axes = list(range(2, x.ndim))
        return self._norm(x, x.mean(axes).mean(0), x.var(axes, correction=0).mean(0), mean, variance, weight, bias, eps)

    def _norm(self, x: Tensor, *rest: Tensor | float) -> Tensor:
        own_mean, own_variance, mean, variance, weight, bias, eps = rest
        if self.position == len(self.origins):
            self.origins.append((own_mean, own_variance))
        mean_then, variance_then = self.origins[self.position]
        self.position += 1
        mean = mean + own_mean - mean_then
        variance = variance * (1 + (own_variance - variance_then) / (variance_then + eps))
        mean, variance, weight, bias = (v.reshape(-1, *[1] * (x.ndim - 2)) for v in (mean, variance, weight, bias))
        return (x - mean) / (variance + eps).sqrt() * weight + bias


def wrapped(name: str, hparams: str = "weight_decay,label_smoothing") -> tuple[stn_fx.SelfTuningModule, Tensor]:
    """A model with running statistics, and a response that is not zero; a batch."""
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model = randomised(build())
    torch.manual_seed(1)
    x = inputs()
    stn = stn_fx.transform(model, hparams, (x,), seed=0)
    spread(stn)
    return stn.eval(), x


def loss_of(output: Tensor) -> Tensor:
    return (output * torch.arange(output.numel(), dtype=output.dtype).cos().reshape(output.shape)).sum()


@pytest.mark.parametrize("name", MODELS)
def test_the_hypergradient_is_that_of_statistics_that_move_with_the_weights(name: str) -> None:
    stn, x = wrapped(name)
    centre = stn.hparams.raw.detach().clone()
    (ours,) = torch.autograd.grad(loss_of(stn.respond_with_statistics(x)), stn.hparams.raw)
    statistics = MovingStatistics()

    def judged(raw: Tensor) -> float:
        changes = stn.weight_response(raw - centre)
        weights = {name: w + changes.get(name, 0) for name, w in stn.model.named_parameters()}
        with torch.no_grad(), statistics.acting():
            return loss_of(functional_call(stn.model, weights, x)).item()

    assert judged(centre) == pytest.approx(loss_of(stn.respond(x)).item(), rel=1e-9)
    for h, step in enumerate(1e-6 * torch.eye(len(centre), dtype=torch.float64)):
        difference = (judged(centre + step) - judged(centre - step)) / 2e-6
        assert ours[h].item() == pytest.approx(difference, rel=1e-5, abs=1e-6 * ours.norm().item())
    (fixed,) = torch.autograd.grad(loss_of(stn.respond(x)), stn.hparams.raw)
    assert (fixed - ours).norm() > 1e-2 * ours.norm(), "the models are to tell the two apart"


@pytest.mark.parametrize("name", MODELS)
def test_the_value_is_that_of_the_response_pass(name: str) -> None:
    stn, x = wrapped(name)
    raw_BH = stn.hparams.raw.detach() + torch.randn(len(x), 2, dtype=torch.float64)
    torch.testing.assert_close(stn.respond_with_statistics(x, raw=raw_BH), stn.respond(x, raw=raw_BH))


def test_rows_that_are_scaled_before_a_batch_norm_do_not_move_the_outer_step() -> None:
    """Statistics of the batch itself, and a response that scales: the network does not change, nor may the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=1.0, affine=False, eps=1e-12),
                          nn.Tanh(), nn.Flatten(), nn.Linear(784, 3)).double().requires_grad_(False)  # fmt: skip
    model[0].requires_grad_(True)
    x = IMAGES()
    model.train()(x)
    # The running variance is the unbiased one, 1176 / 1175 of that of the batch.
    model[1].running_var *= (6 * 14 * 14 - 1) / (6 * 14 * 14)
    stn = stn_fx.transform(model, "weight_decay", (x,), seed=0).eval()
    with torch.no_grad():
        response = stn.responses()["0.weight"]
        response.U.copy_(model[0].weight)
        response.V.fill_(1.0)
    gradients = [
        torch.autograd.grad(loss_of(respond(x)), stn.hparams.raw)[0].norm().item()
        for respond in (stn.respond_with_statistics, stn.respond)
    ]
    assert gradients[0] < 1e-8 * gradients[1]


def test_statistics_that_training_leaves_alone_stay() -> None:
    """A batch norm that the user holds in evaluation mode, as in fine-tuning."""
    model = randomised(MODELS["torchvision resnet18"][0]()).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = IMAGES()
    stn = stn_fx.transform(model, "weight_decay", (x,), seed=0)
    spread(stn)
    ours, fixed = (
        torch.autograd.grad(loss_of(respond(x)), stn.hparams.raw)[0]
        for respond in (stn.respond_with_statistics, stn.respond)
    )
    assert torch.equal(ours, fixed)


@pytest.mark.parametrize("algorithm", [DeltaSTN, STN])
def test_outer_steps_use_them(algorithm: type[DeltaSTN] | type[STN]) -> None:
    stn, x = wrapped("timm test_resnet", "weight_decay")
    y = torch.arange(len(x)) % 5
    steps = algorithm(stn, hyper_optimizer=lambda raw: torch.optim.SGD(raw, lr=0.0))
    with mock.patch.object(PerExample, "outer", lambda self, space, rows, generator: space.raw.expand(len(x), -1)):
        steps.outer_step((x, y))
    expected = torch.autograd.grad(F.cross_entropy(stn.respond_with_statistics(x), y), stn.hparams.raw)[0]
    torch.testing.assert_close(stn.hparams.raw.grad, expected)


def test_buffers_stay_as_they_are() -> None:
    stn, x = wrapped("timm test_resnet")
    before = {name: buffer.clone() for name, buffer in stn.model.named_buffers()}
    loss_of(stn.respond_with_statistics(x)).backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in stn.model.named_buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_lower_precision_and_for_channels_that_do_not_vary(dtype: torch.dtype) -> None:
    """One example of one pixel has no variance at all."""
    stn, x = wrapped("dense")
    stn = stn.to(dtype)
    x = x.to(dtype)[:1].expand(2, -1)
    output = stn.respond_with_statistics(x)
    (gradient,) = torch.autograd.grad(loss_of(output), stn.hparams.raw)
    assert output.dtype == dtype
    assert gradient.isfinite().all()

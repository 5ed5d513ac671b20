"""Batch norms in the passes: what a change of weights does to a model it does with other statistics.

For the response pass as outer steps differentiate it, the judge is the user's own model in evaluation mode with the
weights that answer hyperparameters, while torch's norms are patched to move their running statistics as those of their
input move; for the linearized pass the same in training mode, group by group; derivatives by central differences. For
both together, a model that is trained again.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from oracles import randomised, spread
from retraining import Problem, cross_entropy, load, retrained, valid_loss
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

import stn_fx
from stn_fx.bilevel import STN, DeltaSTN, GlobalSampling, Linearized, PerBatch, PerExample, PerGroup, SharedForward
from stn_fx.bilevel.objective import as_objective
from stn_fx.errors import InputError
from stn_fx.rules.normalization import normalized_tangent

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


@pytest.mark.parametrize(("size", "before"), [(2, 0), (4, 3)])
@pytest.mark.parametrize("name", MODELS)
def test_a_group_has_the_hypergradient_that_it_would_have_alone(name: str, size: int, before: int) -> None:
    stn, x = wrapped(name)
    groups = [(before + i) // size for i in range(B)]
    raws_GH = stn.hparams.raw.detach() + 0.3 * torch.randn(groups[-1] + 1, 2, dtype=torch.float64)
    raw_BH = raws_GH[groups].requires_grad_()
    with stn.in_groups(size, before):
        output = stn.respond_with_statistics(x, raw=raw_BH)
    torch.testing.assert_close(output, stn.respond(x, raw=raw_BH))
    weights = torch.arange(output.numel(), dtype=output.dtype).cos().reshape(output.shape)
    (ours,) = torch.autograd.grad((output * weights).sum(), raw_BH)
    for group in set(groups):
        rows = slice(groups.index(group), B - groups[::-1].index(group))
        own_BH = raw_BH[rows].detach().requires_grad_()
        alone = stn.respond_with_statistics(x[rows], raw=own_BH)
        (expected,) = torch.autograd.grad((alone * weights[rows]).sum(), own_BH)
        torch.testing.assert_close(ours[rows], expected, rtol=1e-6, atol=1e-9)


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


@pytest.mark.filterwarnings("ignore:The model has batch norms")
@pytest.mark.parametrize("algorithm", [DeltaSTN, STN])
def test_outer_steps_use_them(algorithm: type[DeltaSTN] | type[STN]) -> None:
    stn, x = wrapped("timm test_resnet", "weight_decay")
    y = torch.arange(len(x)) % 5
    steps = algorithm(stn, hyper_optimizer=lambda raw: torch.optim.SGD(raw, lr=0.0))
    with mock.patch.object(
        type(steps.sampling), "outer", lambda self, space, rows, generator: space.raw.expand(len(x), -1)
    ):
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


# ---- the linearized pass, in groups


class GroupStatistics:
    """Stands in for `batch_norm` in training: statistics of the batch, moved as those of some of its examples move."""

    def __init__(self) -> None:
        self.origins: list[tuple[Tensor, Tensor, Tensor]] = []
        self.rows: slice | None = None
        self.position = 0

    @contextmanager
    def acting(self, rows: slice | None = None) -> Iterator[None]:
        self.rows, self.position = rows, 0
        with mock.patch.object(F, "batch_norm", self.batch_norm):
            yield

    def batch_norm(
        self, x: Tensor, _mean: Tensor, _variance: Tensor, weight: Tensor, bias: Tensor, training: bool, _: float,
        eps: float,
    ) -> Tensor:  # fmt: skip
        assert training
        axes = [0, *range(2, x.ndim)]
        shape = (-1, *[1] * (x.ndim - 2))
        if self.rows is None:
            mean, variance = x.mean(axes), x.var(axes, correction=0)
            self.origins.append((x.detach(), mean.detach(), variance.detach()))
        else:
            then, mean, variance = self.origins[self.position]
            then = then[self.rows]
            centre = mean.reshape(shape)
            variance = variance + ((x - centre).square() - (then - centre).square()).mean(axes)
            mean = mean + (x - then).mean(axes)
            self.position += 1
        x = (x - mean.reshape(shape)) / (variance.reshape(shape) + eps).sqrt()
        return x if weight is None else x * weight.reshape(shape) + bias.reshape(shape)


@pytest.mark.parametrize(("size", "before"), [(2, 0), (3, 0), (4, 0), (4, 3), (6, 0), (16, 5)])
@pytest.mark.parametrize("name", ["torchvision resnet18", "timm test_resnet", "dense"])
def test_a_group_is_linearized_with_its_own_change_of_the_statistics(name: str, size: int, before: int) -> None:
    stn, x = wrapped(name)
    stn.train()
    groups = [(before + i) // size for i in range(B)]
    deltas_GH = 0.3 * torch.randn(groups[-1] + 1, len(stn.hparams), dtype=torch.float64)
    raw_BH = stn.hparams.raw.detach() + deltas_GH[groups]
    with stn.in_groups(size, before), torch.no_grad():
        primal, tangent = stn.linearize(x, raw=raw_BH)
    judge = GroupStatistics()
    weights = dict(stn.model.named_parameters())
    with judge.acting(), torch.no_grad():
        torch.testing.assert_close(primal, functional_call(stn.model, weights, x), rtol=1e-9, atol=1e-9)
    for group in set(groups):
        rows = slice(groups.index(group), B - groups[::-1].index(group))
        changes = stn.weight_response(deltas_GH[group])
        outputs = []
        for step in (1e-6, -1e-6):
            moved = {name: w + step * changes.get(name, 0) for name, w in weights.items()}
            with judge.acting(rows), torch.no_grad():
                outputs.append(functional_call(stn.model, moved, x[rows]))
        expected = (outputs[0] - outputs[1]) / 2e-6
        torch.testing.assert_close(tangent[rows], expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_one_group_is_the_batch() -> None:
    stn, x = wrapped("timm test_resnet")
    stn.train()
    raw_BH = stn.hparams.raw.detach() + torch.tensor([[0.3, -0.4]], dtype=torch.float64).expand(B, -1)
    whole = stn.linearize(x, raw=raw_BH)
    with stn.in_groups(B):
        torch.testing.assert_close(stn.linearize(x, raw=raw_BH), whole)


@pytest.mark.parametrize("groups", [(2, 0, 1, 1), (4, 3, 1, 1), (2, 1, 1, 2), (2, 0, 2, 1)])
def test_its_gradient(groups: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, tangent = torch.randn(2, B, 3, 2, dtype=torch.float64)
    mean, rstd = x.mean([0, 2]), torch.rsqrt(x.var([0, 2], correction=0) + 1e-5)
    tangent.requires_grad_()
    torch.autograd.gradcheck(
        lambda t: normalized_tangent("batch", t, x, mean, rstd, [1e-5, *groups]), [tangent], fast_mode=False
    )


class Folded(nn.Module):
    """Rows of a norm that are positions of examples, and examples of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)
        self.norm1, self.norm2 = nn.BatchNorm1d(5), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm1(self.fc1(x).flatten(0, 1)))
        x = x.reshape(-1, 3, 5).transpose(0, 1)
        x = torch.tanh(self.norm2(self.fc2(x).flatten(0, 1)))
        return self.fc3(x.reshape(3, -1, 3)).mean(0)  # type: ignore[no-any-return]


def test_rows_that_are_no_examples_belong_to_their_examples() -> None:
    """One hyperparameter vector for all of a group: its change of the statistics is that of a batch of the group."""
    torch.manual_seed(0)
    half = torch.randn(3, 3, 4, dtype=torch.float64)
    x = torch.cat([half, half])  # so that the statistics of each group are those of the batch
    stn = stn_fx.transform(randomised(Folded()), "weight_decay,label_smoothing", (x,), seed=0)
    spread(stn)
    stn.train()
    rows = {str(tuple(v)) for v in stn.compiled.analysed["training"].layouts.values()}
    assert {"(0, 1, 3)", "(0, 3, 1)"} <= rows, rows
    deltas = 0.3 * torch.randn(2, 2, dtype=torch.float64)
    centre = stn.hparams.raw.detach()
    with stn.in_groups(3):
        tangent = stn.linearize(x, raw=centre + deltas.repeat_interleave(3, 0))[1]
    for group in range(2):
        rows_of = slice(3 * group, 3 * group + 3)
        alone = stn.linearize(half, raw=centre + deltas[group].expand(3, -1))[1]
        torch.testing.assert_close(tangent[rows_of], alone)


def test_scaling_rows_before_a_batch_norm_is_nothing_for_a_group_and_something_for_an_example() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-12)).double()
    x = IMAGES()
    stn = stn_fx.transform(model, "weight_decay", (x,), seed=0)
    with torch.no_grad():
        for name, response in stn.responses().items():
            weight = stn.model.get_parameter(name)
            (response.U.copy_(weight), response.V.fill_(1.0)) if name == "0.weight" else response.G.zero_()
    raw_BH = stn.hparams.raw.detach() + torch.tensor([0.5, -0.2]).double().repeat_interleave(3)[:, None]
    free = stn.linearize(x, raw=raw_BH)[1]
    with stn.in_groups(3):
        tangent = stn.linearize(x, raw=raw_BH)[1]
    # Of a part of the batch whose statistics are not those of the batch, a little is left.
    assert tangent.norm() < 0.1 * free.norm()
    with stn.in_groups(B):
        assert stn.linearize(x, raw=raw_BH[:1].expand(B, -1))[1].norm() < 1e-10 * free.norm()


# ---- who uses them


def frozen(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


@pytest.mark.parametrize(
    ("build", "algorithm", "options", "expected"),
    [
        (Dense, DeltaSTN, {}, "PerGroup(size=16)"),
        (Dense, DeltaSTN, {"sampling": PerGroup(3)}, "PerGroup(size=3)"),
        (Dense, DeltaSTN, {"sampling": PerBatch()}, "PerBatch()"),
        (Dense, SharedForward, {}, "PerGroup(size=16)"),
        (Dense, STN, {"sampling": PerBatch()}, "PerBatch()"),
        (lambda: frozen(Dense().train()), DeltaSTN, {}, "PerExample()"),
        (lambda: nn.Sequential(nn.Linear(12, 4), nn.LayerNorm(4)), DeltaSTN, {}, "PerExample()"),
    ],
)
def test_models_with_batch_statistics_are_perturbed_in_groups(build, algorithm, options, expected) -> None:
    stn = stn_fx.transform(build(), "weight_decay", (torch.randn(B, 12),), seed=0)
    steps = algorithm(stn, **options)
    assert str(steps.sampling) == steps.description()["sampling"] == expected


@pytest.mark.parametrize(
    ("algorithm", "options", "remedy"),
    [
        (DeltaSTN, {"sampling": PerExample()}, "Leave sampling out"),
        (DeltaSTN, {"sampling": GlobalSampling()}, "Leave sampling out"),
        (SharedForward, {"sampling": PerExample()}, "Leave sampling out"),
        (STN, {}, r"Use DeltaSTN, or pass sampling=PerBatch\(\)"),
    ],
)
def test_a_sampling_that_does_not_suit_batch_statistics_is_followed_with_a_warning(algorithm, options, remedy) -> None:
    stn = stn_fx.transform(Dense(), "weight_decay", (torch.randn(B, 12),), seed=0)
    with pytest.warns(UserWarning, match=f"batch norms.*perturbs every example by itself.*{remedy}"):
        steps = algorithm(stn, **options)
    assert not steps.sampling.suits_batch_norms


@pytest.mark.parametrize("algorithm", [DeltaSTN, SharedForward])
def test_inner_steps_tell_the_groups(algorithm: type[DeltaSTN]) -> None:
    """By the first update of the response: with statistics that belong to nobody it would be another."""
    updated = []
    for told in (True, False):
        torch.manual_seed(0)
        stn = stn_fx.transform(Dense(), "label_smoothing", (torch.randn(B, 12),), seed=0)
        spread(stn)
        before = parameters_to_vector(stn.response_parameters()).detach()
        options = {"response_optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "sampling": PerGroup(2)}
        steps = algorithm(stn, **options)
        without = mock.patch.object(type(stn), "in_groups", return_value=nullcontext())
        with nullcontext() if told else without:
            steps.inner_step((torch.randn(B, 12), torch.arange(B) % 4))
        updated.append(parameters_to_vector(stn.response_parameters()).detach() - before)
    assert (updated[0] - updated[1]).norm() > 0.01 * updated[0].norm()


class Squashed(nn.Module):
    """A batch norm whose scale nobody can learn: only the direction of the weight and the shift answer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm1d(1, affine=False, momentum=1.0)

    def forward(self, x: Tensor) -> Tensor:
        value = 4 * torch.tanh(self.norm((x * self.weight).sum(1, keepdim=True))[:, 0]) + self.bias
        return torch.stack([-value / 2, value / 2], 1)


@pytest.mark.filterwarnings("ignore:The model has batch norms")
def test_hypergradients_of_a_model_with_batch_norm_are_those_of_training_again() -> None:
    """And not those of perturbations that differ from example to example, with statistics that stay."""
    torch.manual_seed(0)
    x = torch.randn(128, 4, dtype=torch.float64)
    y = (x[:, 0] + 0.5 * x[:, 1].square() + 0.7 * torch.randn(128, dtype=torch.float64) > 0.3).long()
    problem = Problem("label_smoothing", Squashed, (x[:64], y[:64]), (x[64:], y[64:]), loss=cross_entropy)
    stn = stn_fx.transform(Squashed().double(), "label_smoothing(initial=0.1)", (x,), seed=0).train()
    objective, centre = as_objective(cross_entropy), stn.hparams.raw.detach().clone()

    def train(raw_H: Tensor) -> None:
        for _ in range(3):
            load(stn.model, retrained(stn, objective, problem, raw_H, seed=0))
        stn(problem.train[0])  # the statistics of these weights

    losses = []
    for step in (0.1, -0.1):
        train(centre + step)
        losses.append(valid_loss(stn.model.eval(), problem).item())
        stn.train()
    expected = (losses[0] - losses[1]) / 0.2
    train(centre)
    stn.hparams.raw.data.copy_(centre)
    initial = copy.deepcopy([p.detach() for p in stn.response_parameters()])
    predicted = {}
    for sampling in (PerGroup(64), PerExample()):
        for parameter, value in zip(stn.response_parameters(), initial, strict=True):
            parameter.data.copy_(value)
        steps = DeltaSTN(
            stn, cross_entropy, sampling=sampling, response_optimizer=lambda p: torch.optim.Adam(p, lr=0.02)
        )
        batch = steps.prepare(tuple(each.repeat(8, *[1] * (each.ndim - 1)) for each in problem.train))
        for _ in range(300):
            Linearized()(steps, batch)
        respond = stn.respond_with_statistics if sampling.group else stn.respond
        loss = cross_entropy(respond(problem.valid[0]), problem.valid[1]).mean()
        predicted[sampling.group] = torch.autograd.grad(loss, stn.hparams.raw)[0].item()
    assert predicted[64] == pytest.approx(expected, rel=0.03), (predicted, expected)
    assert abs(predicted[None] - expected) > 10 * abs(expected), (predicted, expected)


@pytest.mark.parametrize("algorithm", [DeltaSTN, SharedForward, functools.partial(STN, sampling=PerBatch())])
@pytest.mark.parametrize("shape", [(12,), (12, 1, 1)])
def test_a_training_batch_with_one_value_of_a_channel_is_refused(algorithm, shape: tuple[int, ...]) -> None:
    """As torch.nn.functional refuses it: its variance is not a number, and stays in the running statistics."""
    norm = nn.BatchNorm1d(12) if shape == (12,) else nn.BatchNorm2d(12)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(9, *shape), torch.randint(3, (9,))
    stn = stn_fx.transform(model, "weight_decay", (x,), seed=0)
    trainer = stn_fx.BilevelTrainer(stn, train=list(batches(x, y, 4)), valid=[(x + 1, y)], algorithm=algorithm(stn))
    with pytest.raises(InputError, match=r"one value only for each of its 12 channels.*drop_last=True"):
        trainer.fit(2)
    assert norm.running_var.isfinite().all()
    with pytest.raises(InputError, match="one value only"):
        stn.linearize(x[:1])
    stn.eval()(x[:1])


def batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.split(size), y.split(size), strict=True)


def test_a_group_of_one_example_in_single_precision() -> None:
    """Its variance is zero: what rounding leaves of a difference from its mean must not be divided by that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, y = torch.rand(17, 6, dtype=torch.float64) * 255, torch.randint(3, (17,))
    for _ in range(60):
        model(x)
    found = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(1)
        stn = stn_fx.transform(copy.deepcopy(model).to(dtype), "weight_decay,label_smoothing", (x.to(dtype),), seed=0)
        for parameter in stn.response_parameters():
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
        with stn.in_groups(16):
            F.cross_entropy(stn.respond_with_statistics(x.to(dtype)), y).backward()
        found.append(stn.hparams.raw.grad.double())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


class UnusedInTraining(nn.Module):
    """The output of its batch norm counts in evaluation only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        normed = self.norm(x)
        return self.last(x if self.training else normed)


@pytest.mark.parametrize("algorithm", [DeltaSTN, SharedForward])
def test_statistics_of_an_output_that_training_does_not_use(algorithm) -> None:
    torch.manual_seed(0)
    model, x, y = UnusedInTraining(), 5 * torch.randn(16, 6) + 3, torch.randint(3, (16,))
    plain = copy.deepcopy(model)
    plain(x)
    stn = stn_fx.transform(model, "weight_decay", (x,), seed=0)
    algorithm(stn).inner_step((x, y))
    for name, expected in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), expected, msg=name)

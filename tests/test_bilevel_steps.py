from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bilevel_fake import FakeSelfTuningModule, classification_batches, regression_batches
from torch import nn
from torch.optim import SGD, AdamW, RMSprop
from torch.optim.lr_scheduler import LambdaLR

from stn_fx.bilevel import DeltaSTN, FixedHyperparameters, Objective
from stn_fx.errors import DivergedError, InputError, StnError


def make(hparams="weight_decay", outputs=3, captured=True):
    torch.manual_seed(0)
    return FakeSelfTuningModule(nn.Linear(8, outputs, dtype=torch.float64), hparams, captured)


def groups(stn):
    """Copies of the four groups of parameters."""
    parameters = {
        "base": list(stn.base_parameters()),
        "response": list(stn.response_parameters()),
        "hyper": [stn.hparams.raw],
        "scale": [stn.hparams.raw_scale],
    }
    return {role: torch.cat([p.detach().flatten().clone() for p in each]) for role, each in parameters.items()}


def changed(before, after):
    return {role for role in before if not torch.equal(before[role], after[role])}


BATCH = classification_batches(0)[0]


def test_an_inner_step_moves_base_and_response_only():
    stn = make("weight_decay,label_smoothing")
    before = groups(stn)
    record = DeltaSTN(stn).inner_step(BATCH)
    assert changed(before, groups(stn)) == {"base", "response"}
    assert record.loss > 0
    assert record.response_loss is not None


def test_an_outer_step_moves_hyperparameters_and_scales_only():
    stn = make("weight_decay,label_smoothing")
    steps = DeltaSTN(stn)
    steps.inner_step(BATCH)
    before = groups(stn)
    steps.outer_step(BATCH)
    assert changed(before, groups(stn)) == {"hyper", "scale"}


def test_the_passes_and_their_modes():
    stn = make()
    stn.eval()
    steps = DeltaSTN(stn)
    steps.inner_step(BATCH)
    steps.outer_step(BATCH)
    assert stn.calls == [("base", True), ("linearize", True), ("respond", False)]
    assert not stn.training


def test_frozen_submodules_stay_frozen_in_an_inner_step():
    stn = make().train()
    stn.model.eval()
    DeltaSTN(stn).inner_step(BATCH)
    assert stn.training
    assert not stn.model.training


def test_fixed_hyperparameters_run_the_base_pass_alone():
    stn = make()
    before = groups(stn)
    steps = FixedHyperparameters(stn)
    assert steps.inner_step(BATCH).response_loss is None
    assert changed(before, groups(stn)) == {"base"}
    assert stn.calls == [("base", True)]
    with pytest.raises(InputError, match="DeltaSTN"):
        steps.outer_step(BATCH)


def test_weight_decay_has_the_gradient_of_its_definition():
    stn = make()
    with torch.no_grad():
        stn.hparams.set_values({"weight_decay": 0.3})
    weight = stn.model.weight.detach().clone()
    FixedHyperparameters(stn, lambda output, target: 0 * output.sum(1), base_optimizer=partial(SGD, lr=0.1)).inner_step(
        BATCH
    )
    torch.testing.assert_close(stn.model.weight.detach(), weight - 0.1 * 0.3 * weight)


def test_weight_decay_acts_per_example_on_the_perturbed_weights():
    stn = make()
    with torch.no_grad():
        stn.G.normal_()
    generator_state = stn.generator().get_state()
    still = partial(SGD, lr=0.0)
    steps = DeltaSTN(stn, lambda output, target: 0 * output.sum(1), base_optimizer=still, response_optimizer=still)
    actual = steps.inner_step(BATCH).response_loss
    stn.generator().set_state(generator_state)
    raw_BH = stn.hparams.sample(len(BATCH[0]), stn.generator()).detach()
    expected = sum(
        0.5 * stn.hparams.constrain(raw)[0] * (stn.model.weight + stn.G @ (raw - stn.hparams.raw)).square().sum()
        for raw in raw_BH
    ) / len(raw_BH)
    assert actual == pytest.approx(expected.item())


def test_capture_from_the_first_batch():
    stn = make(captured=False)
    steps = DeltaSTN(stn)
    assert not steps.optimizers
    steps.inner_step(BATCH)
    assert set(steps.optimizers) == {"base", "response", "hyper", "scale"}


def test_users_optimizers_are_used():
    stn = make()
    optimizers = {
        "base_optimizer": SGD(stn.base_parameters(), lr=0.1),
        "response_optimizer": partial(SGD, lr=0.2),
        "hyper_optimizer": RMSprop([stn.hparams.raw], lr=0.5),
    }
    steps = DeltaSTN(stn, **optimizers)
    assert steps.optimizers["base"] is optimizers["base_optimizer"]
    assert steps.optimizers["response"].param_groups[0]["lr"] == 0.2
    assert steps.optimizers["hyper"] is optimizers["hyper_optimizer"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda stn: {"base_optimizer": SGD(make().base_parameters(), lr=0.1)}, "2 of 2 parameters .* missing"),
        (lambda stn: {"base_optimizer": SGD([stn.model.weight], lr=0.1)}, "1 of 2 parameters .* missing"),
        (lambda stn: {"response_optimizer": SGD([stn.G, stn.hparams.raw], lr=0.1)}, "1 of its own"),
        (lambda stn: {"hyper_optimizer": SGD([stn.hparams.raw_scale], lr=0.1)}, "hyper optimizer does not fit"),
        (lambda stn: {"hyper_optimizer": partial(AdamW, lr=0.1)}, "middle"),
        (lambda stn: {"base_optimizer": partial(AdamW, lr=0.1)}, "beside the hyperparameter weight_decay"),
        (lambda stn: {"base_optimizer": "sgd"}, "base_optimizer is a str"),
    ],
)
def test_optimizers_that_do_harm_are_refused(options, message):
    stn = make()
    with pytest.raises(InputError, match=message):
        DeltaSTN(stn, **options(stn))


def test_an_optimizers_own_weight_decay_is_allowed_where_it_is_not_tuned():
    DeltaSTN(make("label_smoothing"), base_optimizer=partial(SGD, lr=0.1, weight_decay=1e-3))


def test_frozen_parameters_are_left_out():
    stn = make()
    stn.model.bias.requires_grad_(False)
    before = stn.model.bias.clone()
    DeltaSTN(stn, base_optimizer=SGD([stn.model.weight], lr=0.1)).inner_step(BATCH)
    assert torch.equal(stn.model.bias, before)
    stn.model.weight.requires_grad_(False)
    with pytest.raises(InputError, match="nothing for the base optimizer"):
        DeltaSTN(stn)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_is_applied_when_a_loss_is_not_finite(bad):
    stn = make()
    steps = DeltaSTN(stn, lambda output, target: F.cross_entropy(output, target) * bad)
    before = groups(stn)
    for step in (steps.inner_step, steps.outer_step):
        with pytest.raises(DivergedError, match="not applied"):
            step(BATCH)
    assert not changed(before, groups(stn))


def test_nothing_is_applied_when_a_gradient_is_not_finite():
    stn = make()
    # The derivative of sqrt is infinite at zero, where its value is finite.
    steps = DeltaSTN(stn, lambda output, target: torch.sqrt(0 * output.square().sum(1)))
    before = groups(stn)
    with pytest.raises(DivergedError, match="gradient"):
        steps.inner_step(BATCH)
    assert not changed(before, groups(stn))


def test_a_loss_that_does_not_depend_on_the_output_is_refused():
    steps = DeltaSTN(make("label_smoothing"), lambda output, target: output.detach().sum(1) * target.sum())
    with pytest.raises(InputError, match=r"does not depend|soft targets"):
        steps.inner_step(BATCH)


def test_a_primal_that_requires_a_gradient_is_refused():
    stn = make()
    stn.linearize = lambda x, raw: (stn.model(x), stn.respond(x, raw) - stn.model(x))
    with pytest.raises(StnError, match="primal"):
        DeltaSTN(stn).inner_step(BATCH)


def test_a_validation_objective_is_not_improved_through_the_hyperparameters_directly():
    stn = make()
    objective = Objective(
        train=lambda output, batch, values: F.cross_entropy(output, batch[1]),
        valid=lambda output, batch, values: F.cross_entropy(output, batch[1]) + 100 * values["weight_decay"].mean(),
    )
    before = stn.hparams.raw.detach().clone()
    DeltaSTN(stn, objective, hyper_optimizer=partial(SGD, lr=1.0)).outer_step(BATCH)
    # The response is still zero, so nothing but the direct path could move it.
    torch.testing.assert_close(stn.hparams.raw.detach(), before)


def test_the_entropy_term_widens_the_scales():
    stn = make()
    before = stn.hparams.scales().detach()
    DeltaSTN(stn, entropy_weight=1.0).outer_step(BATCH)
    assert (stn.hparams.scales() > before).all()


def ridge_weights(batches, decay):
    """argmin over w of mean_i (x_i w - y_i)^2 + 0.5 * decay * |w|^2, as a column (I, 1)."""
    x, y = (torch.cat(each) for each in zip(*batches, strict=True))
    return torch.linalg.solve(
        2 * x.t() @ x / len(x) + decay * torch.eye(x.shape[1], dtype=x.dtype), 2 * x.t() @ y / len(x)
    )


def test_the_response_converges_to_the_best_response_of_ridge_regression():
    scale, batches = 0.1, regression_batches(0, 4096, batch_size=4096)
    stn = FakeSelfTuningModule(
        nn.Linear(8, 1, bias=False, dtype=torch.float64), f"weight_decay(initial=0.3, scale={scale})"
    )
    # The curvature of the objective in G is that of the ridge problem times the variance of the perturbation.
    response_optimizer = SGD(stn.response_parameters(), lr=0.2 / scale**2)
    schedule = LambdaLR(response_optimizer, lambda step: 1 / (1 + step / 20))
    steps = DeltaSTN(stn, F.mse_loss, base_optimizer=partial(SGD, lr=0.1), response_optimizer=response_optimizer)
    for _ in range(800):
        steps.inner_step(batches[0])
        schedule.step()
    decay = torch.tensor(stn.hparams.values()["weight_decay"], dtype=torch.float64)
    torch.testing.assert_close(stn.model.weight.detach().t(), ridge_weights(batches, decay), rtol=1e-6, atol=1e-8)
    per_decay = torch.autograd.functional.jacobian(lambda value: ridge_weights(batches, value), decay)
    expected = (per_decay * decay * (1 - decay)).flatten()  # d constrained / d raw of a sigmoid onto (0, 1)
    actual = stn.G.detach().flatten()
    assert F.cosine_similarity(actual, expected, dim=0) > 0.99
    assert (actual - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("initial", [0.05, 8.0])
def test_a_tuned_weight_decay_reaches_the_optimum_of_the_validation_loss(initial):
    # Each example many times in the batch, with an own perturbation each: fewer steps for the same precision.
    train = [(x.repeat(20, 1), y.repeat(20, 1)) for x, y in regression_batches(0, 24, noise=2.0)]
    valid = regression_batches(1, 400, noise=2.0, batch_size=400)
    (x, y) = valid[0]

    def valid_loss(decay):
        return F.mse_loss(x @ ridge_weights(train, decay), y).item()

    grid = torch.logspace(-3, 0.99, 400).tolist()
    optimum, start = min(valid_loss(decay) for decay in grid), valid_loss(initial)
    stn = FakeSelfTuningModule(
        nn.Linear(8, 1, bias=False, dtype=torch.float64), f"weight_decay(initial={initial}, high=10)"
    )
    steps = DeltaSTN(stn, F.mse_loss, base_optimizer=partial(SGD, lr=0.05), response_optimizer=partial(SGD, lr=0.2))
    for step in range(2500):
        steps.inner_step(train[0])
        if step > 200 and step % 5 == 0:
            steps.outer_step(valid[0])
    reached = valid_loss(stn.hparams.values()["weight_decay"])
    assert reached - optimum < 0.1 * (start - optimum)

"""The variants of the papers, each against its definition."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bilevel_fake import FakeSelfTuningModule, classification_batches
from torch import nn
from torch.optim import SGD

import stn_fx
from stn_fx.bilevel import (
    STN,
    BilevelTrainer,
    Callback,
    DeltaSTN,
    EveryKth,
    FixedHyperparameters,
    GlobalSampling,
    Linearized,
    Objective,
    OnFraction,
    PerBatch,
    PerExample,
    PerGroup,
    UpdateOptions,
    WithoutLinearization,
)
from stn_fx.bilevel.replicas import Rows
from stn_fx.errors import InputError
from stn_fx.hparams import HyperparameterSpace, parse_hparams, resolve

BATCH = classification_batches(0)[0]


def make_space():
    resolved = [each for s in parse_hparams("weight_decay,label_smoothing") for each in resolve(s)]
    space = HyperparameterSpace(resolved, dtype=torch.float64)
    with torch.no_grad():
        space.raw.add_(2.0)
    return space


def draw(sampling, way="inner", rows=None):
    rows = rows or Rows(0, 4000, 4000)
    return getattr(sampling, way)(make_space(), rows, torch.Generator().manual_seed(0))


def test_per_example_perturbations_are_around_the_current_value_with_the_tuned_scale():
    space, raw_BH = make_space(), draw(PerExample())
    torch.testing.assert_close(raw_BH.mean(0), space.raw.data, atol=0.05, rtol=0)
    torch.testing.assert_close(raw_BH.std(0), space.scales(), atol=0.05, rtol=0)


def test_per_batch_perturbations_are_common_to_all_examples():
    raw_BH = draw(PerBatch())
    assert (raw_BH == raw_BH[0]).all()
    assert (raw_BH[0] != make_space().raw).all()


def test_the_examples_of_a_group_are_perturbed_alike():
    sampling = PerGroup(size=4)
    raw_BH = draw(sampling)
    groups = raw_BH.unflatten(0, (-1, 4))
    assert (groups == groups[:, :1]).all()
    assert len(raw_BH[:, 0].unique()) == len(groups)
    outer = draw(sampling, "outer")
    assert torch.equal(outer, raw_BH)
    assert outer.requires_grad


def test_global_sampling_does_not_follow_the_current_value_but_tunes_there():
    space, raw_BH = make_space(), draw(GlobalSampling(width=0.5))
    torch.testing.assert_close(raw_BH.mean(0), space.raw.data - 2.0, atol=0.05, rtol=0)
    torch.testing.assert_close(raw_BH.std(0), torch.full((2,), 0.5).double(), atol=0.05, rtol=0)
    outer = draw(GlobalSampling(), "outer")
    assert (outer == space.raw).all()
    assert outer.requires_grad


@pytest.mark.parametrize("sampling", [PerExample(), PerGroup(3), PerBatch(), GlobalSampling()])
def test_perturbations_do_not_depend_on_who_has_the_rows(sampling):
    parts = [draw(sampling, rows=Rows(*ends, 10, 2)) for ends in ((0, 6), (6, 10))]
    assert torch.equal(torch.cat(parts), draw(sampling, rows=Rows(0, 10, 10)))


def make_fake(**options):
    torch.manual_seed(0)
    stn = FakeSelfTuningModule(nn.Linear(8, 3, dtype=torch.float64), "weight_decay,label_smoothing")
    return stn, DeltaSTN(stn, **options)


def test_fixed_scales_stay_and_the_rest_is_tuned():
    stn, steps = make_fake(tune_scales=False)
    scales, raw = stn.hparams.raw_scale.detach().clone(), stn.hparams.raw.detach().clone()
    steps.inner_step(BATCH)
    steps.outer_step(BATCH)
    assert torch.equal(stn.hparams.raw_scale, scales)
    assert not torch.equal(stn.hparams.raw, raw)
    with pytest.raises(InputError, match="nothing to do"):
        make_fake(tune_scales=False, scale_optimizer=partial(SGD, lr=0.1))


def test_scales_that_a_sampling_does_not_use_are_not_tuned():
    stn, steps = make_fake(sampling=GlobalSampling())
    scales = stn.hparams.raw_scale.detach().clone()
    steps.inner_step(BATCH)
    steps.outer_step(BATCH)
    assert torch.equal(stn.hparams.raw_scale, scales)
    with pytest.raises(InputError, match="nothing to do"):
        make_fake(sampling=GlobalSampling(), scale_optimizer=partial(SGD, lr=0.1))


@pytest.mark.filterwarnings("ignore:The model has batch norms")
def test_stn_moves_every_buffer_as_training_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 3))
    still = partial(SGD, lr=0.0)
    steps = STN(
        stn_fx.transform(model, "weight_decay", (torch.randn(4, 8),)), base_optimizer=still, response_optimizer=still
    )
    plain, x = copy.deepcopy(model).train(), torch.randn(6, 8)
    for batch in (x, x + 1):
        steps.inner_step((batch, torch.arange(6) % 3))
        plain(batch)
    assert model[1].num_batches_tracked == 2
    torch.testing.assert_close(model[1].running_mean, plain[1].running_mean)


@pytest.mark.filterwarnings("ignore:The model has batch norms")
@pytest.mark.parametrize("algorithm", [STN, DeltaSTN])
def test_a_bad_batch_does_not_spoil_running_statistics(algorithm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    stn = stn_fx.transform(model, "weight_decay", (torch.randn(4, 8),))
    steps, x = algorithm(stn), torch.randn(6, 8)
    steps.inner_step((x, torch.arange(6) % 3))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert steps.inner_step((x * float("nan"), torch.arange(6) % 3)).skipped
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    steps.inner_step((x, torch.arange(6) % 3))
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


class NoisyInput(nn.Module):
    """Draws from the global generator, as a user's own noise does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        return self.linear(x + 0.1 * torch.randn_like(x) if self.training else x)


def test_learning_the_response_leaves_training_alone_in_models_that_draw_by_themselves():
    weights = []
    for algorithm in (FixedHyperparameters, DeltaSTN):
        torch.manual_seed(0)
        stn = stn_fx.transform(NoisyInput(), "weight_decay", (torch.randn(4, 8),), seed=0)
        steps = algorithm(stn)
        for x, y in classification_batches(0):
            steps.inner_step((x.float(), y))
        weights.append(stn.model.linear.weight.detach().clone())
    assert torch.equal(*weights)


def test_the_response_is_learned_in_every_kth_step():
    stn, steps = make_fake(response_step=EveryKth(Linearized(), 3))
    records = [steps.inner_step(BATCH) for _ in range(7)]
    assert [record.response_loss is not None for record in records] == [True, False, False, True, False, False, True]
    assert [name for name, _ in stn.calls].count("linearize") == 2 * 3  # a perturbation and its opposite
    other = EveryKth(Linearized(), 3)
    other.load_state_dict(steps.response_step.state_dict())
    assert other(steps, steps.prepare(BATCH)) is None


def test_a_fraction_of_the_batch_is_what_a_smaller_batch_would_be():
    still, step = partial(SGD, lr=0.0), partial(SGD, lr=0.1)
    whole, part = (
        make_fake(base_optimizer=still, response_optimizer=step, response_step=OnFraction(Linearized(), fraction))
        for fraction in (1.0, 0.3)
    )
    five = tuple(each[[0, 3, 6, 10, 13]] for each in BATCH)  # 0.3 * 16, rounded up, evenly spaced
    assert part[1].inner_step(BATCH).response_loss == whole[1].inner_step(five).response_loss
    assert torch.equal(part[0].G, whole[0].G)


def test_a_fraction_of_a_batch_on_axis_1():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x):  # (T, B, C)
            return self.head(self.cell(x).tanh().mean(0))

    x, y = torch.randn(7, 6, 3), torch.randint(0, 3, (6,))
    stn = stn_fx.transform(Recurrent(), "weight_decay", (x,), batch_axis=1)
    assert not DeltaSTN(stn, response_step=OnFraction(Linearized(), 0.5)).inner_step((x, y)).skipped


def taken(step, batch, axis=0, **options):
    """Number of examples that a pass of the response sees."""
    sizes = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            return self.layer(x).mean(1 - axis) if x.ndim == 3 else self.layer(x)

    def loss(output, content, hyperparameters):
        sizes.append(len(output))
        return output.square().mean(1)

    stn = stn_fx.transform(Model(), "weight_decay", (batch["x"],), batch_axis=axis)
    objective = Objective(train=loss, inputs=lambda content: (content["x"],))
    assert not DeltaSTN(stn, objective, response_step=step, **options).inner_step(batch).skipped
    return sizes[-1]


@pytest.mark.parametrize(("least", "size", "part"), [(1, 100, 7), (10, 100, 10), (32, 24, 24), (32, 48, 32), (1, 3, 1)])
def test_how_many_examples_a_fraction_has(least, size, part):
    assert taken(OnFraction(Linearized(), 0.07, least=least), {"x": torch.randn(size, 3)}) == part


@pytest.mark.parametrize(
    ("other", "axis", "part"),
    [
        ({"y": torch.randn(6, 2)}, 0, 3),
        ({"y": torch.randn(6, 2)}, 1, 3),
        ({"y": torch.randn(2, 6)}, 1, 3),
        ({"y": None, "z": [torch.randn(6), (torch.randn(6),)]}, 0, 3),
        ({"y": torch.randn(6, 6)}, 0, 6),
        ({"y": torch.randn(6, 6, 2)}, 0, 3),
        ({"y": torch.randn(6, 6, 2)}, 1, 6),
        ({"y": torch.randn(5)}, 0, 6),
        ({"y": torch.tensor(1.0)}, 0, 6),
        ({"y": ["a"] * 6}, 0, 6),
        ({"y": [1] * 6}, 0, 6),
    ],
    ids=[
        "rows",
        "target on axis 0",
        "target on axis 1",
        "nested",
        "pairs",
        "a map",
        "either axis",
        "other size",
        "scalar",
        "words",
        "list",
    ],
)
def test_a_batch_that_cannot_be_cut_with_certainty_is_taken_whole(other, axis, part):
    batch = {"x": torch.randn(*((6, 7, 3) if axis == 0 else (7, 6, 3)))} | other
    assert taken(OnFraction(Linearized(), 0.5), batch, axis) == part


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EveryKth(Linearized(), 0), "k=0"),
        (lambda: OnFraction(Linearized(), 0.0), "fraction"),
        (lambda: OnFraction(Linearized(), 0.5, least=0), "least=0"),
        (lambda: GlobalSampling(0.0), "width"),
    ],
)
def test_options_out_of_range_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()


def wrapped(*layers, hparams="dropout,weight_decay"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), *layers, nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()
    stn = stn_fx.transform(model, hparams, (torch.randn(4, 6).double(),), seed=0)
    with torch.no_grad():
        for parameter in stn.response_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return stn.train()


def test_the_perturbed_network_is_the_users_own_with_the_weights_moved():
    stn, x = wrapped(), torch.randn(5, 6).double()
    raw_BH = stn.hparams.sample(5, torch.Generator().manual_seed(1)).detach()
    with torch.no_grad():
        raw_BH[:, 0] = -50.0  # no dropout
    actual = stn.respond_in_training(x, raw=raw_BH)
    model = stn.model.eval()
    for i in range(5):
        moved = stn.weight_response(raw_BH[i] - stn.hparams.raw)
        weights = {name: p + moved[name] for name, p in model.named_parameters()}
        torch.testing.assert_close(actual[i], torch.func.functional_call(model, weights, (x[i : i + 1],))[0])


def test_the_perturbed_network_drops_out_and_leaves_base_and_statistics_alone():
    stn, x = wrapped(nn.BatchNorm1d(8)), torch.randn(5, 6).double()
    buffers = {name: buffer.clone() for name, buffer in stn.model.named_buffers()}
    raw_BH = stn.hparams.sample(5, torch.Generator().manual_seed(1)).detach()
    first, second = (stn.respond_in_training(x, raw=raw_BH) for _ in range(2))
    assert not torch.equal(first, second)
    F.cross_entropy(first, torch.zeros(5, dtype=torch.long)).backward()
    assert all(p.grad is None for p in stn.base_parameters())
    assert all(p.grad is not None for p in stn.response_parameters())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in stn.model.named_buffers())


@pytest.mark.parametrize(
    "options",
    [
        {"response_step": WithoutLinearization()},
        {"response_step": OnFraction(WithoutLinearization(), 0.5), "tune_scales": False},
        {"sampling": GlobalSampling(), "tune_scales": False},
        {"sampling": PerBatch(), "response_step": EveryKth(Linearized(), 2)},
    ],
)
def test_every_variant_trains_and_tunes(options):
    stn = wrapped()
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(8, 6, generator=generator).double(), torch.randint(0, 3, (8,), generator=generator))
        for _ in range(6)
    ]
    result = BilevelTrainer(stn, train=batches[:4], valid=batches[4:], **options).fit(3, warmup_epochs=1, train_steps=2)
    assert result.values != result.schedule[0].values
    assert result.skipped == 0


def test_stn_is_the_uncentred_joint_training_of_its_paper():
    """Against a row-wise hypernetwork written out by hand, with weight decay, over inner and outer steps."""
    torch.manual_seed(0)
    model = nn.Linear(8, 3, bias=False, dtype=torch.float64)
    stn = stn_fx.transform(model, "weight_decay(initial=0.3)", (BATCH[0],), seed=0)
    rates = {"base": 0.1, "response": 0.1, "hyper": 20.0, "scale": 0.1}
    sgd = {f"{role}_optimizer": partial(SGD, lr=rate) for role, rate in rates.items()}
    steps = STN(stn, **sgd, entropy_weight=0.01)
    generator = torch.Generator()
    generator.set_state(steps.perturbations.get_state())

    v0 = model.weight.detach().clone().requires_grad_()
    U, V = (p.detach().clone().requires_grad_() for p in (stn.response.weight.U, stn.response.weight.V))
    raw, raw_scale = (p.detach().clone().requires_grad_() for p in (stn.hparams.raw, stn.hparams.raw_scale))
    centre = raw.detach().clone()

    def weights_B(raw_BH):
        return v0 + ((raw_BH - centre) @ V.t())[:, None, :] * U  # rows are those of the longer side, the inputs

    def sample(size):
        return raw + F.softplus(raw_scale) * torch.randn(size, 1, generator=generator, dtype=torch.float64)

    def descend(loss, parameters, rates):
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient, rate in zip(parameters, gradients, rates, strict=True):
            parameter.data -= rate * gradient

    batches = classification_batches(0)
    for x, y in [*batches, *batches]:
        raw_BH = sample(len(x)).detach()
        W = weights_B(raw_BH)
        decay = (0.5 * torch.sigmoid(raw_BH[:, 0]) * W.square().sum((1, 2))).mean()
        descend(F.cross_entropy(torch.einsum("boi,bi->bo", W, x), y) + decay, [v0, U, V], [0.1] * 3)
        raw_BH = sample(len(x))
        valid = F.cross_entropy(torch.einsum("boi,bi->bo", weights_B(raw_BH), x), y)
        descend(valid - 0.01 * F.softplus(raw_scale).log().sum(), [raw, raw_scale], [20.0, 0.1])
        assert not steps.inner_step((x, y)).skipped
        steps.outer_step((x, y))

    assert (raw - centre).abs() > 0.01
    torch.testing.assert_close(stn.hparams.raw.data, raw.data)
    torch.testing.assert_close(stn.response.weight.V.data, V.data)
    torch.testing.assert_close(model.weight.data, weights_B(raw[None])[0].detach())


@pytest.mark.filterwarnings("ignore:The model has batch norms")
def test_stn_trains_and_tunes_through_the_trainer():
    stn = wrapped(nn.BatchNorm1d(8))
    data = [(torch.randn(8, 6).double(), torch.randint(0, 3, (8,))) for _ in range(6)]
    trainer = BilevelTrainer(stn, train=data[:4], valid=data[4:], algorithm=STN(stn))
    result = trainer.fit(3, warmup_epochs=1, train_steps=2)
    assert result.values != result.schedule[0].values
    assert result.skipped == 0
    assert stn.model[1].running_mean.abs().sum() > 0


def test_learning_the_response_does_not_touch_the_training_of_the_model():
    data = classification_batches(0)
    trained = []
    for algorithm in (stn_fx.DeltaSTN, FixedHyperparameters):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3)).double()
        stn = stn_fx.transform(model, "dropout,input_dropout,mixup,weight_decay", (data[0][0],), seed=0)
        steps = algorithm(stn, loss=F.cross_entropy)
        for batch in (*data, *data):
            steps.inner_step(batch)
        trained.append(model.state_dict())
    for name, tensor in trained[0].items():
        assert torch.equal(tensor, trained[1][name]), name


def response_gradients(step, stn, batch, draws):
    """Gradients (draws, parameters) of response updates that change nothing."""
    steps = DeltaSTN(stn, response_optimizer=partial(SGD, lr=0.0), response_step=step)
    batch, found = steps.prepare(batch), []
    for _ in range(draws):
        steps.response_step(steps, batch)
        found.append(torch.cat([p.grad.flatten() for p in stn.response_parameters()]))
    return torch.stack(found)


@pytest.mark.parametrize("way", [Linearized, WithoutLinearization])
def test_antithetic_perturbations_leave_the_gradient_and_take_most_of_its_noise(way):
    x, y = torch.randn(16, 6).double(), torch.randint(0, 3, (16,))
    both, single = (
        response_gradients(way(antithetic), wrapped(hparams="dropout"), (x, y), draws=400)
        for antithetic in (True, False)
    )
    error = ((both.var(0) + single.var(0)) / 400).sqrt()
    assert ((both.mean(0) - single.mean(0)).abs() < 5 * error + 1e-12).all()
    # Two passes instead of one halve the variance by themselves.
    assert both.var(0).sum() < 0.25 * single.var(0).sum()


class Noisy(nn.Module):
    """Draws random numbers of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.second(h + torch.randn_like(h))


def test_the_opposite_perturbation_sees_the_same_masks_and_the_models_own_random_numbers():
    torch.manual_seed(0)
    x, y = torch.randn(5, 6).double(), torch.randint(0, 3, (5,))
    stn = stn_fx.transform(Noisy().double(), "dropout", (x,), seed=0).train()
    seen, linearize = [], stn.linearize
    stn.linearize = lambda *inputs, raw: seen.append((raw, *linearize(*inputs, raw=raw))) or seen[-1][1:]
    steps = DeltaSTN(stn, response_step=Linearized())
    with torch.no_grad():
        stn.hparams.raw.fill_(1.0)  # high rates, so that other masks would show
        stn.hparams.raw_scale.fill_(-12.0)  # perturbations so small that no mask changes
    steps.inner_step((x, y))
    (raw, primal, _), (opposite, again, _) = seen
    torch.testing.assert_close(raw + opposite, 2 * stn.hparams.raw.detach().expand_as(raw))
    assert not torch.equal(raw, opposite)
    torch.testing.assert_close(primal, again, rtol=1e-4, atol=1e-4)
    steps.inner_step((x, y))
    assert not torch.allclose(seen[2][1], primal, rtol=1e-2, atol=1e-2)


def test_the_opposite_of_a_global_sample_lies_on_the_other_side_of_the_initial_value():
    space = make_space()
    raw_BH = GlobalSampling(0.5).inner(space, Rows(0, 6, 6), torch.Generator().manual_seed(0))
    initial_H = torch.tensor([each.raw_initial() for each in space.resolved], dtype=torch.float64)
    middle_BH = (raw_BH + GlobalSampling(0.5).opposite(space, raw_BH)) / 2
    torch.testing.assert_close(middle_BH, initial_H.expand(6, 2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_stn_moves_both_uses_of_a_tied_weight():
    """At hyperparameters away from the initial ones, by autograd through the model itself, one example at a time."""
    torch.manual_seed(0)
    model, x, y = Tied().double(), torch.randn(7, 6, dtype=torch.float64), torch.randint(3, (7,))
    stn = stn_fx.transform(model, "label_smoothing", (x,), seed=0)
    for parameter in stn.response_parameters():
        parameter.data.copy_(0.3 * torch.randn_like(parameter))
    centre_H = stn.hparams.raw.detach().clone()
    raw_BH = centre_H + torch.randn(7, 1, dtype=torch.float64)
    stn.hparams.raw.data.add_(0.7)
    steps = STN(stn)
    shifts = steps._from_centre()
    weights = dict(model.named_parameters())
    base = {name: w + shifts[name] - shifts[name].detach() if name in shifts else w for name, w in weights.items()}
    loss = F.cross_entropy(stn.respond_in_training(x, raw=raw_BH, base=base), y)
    learned = list(stn.response_parameters())
    found = torch.autograd.grad(loss, learned)

    constant = {name: w.detach() - shifts[name].detach() if name in shifts else w for name, w in weights.items()}
    losses = []
    for example in range(len(x)):
        change = stn.weight_response(raw_BH[example] - centre_H)
        moved = {name: v + change[name] if name in change else v for name, v in constant.items()}
        output = torch.func.functional_call(model, moved, (x[example : example + 1],))
        losses.append(F.cross_entropy(output, y[example : example + 1]))
    expected = torch.autograd.grad(torch.stack(losses).mean(), learned)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_gradients_that_wait_for_others_are_dropped_before_another_fit():
    """Else its first update would be of an old batch too, and its outer steps within the gathering of gradients."""
    torch.manual_seed(0)
    stn = wrapped()
    data = [(torch.randn(8, 6).double(), torch.randint(3, (8,))) for _ in range(8)]
    trainer = BilevelTrainer(stn, train=data[:4], valid=data[4:], updates=UpdateOptions(accumulate=3))
    updaters = trainer.algorithm.updaters
    trainer.fit(2, warmup_epochs=0, train_steps=1)
    assert updaters["base"]._gathered == 2
    seen = []

    class Watch(Callback):
        def inner_step_ended(self, trainer, epoch, record):
            seen.append((updaters["base"]._gathered, updaters["response"]._gathered))

    trainer.fit(1, warmup_epochs=0, train_steps=1, callbacks=[Watch()])
    assert seen == [(1, 1), (2, 2), (0, 0), (1, 0)]

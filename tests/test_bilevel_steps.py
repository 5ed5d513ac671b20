import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bilevel_fake import FakeSelfTuningModule, classification_batches
from torch import nn
from torch.optim import SGD, AdamW, RMSprop

import stn_fx
from stn_fx.bilevel import DeltaSTN, EveryKth, FixedHyperparameters, Linearized, Objective, UpdateOptions
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
    steps.inner_step(BATCH)
    learning = [("base", True), ("linearize", True), ("linearize", True)]  # a perturbation and its opposite
    assert stn.calls == [*learning, ("respond", False), ("base", True)]
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
    still = partial(SGD, lr=0.0)
    steps = DeltaSTN(stn, lambda output, target: 0 * output.sum(1), base_optimizer=still, response_optimizer=still)
    generator = torch.Generator()
    generator.set_state(steps.perturbations.get_state())
    actual = steps.inner_step(BATCH).response_loss
    raw_BH = stn.hparams.sample(len(BATCH[0]), generator).detach()
    raw_BH = torch.cat([raw_BH, 2 * stn.hparams.raw.detach() - raw_BH])
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
    DeltaSTN(make("weight_decay"), response_optimizer=partial(AdamW, lr=0.1))


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
    assert len(steps.inner_step(BATCH).skipped) == 2
    assert f"validation loss of the response pass is {bad}" in steps.outer_step(BATCH).skipped[0]
    assert not changed(before, groups(stn))
    assert not steps.healthy


def test_too_many_skipped_updates_in_a_row_stop_with_a_diagnosis():
    stn = make()
    factor = [float("nan")]
    steps = DeltaSTN(
        stn,
        lambda output, target: F.cross_entropy(output, target) * factor[0],
        updates=UpdateOptions(skip_limit=2),
        response_step=EveryKth(Linearized(), 2),
    )
    for _ in range(2):
        steps.inner_step(BATCH)
    factor[0] = 1.0  # one that is applied begins the count anew
    assert not steps.inner_step(BATCH).skipped
    assert steps.healthy
    factor[0] = float("nan")
    for _ in range(2):
        steps.inner_step(BATCH)
    with pytest.raises(DivergedError, match=r"base pass is nan.* 3 in a row .* learning rate of the base optimizer"):
        steps.inner_step(BATCH)


def test_statistics_of_norms_are_put_back_when_an_update_is_skipped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    stn = stn_fx.transform(model, "weight_decay", (torch.randn(4, 8),))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    steps = DeltaSTN(stn)
    assert steps.inner_step((torch.full((4, 8), float("nan")), torch.zeros(4, dtype=torch.long))).skipped
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    steps.inner_step((torch.randn(4, 8), torch.zeros(4, dtype=torch.long)))
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_nothing_is_applied_when_a_gradient_is_not_finite():
    stn = make()
    # The derivative of sqrt is infinite at zero, where its value is finite.
    steps = DeltaSTN(stn, lambda output, target: torch.sqrt(0 * output.square().sum(1)))
    before = groups(stn)
    assert "gradient" in steps.inner_step(BATCH).skipped[0]
    assert not changed(before, groups(stn))


@pytest.mark.parametrize("base_lr", [0.1, 0.0])
def test_gradients_of_several_batches_are_averaged_into_one_update(base_lr):
    batches = classification_batches(0)[:2]
    options = {"base_optimizer": partial(SGD, lr=base_lr), "response_optimizer": partial(SGD, lr=0.1)}
    one, two = make(), make()
    DeltaSTN(one, **options).inner_step([torch.cat(each) for each in zip(*batches, strict=True)])
    steps = DeltaSTN(two, **options, updates=UpdateOptions(accumulate=2))
    before = groups(two)
    steps.inner_step(batches[0])
    assert not changed(before, groups(two))
    steps.inner_step(batches[1])
    torch.testing.assert_close(two.model.weight, one.model.weight)
    if not base_lr:  # else the first batch's linearized pass is before the update of the base, not after it
        torch.testing.assert_close(two.G, one.G)


def test_an_accumulated_update_with_one_bad_loss_is_skipped_as_a_whole():
    stn = make()
    steps = DeltaSTN(stn, updates=UpdateOptions(accumulate=2), response_step=EveryKth(Linearized(), 2))
    before = groups(stn)
    bad = (BATCH[0] * float("nan"), BATCH[1])
    records = [steps.inner_step(batch) for batch in (bad, BATCH)]
    assert not changed(before, groups(stn))
    assert [len(record.skipped) for record in records] == [0, 2], "one update of each group, told where it was due"
    for _ in range(2):
        steps.inner_step(BATCH)
    assert changed(before, groups(stn)) == {"base"}  # the response learns in every second update
    for _ in range(2):
        steps.inner_step(BATCH)
    assert changed(before, groups(stn)) == {"base", "response"}


def test_gradients_are_clipped_by_their_norm():
    stn = make()
    weights = torch.cat([p.detach().flatten() for p in stn.model.parameters()])
    options = UpdateOptions(clip_norm=1e-3)
    DeltaSTN(stn, base_optimizer=partial(SGD, lr=1.0), updates=options).inner_step(BATCH)
    moved = torch.cat([p.detach().flatten() for p in stn.model.parameters()]) - weights
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    "options", [{"accumulate": 0}, {"clip_norm": 0.0}, {"skip_limit": -1}, {"autocast": torch.float16}]
)
def test_update_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        UpdateOptions(**options)


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


def test_the_first_outer_step_is_no_longer_than_others():
    stn = make()
    steps = DeltaSTN(stn)
    for _ in range(2):
        steps.inner_step(BATCH)
    before = [stn.hparams.raw.detach().clone(), stn.hparams.raw_scale.detach().clone()]
    steps.outer_step(BATCH)
    for old, new in zip(before, (stn.hparams.raw, stn.hparams.raw_scale), strict=True):
        assert 0.02 < (new - old).abs().max() < 0.0301


# A response of low rank is still so small after three steps that rounding shows in its hypergradient.
@pytest.mark.parametrize(("response", "of_hyper"), [("rowwise", 0.99), (stn_fx.LowRank(2), 0.9)])
@pytest.mark.parametrize("hparams", ["dropout,weight_decay", "dropout,weight_decay,label_smoothing"])
def test_bfloat16_autocast_gives_nearly_the_same_gradients(hparams, response, of_hyper):
    def gradients(dtype):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(144, 16), nn.Tanh(), nn.Linear(16, 24), nn.Linear(24, 3))
        x, y = torch.randn(8, 1, 8, 8), torch.arange(8) % 3
        stn = stn_fx.transform(model, hparams, (x,), response=response, seed=0)
        # The response learns in the last step too; from the difference of two passes, which doubles what rounding does.
        steps = DeltaSTN(stn, response_step=Linearized(), updates=UpdateOptions(autocast=dtype))
        for _ in range(3):
            steps.inner_step((x, y))
        steps.outer_step((x, y))
        groups = {"base": stn.base_parameters(), "response": stn.response_parameters(), "hyper": [stn.hparams.raw]}
        assert all(p.dtype == torch.float32 for p in stn.parameters())
        return {role: torch.cat([p.grad.flatten() for p in each]) for role, each in groups.items()}

    full, lowered = gradients(None), gradients(torch.bfloat16)
    for role in full:
        assert not torch.equal(full[role], lowered[role])
        agreement = torch.cosine_similarity(full[role], lowered[role], dim=0)
        assert agreement > (of_hyper if role == "hyper" else 0.99), f"{role}: {agreement:.3f}"


def test_the_linearized_pass_leaves_statistics_over_parameters_alone():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 4))
            self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(torch.tanh(x @ self.norm(self.table).t() @ self.table))

    torch.manual_seed(0)
    model, x, y = Table(), torch.randn(8, 4), torch.arange(8) % 3
    twin = copy.deepcopy(model)
    steps = stn_fx.DeltaSTN(stn_fx.transform(model, "weight_decay", (x,), seed=0))
    plain = FixedHyperparameters(stn_fx.transform(twin, "weight_decay", (x,), seed=0, response=None))
    for _ in range(4):
        steps.inner_step((x, y))
        plain.inner_step((x, y))
    for mine, other in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, other)
    assert model.norm.running_mean.any()

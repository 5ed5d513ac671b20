"""`SharedForward`: one forward for the updates of weights and response gives what two forwards would give."""

import copy
from functools import partial

import pytest
import torch
from oracles import Subject
from rule_cases import CASES, Case
from torch import nn
from torch.optim import SGD
from torch.utils._pytree import tree_leaves

import stn_fx
from stn_fx.bilevel import (
    BilevelTrainer,
    DeltaSTN,
    FixedHyperparameters,
    GlobalSampling,
    Linearized,
    SharedForward,
    UpdateOptions,
)
from stn_fx.bilevel.mixing import mix
from stn_fx.bilevel.penalties import penalties
from stn_fx.bilevel.replicas import Rows
from stn_fx.errors import InputError, StnError
from stn_fx.rules import Rule, load_builtin_rules

SEED = 7

UNTRAINABLE = ("RecurrentRule", "OpaqueRule")


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("each", CASES, ids=lambda each: each.name)
def test_one_forward_gives_both_gradients(each: Case) -> None:
    stn = Subject(each.build, each.inputs, each.hparams, **each.options).stn
    stn.train()
    given = each.inputs(4)
    args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
    compiled, inputs = stn._prepare(args, kwargs)
    if set(UNTRAINABLE) & set(each.rules):
        with pytest.raises(StnError, match="Use DeltaSTN instead"):
            SharedForward(stn)
        return
    noise = torch.randn(1, len(stn.hparams), generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    raw_BH = (stn.hparams.raw.detach() + 0.3 * noise).expand(compiled.captured.batch_size(inputs), -1)
    buffers = {name: buffer.clone() for name, buffer in stn.model.named_buffers()}

    def passed(run, role):
        """Outputs of a pass and their gradients, and the buffers after it; from the same buffers and random numbers."""
        stn.model.load_state_dict(buffers, strict=False)
        stn.generator().manual_seed(SEED)
        torch.manual_seed(SEED)
        outputs = [leaf for leaf in run() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        parameters = [p for p in getattr(stn, f"{role}_parameters")() if p.requires_grad]
        projected = projections(outputs)
        found = torch.autograd.grad(projected, parameters, allow_unused=True, materialize_grads=True)
        return [*outputs, *found], [buffer.clone() for buffer in stn.model.buffers()]

    def base():
        values = stn.hparams.constrain(raw_BH)
        return compiled.base(stn._state(compiled), {}, values, None, stn._draws(), *inputs)

    def joint(tangent):
        trained = stn.linearize_and_train(*args, raw=raw_BH, **kwargs)
        if tangent:
            return [*tree_leaves(trained.tangent), *trained.activation_tangents]
        return [*tree_leaves(trained.primal), *trained.activations]

    def linearized():
        with stn.watching() as watched:
            _, tangent = stn.linearize(*args, raw=raw_BH, **kwargs)
        assert not watched, "no case here looks at activations"
        return tree_leaves(tangent)

    expected, statistics = passed(base, "base")
    trained, its_statistics = passed(partial(joint, tangent=False), "base")
    assert any(gradient.abs().sum() > 0 for gradient in trained)
    assert_same(trained, expected)
    assert_same(its_statistics, statistics)
    assert_same(passed(partial(joint, tangent=True), "response")[0], passed(linearized, "response")[0])


def projections(leaves):
    """A scalar that every number of the outputs has a part in."""
    generator = torch.Generator().manual_seed(SEED)
    return sum((leaf * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)).sum() for leaf in leaves)


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def noisy(hparams="dropout,weight_decay,label_smoothing,l1,activation_regularization@0,mixup"):
    """A wrapped network with dropout and batch norm, and a response that is not zero."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)]
    stn = stn_fx.transform(nn.Sequential(*layers).double(), hparams, (torch.randn(4, 6).double(),), seed=0)
    with torch.no_grad():
        for parameter in stn.response_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return stn.train()


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 6, generator=generator).double(), torch.randint(0, 3, (8,), generator=generator))
        for _ in range(count)
    ]


RATES = {"base_optimizer": partial(SGD, lr=0.1), "response_optimizer": partial(SGD, lr=0.1)}


@pytest.mark.parametrize("antithetic", [False, True])
def test_both_updates_are_those_of_passes_of_their_own(antithetic):
    """The response's against `DeltaSTN` at the same perturbations and masks, the weights' against the base graph."""
    (batch,) = batches(1)
    stn, twin = noisy(), noisy()
    shared = SharedForward(stn, every=1, antithetic=antithetic, **RATES)
    separate = DeltaSTN(twin, response_step=Linearized(antithetic), **RATES)
    start = [p.detach().clone() for p in twin.base_parameters()]
    for mine, device in zip(separate.response_masks.values(), stn._generators, strict=False):
        mine.set_state(stn.generator(device).get_state())  # its response learns by masks of its own
    raw_BH = shared.sampling.inner(
        stn.hparams, Rows(0, 8, 8), torch.Generator().set_state(shared.perturbations.get_state())
    ).detach()
    record = shared.inner_step(batch)
    with stn_fx.bilevel.algorithm.training_mode(twin):
        outcome = separate.response_step(separate, separate.prepare(batch))
    assert record.response_loss == pytest.approx(outcome.loss, rel=1e-12)
    assert_same(list(stn.response_parameters()), list(twin.response_parameters()))

    table = twin.hparams.constrain(raw_BH)
    values = dict(zip(twin.hparams.names, table.unbind(-1), strict=True))
    twin.generator().manual_seed(0)
    with twin.watching() as seen:
        mixed = mix(twin, separate.prepare(batch), values)
        compiled, inputs = twin._prepare(mixed.batch.inputs, {})
        output = twin._handed_out(
            compiled.captured.training, compiled.base(twin._state(compiled), {}, table, None, twin._draws(), *inputs)
        )
    targeted = mixed.with_targets(output)
    loss = separate.objective.training_loss(output, targeted, values)
    loss = sum(penalties(twin, output, values, None, targeted, seen), loss)
    assert record.loss == pytest.approx(loss.item(), rel=1e-12)
    expected = [
        p - 0.1 * g for p, g in zip(start, torch.autograd.grad(loss, list(twin.base_parameters())), strict=True)
    ]
    assert_same([p.detach() for p in stn.base_parameters()], expected)
    assert_same(list(stn.model.buffers()), list(twin.model.buffers()))


def test_between_its_steps_weights_are_trained_at_the_current_hyperparameters():
    stn, twin = noisy("weight_decay,label_smoothing"), noisy("weight_decay,label_smoothing")
    steps = SharedForward(stn, every=3, **RATES)
    records = [steps.inner_step(batch) for batch in batches(7)]
    assert [record.response_loss is not None for record in records] == [True, False, False, True, False, False, True]
    fixed = FixedHyperparameters(twin, base_optimizer=RATES["base_optimizer"])
    first, second, *_ = batches(7)
    again = SharedForward(twin, every=3, **RATES)
    again.inner_step(first)
    assert fixed.inner_step(second).loss == records[1].loss


def test_both_perturbations_see_the_buffers_as_they_are():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3).double()
            self.register_buffer("steps", torch.ones((), dtype=torch.float64))

        def forward(self, x):
            if self.training:
                self.steps.add_(1)
            return self.linear(x) / self.steps

    def wrapped():
        torch.manual_seed(0)
        return stn_fx.transform(
            Counting(), "weight_decay,label_smoothing", (torch.randn(4, 6).double(),), seed=0
        ).train()

    (batch,), stn, twin = batches(1), wrapped(), wrapped()
    SharedForward(stn, every=1, **RATES).inner_step(batch)
    separate = DeltaSTN(twin, response_step=Linearized(), **RATES)
    separate.response_step(separate, separate.prepare(batch))
    assert_same(list(stn.response_parameters()), list(twin.response_parameters()))
    assert stn.model.steps == 2


def test_the_opposite_pass_leaves_the_masks_of_training_alone():
    losses = []
    for antithetic in (False, True):
        stn = noisy("dropout,weight_decay")
        steps = SharedForward(stn, every=1, antithetic=antithetic, **RATES)
        losses.append([steps.inner_step(batch).loss for batch in batches(4)])
    assert losses[0] == losses[1]


def test_a_bad_batch_changes_nothing():
    stn = noisy()
    steps = SharedForward(stn, every=1)
    (x, y), other = batches(2)
    steps.inner_step(other)
    before = [tensor.clone() for tensor in stn.state_dict().values() if isinstance(tensor, torch.Tensor)]
    assert len(steps.inner_step((x * float("nan"), y)).skipped) == 2
    after = [tensor for tensor in stn.state_dict().values() if isinstance(tensor, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("updates", [UpdateOptions(accumulate=2), UpdateOptions(clip_norm=0.1)])
def test_it_trains_tunes_and_goes_on(updates):
    def trained(stn, parts):
        data = batches(6)
        state = None
        for epochs in parts:
            steps = SharedForward(stn, every=2, updates=updates)
            if state is not None:
                steps.load_state_dict(state)
            for _ in range(epochs):
                for batch in data[:3]:
                    steps.inner_step(batch)
                steps.outer_step(data[4])
            state = copy.deepcopy(steps.state_dict())
        return [p.detach().clone() for p in stn.parameters()]

    whole, resumed = trained(noisy(), [4]), trained(noisy(), [1, 3])
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    stn = noisy()
    initial = stn.hparams.values()
    result = BilevelTrainer(
        stn, train=batches(4), valid=batches(2, 1), algorithm=SharedForward(stn, updates=updates)
    ).fit(2, warmup_epochs=1, train_steps=2)
    assert result.values != initial
    assert result.skipped == 0


def test_a_rule_of_the_users_own_is_not_taken_to_train():
    class OwnTanh(Rule):
        name = "own tanh"
        targets = (torch.ops.aten.tanh.default,)

        def linearize(self, emit, node):
            primal = emit.copy(node)
            slope = emit.call(torch.rsub, emit.call(torch.square, primal), 1.0)
            return primal, emit.call(torch.mul, slope, emit.tangent(node.args[0]))

    def transformed(known):
        rules = load_builtin_rules().copy()
        rule = OwnTanh()
        rule.differentiable_primal = known
        rules.add(rule)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        return stn_fx.transform(model, "weight_decay", (torch.randn(4, 6).double(),), rules=rules)

    with pytest.raises(StnError, match="own tanh at 1 cannot train"):
        SharedForward(transformed(None))
    assert not SharedForward(transformed(True)).inner_step(batches(1)[0]).skipped


def test_options_are_checked():
    with pytest.raises(InputError, match="every=0"):
        SharedForward(noisy(), every=0)
    with pytest.raises(InputError, match="response_step"):
        SharedForward(noisy(), response_step=Linearized())
    with pytest.raises(InputError, match="around the initial"):
        SharedForward(noisy(), sampling=GlobalSampling())
    assert SharedForward(noisy()).description() != SharedForward(noisy(), every=3).description()

"""Terms of the loss beside the user's: norms of groups of responded weights, confidence penalty, mixed targets."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stn_fx
from stn_fx.augment import Draws
from stn_fx.augment.mixing import draw_cutmix, draw_mixup
from stn_fx.bilevel import STN, Objective, WithoutLinearization
from stn_fx.bilevel.batch import Batch
from stn_fx.bilevel.decay import Decay
from stn_fx.bilevel.mixing import mix
from stn_fx.bilevel.penalties import entropy, penalties
from stn_fx.bilevel.updates import named_values
from stn_fx.errors import InputError, UnknownHyperparameterError
from stn_fx.hparams.weight_groups import weight_groups
from stn_fx.verify.subject import randomise_response

X = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def wrapped(hparams, response="rowwise"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    stn = stn_fx.transform(model.double(), hparams, (X,), response=response, seed=0)
    randomise_response(stn, torch.Generator().manual_seed(1))
    return stn


def responded(stn, raw_H):
    changes = stn.weight_response(raw_H - stn.hparams.raw.detach())
    return {name: p.detach() + changes[name] for name, p in stn.model.named_parameters()}


def test_each_weight_is_in_one_group():
    weights = {"a.weight": 2, "a.bias": 1, "b.0.weight": 4, "b.1.weight": 2, "norm": 1}
    names = ["weight_decay", "weight_decay@b", "weight_decay@b.0", "weight_decay@**.bias"]
    assert weight_groups(names, weights) == {
        "weight_decay": ["a.weight"],
        "weight_decay@b": ["b.0.weight", "b.1.weight"],
        "weight_decay@b.0": [],
        "weight_decay@**.bias": ["a.bias"],
    }


@pytest.mark.parametrize("response", ["rowwise", stn_fx.LowRank(2)])
@pytest.mark.parametrize("hparams", ["weight_decay", "weight_decay,weight_decay@0,weight_decay@5.bias", "l1,l1@3"])
def test_norms_are_those_of_the_responded_weights(hparams, response):
    stn = wrapped(hparams, response)
    raw_BH = (stn.hparams.raw + 1e-3 * torch.randn(5, len(stn.hparams), dtype=torch.float64)).detach()
    values = named_values(stn, raw_BH)
    weights = {name: p.ndim for name, p in stn.model.named_parameters()}
    groups = weight_groups(stn.hparams.names, weights)
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        dense = responded(stn, raw_BH[i])
        for name, members in groups.items():
            for member in members:
                norm = dense[member].abs().sum() if name.startswith("l1") else 0.5 * dense[member].square().sum()
                expected = expected + values[name][i] * norm / 5
    actual = sum(penalties(stn, None, values, raw_BH))
    torch.testing.assert_close(actual, expected, rtol=1e-4 if "l1" in hparams else 1e-9, atol=0)
    same = stn.hparams.raw.detach().expand(5, -1)
    base = sum(penalties(stn, None, named_values(stn, same)))
    torch.testing.assert_close(base, sum(penalties(stn, None, named_values(stn, same), same)))


@pytest.mark.parametrize("response", ["rowwise", stn_fx.LowRank(2)])
@pytest.mark.parametrize("perturbed", [False, True])
def test_decay_in_place_is_that_of_autograd(perturbed, response):
    stn = wrapped("weight_decay,weight_decay@0,weight_decay@5.bias", response)
    raw_BH = (stn.hparams.raw + 0.1 * torch.randn(5, len(stn.hparams), dtype=torch.float64)).detach()
    values = named_values(stn, raw_BH)
    term = sum(penalties(stn, None, values, raw_BH if perturbed else None))
    trained = list(stn.response_parameters() if perturbed else stn.base_parameters())
    expected = torch.autograd.grad(term, trained, allow_unused=True)
    decay = Decay(stn, values, raw_BH if perturbed else None)
    torch.testing.assert_close(decay.value, term.detach())
    left_out, *rest = [(p, g) for p, g in zip(trained, expected, strict=True) if g is not None]
    decay.add_gradient(0.5, [p for p, _ in rest])
    assert left_out[0].grad is None
    for parameter, gradient in rest:
        torch.testing.assert_close(parameter.grad, 0.5 * gradient)
    Decay(stn, values, raw_BH if perturbed else None).add_gradient(0.5, trained)
    torch.testing.assert_close(left_out[0].grad, 0.5 * left_out[1])
    for parameter, gradient in rest:
        torch.testing.assert_close(parameter.grad, gradient)


def test_confidence_penalty_is_the_entropy():
    output = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(entropy(output), torch.distributions.Categorical(logits=output).entropy())
    dense = torch.randn(4, 3, 5, 2, dtype=torch.float64)
    each = torch.distributions.Categorical(logits=dense.movedim(1, -1)).entropy()
    torch.testing.assert_close(entropy(dense), each.mean((1, 2)))
    with pytest.raises(InputError, match="needs scores"):
        entropy({"logits": output})


def test_groups_that_match_nothing_and_optimizers_with_weight_decay_are_refused():
    with pytest.raises(UnknownHyperparameterError, match=r"weight_decay@layer9.*matches no trained parameter"):
        wrapped("weight_decay@layer9")
    stn = wrapped("weight_decay@0")
    with pytest.raises(InputError, match="weight decay of its own"):
        stn_fx.DeltaSTN(stn, base_optimizer=torch.optim.AdamW(stn.base_parameters()))


def test_the_report_says_what_each_pattern_matched():
    report = wrapped("dropout@0, weight_decay@3, weight_decay@5.bias, rotation@*").report
    matched = {row.text: row.matched for row in report.matches}
    assert matched == {
        "dropout@0": ("0",),
        "weight_decay@3": ("3.weight",),
        "weight_decay@5.bias": ("5.bias",),
        "rotation@*": (report.sites[0].name,),
    }
    assert "weight_decay@3 matched 3.weight" in str(report)


@pytest.mark.parametrize("hparams", ["mixup", "cutmix", "mixup,cutmix,label_smoothing,l1,confidence_penalty"])
def test_a_run_with_all_of_them(hparams):
    stn = wrapped(hparams)
    steps = stn_fx.DeltaSTN(stn)
    before = stn.hparams.raw.detach().clone()
    batch = (X, torch.tensor([0, 1, 2, 0, 1]))
    for _ in range(3):
        assert steps.inner_step(batch).loss == pytest.approx(1.1, abs=1.0)
        steps.outer_step(batch)
    assert (stn.hparams.raw != before).all()


# ---- mixing

MANY = 4000


def test_shares_follow_each_examples_beta():
    x = torch.zeros(MANY, 1)
    alpha = torch.cat([torch.full((MANY // 2,), 0.2), torch.full((MANY // 2,), 2.0)])
    share = draw_mixup(x, alpha, Draws(torch.Generator().manual_seed(0)), "m").share_B
    assert (share >= 0.5).all()
    for part, concentration in zip(share.split(MANY // 2), (0.2, 2.0), strict=True):
        beta = torch.distributions.Beta(concentration, concentration).sample((200_000,))
        assert part.mean().item() == pytest.approx(torch.maximum(beta, 1 - beta).mean().item(), abs=0.01)


@pytest.mark.parametrize("draw", [draw_mixup, draw_cutmix])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (1, 1, 1, 1), (6, 3, 7, 5)])
def test_alpha_zero_mixes_nothing(draw, shape):
    x = torch.randn(shape)
    for alpha in (0.0, 1e-22):
        mixture = draw(x, torch.full(shape[:1], alpha), Draws(), "m")
        assert torch.equal(mixture.inputs(x), x)
        assert (mixture.share_B == 1).all()
    assert draw(x, torch.ones(shape[:1]), Draws(), "m").inputs(x).shape == shape


def test_mixed_inputs_and_targets_agree():
    x = torch.eye(6).reshape(6, 6, 1, 1).expand(6, 6, 8, 9).contiguous()  # each image is of its own class everywhere
    for draw in (draw_mixup, draw_cutmix):
        mixture = draw(x, torch.ones(6), Draws(torch.Generator().manual_seed(0)), "m")
        torch.testing.assert_close(mixture.inputs(x).mean((2, 3)), mixture.targets(torch.eye(6)))


def test_the_loss_receives_mixed_soft_targets():
    stn = wrapped("mixup")
    batch = Batch((X, torch.tensor([0, 1, 2, 0, 1])), (X,))
    mixed = mix(stn, batch, {"mixup": torch.ones(5)})
    done = mixed.with_targets(torch.zeros(5, 3, dtype=torch.float64))
    expected = mixed.mixture.targets(F.one_hot(batch.content[1]).double())
    torch.testing.assert_close(done.content[1], expected)
    assert not torch.equal(done.inputs[0], X)
    named = Batch({"x": X, "labels": torch.randn(5)}, {"x": X})
    assert mix(stn, named, {"mixup": torch.ones(5)}).with_targets(None).content["labels"].shape == (5,)
    with pytest.raises(InputError, match="cutmix needs an image"):
        mix(stn, Batch((), (X[:, 0],)), {"cutmix": torch.ones(5)})


class SequenceFirst(nn.Module):
    """Scores (B, C) of a sequence (T, B, F)."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x_TBF):
        return self.score(x_TBF).mean(0)


@pytest.mark.parametrize("length", [5, 7])
def test_examples_are_mixed_along_the_batch_axis_wherever_it_is(length):
    x_TBF = torch.arange(5.0, dtype=torch.float64)[:, None].expand(length, 5, 4)  # an example holds its number
    stn = stn_fx.transform(SequenceFirst(), "mixup", (x_TBF,), batch_axis=1, seed=0)
    mixed = mix(stn, Batch((x_TBF, torch.arange(5) % 3), (x_TBF,)), {"mixup": torch.ones(5)})
    (ours_TBF,) = mixed.batch.inputs
    mixture = mixed.mixture
    number_B = mixture.inputs(torch.arange(5.0, dtype=torch.float64)[:, None])[:, 0]
    assert not torch.equal(number_B, torch.arange(5.0, dtype=torch.float64))
    torch.testing.assert_close(ours_TBF, number_B[:, None].expand(length, 5, 4))


class ImageAndWords(nn.Module):
    """Scores (B, C) of images and token numbers (B, T), or of two images."""

    def __init__(self):
        super().__init__()
        self.words, self.score = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, image, words):
        words = words.mean((2, 3)) if words.is_floating_point() else self.words(words).mean(1)
        return self.score(words * image.mean((1, 2, 3))[:, None])


@pytest.mark.parametrize(
    ("way", "other", "what"),
    [
        ("mixup", torch.zeros(5, 7, dtype=torch.long), r"int64 \(5, 7\)"),
        ("cutmix", torch.zeros(5, 4, 8, 8), r"float32 \(5, 4, 8, 8\)"),
    ],
)
def test_examples_of_which_only_a_part_can_be_mixed_are_refused(way, other, what):
    inputs = (torch.randn(5, 3, 8, 8), other)
    stn = stn_fx.transform(ImageAndWords(), way, inputs, seed=0)
    with pytest.raises(InputError, match=f"{way} mixes the targets.*{what} would stay"):
        mix(stn, Batch((*inputs, torch.zeros(5).long()), inputs), {way: torch.ones(5)})


@pytest.mark.parametrize("hparams", ["weight_decay@**,weight_decay@0", "weight_decay,l1@3.weight,l1@3.*,l1@3.bias"])
def test_a_pattern_that_is_left_without_weights_is_refused(hparams):
    with pytest.raises(UnknownHyperparameterError, match="no weights are left"):
        wrapped(hparams)


def test_the_loss_of_an_outer_step_is_the_validation_loss_alone():
    stn = wrapped("weight_decay,label_smoothing")
    steps = stn_fx.DeltaSTN(stn, entropy_weight=10.0)
    steps.prepare((X, torch.tensor([0, 1, 2, 0, 1])))
    with torch.no_grad():
        for parameter in stn.response_parameters():
            parameter.zero_()  # then it is that of the base pass
    expected = F.cross_entropy(stn.model.eval()(X), torch.tensor([0, 1, 2, 0, 1]))
    record = steps.outer_step((X, torch.tensor([0, 1, 2, 0, 1])))
    assert record.loss == pytest.approx(expected.item(), rel=1e-12)


def test_the_joint_loss_of_stn_has_the_gradient_of_the_norms_in_base_and_response():
    stn = wrapped("weight_decay,weight_decay@0,weight_decay@5.bias,l1@3")
    steps = STN(stn, Objective(train=lambda output, content, values: 0.0 * output.sum(1)))
    with torch.no_grad():
        stn.hparams.raw.add_(0.01)
    noise_BH = 1e-5 * torch.randn(5, len(stn.hparams), dtype=torch.float64)  # too little to change a weight's sign
    raw_BH = (stn.hparams.raw + noise_BH).detach()
    batch = steps.prepare((X, torch.zeros(5).long()))
    trained = [*stn.base_parameters(), *stn.response_parameters()]
    actual = torch.autograd.grad(steps._loss(batch, raw_BH), trained, allow_unused=True, materialize_grads=True)

    values = named_values(stn, raw_BH)
    centre_H = torch.tensor([each.raw_initial() for each in stn.hparams.resolved], dtype=torch.float64)
    moved = stn.weight_response(stn.hparams.raw.detach() - centre_H)
    w = {n: p + moved[n] - moved[n].detach() for n, p in stn.model.named_parameters()}
    groups = {
        name: members
        for entry in ("weight_decay", "l1")
        for name, members in weight_groups(
            [n for n in stn.hparams.names if n.startswith(entry)], {n: p.ndim for n, p in stn.model.named_parameters()}
        ).items()
    }
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        change = stn.weight_response(raw_BH[i] - stn.hparams.raw.detach())
        for name, members in groups.items():
            for dense in (w[member] + change[member] for member in members):
                norm = dense.abs().sum() if name.startswith("l1") else 0.5 * dense.square().sum()
                expected = expected + values[name][i] * norm / 5
    torch.testing.assert_close(
        actual,
        torch.autograd.grad(expected, trained, allow_unused=True, materialize_grads=True),
        rtol=1e-6,
        atol=1e-14,  # gradients of the response are as small as the displacement
    )


@pytest.mark.parametrize("algorithm", ["perturbed", "stn"])
def test_variants_mix_and_penalize(algorithm):
    stn = wrapped("mixup,cutmix,label_smoothing,l1,confidence_penalty,weight_decay@0,gaussian_noise")
    steps = STN(stn) if algorithm == "stn" else stn_fx.DeltaSTN(stn, response_step=WithoutLinearization())
    before = stn.hparams.raw.detach().clone()
    batch = (X, torch.tensor([0, 1, 2, 0, 1]))
    for _ in range(3):
        assert not steps.inner_step(batch).skipped
        steps.outer_step(batch)
    assert (stn.hparams.raw != before).all()

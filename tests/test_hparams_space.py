"""The space: values, sampling, derivatives, state, movement between dtypes."""

import copy
import io
import json
import math
import pickle

import pytest
import torch
from torch.func import grad, jvp, vmap

from stn_fx.errors import CheckpointError, InputError, OutOfBoundsError, UnknownHyperparameterError
from stn_fx.hparams import HyperparameterSpace, ResolvedHyperparameter, SiteContext, parse_hparams, resolve

# Forward-mode differentiation loads torch's own scripted decompositions, which warn since torch.jit is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")


def make(text="dropout,cutout,weight_decay(high=inf)", dtype=torch.float64):
    context = SiteContext(image_size=(32, 32))
    return HyperparameterSpace(
        [each for selection in parse_hparams(text) for each in resolve(selection, context, "layer1.0")], dtype=dtype
    )


@pytest.fixture
def space():
    return make()


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_starts_at_the_initial_values(space):
    assert space.names == ("dropout.layer1.0", "cutout.holes", "cutout.length", "weight_decay")
    assert list(space.values()) == list(space.names)
    assert list(space.values().values()) == pytest.approx([0.05, 1.0, 4.0, 5e-4], rel=1e-12)
    torch.testing.assert_close(space.scales(), torch.full((4,), 0.5, dtype=torch.float64))
    assert {name for name, _ in space.named_parameters()} == {"raw", "raw_scale"}
    assert make(dtype=None).raw.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_stay_within_bounds_and_discrete_ones_are_integers(dtype):
    space = make("dropout(low=0.1,high=0.3),cutout(length=3..7),weight_decay", dtype)
    for raw in (-1e4, -50.0, -1.0, 0.0, 2.0, 50.0, 1e4):
        with torch.no_grad():
            space.raw.fill_(raw)
        for resolved, value in zip(space.resolved, space.values().values(), strict=True):
            assert resolved.low <= value <= resolved.high
            assert not resolved.discrete or value == int(value)


def test_discrete_values_are_the_nearest_integers(space):
    raw = noise(500, 4).mul(3)
    values = space.constrain(raw)
    exact = 24 * torch.sigmoid(raw[:, 2])
    torch.testing.assert_close(space.column(values, "cutout.length"), exact.round(), rtol=0, atol=0)
    assert space.column(values, "cutout.length").unique().numel() > 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constrain_keeps_the_dtype_of_raw_and_any_leading_shape(space, dtype):
    for shape in ((4,), (0, 4), (3, 4), (2, 3, 4)):
        values = space.constrain(torch.zeros(shape, dtype=dtype))
        assert values.dtype == dtype
        assert values.shape == shape


def test_constrain_under_transforms(space):
    raw, tangent = noise(5, 4), noise(5, 4, seed=1)
    low, high = space.low_H, space.high_H
    slope = torch.where(torch.isfinite(high), (high - low) * torch.sigmoid(raw) * torch.sigmoid(-raw), raw.exp())

    def total(row):
        return space.constrain(row).sum()

    torch.testing.assert_close(grad(total)(raw), slope)
    torch.testing.assert_close(vmap(grad(total))(raw), slope)
    torch.testing.assert_close(jvp(space.constrain, (raw,), (tangent,))[1], slope * tangent)
    torch.testing.assert_close(vmap(space.constrain)(raw), space.constrain(raw))
    torch.testing.assert_close(jvp(vmap(grad(total)), (raw,), (tangent,))[0], slope)


def test_sampling_is_reparametrised(space):
    raw_BH = space.sample(6, torch.Generator().manual_seed(3))
    assert raw_BH.shape == (6, 4)
    eps = (raw_BH - space.raw).detach() / space.scales().detach()
    torch.testing.assert_close(space.perturb(eps), raw_BH)
    weight = noise(6, 4)
    raw_grad, scale_grad = torch.autograd.grad((weight * raw_BH).sum(), (space.raw, space.raw_scale))
    torch.testing.assert_close(raw_grad, weight.sum(0))
    torch.testing.assert_close(scale_grad, (weight * eps).sum(0) * torch.sigmoid(space.raw_scale))


def test_sampling_has_the_scale_and_is_reproducible(space):
    draw = [space.sample(20000, torch.Generator().manual_seed(seed)).detach() for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    torch.testing.assert_close(draw[0].mean(0), space.raw.detach(), rtol=0, atol=5 * 0.5 / math.sqrt(20000))
    torch.testing.assert_close(draw[0].std(0), space.scales().detach(), rtol=0.03, atol=0)


def test_entropy_is_that_of_the_gaussian(space):
    expected = torch.distributions.Normal(torch.zeros(4, dtype=torch.float64), space.scales()).entropy().sum()
    torch.testing.assert_close(space.entropy(), expected)
    assert torch.autograd.gradcheck(lambda _: space.entropy(), space.raw_scale)


def test_set_values(space):
    space.set_values({"dropout.layer1.0": 0.5, "cutout.length": 10})
    assert space.values()["dropout.layer1.0"] == pytest.approx(0.5)
    assert space.values()["cutout.length"] == 10.0
    before = space.raw.clone()
    with pytest.raises(OutOfBoundsError, match=r"cutout\.holes = 4 .* 0 and 4"):
        space.set_values({"dropout.layer1.0": 0.1, "cutout.holes": 4})
    assert torch.equal(space.raw, before)
    with pytest.raises(UnknownHyperparameterError, match=r"There are: dropout\.layer1\.0, cutout\.holes"):
        space.set_values({"dropout": 0.1})


def test_no_hyperparameters():
    space = HyperparameterSpace()
    assert len(space) == 0
    assert space.values() == {}
    assert space.sample(3).shape == (3, 0)
    assert space.constrain(space.sample(3)).shape == (3, 0)
    assert space.entropy().item() == 0.0
    space.load_state_dict(space.state_dict())


def test_names_are_distinct():
    one = ResolvedHyperparameter("a", "dropout", "rate", 0.0, 1.0, 0.5, 0.5)
    with pytest.raises(InputError, match="twice: a"):
        HyperparameterSpace([one, one])


def test_specs_are_json(space):
    specs = json.loads(json.dumps(space.specs(), allow_nan=False))
    assert [spec["name"] for spec in specs] == list(space.names)
    assert specs[3]["high"] is None


def test_state_dict_round_trip(space):
    space.set_values({"dropout.layer1.0": 0.5})
    file = io.BytesIO()
    torch.save(space.state_dict(), file)
    file.seek(0)
    other = make()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.values() == space.values()
    assert set(space.state_dict()) == {"raw", "raw_scale", "_extra_state"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dropout,cutout", "only in the checkpoint: weight_decay"),
        ("dropout(shared),cutout,weight_decay(high=inf)", "only here: dropout"),
        ("dropout,cutout(length=0..10),weight_decay(high=inf)", r"cutout\.length: high is 24\.0 .* and 10\.0 here"),
        ("dropout,cutout,weight_decay", "weight_decay: high is None"),
        ("cutout,dropout,weight_decay(high=inf)", "order"),
    ],
)
def test_a_checkpoint_of_other_hyperparameters_is_refused_and_changes_nothing(space, text, message):
    other = torch.nn.ModuleDict({"hparams": make(text)})
    before = copy.deepcopy(other["hparams"].raw)
    with pytest.raises(CheckpointError, match=message):
        other.load_state_dict({f"hparams.{key}": value for key, value in space.state_dict().items()})
    assert torch.equal(other["hparams"].raw, before)


def test_other_initial_values_and_scales_are_no_obstacle(space):
    other = make("dropout(initial=0.4),cutout,weight_decay(high=inf,scale=0.1)")
    other.load_state_dict(space.state_dict())
    assert other.values() == space.values()


def test_copies_are_independent(space):
    for other in (copy.deepcopy(space), pickle.loads(pickle.dumps(space))):
        assert other.values() == space.values()
        other.set_values({"dropout.layer1.0": 0.7})
        assert space.values()["dropout.layer1.0"] == pytest.approx(0.05)


def test_to(space):
    single = copy.deepcopy(space).float()
    assert {tensor.dtype for tensor in (single.raw, single.raw_scale, single.low_H)} == {torch.float32}
    assert list(single.values().values()) == pytest.approx(list(space.values().values()), rel=1e-5)
    assert copy.deepcopy(space).to("meta").raw.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_cuda_without_synchronising(space):
    space = space.cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    space.constrain(space.sample(4, generator))
    torch.cuda.set_sync_debug_mode("error")
    try:
        space.constrain(space.sample(4, generator)).sum().backward()
        space.entropy()
    finally:
        torch.cuda.set_sync_debug_mode("default")

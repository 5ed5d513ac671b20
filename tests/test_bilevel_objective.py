from collections import UserDict

import pytest
import torch
import torch.nn.functional as F

from stn_fx.bilevel.batch import Batch, split
from stn_fx.bilevel.label_smoothing import soft_targets
from stn_fx.bilevel.objective import Objective, as_objective
from stn_fx.errors import InputError

CPU = torch.device("cpu")
OUTPUT = torch.randn(4, 3, dtype=torch.float64)
TARGET = torch.tensor([0, 1, 2, 0])


def test_tuple_batches_have_their_target_last():
    assert split((1, 2, 3)) == ((1, 2), 3)
    assert split([1, 2]) == ((1,), 2)


@pytest.mark.parametrize("key", ["labels", "label", "target", "targets"])
def test_mapping_batches_have_their_target_under_a_known_key(key):
    assert split(UserDict({"input_ids": 1, key: 2})) == ({"input_ids": 1}, 2)


@pytest.mark.parametrize("content", [torch.zeros(2), (1,), {"x": 1}, {"labels": 1}, {"x": 0, "label": 1, "labels": 2}])
def test_batches_without_a_clear_target_are_refused_with_the_general_form(content):
    with pytest.raises(InputError, match="Objective"):
        split(content)


def test_keyword_inputs_reach_the_model_as_keywords():
    batch = as_objective(F.cross_entropy).batch(UserDict({"x": torch.ones(2), "labels": TARGET}), CPU)
    assert batch.feed(lambda x, extra: (x.sum().item(), extra), extra=5) == (2.0, 5)


def per_example_cross_entropy(output, target):
    return F.cross_entropy(output, target, reduction="none")


@pytest.mark.parametrize("loss", [F.cross_entropy, per_example_cross_entropy])
def test_label_smoothing_acts_per_example(loss):
    smoothing_B = torch.tensor([0.0, 0.1, 0.4, 0.9], dtype=torch.float64)
    actual = as_objective(loss).training_loss(OUTPUT, Batch((None, TARGET), ()), {"label_smoothing": smoothing_B})
    expected = torch.stack(
        [F.cross_entropy(OUTPUT[i : i + 1], TARGET[i : i + 1], label_smoothing=smoothing_B[i].item()) for i in range(4)]
    )
    torch.testing.assert_close(actual, expected.mean())


def test_autocast_does_not_round_the_smoothing_away():
    smoothing_B = torch.tensor([0.001, 0.002, 0.05, 0.051])
    with torch.autocast("cpu", torch.bfloat16):
        targets = soft_targets(OUTPUT.bfloat16(), TARGET, smoothing_B)
    torch.testing.assert_close(targets, soft_targets(OUTPUT.float(), TARGET, smoothing_B))


def test_soft_targets_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"shape \(4,\), the scores \(4, 3\)"):
        soft_targets(OUTPUT, torch.rand(4), torch.zeros(4))


def test_one_tensor_is_one_input():
    objective = Objective(train=lambda *_: None, inputs=lambda batch: batch["x"])
    x = torch.randn(5, 3)
    (found,) = objective.batch({"x": x}, x.device).inputs
    assert torch.equal(found, x)


def test_mappings_of_other_packages_become_dicts_wherever_they_are():
    x = torch.randn(2, 3)
    content = (UserDict(x=x, deep=[UserDict(y=x)]), x)
    batch = as_objective(F.cross_entropy).batch(content, torch.device("meta"))
    (found,) = batch.inputs
    assert type(found) is dict
    assert found["x"].is_meta
    assert type(found["deep"][0]) is dict
    assert found["deep"][0]["y"].is_meta


def test_label_smoothing_leaves_the_validation_loss_alone():
    hyperparameters = {"label_smoothing": torch.full((4,), 0.5)}
    actual = as_objective(F.cross_entropy).validation_loss(OUTPUT, Batch((None, TARGET), ()), hyperparameters)
    torch.testing.assert_close(actual, F.cross_entropy(OUTPUT, TARGET))


@pytest.mark.parametrize("loss", [F.nll_loss, F.multi_margin_loss])
def test_label_smoothing_beside_a_loss_without_soft_targets_is_refused(loss):
    with pytest.raises(InputError, match="soft targets"):
        as_objective(loss).training_loss(OUTPUT, Batch((None, TARGET), ()), {"label_smoothing": torch.zeros(4)})


def test_soft_targets_of_dense_predictions():
    output, target = torch.zeros(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    smoothed = soft_targets(output, target, torch.tensor([0.0, 0.3]))
    assert smoothed.shape == output.shape
    torch.testing.assert_close(smoothed.sum(1), torch.ones(2, 4, 5))
    assert smoothed[0].max() == 1
    torch.testing.assert_close(smoothed[1].max(), torch.tensor(0.8))


@pytest.mark.parametrize(
    ("output", "target"),
    [
        (torch.zeros(4), TARGET),
        ({"logits": OUTPUT}, TARGET),
        (OUTPUT, TARGET[:3]),
        (OUTPUT, torch.tensor([0, 1, -100, 2])),
    ],
)
def test_targets_that_cannot_be_smoothed_are_refused(output, target):
    with pytest.raises(InputError, match="label_smoothing"):
        soft_targets(output, target, torch.zeros(4))


def test_losses_of_other_shapes_are_refused():
    objective = as_objective(lambda output, target: (output - 1).square())
    with pytest.raises(InputError, match=r"\(4, 3\) for 4 examples"):
        objective.training_loss(OUTPUT, Batch((None, TARGET), ()), {"weight_decay": torch.zeros(4)})
    with pytest.raises(InputError, match="not a tensor"):
        as_objective(lambda output, target: 0.0).training_loss(OUTPUT, Batch((None, TARGET), ()), {})


def test_the_general_form_sees_output_batch_and_hyperparameters():
    objective = Objective(
        train=lambda output, batch, hyperparameters: output["y"] * batch["w"] + hyperparameters["weight_decay"],
        valid=lambda output, batch, hyperparameters: output["y"].mean(),
        inputs=lambda batch: {"x": batch["x"]},
    )
    batch = objective.batch({"x": torch.ones(2), "w": torch.tensor([1.0, 3.0])}, CPU)
    output = batch.feed(lambda x: {"y": 2 * x})
    values = {"weight_decay": torch.tensor([0.0, 1.0])}
    assert objective.training_loss(output, batch, values).item() == 4.5
    assert objective.validation_loss(output, batch, values).item() == 2.0


def test_a_loss_that_cannot_be_called_is_refused():
    with pytest.raises(InputError, match="str"):
        as_objective("cross_entropy")

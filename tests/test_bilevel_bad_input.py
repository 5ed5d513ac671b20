"""Bad input is an error that names the remedy, before any training time is spent."""

import pytest
import torch
import torch.nn.functional as F
from bilevel_fake import FakeSelfTuningModule, classification_batches
from torch import nn
from torch.optim import SGD
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

import stn_fx
from stn_fx.bilevel import STN, BilevelTrainer, Checkpoint, LearningRateSchedule, Linearized, Objective
from stn_fx.errors import InputError, UnknownHyperparameterError

TRAIN, VALID = classification_batches(0), classification_batches(1)
X, Y = (torch.cat(each) for each in zip(*TRAIN, strict=True))
DATA = TensorDataset(X, Y)


def fit(train=TRAIN, valid=VALID, loss=F.cross_entropy):
    """Train; what fails must do so before the first update."""
    torch.manual_seed(0)
    stn = FakeSelfTuningModule(nn.Linear(8, 3, dtype=torch.float64), "weight_decay")
    before = {name: parameter.clone() for name, parameter in stn.named_parameters()}
    try:
        BilevelTrainer(stn, loss, train=train, valid=valid).fit(2, warmup_epochs=1)
    except InputError:
        assert all(torch.equal(parameter, before[name]) for name, parameter in stn.named_parameters())
        raise


def test_loaders_of_different_structure_are_refused():
    with pytest.raises(InputError, match=r"different structure:\n.*float64 with 2 axes in training, float32 with 2"):
        fit(valid=[(x.float(), y) for x, y in VALID])
    stn = stn_fx.transform(nn.Bilinear(4, 4, 3), "weight_decay")
    a, b, y = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 3
    train = [{"input1": a, "input2": b, "label": y}]
    with pytest.raises(InputError, match=r"input3.*nothing in training, float32 with 2 axes in validation"):
        BilevelTrainer(stn, train=train, valid=[{name: x.clone() for name, x in train[0].items()} | {"input3": a}]).fit(
            2
        )


def halves(overlap):
    return Subset(DATA, range(40 + overlap)), Subset(DATA, range(40, 64))


class Changed(Dataset):
    """Another data set's examples, changed one by one."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset[index]
        return 2 * x, y


HALF = [1.0] * 41 + [0.0] * 23
"""Chances of each example: the last ones are never drawn."""


@pytest.mark.parametrize(
    ("train", "valid", "common"),
    [
        (DataLoader(DATA, 16), DataLoader(DATA, 16), "64 of 64"),
        (DataLoader(DATA, 16), DataLoader(TensorDataset(X, Y), 16), "64 of 64"),
        (*(DataLoader(each, 16) for each in halves(3)), "3 of 24"),
        (DataLoader(Subset(Subset(DATA, range(50)), range(10)), 5), DataLoader(Subset(DATA, [2, 60]), 2), "1 of 2"),
        (TRAIN, TRAIN[1:2], "16 of 16"),
        (TRAIN, [tuple(x[:4] for x in TRAIN[1])], "4 of 4"),
        (DataLoader(ConcatDataset([DATA, TensorDataset(X + 1, Y)]), 16), DataLoader(DATA, 16), "64 of 64"),
        (DataLoader(Changed(DATA), 16), DataLoader(Subset(Changed(DATA), range(9)), 9), "9 of 9"),
        (DataLoader(TensorDataset(X[:40], Y[:40]), 8), DataLoader(TensorDataset(X[30:], Y[30:]), 8), "10 of 34"),
        (DataLoader(DATA, 8, sampler=WeightedRandomSampler(HALF, 32)), DataLoader(halves(1)[1], 8), "1 of 24"),
        (
            DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(33))),
            DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(32, 64))),
            "1 of 32",
        ),
    ],
)
def test_validation_examples_that_are_trained_on_are_refused(train, valid, common):
    with pytest.raises(InputError, match=rf"{common} validation examples .*random_split"):
        fit(train, valid)


@pytest.mark.parametrize(
    "parts",
    [
        halves(0),
        random_split(DATA, [0.7, 0.3], generator=torch.Generator().manual_seed(0)),
        (TensorDataset(X[:40], Y[:40]), TensorDataset(X[40:], Y[40:])),
        (Subset(Changed(DATA), range(40)), Changed(Subset(DATA, range(40, 64)))),
        (ConcatDataset([Subset(DATA, range(20)), Subset(DATA, range(30, 64))]), Subset(DATA, range(20, 30))),
    ],
)
def test_parts_without_overlap_pass(parts):
    fit(*(DataLoader(each, 8) for each in parts))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, target: F.one_hot(target, 3) * output, r"shape \(16, 3\) for 16 examples"),
        (lambda output, target: 1.0, "returned a float"),
        (lambda output, target: output.detach().sum(1), "training loss does not depend on the model's output"),
        (lambda output, target: (output.argmax(1) != target).double(), "does not depend"),
        (lambda output, target: (output.argmax(1) != target).sum(), "The loss is of int64.*does not depend"),
        (lambda output, target: torch.ones((), requires_grad=True) * target.sum(), "training loss does not depend"),
        (
            Objective(
                train=lambda output, batch, _: F.cross_entropy(output, batch[1]),
                valid=lambda output, batch, _: torch.ones((), requires_grad=True) * batch[1].sum(),
            ),
            "validation loss does not depend",
        ),
    ],
)
def test_losses_that_cannot_be_learned_from_are_refused(loss, message):
    with pytest.raises(InputError, match=message):
        fit(loss=loss)


class FirstHalf(BatchSampler):
    """Chooses the examples by itself, whatever its sampler would give."""

    def __iter__(self):
        return iter(torch.arange(32).split(self.batch_size))


def test_batch_samplers_of_ones_own_are_not_judged():
    second = DataLoader(Subset(DATA, range(32, 64)), 16)
    half = BatchSampler(SubsetRandomSampler(range(32)), 8, drop_last=False)
    for sampler in (FirstHalf(range(64), 8, drop_last=False), half):
        fit(DataLoader(DATA, batch_sampler=sampler), second)
    whole = BatchSampler(SequentialSampler(DATA), 8, drop_last=False)
    with pytest.raises(InputError, match="32 of 32 validation examples"):
        fit(DataLoader(DATA, batch_sampler=whole), second)


def test_a_loss_beside_an_algorithm_is_refused():
    stn = FakeSelfTuningModule(nn.Linear(8, 3, dtype=torch.float64), "weight_decay")
    with pytest.raises(InputError, match="loss: given beside an algorithm"):
        BilevelTrainer(stn, F.cross_entropy, train=TRAIN, valid=VALID, algorithm=stn_fx.DeltaSTN(stn))
    with pytest.raises(InputError, match="STN learns base and response in one step"):
        STN(stn, response_step=Linearized())


class Once:
    """Has batches in its first passes only, as a loader over a generator has."""

    def __init__(self, batches, passes):
        self.batches, self.left = batches, passes

    def __iter__(self):
        self.left -= 1
        return iter(self.batches if self.left >= 0 else [])


def test_a_training_loader_that_runs_dry_is_refused():
    trainer = BilevelTrainer(FakeSelfTuningModule(nn.Linear(8, 3).double()), train=Once(TRAIN, 3), valid=VALID)
    with pytest.raises(InputError, match="training loader had batches in its first pass and none in pass 2"):
        trainer.fit(3, warmup_epochs=1)  # a batch is looked at before, and whether the next pass begins anew


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return (DATA[row] for row in self.rows)


def test_loaders_that_do_not_know_their_length(tmp_path):
    train, valid = (DataLoader(Stream(rows), 8) for rows in (range(32), range(32, 64)))
    stn = FakeSelfTuningModule(nn.Linear(8, 3, dtype=torch.float64), "weight_decay")
    result = BilevelTrainer(stn, train=train, valid=valid).fit(
        2, warmup_epochs=1, train_steps=2, callbacks=[Checkpoint(tmp_path)]
    )
    assert [record.inner_step for record in result.history] == [4, 8]
    with pytest.raises(InputError, match="has no length"):
        BilevelTrainer(stn, train=train, valid=valid).fit(2, callbacks=[LearningRateSchedule()])


def test_a_parameter_that_was_replaced_is_noticed_before_training():
    stn = FakeSelfTuningModule(nn.Linear(8, 3, dtype=torch.float64), "weight_decay")
    trainer = BilevelTrainer(stn, train=TRAIN, valid=VALID)
    stn.model.weight = nn.Parameter(stn.model.weight.detach().clone())
    with pytest.raises(InputError, match="base optimizer does not fit the model: 1 of 2"):
        trainer.fit(2)


@pytest.mark.parametrize("loaders", [{"train": []}, {"valid": []}])
def test_empty_loaders_are_refused(loaders):
    with pytest.raises(InputError, match="loader is empty"):
        fit(**loaders)


def test_optimizers_over_stale_parameters_are_refused():
    model = nn.Linear(8, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    model.weight = nn.Parameter(torch.randn(3, 8))
    stn = stn_fx.transform(model, "weight_decay", (torch.randn(4, 8),))
    with pytest.raises(InputError, match=r"1 of 2 parameters to train are missing .* Build it anew"):
        stn_fx.DeltaSTN(stn, base_optimizer=optimizer)


@pytest.mark.parametrize("name", ["learning_rate", "lr"])
def test_a_learning_rate_cannot_be_tuned(name):
    with pytest.raises(UnknownHyperparameterError, match=r"(?i)learning rate"):
        stn_fx.transform(nn.Linear(8, 3), name, (torch.randn(4, 8),))


def test_the_checks_leave_the_run_as_it_would_be():
    """Trying the losses draws masks: the generators are put back."""

    def first_mask(check):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
        stn = stn_fx.transform(model, "dropout", (X[:4],), seed=0)
        if check:
            trainer = BilevelTrainer(stn, train=TRAIN, valid=VALID)
            from stn_fx.bilevel.fit import Fit

            fit = Fit(trainer, 1, 0, 5, 1, ())
            fit._prepare(fit.generators.state())
        assert not model[1].num_batches_tracked
        return stn.generator().get_state()

    assert torch.equal(first_mask(True), first_mask(False))


def test_a_fit_that_is_refused_leaves_generators_alone():
    stn = FakeSelfTuningModule(nn.Linear(8, 3, dtype=torch.float64), "weight_decay")
    trainer = BilevelTrainer(
        stn, lambda output, target: output[:, None], train=DataLoader(DATA, 8, shuffle=True), valid=VALID
    )
    torch.manual_seed(0)
    before = torch.get_rng_state(), stn.generator().get_state()
    with pytest.raises(InputError, match="The loss returned shape"):
        trainer.fit(2)
    assert all(map(torch.equal, before, (torch.get_rng_state(), stn.generator().get_state())))


class Streamed:
    """Gives the same iterator again and again."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


class Cursor:
    """One iterator that begins anew in place, as that of a DataLoader with persistent workers."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        return self.left.pop(0)


class BeganAnew:
    def __init__(self, batches):
        self.cursor = Cursor(batches)

    def __iter__(self):
        self.cursor.left = list(self.cursor.batches)
        return self.cursor


def test_a_loader_whose_iterator_begins_anew_is_no_such_loader():
    stn = FakeSelfTuningModule(nn.Linear(8, 3, dtype=torch.float64), "weight_decay")
    result = BilevelTrainer(stn, train=BeganAnew(TRAIN), valid=VALID).fit(2, warmup_epochs=1)
    assert [record.inner_step for record in result.history] == [len(TRAIN), 2 * len(TRAIN)]


@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_loader_that_can_be_read_once_is_refused(part):
    loaders = {"train": TRAIN, "valid": VALID}
    with pytest.raises(InputError, match=f"{part}.* loader can be read once only"):
        fit(**(loaders | {part: Streamed(loaders[part])}))


def test_a_model_in_half_precision_is_refused():
    stn = FakeSelfTuningModule(nn.Linear(8, 3).half(), "weight_decay")
    half = [(x.half(), y) for x, y in TRAIN]
    with pytest.raises(InputError, match=r"parameters are in float16.*autocast=torch\.bfloat16"):
        BilevelTrainer(stn, train=half, valid=half[:1])

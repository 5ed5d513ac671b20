"""What a training loop of ones own needs of the trainer: averages, logs, batches of other packages."""

import io
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from bilevel_fake import FakeSelfTuningModule, classification_batches
from rich.console import Console
from torch import nn

import stn_fx
from stn_fx.bilevel import BilevelTrainer, Callback, Checkpoint, LiveProgress, Objective, TensorBoard, WeightAverage
from stn_fx.errors import InputError

TRAIN, VALID = classification_batches(0), classification_batches(1)


def make_trainer():
    torch.manual_seed(0)
    stn = FakeSelfTuningModule(nn.Linear(8, 3, dtype=torch.float64), "weight_decay,label_smoothing")
    return BilevelTrainer(stn, train=TRAIN, valid=VALID)


class Weights(Callback):
    def __init__(self):
        self.seen = []

    def inner_step_ended(self, trainer, epoch, record):
        self.seen.append(trainer.stn.model.weight.detach().clone())


@pytest.mark.parametrize("terminal", [False, True])
def test_a_loop_of_ones_own_can_show_its_progress(terminal):
    text = io.StringIO()
    shown = LiveProgress(Console(file=text, force_terminal=terminal, width=100), "mine")
    make_trainer().fit(3, warmup_epochs=1, callbacks=[shown])
    for expected in ("mine", "3/3", "weight_decay", "label_smoothing", "validation loss"):
        assert expected in text.getvalue()
    assert terminal or len(text.getvalue().splitlines()) == 3, "where nothing can be redrawn, a line for each epoch"


def test_the_average_is_that_of_its_definition_and_leaves_training_alone():
    alone, trainer, average, weights = make_trainer(), make_trainer(), WeightAverage(0.9), Weights()
    alone.fit(3)
    result = trainer.fit(3, callbacks=[average, weights])
    assert torch.equal(trainer.stn.model.weight, alone.stn.model.weight)
    expected = weights.seen[0]
    for each in weights.seen[1:]:
        expected = 0.9 * expected + 0.1 * each
    torch.testing.assert_close(average.model.weight.detach(), expected)
    assert len(average.evaluations) == 3
    with average.in_place(trainer):
        assert trainer.evaluate(VALID).loss == average.evaluations[-1].loss != result.history[-1].valid_loss
    average.apply(trainer)
    torch.testing.assert_close(trainer.stn.model.weight.detach(), expected)


def test_the_average_is_resumed(tmp_path):
    whole, part, resumed = (WeightAverage(0.9) for _ in range(3))
    make_trainer().fit(3, callbacks=[whole])

    class Stop(Callback):
        def safe_point(self, trainer, point):
            if point.inner_step == 6:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_trainer().fit(3, callbacks=[part, Checkpoint(tmp_path, every_steps=1), Stop()])
    make_trainer().fit(3, callbacks=[resumed], resume_from=tmp_path)
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert resumed.evaluations == whole.evaluations


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(InputError, match="decay"):
        WeightAverage(decay)


def test_tensorboard_gets_every_scalar(monkeypatch, tmp_path):
    class SummaryWriter:
        def __init__(self, folder):
            self.scalars = []

        def add_scalar(self, name, value, step):
            self.scalars.append((name, step))

        def close(self):
            self.scalars.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = TensorBoard(tmp_path)
    make_trainer().fit(2, warmup_epochs=1, train_steps=5, callbacks=[log])
    scalars = log._writer.scalars
    assert {("loss/base pass", 8), ("loss/linearized pass", 1), ("loss/validation", 4)} <= set(scalars)
    assert {("hyperparameter/weight_decay", 0), ("scale/label_smoothing", 5)} <= set(scalars)
    assert scalars[-1] == "closed"


def test_tensorboard_that_is_not_installed_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        TensorBoard(tmp_path)


@pytest.mark.parametrize("own_loss", [False, True])
def test_hugging_face_batches_and_outputs(own_loss):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=50, num_labels=3, max_position_embeddings=16, **sizes)
    model = transformers.BertForSequenceClassification(config)

    def batch():
        ids, mask = torch.randint(0, 50, (8, 7)), torch.ones(8, 7, dtype=torch.long)
        parts = {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 3, (8,)), "text": ["words"] * 8}
        return transformers.BatchEncoding(parts)

    def inputs(content):
        return {name: content[name] for name in ("input_ids", "attention_mask")}

    def loss(output, content, hyperparameters):
        return F.cross_entropy(output.logits, content["labels"], reduction="none")

    train, valid = [batch() for _ in range(4)], [batch() for _ in range(2)]
    objective = Objective(train=loss, inputs=inputs)
    if not own_loss:
        objective = lambda output, target: F.cross_entropy(output.logits, target)  # noqa: E731
        for content in train + valid:
            del content["text"]
    stn = stn_fx.transform(model, "dropout(shared),weight_decay")
    result = BilevelTrainer(stn, objective, train=train, valid=valid).fit(2, warmup_epochs=1, train_steps=2)
    assert result.history[-1].outer_step == 2
    assert result.skipped == 0

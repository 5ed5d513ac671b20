import sys

import pytest
from torch import nn

from stn_fx.errors import InputError
from stn_fx.model_reference import input_channels, load_model

NETS = """
from torch import nn
import neighbour

class Net(nn.Sequential):
    def __init__(self, num_classes=3, in_chans=1, width=4):
        super().__init__(nn.Conv2d(in_chans, width, 3), nn.Flatten(), nn.LazyLinear(num_classes))

def small(num_classes):
    return Net(num_classes, width=2)

def broken():
    raise RuntimeError("no luck")

constant = 3
_private = 4
"""


@pytest.fixture
def file(tmp_path):
    def write(text, name="nets.py"):
        (tmp_path / "neighbour.py").write_text("")
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_torchvision_models():
    loaded = load_model("torchvision:resnet18", classes=7, channels=1)
    assert loaded.model.fc.out_features == 7
    assert loaded.name == "resnet18"
    assert input_channels(loaded.model) == 3


def test_timm_models_take_their_number_of_channels():
    loaded = load_model("timm:test_resnet", classes=7, channels=1)
    assert loaded.model.num_classes == 7
    assert input_channels(loaded.model) == 1


def test_a_name_in_a_file(file):
    path = file(NETS)
    assert load_model(f"{path}:Net", classes=5, channels=2).model[0].in_channels == 2
    assert load_model(f"{path}:small", classes=5).model[0].out_channels == 2
    assert load_model(f"{path}:Net", arguments={"width": 9}).model[0].out_channels == 9
    assert load_model(f"{path}:Net").name == "Net"
    assert not any("neighbour" in entry or entry == path for entry in sys.path)


@pytest.mark.parametrize(
    "text",
    [
        "from torch import nn\nclass Net(nn.Linear):\n    def __init__(self): super().__init__(2, 3)",
        "from torch import nn\nnet = nn.Linear(2, 3)\nclass Other(nn.Module): pass",
        "from torch import nn\nclass A(nn.Module): pass\ndef helper(): pass\ndef build_model(): return nn.Linear(2, 3)",
        "from torch import nn\nfrom torch.nn import Conv2d\ndef anything(): return nn.Linear(2, 3)",
    ],
)
def test_the_only_model_of_a_file_needs_no_name(file, text):
    loaded = load_model(file(text))
    assert isinstance(loaded.model, nn.Linear)
    assert loaded.name == "nets"
    assert loaded.model.training


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("torchvision:resnet81", "resnet18"),
        ("timm:resnet10x", "resnet10t"),
        ("resnet18", "torchvision:NAME"),
        ("keras:resnet18", "torchvision:NAME"),
        ("missing.py", "no file"),
        ("{file}:Nett", "Net, small, broken"),
        ("{file}:constant", "neither a model nor a factory"),
        ("{file}:broken", "no luck"),
    ],
)
def test_references_that_name_no_model_are_refused(file, reference, message):
    with pytest.raises(InputError, match=message):
        load_model(reference.format(file=file(NETS)), classes=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from torch import nn\nclass A(nn.Module): pass\nclass B(nn.Module): pass", "say which: .*:A, .*:B"),
        ("x = (", "SyntaxError"),
        ("\n1 / 0", "line 2: ZeroDivisionError"),
        ("import no_such_package", "ModuleNotFoundError"),
        ("x = 1", "defines no model"),
        ("def model(): return 3", "gave a int"),
    ],
)
def test_files_that_give_no_model_are_refused_with_the_reason(file, text, message):
    with pytest.raises(InputError, match=message):
        load_model(file(text))


def test_arguments_that_a_factory_does_not_take_are_told():
    with pytest.raises(InputError, match="--model-arg"):
        load_model("torchvision:resnet18", arguments={"depth": 3})

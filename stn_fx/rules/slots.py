"""The places of a module that hold tensors, each named once, as ``torch.func.functional_call`` needs them.

With its own handling of ties, or with two names for one place, ``functional_call`` puts a stand-in back for the
original where modules are shared, and the user's model is damaged.
"""

from collections.abc import Iterator

from torch import Tensor, nn


def slots(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by place: a tied parameter has several places, that of a shared module only one."""
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield (f"{path}.{name}" if path else name), tensor

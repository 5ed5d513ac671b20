"""What loaders and loss must satisfy, found out on one batch of each before any training time is spent."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from stn_fx.bilevel.algorithm import evaluation_mode, training_mode
from stn_fx.bilevel.batch import Batch, Inputs
from stn_fx.bilevel.objective import Objective
from stn_fx.bilevel.updates import linearized_loss, validation_loss
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

Examples = set[tuple[Hashable, int]]


def require_same_structure(train: Inputs, valid: Inputs) -> None:
    """The model is called in one way: InputError where the two loaders give inputs of different structure."""
    ours, theirs = _structure(train), _structure(valid)
    lines = [
        f"{place}: {ours.get(place, 'nothing')} in training, {theirs.get(place, 'nothing')} in validation"
        for place in dict.fromkeys([*ours, *theirs])
        if ours.get(place) != theirs.get(place)
    ]
    if lines:
        raise InputError(
            "The training and the validation loader give the model inputs of different structure:\n  "
            + "\n  ".join(lines)
            + "\nMake both the same in the loaders' collate_fn, or choose them with Objective(inputs=...)."
        )


def require_no_overlap(train: Any, valid: Any) -> None:
    """InputError where the same examples, by identity, are in both loaders, as far as loaders tell what they hold."""
    ours, theirs = _examples(train), _examples(valid)
    if ours is None or theirs is None:
        return
    common = len(ours & theirs)
    if common:
        raise InputError(
            f"{common} of {len(theirs)} validation examples (of lists: batches) are in the training loader too. "
            f"Hyperparameters that are tuned on training data switch all regularization off. Hold them out, for "
            f"example with torch.utils.data.random_split."
        )


def require_usable_losses(stn: "SelfTuningModule", objective: Objective, train: Batch, valid: Batch) -> None:
    """Evaluate both losses once, without any update.

    Raises:
        InputError: a loss has the wrong shape, or does not depend on the model's output in a differentiable way.
    """
    with training_mode(stn):
        size = train.rows.stop - train.rows.start
        raw_BH = stn.hparams.raw.detach().expand(size, -1)
        losses = {"training loss": linearized_loss(stn, objective, train, raw_BH)}
    with evaluation_mode(stn), torch.enable_grad():
        losses["validation loss"] = validation_loss(stn, objective, valid)
    for name, loss in losses.items():
        if not loss.requires_grad:
            raise InputError(
                f"The {name} does not depend on the model's output in a differentiable way (detached, converted, or "
                f"made of integers?), so there is nothing to learn from. Compute it from the output with torch "
                f"operations."
            )


def _structure(inputs: Inputs) -> dict[str, str]:
    """What is at each place of the inputs, in words; sizes may differ."""
    leaves, _ = tree_flatten_with_path(inputs)
    return {
        "".join(map(str, path)): f"{str(leaf.dtype).removeprefix('torch.')} with {leaf.ndim} axes"
        if isinstance(leaf, Tensor)
        else f"a {type(leaf).__name__}"
        for path, leaf in leaves
    }


def _examples(loader: Any) -> Examples | None:
    """Identities of all examples of a loader; None where they cannot be known without reading it."""
    if isinstance(loader, DataLoader):
        return _loader_examples(loader)
    if isinstance(loader, (list, tuple)):  # batches in memory: the tensors themselves are their identity
        return {(_storage(leaf), 0) for leaf in _first_tensors(loader)}
    return None


def _loader_examples(loader: "DataLoader[Any]") -> Examples | None:
    try:
        count = len(loader.dataset)  # type: ignore[arg-type]
    except TypeError:
        return None
    sampler = loader.sampler
    if loader.batch_sampler is not None:
        if type(loader.batch_sampler) is not BatchSampler:
            return None  # it chooses the examples by itself
        sampler = loader.batch_sampler.sampler  # that of a loader which was given the batch sampler is never used
    if isinstance(sampler, SubsetRandomSampler):
        indices: Sequence[int] = [int(index) for index in sampler.indices]
    elif isinstance(sampler, (SequentialSampler, RandomSampler, DistributedSampler)):
        indices = range(count)
    else:
        return None  # a sampler of ones own may leave out anything
    return _located(loader.dataset, indices)


def _located(dataset: Any, indices: Sequence[int]) -> Examples:
    """Examples by the data set that holds them in the end and their place in it."""
    while isinstance(dataset, Subset):
        indices = [dataset.indices[index] for index in indices]
        dataset = dataset.dataset
    source: Hashable = id(dataset)
    if isinstance(dataset, TensorDataset):  # two data sets over the same tensors hold the same examples
        source = _storage(dataset.tensors[0])
    return {(source, index) for index in indices}


def _first_tensors(batches: Sequence[Any]) -> list[Tensor]:
    leaves = (next((x for x in tree_leaves(batch) if isinstance(x, Tensor)), None) for batch in batches)
    return [leaf for leaf in leaves if leaf is not None]


def _storage(tensor: Tensor) -> Hashable:
    return (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape))

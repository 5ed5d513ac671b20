"""What loaders and loss must satisfy, found out on one batch of each before any training time is spent."""

from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_leaves
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from stn_fx.bilevel.algorithm import evaluation_mode, training_mode
from stn_fx.bilevel.batch import Batch, Inputs
from stn_fx.bilevel.objective import Objective
from stn_fx.bilevel.reader import sampler_of
from stn_fx.bilevel.updates import linearized_loss, named_values, validation_loss, validation_loss_of_response
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

Examples = set[tuple[Hashable, int]]


def require_repeatable(loader: Any, batches: Iterator[Any], name: str) -> None:
    """InputError where a loader hands out one iterator again and again, that of these batches, which has an end."""
    # Others may begin anew in place, as that of a DataLoader with persistent workers does; asking them starts workers.
    if type(batches).__module__ in ("builtins", "itertools") and batches is iter(loader):
        raise InputError(
            f"The {name} loader can be read once only, as a generator (each iter() gives the same iterator). Give a "
            f"loader that begins anew at every iter(), such as a DataLoader."
        )


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
            f"{common} of {len(theirs)} validation examples are in the training loader too. "
            f"Hyperparameters that are tuned on training data switch all regularization off. Hold them out, for "
            f"example with torch.utils.data.random_split."
        )


def require_usable_losses(stn: "SelfTuningModule", objective: Objective, train: Batch, valid: Batch) -> None:
    """Evaluate both losses once, without any update.

    Raises:
        InputError: a loss has the wrong shape, or does not depend on the model's output in a differentiable way.
    """
    size = train.rows.stop - train.rows.start
    raw_BH = stn.hparams.raw.detach().expand(size, -1)
    responses = [parameter for parameter in stn.response_parameters() if parameter.requires_grad]
    if responses:
        with training_mode(stn):
            losses = {"training loss": linearized_loss(stn, objective, train, raw_BH)}
        with evaluation_mode(stn), torch.enable_grad():
            losses["validation loss"] = validation_loss_of_response(stn, objective, valid)
    else:  # the model only trains
        with evaluation_mode(stn), torch.enable_grad():
            losses = {
                "training loss": objective.training_loss(train.feed(stn), train, named_values(stn, raw_BH)),
                "validation loss": validation_loss(stn, objective, valid),
            }
    # The response reaches a loss through the model's output alone; a penalty on weights does not depend on it.
    parameters = responses or [parameter for parameter in stn.base_parameters() if parameter.requires_grad]
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else ()
        if all(gradient is None for gradient in gradients):
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
    if isinstance(loader, (list, tuple)):  # batches in memory
        return set().union(*(_rows(leaf, range(len(leaf))) for leaf in _first_tensors(loader)))
    return None


def _loader_examples(loader: "DataLoader[Any]") -> Examples | None:
    try:
        count = len(loader.dataset)  # type: ignore[arg-type]
    except TypeError:
        return None
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        return None  # it chooses the examples by itself
    sampler = sampler_of(loader)
    if isinstance(sampler, SubsetRandomSampler):
        indices: Sequence[int] = [int(index) for index in sampler.indices]
    elif isinstance(sampler, WeightedRandomSampler):
        indices = sampler.weights.nonzero().flatten().tolist()
    elif isinstance(sampler, (SequentialSampler, RandomSampler, DistributedSampler)):
        indices = range(count)
    else:
        return None  # a sampler of ones own may leave out anything
    return _located(loader.dataset, indices)


def _located(dataset: Any, indices: Sequence[int]) -> Examples:
    """Examples by the data set that holds them in the end and their place in it."""
    while not isinstance(dataset, (ConcatDataset, TensorDataset)):
        if isinstance(dataset, Subset):
            indices = [dataset.indices[index] for index in indices]
        elif not _is_wrapper(dataset):
            return {(id(dataset), index) for index in indices}
        dataset = dataset.dataset
    if isinstance(dataset, TensorDataset):
        return _rows(dataset.tensors[0], indices)
    ends = dataset.cumulative_sizes
    parts: list[list[int]] = [[] for _ in ends]
    for index in indices:
        part = bisect_right(ends, index)
        parts[part].append(index - (ends[part - 1] if part else 0))
    return set().union(*map(_located, dataset.datasets, parts))


def _is_wrapper(dataset: Any) -> bool:
    """Whether a data set seems to change the examples of another one, one by one, as a transform does."""
    inner = getattr(dataset, "dataset", None)
    try:
        return inner is not None and len(inner) == len(dataset)
    except TypeError:
        return False


def _first_tensors(batches: Sequence[Any]) -> list[Tensor]:
    leaves = (next((x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), None) for batch in batches)
    return [leaf for leaf in leaves if leaf is not None]


def _rows(tensor: Tensor, indices: Sequence[int]) -> Examples:
    """By their place in memory: slices of one tensor hold the same examples."""
    bytes_per_row = tensor.stride(0) * tensor.element_size()
    return {(str(tensor.device), tensor.data_ptr() + index * bytes_per_row) for index in indices}

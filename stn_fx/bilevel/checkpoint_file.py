"""The file of a checkpoint: what is in it, whose it is, and how it is read without executing code.

One file, written atomically by `torch.save` and read by `torch.load(weights_only=True)`: tensors and plain data
(numbers, strings, lists, tuples, dicts) and nothing else, which is checked when it is written.

    {"identity": whose it is, compared before anything is restored,
     "state":    everything that training goes on from}
"""

import zipfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stn_fx.bilevel.atomic import write_atomically
from stn_fx.bilevel.replicas import Replicas
from stn_fx.errors import CheckpointError

FORMAT = 2
"""Raised by one whenever files of before cannot be read any more."""

MAX_LINES = 8
PLAIN = (type(None), bool, int, float, str, Tensor)


def write_checkpoint(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a checkpoint, the whole file or nothing.

    Raises:
        CheckpointError: something in it is neither a tensor nor plain data.
    """
    content = {"identity": {"format": FORMAT, "stn_fx": package_version()} | identity, "state": state}
    require_plain(content)
    write_atomically(path, lambda temporary: torch.save(_plain(content), temporary))


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Identity and state of a checkpoint, tensors on the CPU.

    Raises:
        CheckpointError: there is no such file, it is no checkpoint, or one of another version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look at the check sums
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error.strerror}. Give another path.") from error
    except Exception as error:  # what a damaged file makes of its reader is of any kind
        raise _no_checkpoint(path, type(error).__name__) from error
    if damaged is not None:
        raise _no_checkpoint(path, f"the check sum of {damaged} is wrong")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("identity", "state")):
        raise _no_checkpoint(path, "identity or state is missing")
    identity, state = content["identity"], content["state"]
    for key, ours in (("format", FORMAT), ("stn_fx", package_version())):
        if identity.get(key) != ours:
            raise CheckpointError(
                f"The checkpoint {path} was made by another version: {key} is {identity.get(key)} in it and {ours} "
                f"here. Install stn_fx {identity.get('stn_fx')} to resume it."
            )
    return identity, state


def _no_checkpoint(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is no checkpoint of stn_fx, or a damaged one ({reason}). Resume from another one.")


def require_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: Path) -> None:
    """Compare the identity of a checkpoint with that of the run that wants it.

    Raises:
        CheckpointError: they differ; names each difference.
    """
    lines = list(_differences({k: theirs.get(k) for k in ours}, ours, ""))
    if lines:
        more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
        raise CheckpointError(
            f"The checkpoint {path} is of another run:\n  "
            + "\n  ".join(lines[:MAX_LINES] + more)
            + "\nResume with the same model, hyperparameters, optimizers and options, or begin a new run."
        )


def require_whole(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: Path) -> None:
    """CheckpointError where a part of the state that a run goes on from is not in its checkpoint."""
    for name, part in ours.items():
        found, keys = theirs.get(name), set(part) if isinstance(part, Mapping) else set()
        if name not in theirs or (keys and not (isinstance(found, Mapping) and keys <= set(found))):
            raise _no_checkpoint(path, f"{name} is missing, or not all of it is there")


def latest_checkpoint(place: str | Path, replicas: Replicas | None = None) -> Path:
    """The checkpoint to resume from: the file itself, or the one of a folder with the most steps.

    Args:
        place: a file, or the folder of a `Checkpoint` callback.
        replicas: processes that train together resume from the same step, each from its own file.

    Raises:
        CheckpointError: there is none (that every process has).
    """
    place, replicas = Path(place), replicas or Replicas()
    if not place.is_dir() and replicas.count == 1:
        return place
    found = {int(path.stem.removeprefix("step-")): path for path in checkpoints_in(folder_of(place, replicas))}
    common = replicas.common(found)
    if not common:
        raise CheckpointError(
            f"There is no checkpoint in {place}. Give the folder of a `Checkpoint` callback, or begin a new run."
        )
    return found[max(common)]


def folder_of(folder: Path, replicas: Replicas) -> Path:
    """Where a process keeps its checkpoints: the first one in the folder itself, the others in folders below."""
    return folder / f"rank{replicas.rank}" if replicas.rank else folder


def checkpoints_in(folder: Path) -> list[Path]:
    """Finished checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def checkpoint_path(folder: Path, inner_step: int) -> Path:
    """Where the checkpoint after so many inner steps is; names sort by steps."""
    return folder / f"step-{inner_step:010d}.pt"


def require_plain(tree: Any, path: str = "") -> None:
    """Refuse what would need code to be executed when it is read; CheckpointError names where it is."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if not isinstance(key, (str, int)):
                raise _not_plain(f"{path} key {key!r}", key)
            require_plain(value, f"{path}/{key}" if path else str(key))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            require_plain(value, f"{path}/{index}")
    elif type(tree) not in PLAIN and not isinstance(tree, Tensor):
        raise _not_plain(path, tree)


def package_version() -> str:
    """Version of stn_fx; "unknown" where it is not installed but found on the path."""
    try:
        return version("stn-fx")
    except PackageNotFoundError:
        return "unknown"


def _not_plain(path: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"The state at {path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot "
        f"hold: it is read without executing code, so it holds tensors, numbers, strings, lists and dicts only. Let "
        f"the state_dict of its owner (model, optimizer, scheduler or callback) give these."
    )


def _plain(tree: Any) -> Any:
    """Mappings of other kinds as dicts, so that nothing but dicts, lists, tuples and tensors is pickled."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_plain(value) for value in tree) if type(tree) in (list, tuple) else tuple(map(_plain, tree))
    return tree.detach() if isinstance(tree, Tensor) else tree


def _differences(theirs: Any, ours: Any, path: str) -> Iterator[str]:
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            name = f"{path} {key}".strip()
            if key not in theirs:
                yield f"only here: {name}"
            elif key not in ours:
                yield f"only in the checkpoint: {name}"
            else:
                yield from _differences(theirs[key], ours[key], name)
    elif theirs != ours:
        yield f"{path} is {theirs} in the checkpoint and {ours} here"

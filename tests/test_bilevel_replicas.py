"""Two processes with half of every batch each make the updates of one process with the whole batch."""

import os
import subprocess
import sys

import pytest
import replicated_run
import torch

import stn_fx
from stn_fx.bilevel.replicas import Replicas
from stn_fx.errors import InputError


def torchrun(folder, processes, algorithm="DeltaSTN"):
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, replicated_run.__file__, str(folder), algorithm],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"end{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("algorithm", ["DeltaSTN", "OnFraction", "SharedForward", "STN"])
def test_two_processes_make_the_updates_of_one(tmp_path, algorithm):
    (one,), two = torchrun(tmp_path / "one", 1, algorithm), torchrun(tmp_path / "two", 2, algorithm)
    for each in two:
        assert each["values"] == pytest.approx(one["values"], rel=1e-9)
        torch.testing.assert_close(each["losses"], one["losses"], rtol=1e-9, atol=0)
        torch.testing.assert_close(each["trust"], one["trust"], rtol=1e-6, atol=1e-12)
        for name, expected in one["parameters"].items():
            torch.testing.assert_close(each["parameters"][name], expected, rtol=1e-9, atol=1e-12)
    assert (tmp_path / "two" / "run" / "values.json").exists()
    # Resumed at the end: every process finds its own checkpoint again.
    again = torchrun(tmp_path / "two", 2, algorithm)
    assert all(torch.equal(a["losses"], b["losses"]) for a, b in zip(again, two, strict=True))


def test_a_wrapper_around_the_forward_is_refused():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(InputError, match=r"its \.module"):
        stn_fx.transform(torch.nn.DataParallel(model), "weight_decay", (torch.randn(4, 3),))
    stn = stn_fx.transform(model, "weight_decay", (torch.randn(4, 3),))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(InputError, match="averaged over the processes"):
            stn_fx.DeltaSTN(torch.nn.parallel.DistributedDataParallel(stn))
        with pytest.raises(InputError, match="DistributedDataParallel"):
            stn_fx.transform(torch.nn.parallel.DistributedDataParallel(model), "weight_decay")
    finally:
        torch.distributed.destroy_process_group()


def test_one_process_is_alone():
    alone = Replicas()
    assert alone.first(7) == 7
    rows = alone.rows(5, torch.device("cpu"))
    assert (rows.start, rows.stop, rows.total, rows.share) == (0, 5, 5, 1.0)
    assert alone.sums([1.0, 2.0], torch.device("cpu")) == [1.0, 2.0]
    assert alone.common([3, 4]) == {3, 4}

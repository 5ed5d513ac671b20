"""Two processes with half of every batch each make the updates of one process with the whole batch."""

import os
import subprocess
import sys

import pytest
import replicated_run
import torch

from stn_fx.bilevel.replicas import Replicas


def torchrun(folder, processes):
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, replicated_run.__file__, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"end{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_make_the_updates_of_one(tmp_path):
    (one,), two = torchrun(tmp_path / "one", 1), torchrun(tmp_path / "two", 2)
    for each in two:
        assert each["values"] == pytest.approx(one["values"], rel=1e-9)
        torch.testing.assert_close(each["losses"], one["losses"], rtol=1e-9, atol=0)
        for name, expected in one["parameters"].items():
            torch.testing.assert_close(each["parameters"][name], expected, rtol=1e-9, atol=1e-12)
    assert (tmp_path / "two" / "run" / "values.json").exists()
    # Resumed at the end: every process finds its own checkpoint again.
    again = torchrun(tmp_path / "two", 2)
    assert all(torch.equal(a["losses"], b["losses"]) for a, b in zip(again, two, strict=True))


def test_one_process_is_alone():
    alone = Replicas()
    rows = alone.rows(5, torch.device("cpu"))
    assert (rows.start, rows.stop, rows.total, rows.share) == (0, 5, 5, 1.0)
    assert alone.sums([1.0, 2.0], torch.device("cpu")) == [1.0, 2.0]
    assert alone.common([3, 4]) == {3, 4}

"""A run by one or several processes: `torchrun --nproc-per-node N replicated_run.py FOLDER ALGORITHM` leaves its end.

Every process has its share of each batch; of the odd last one the shares differ, but for `OnFraction`, which is the
same for any number of processes only where the shares are even.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import stn_fx
from stn_fx import bilevel
from stn_fx.bilevel import BilevelTrainer, Checkpoint, RunFolder
from stn_fx.bilevel.checkpoint_file import checkpoints_in


def batches(seed, count, rank, processes):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (count,), generator=generator)
    whole = zip(x.split(8), y.split(8), strict=True)
    return [tuple(part.tensor_split(processes)[rank] for part in pair) for pair in whole]


def main(folder, algorithm="DeltaSTN", epochs=3):
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)  # the first process's weights count
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    stn = stn_fx.transform(
        model, "weight_decay,label_smoothing", (torch.randn(4, 6).double(),), seed=3 + rank
    )  # so does its seed
    in_part = algorithm == "OnFraction"
    train, valid = (batches(seed, count, rank, processes) for seed, count in ((0, 36 if in_part else 37), (1, 16)))
    if in_part:
        trained = bilevel.DeltaSTN(stn, response_step=bilevel.OnFraction(bilevel.Linearized(), 0.5))
    else:
        trained = getattr(bilevel, algorithm)(stn)
    trainer = BilevelTrainer(stn, train=train, valid=valid, algorithm=trained)
    callbacks = [RunFolder(folder / "run", overwrite=True), Checkpoint(folder / "checkpoints")]
    resume = folder / "checkpoints" if checkpoints_in(folder / "checkpoints") else None
    result = trainer.fit(epochs, warmup_epochs=1, train_steps=2, callbacks=callbacks, resume_from=resume)
    end = {"parameters": {name: p.detach() for name, p in stn.named_parameters()}, "values": result.values}
    losses = [[record.train_loss, record.response_loss or 0.0, record.valid_loss] for record in result.history]
    keys = ("promised", "promised_error", "delivered", "delivered_error", "hypergradient", "hypergradient_error")
    trust = [[getattr(each, key) for key in keys] for each in result.history[-1].trust.values()]
    end["trust"] = torch.tensor(trust, dtype=torch.float64)
    torch.save({**end, "losses": torch.tensor(losses)}, folder / f"end{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

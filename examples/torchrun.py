"""Several processes that train one model: `torchrun --nproc-per-node 2 examples/torchrun.py`.

The model is not wrapped in DistributedDataParallel: gradients are averaged in the updates. Without torchrun: alone.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split

import stn_fx
from stn_fx.bilevel import RunFolder


def main(folder: str = "runs/torchrun", epochs: int = 4, examples: int = 600) -> dict[str, float]:
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)  # the data and their split must be the same everywhere; weights are taken from the first
    x = torch.randn(examples, 20)
    y = (x[:, :3].sum(1) + torch.randn(examples) > 0).long()
    train, valid = random_split(TensorDataset(x, y), [0.7, 0.3])

    def loader(part: torch.utils.data.Dataset, size: int, shuffle: bool) -> DataLoader:
        sampler = DistributedSampler(part, shuffle=shuffle) if dist.is_initialized() else None
        return DataLoader(part, size, sampler=sampler, shuffle=shuffle and sampler is None)

    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2)).to(device)
    stn = stn_fx.transform(model, "dropout,weight_decay", (x[:4].to(device),))
    trainer = stn_fx.BilevelTrainer(stn, train=loader(train, 16, True), valid=loader(valid, 64, False))
    result = trainer.fit(epochs, callbacks=[RunFolder(folder, overwrite=True)])  # written by the first process only
    print(result.values)
    if dist.is_initialized():
        dist.destroy_process_group()
    return result.values


if __name__ == "__main__":
    main(*sys.argv[1:2])

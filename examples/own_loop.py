"""A training loop of one's own: the steps without the trainer: `python examples/own_loop.py`."""

from itertools import cycle

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import stn_fx


def main(epochs: int = 8, examples: int = 600) -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.randn(examples, 20)
    y = (x[:, :3].sum(1) + torch.randn(examples) > 0).long()  # noisy: regularization matters
    train, valid = random_split(TensorDataset(x, y), [0.7, 0.3])
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2))

    stn = stn_fx.transform(model, "dropout,weight_decay", (x[:4],))
    optimizer = torch.optim.Adam(stn.base_parameters(), lr=1e-2)  # yours; None would be a sensible default
    steps = stn_fx.DeltaSTN(stn, F.cross_entropy, base_optimizer=optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    rates = {role: steps.optimizers[role].param_groups[0]["lr"] for role in ("base", "hyper", "scale")}
    validation = cycle(DataLoader(valid, 64))

    for epoch in range(epochs):
        for i, batch in enumerate(DataLoader(train, 32, shuffle=True)):
            record = steps.inner_step(batch)  # the weights, then their response
            if epoch >= epochs // 3 and i % 2 == 1:
                steps.outer_step(next(validation))  # the hyperparameters
        scheduler.step()
        for role in ("hyper", "scale"):  # those that go on moving around weights at rest run away
            steps.optimizers[role].param_groups[0]["lr"] = rates[role] * scheduler.get_last_lr()[0] / rates["base"]
        print(f"epoch {epoch + 1}  training loss {record.loss:.3f}  {stn.hparams.values()}")

    plain = stn.finalize()  # your own model; its dropout has the tuned rate
    assert plain is model
    return stn.hparams.values()


if __name__ == "__main__":
    main()

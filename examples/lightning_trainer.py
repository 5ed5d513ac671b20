"""Training and tuning by a Lightning Trainer, with the extra `lightning`: `python examples/lightning_trainer.py`."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import stn_fx
from stn_fx.bilevel.lightning import TunedLightningModule


def main(epochs: int = 5, examples: int = 600, folder: str = "runs/lightning") -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.randn(examples, 20)
    y = (x[:, :3].sum(1) + torch.randn(examples) > 0).long()
    train, valid = (
        DataLoader(part, size, shuffle=shuffle)
        for part, size, shuffle in zip(
            random_split(TensorDataset(x, y), [0.7, 0.3]), (32, 128), (True, False), strict=True
        )
    )
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2))
    stn = stn_fx.transform(model, "dropout,weight_decay", (x[:4],))

    module = TunedLightningModule(stn, valid)
    best = ModelCheckpoint(folder, monitor="valid_loss")
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[best], logger=False, enable_progress_bar=False,
        default_root_dir=folder, log_every_n_steps=5,
    )  # fmt: skip
    trainer.fit(module, train, valid)
    print(stn.hparams.values(), best.best_model_path)
    return stn.hparams.values()


if __name__ == "__main__":
    main()

"""A transformers model with its own collator, dict batches, and its own loss: `python examples/hugging_face.py`.

Needs the package transformers; weights and texts are random, so that nothing is downloaded.
"""

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import stn_fx
from stn_fx.bilevel import Objective


def texts(count: int, seed: int) -> list[dict[str, list[int] | int]]:
    """Token ids of different lengths; the label is whether the token 7 occurs."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    ids = [torch.randint(5, 25, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": each, "label": int(7 in each)} for each in ids]


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Pads, as `DataCollatorWithPadding` does with a tokenizer."""
    ids = [torch.tensor(each["input_ids"]) for each in examples]
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
        "labels": torch.tensor([each["label"] for each in examples]),
    }


def main(epochs: int = 4, count: int = 320) -> dict[str, float]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=30, max_position_embeddings=16, **sizes))
    train = DataLoader(texts(count, 0), 32, shuffle=True, collate_fn=collate)
    valid = DataLoader(texts(count // 2, 1), 64, collate_fn=collate)

    # The model is given the labels and computes the loss itself; nothing here needs to know which one.
    objective = Objective(train=lambda output, batch, hyperparameters: output["loss"], inputs=lambda batch: batch)
    example = next(iter(train))
    stn = stn_fx.transform(model, "dropout(shared),weight_decay", example, batch_axis=0)
    trainer = stn_fx.BilevelTrainer(stn, objective, train=train, valid=valid)
    result = trainer.fit(epochs=epochs)
    print(result.values, result.best)
    return result.values


if __name__ == "__main__":
    main()

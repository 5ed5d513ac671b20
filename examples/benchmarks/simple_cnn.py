"""The SimpleCNN of the Delta-STN experiments: two 5x5 convolutions, two fully connected layers, dropout before each."""

from torch import Tensor, nn


class SimpleCNN(nn.Module):
    """Plain PyTorch, as a user would write it; (B, channels, size, size) images to (B, classes) logits."""

    def __init__(self, channels: int = 1, size: int = 28, classes: int = 10, rate: float = 0.05) -> None:
        super().__init__()
        features = 32 * (size // 4) ** 2
        self.dropout1 = nn.Dropout(rate)
        self.conv1 = nn.Conv2d(channels, 16, 5, padding=2)
        self.dropout2 = nn.Dropout(rate)
        self.conv2 = nn.Conv2d(16, 32, 5, padding=2)
        self.dropout3 = nn.Dropout(rate)
        self.fc1 = nn.Linear(features, features)
        self.dropout4 = nn.Dropout(rate)
        self.fc2 = nn.Linear(features, classes)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv1(self.dropout1(x)).relu())
        x = self.pool(self.conv2(self.dropout2(x)).relu())
        x = self.fc1(self.dropout3(x.flatten(1))).relu()
        return self.fc2(self.dropout4(x))

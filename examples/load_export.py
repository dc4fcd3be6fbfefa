"""Run exported weights of the main job with plain PyTorch: ``python examples/load_export.py OUT.safetensors``.

OUT.safetensors comes from ``scpl-dist train`` and then ``scpl-dist export RUN_DIR OUT.safetensors``: one state dict
with keys ``blocks.<i>.<name>`` for the network and ``heads.<i>.<name>`` for what the local losses added. Of the heads,
only the predictor behind the last block is needed.
"""

import sys

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn


def conv(channels_in: int, channels_out: int) -> list[nn.Module]:
    """Convolution, BatchNorm, ReLU."""
    return [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    ]


network = nn.Sequential(
    nn.Sequential(*conv(1, 16), *conv(16, 16), nn.MaxPool2d(2)),
    nn.Sequential(*conv(16, 48), *conv(48, 48), nn.MaxPool2d(2)),
    nn.Sequential(*conv(48, 96), *conv(96, 96)),
    nn.Sequential(*conv(96, 96), *conv(96, 96)),
)
predictor = nn.Sequential(nn.Flatten(), nn.Linear(96 * 4 * 4, 10))

state = load_file(sys.argv[1])
network.load_state_dict({key[7:]: value for key, value in state.items() if key.startswith("blocks.")})
head = "heads.3.predictor.layers."
predictor.load_state_dict({key[len(head) :]: value for key, value in state.items() if key.startswith(head)})

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
images = nn.functional.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
with torch.no_grad():
    network.eval()
    scores = predictor(network((images - 0.3055) / 0.3192))
accuracy = (scores.argmax(1) == torch.tensor(digits.target)).float().mean()
print(f"accuracy on all {len(images)} images {accuracy:.4f}")

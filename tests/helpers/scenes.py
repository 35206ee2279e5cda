"""A data set with a class per pixel, and a pipeline of a teacher and a student of it."""

from __future__ import annotations

from pathlib import Path

SCENES = '''
import numpy as np
import torch

CLASSES = ("ground", "box", "disc")

class Scenes(torch.utils.data.Dataset):
    """Boxes and discs on a noisy ground; the first row of pixels is ignored."""
    classes = CLASSES
    def __init__(self, count, seed):
        self.count, self.seed = count, seed
    def __len__(self):
        return self.count
    def __getitem__(self, i):
        if i >= self.count:
            raise IndexError(i)
        g = np.random.default_rng(1000 * self.seed + i)
        mask = np.zeros((24, 32), np.int64)
        rows, columns = np.mgrid[:24, :32]
        x, y = g.integers(0, 22), g.integers(2, 14)
        mask[y:y + 8, x:x + 9] = 1
        cx, cy = g.integers(4, 28), g.integers(4, 20)
        mask[(rows - cy) ** 2 + (columns - cx) ** 2 <= 16] = 2
        colors = np.array([[90, 100, 90], [150, 90, 80], [80, 90, 160]])
        image = (colors[mask] + g.normal(0, 20, (24, 32, 3))).clip(0, 255).astype(np.uint8)
        mask[0] = 255
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)

def make(split):
    return Scenes({"train": 64, "validation": 16, "test": 24}[split], {"train": 1, "validation": 2, "test": 3}[split])
'''

PIPELINE = """
dataset: {{name: "{folder}/scenes.py:make"}}
transform:
  - ToDtype: {{dtype: float32, scale: true}}
  - RandomHorizontalFlip: {{}}
eval_transform:
  - ToDtype: {{dtype: float32, scale: true}}
teacher:
  model: small:fcn
  args: {{width: 8}}
  weights: {folder}/teacher/model.safetensors
  train: {{epochs: 6, batch_size: 8, lr: 0.1}}
cache:
  logits: false
  views: 2
  outputs: {{pixels: {{kind: classes, places: grid, source: classifier, over_places: true}}}}
student:
  model: small:fcn
  args: {{width: 4}}
  train: {{epochs: 12, batch_size: 8, lr: 0.1}}
loss: {{name: kd, temperature: {{tau: 1}}}}
"""


def scenes_folder(folder: Path) -> Path:
    """Write `scenes.py` and `p.yaml` to a folder, and return it."""
    (folder / "scenes.py").write_text(SCENES)
    (folder / "p.yaml").write_text(PIPELINE.format(folder=folder))
    return folder

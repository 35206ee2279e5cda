"""A plain PyTorch loop with a cached teacher, from data set and cache to test accuracy.

kdcache demo && python examples/plain_pytorch.py kdcache-demo/digits.kdcache
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader

import kdcache
from kdcache.config.schema import DatasetSpec
from kdcache.data.views import View
from kdcache.models.evaluate import evaluate

EPOCHS = 10

torch.manual_seed(0)
digits = DatasetSpec(name="digits")
test = kdcache.load_split(digits, "test")

cache = kdcache.open_cache(sys.argv[1])
teacher = cache.teacher()
# In the place of Samples, any torch data set of (image, label) pairs will do.
train = kdcache.CachedDataset(kdcache.load_split(digits, "train"), cache)
loader = DataLoader(train, batch_size=64, shuffle=True)
loss = kdcache.Loss.model_validate({"name": "kd"})

student = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
for epoch in range(EPOCHS):
    train.set_epoch(epoch)
    for images, labels, ids, views in loader:
        parts = kdcache.distillation_loss(student(images), teacher(ids, views), labels, loss, epoch + 1)
        optimizer.zero_grad()
        parts.total.backward()  # type: ignore[no-untyped-call]  # in torch
        optimizer.step()

accuracy = evaluate(student, View(test, test.transform)).accuracy
sys.stdout.write(f"test accuracy {accuracy:.2%}\n")

"""A plain PyTorch loop with a cached teacher, from data set and cache to test accuracy.

kdcache demo && python examples/plain_pytorch.py kdcache-demo/digits.kdcache
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader

import kdcache

EPOCHS = 10

torch.manual_seed(0)
cache = kdcache.open_cache(sys.argv[1])
teacher = cache.teacher()
# Instead of load_split, any torch data set of (image, label) pairs will do.
train = kdcache.CachedDataset(kdcache.load_split("digits", "train"), cache)
loader = DataLoader(train, batch_size=64, shuffle=True)
loss = kdcache.loss("kd", tau=4)

student = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
for epoch in range(EPOCHS):
    train.set_epoch(epoch)
    for images, labels, ids, views in loader:
        parts = loss(student(images), teacher(ids, views), labels, epoch + 1)
        optimizer.zero_grad()
        parts.total.backward()
        optimizer.step()

accuracy = kdcache.evaluate(student, kdcache.load_split("digits", "test")).accuracy
sys.stdout.write(f"test accuracy {accuracy:.2%}\n")

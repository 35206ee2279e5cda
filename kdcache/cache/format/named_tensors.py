"""Encoded rows of any kind: named tensors whose first dimension is the row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Self

import torch
from torch import Tensor


class NamedTensors:
    """A base class of dataclasses whose fields are tensors; those that an encoding does not have are None."""

    def arrays(self) -> dict[str, Tensor]:
        """Return the tensors by name, without those that the encoding does not have."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in named.items() if value is not None}

    def __len__(self) -> int:
        return len(next(iter(self.arrays().values())))

    def to(self, device: torch.device | str) -> Self:
        """Return the rows on another device."""
        return self.of({name: value.to(device) for name, value in self.arrays().items()})

    def __getitem__(self, which: Tensor | slice) -> Self:
        return self.of({name: value[which] for name, value in self.arrays().items()})

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor]) -> Self:
        """Return the rows of a mapping as `arrays()` returns it."""
        return cls(**{field.name: arrays.get(field.name) for field in fields(cls)})  # type: ignore[arg-type]

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """Concatenate parts in order."""
        return cls.of({name: torch.cat([part.arrays()[name] for part in parts]) for name in parts[0].arrays()})

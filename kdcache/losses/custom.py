"""A divergence from a file of the user, `path/file.py:function`.

The file is run elsewhere (`config/loss.py`), which puts the checked function into these options: nothing here imports
code by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from pydantic import Field, PrivateAttr
from torch import Tensor

from kdcache.losses.options import DivergenceOptions


class CustomDivergence(DivergenceOptions):
    """Options of a function `(student_logits [B, C], teacher_logits [B, C], labels [B], **options) -> [B] or scalar`.

    Two attributes of the function are its traits. Both are True unless it says otherwise: `acts_on_label` (refused for
    mixed images, which have two labels) and `needs_level` (refused for caches that hold probabilities only).
    """

    needs_constant_temperature = True

    kind: Literal["function"] = "function"
    function: str
    """`path/file.py:function`."""
    options: dict[str, Any] = Field(default={})
    """Its keyword arguments."""

    _loaded: Callable[..., Tensor] | None = PrivateAttr(default=None)

    def with_function(self, function: Callable[..., Tensor]) -> CustomDivergence:
        """Return these options with the function that `function` names."""
        copy = self.model_copy()
        copy._loaded = function
        return copy

    def bind(self, **step: Any) -> Callable[..., Any]:
        """Return the function with its options filled in.

        Raises:
            ValueError: if the file has not been run.
        """
        if self._loaded is None:
            raise ValueError(f"{self.function} is not loaded: make the loss with kdcache.loss")
        return partial(self._loaded, **self.options)

    def described(self, trait: str) -> str:
        """Return what the function is called in a message about one of its traits, and how it denies the trait."""
        return f"the function {self.function}, unless it has an attribute {trait} = False,"

    @property
    def acts_on_label(self) -> bool:  # type: ignore[override]  # a class variable of the other divergences
        """Whether the function treats the one true class of each sample apart."""
        return bool(getattr(self._loaded, "acts_on_label", True))

    @property
    def needs_level(self) -> bool:  # type: ignore[override]  # a class variable of the other divergences
        """Whether a constant that is added to a row of the teacher's logits changes the result."""
        return bool(getattr(self._loaded, "needs_level", True))

"""Griffe extension: reads two habits of our docstrings that the Google style does not know."""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Object


class HouseStyle(Extension):
    """`Example:` is a section of doctests, and the `Args:` of a pydantic model are its fields."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the heads of sections before the docstring is parsed."""
        if obj.docstring is None:
            return
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
        if isinstance(obj, Class) and any(str(base).endswith("BaseModel") for base in obj.bases):
            text = re.sub(r"^( *)Args:$", r"\1Attributes:", text, flags=re.MULTILINE)
        obj.docstring.value = text

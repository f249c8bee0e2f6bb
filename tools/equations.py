"""Griffe extension: a paragraph of a docstring that is an equation keeps its lines and spaces."""

import re
from typing import Any

import griffe

EQUATION = re.compile(
    r"[A-Za-z](?:[\w^.|']|, ?|\[[^\]]*\]|\((?:[^()]|\([^()]*\))*\))* +:?= "
)  # no blank outside of brackets, so that a sentence with an = in it is none


def keep_equations(docstring: str) -> str:
    """Indent the paragraphs that open with an equation, which makes them code in Markdown."""
    paragraphs = docstring.split("\n\n")
    return "\n\n".join(
        "\n".join(f"    {line}" for line in paragraph.splitlines())
        if EQUATION.match(paragraph)
        else paragraph
        for paragraph in paragraphs
    )


class Equations(griffe.Extension):
    """Does so to every docstring, before it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object that was just loaded."""
        if obj.docstring:
            obj.docstring.value = keep_equations(obj.docstring.value)

"""Writes docs/api.md from the docstrings: `python docs/make_api.py`; a test compares the two."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

import bigru
from bigru.data.clips import read_clip
from bigru.data.synthetic import write_clip, write_index
from bigru.data.windows import load_dataset
from bigru.model.load import load_model
from bigru.model.prediction import forecast
from bigru.streaming import ForecastStream

NAMES = {name: getattr(bigru, name) for name in bigru.__all__ if not name.startswith("_")}
NAMES["prove"] = bigru.prove.prove  # the function, of the module that can be called
OTHERS = (ForecastStream, load_model, forecast, load_dataset, read_clip, write_clip, write_index)
HEAD = """# Names

Made from the docstrings by `python docs/make_api.py`. Those of the first part are imported from `bigru`, the others,
which need `bigru[forecaster]`, from the module named.
"""


def entry(thing: type | object, methods: bool = True) -> str:
    """Returns the heading, signature and docstring of a class, with its documented methods, or of a function."""
    where = "bigru" if thing in NAMES.values() else thing.__module__
    parts = [f"## {thing.__name__}", f"`from {where} import {thing.__name__}`", block(thing.__name__, thing)]
    for name, member in vars(thing).items() if inspect.isclass(thing) else ():
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function) and not name.startswith("_") and function.__doc__ and name != "extra_repr":
            parts.append(block(f"{thing.__name__}.{name}", function))
    return "\n\n".join(parts)


def block(name: str, thing: object) -> str:
    """Returns a signature, broken where it is long, and the docstring below it."""
    # Annotations are texts here, which would stand in quotes.
    signature = re.sub(r"""(: |-> )(['"])(.*?)\2""", r"\1\3", str(inspect.signature(thing)))
    lines = textwrap.wrap(name + signature, 100, subsequent_indent="    ", break_long_words=False)
    return "\n".join(["```text", *lines, "", inspect.getdoc(thing) or "", "```"])


def text() -> str:
    """Returns the document."""
    return "\n\n".join([HEAD.strip(), *map(entry, (*NAMES.values(), *OTHERS))]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(text(), encoding="utf-8")

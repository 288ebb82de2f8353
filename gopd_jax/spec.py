"""Named functions in tables, and the strings that choose them: "name" or "name(key=value)"."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Mapping


def table(*functions: Callable) -> dict[str, Callable]:
    """A table of functions by their own names. Two of one name are an error."""
    entries = {function.__name__: function for function in functions}
    if len(entries) != len(functions):
        raise ValueError(f"two entries share a name among {[f.__name__ for f in functions]}")
    return entries


def options_of(function: Callable) -> list[str]:
    """An entry's options: its keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def plain(entry: Callable) -> Callable:
    """An entry of a table without the options that are bound to it."""
    return getattr(entry, "func", entry)


def resolve(text: str, entries: Mapping[str, Callable]) -> Callable:
    """The entry that `text` names, with its keyword options bound.

    `text` is "name" or "name(key=value, ...)" with Python literals as values; options are the
    entry's keyword-only parameters. ValueError names what is wrong and what there is.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        node = None
    call = node if isinstance(node, ast.Call) else None
    name = call.func if call else node
    if not isinstance(name, ast.Name) or (call and call.args):
        raise ValueError(f"{text!r} is not of the form name or name(key=value)")
    if name.id not in entries:
        raise ValueError(f"there is no {name.id!r}; there are {sorted(entries)}")
    function = entries[name.id]
    options, given = options_of(function), {}
    for keyword in call.keywords if call else ():
        if keyword.arg not in options:
            raise ValueError(f"{name.id} has no {[keyword.arg]}; it has {options}")
        if keyword.arg in given:
            raise ValueError(f"{text!r} gives {keyword.arg} twice; keep one")
        try:
            given[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError as error:
            raise ValueError(f"{text!r}: {keyword.arg} is not a literal value") from error
    return functools.partial(function, **given) if given else function

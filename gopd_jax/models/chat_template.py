"""Where chat templates are rendered: Jinja in a sandbox, with what transformers gives them."""

from __future__ import annotations

import datetime
import json

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks assistant text, renders as its body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def environment() -> jinja2.Environment:
    """Templates are downloaded text: they run in a sandbox and see plain values only."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    # Jinja's own tojson escapes HTML, which would change what the model reads.
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _no_day
    return made


def day(text: str):
    """strftime_now of "2024-07-26"; ValueError for what is no date."""
    try:
        return datetime.date.fromisoformat(text).strftime
    except (TypeError, ValueError):
        raise ValueError(
            f"strftime_now is {text!r}, the day that the chat template writes; write it as "
            "'2024-07-26'"
        ) from None


class UndatedError(jinja2.TemplateError):
    """The template asks for today's date, and no day is named."""


def _no_day(form: str):
    raise UndatedError(form)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)

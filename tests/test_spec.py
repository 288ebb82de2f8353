"""Strings that choose functions: what they bind, and what they say when they cannot."""

import pytest

from gopd_jax.spec import resolve, table


def plain(x):
    return x


def scaled(x, *, by=2.0, shift=0):
    return by * x + shift


def bounded(x, *, low, high=9):
    return max(low, min(high, x))


ENTRIES = table(plain, scaled, bounded)


def test_a_table_goes_by_the_functions_own_names():
    assert {"plain": plain, "scaled": scaled, "bounded": bounded} == ENTRIES


def test_two_entries_of_one_name_are_refused():
    def plain(x):
        return -x

    with pytest.raises(ValueError, match=r"share a name among \['plain', 'plain'\]"):
        table(ENTRIES["plain"], plain)


def test_a_name_alone_is_the_function_itself():
    assert resolve("plain", ENTRIES) is plain
    assert resolve("  scaled  ", ENTRIES) is scaled
    assert resolve("scaled()", ENTRIES) is scaled


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("scaled(by=3.0)", 15.0),
        ("scaled(by=-1, shift=2)", -3),
        (" scaled( shift = 1e1 ) ", 20.0),
        ("bounded(low=7)", 7),
        ("bounded(low=0, high=4)", 4),
    ],
)
def test_options_are_bound(text, want):
    assert resolve(text, ENTRIES)(5) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plane", r"there is no 'plane'; there are \['bounded', 'plain', 'scaled'\]"),
        ("scaled(bye=1)", r"scaled has no \['bye'\]; it has \['by', 'shift'\]"),
        ("scaled(x=1)", r"scaled has no \['x'\]"),  # the quantity itself is no option
        ("scaled(**{'by': 1})", r"scaled has no \[None\]"),
        ("scaled(by=two)", r"'scaled\(by=two\)': by is not a literal value"),
        ("scaled(by=1 + 2)", r"by is not a literal value"),
        ("scaled(by=1, by=2)", r"'scaled\(by=1, by=2\)' gives by twice"),
        ("scaled(3)", r"'scaled\(3\)' is not of the form name or name\(key=value\)"),
        ("scaled(by=1", r"is not of the form"),
        ("scaled(by=1); plain", r"is not of the form"),
        ("a.b", r"is not of the form"),
        ("scaled()()", r"is not of the form"),
        ("", r"'' is not of the form"),
    ],
)
def test_what_is_wrong_is_said_and_what_there_is(text, message):
    with pytest.raises(ValueError, match=message):
        resolve(text, ENTRIES)

"""What the tests of verifiers share: a record, its verdict, and answers for the code verifier."""

import json

import pytest

from gopd_jax.types import Record
from gopd_jax.verifiers import close, verify

SUM = {"entry": "f", "tests": [{"args": [[1, 2, 3]], "want": 6}, {"args": [[]], "want": 0}]}


@pytest.fixture(scope="module", autouse=True)
def workers_end():
    """To be imported where verifiers are called: their processes end with the module."""
    yield
    close()


def record(verifier, answer):
    answer = answer if isinstance(answer, str) else json.dumps(answer)
    return Record(messages=(), task="t", answer=answer, verifier=verifier, source="memory:1")


def judge(completion, answer, verifier="code"):
    (verdict,) = verify([completion], [record(verifier, answer)])
    assert verdict.reason
    assert verdict.reason.isascii()
    return verdict


def returns(want, *args):
    return {"entry": "f", "tests": [{"args": list(args), "want": want}]}

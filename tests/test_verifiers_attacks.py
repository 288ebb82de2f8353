"""Completions that mean harm: each has a verdict with a clear reason, in bounded time."""

import os
import sys
import time

import pytest
from judging import SUM, judge, record, returns, workers_end  # noqa: F401

from gopd_jax.verifiers.code import code

OS = "import sys\nos = sys.modules['os']\n"
LIAR = (
    "class A({base}):\n    __eq__ = lambda s, o: True\n    __hash__ = lambda s: 0\n"
    "    __ne__ = lambda s, o: False\ndef f(x): return A()"
)

ATTACKS = {
    # name: (source, part of the reason)
    "nothing": ("", "defines no function f"),
    "not callable": ("f = 6", "defines no function f"),
    "syntax": ("def f(x) return 6", "SyntaxError"),
    "null bytes": ("def f(x):\x00 return 6", "raised"),
    "surrogates": ("f = '\ud800'", "raised UnicodeEncodeError"),
    "deep source": ("f = " + "(" * 5000 + ")" * 5000, "raised"),
    "long source": ("#" * 100_000, "source of 100000 characters"),
    "exception": ("def f(x): return x.y", "raised AttributeError: 'list' object has no"),
    "lying exception": (
        "class E(Exception):\n    def __str__(s): raise E\ndef f(x): raise E",
        "raised E",
    ),
    "exit": ("def f(x): exit()", "NameError"),
    "sys.exit": ("import sys\ndef f(x): sys.exit(0)", "raised SystemExit"),
    "os._exit": (OS + "def f(x): os._exit(0)", "exited with status 0"),
    "abort": (OS + "def f(x): os.abort()", "the process died of SIG"),
    "interrupt": ("def f(x): raise KeyboardInterrupt", "raised KeyboardInterrupt"),
    "recursion": ("def f(x): return f(x)", "RecursionError"),
    "deep stack": (
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n"
        "    __getattr__ = lambda s, n: getattr(s, n + 'a')\ndef f(x): return A().b",
        "test 1 of 2",
    ),
    "big power": ("def f(x): return 9**9**9", "1 s of processor time"),
    "loop": ("def f(x):\n    while True: pass", "1 s of processor time"),
    "loop that catches": (
        "def f(x):\n    while True:\n        try:\n            while True: pass\n"
        "        except BaseException: pass",
        "1 s of processor time",
    ),
    "loop outside": ("while True: pass", "1 s of processor time"),
    "one big list": ("def f(x): return [0] * 10**10", "raised MemoryError"),
    "growing text": ("def f(x):\n    s = 'x'\n    while True: s += s", "raised MemoryError"),
    "giant print": (
        "def f(x):\n    for _ in x: print('x' * 10**7)\n    return 7",
        "returned",
    ),
    "giant text": ("def f(x): return 'x' * 10**7", "more than the sandbox takes"),
    "giant list": ("def f(x): return [0] * 10**6", "more than 100000 parts"),
    "giant tree": ("def f(x):\n    for _ in range(60): x = [x, x]\n    return x", "parts"),
    "giant int": ("def f(x): return 1 << 10**6", "raised ValueError"),
    "list in itself": ("def f(x):\n    x.append(x)\n    return x", "parts"),
    "deep list": ("def f(x):\n    for _ in range(50000): x = [x]\n    return x", "RecursionError"),
    "tuple": ("def f(x): return (6,)", "returned a tuple where JSON has only lists"),
    "liar": (LIAR.format(base="object"), "returned a A, which is no plain value"),
    "lying int": (LIAR.format(base="int"), "returned a A, which is no plain value"),
    "lying list": (LIAR.format(base="list"), "returned a A, which is no plain value"),
    "builtins": (
        "def f(x):\n    b = (lambda: 0).__builtins__\n    b['type'] = lambda v: int\n"
        "    b['len'] = b['all'] = b['isinstance'] = lambda *a: True\n    return 'six'",
        "returned 'six'",
    ),
    "builtins module": (
        "import sys\nb = vars(sys.modules['builtins'])\n"
        "b['type'] = lambda v: int\nb['int'] = object\ndef f(x): return 'six'",
        "test 1 of 2",
    ),
    "json": (
        "import json\njson.dumps = lambda *a: '{\"value\": 7}'\ndef f(x): return 6",
        "7 where 6",
    ),
    "import os": ("import os\ndef f(x): return 6", "import of 'os' is not permitted"),
    "import socket": ("def f(x):\n    import socket", "import of 'socket' is not permitted"),
    "import unloaded": ("def f(x): return sys\nimport antigravity", "is not permitted"),
    "true import": ("import sys\nsys.modules['builtins'].__import__('ssl')", "import is not perm"),
    "input": ("def f(x): return int(input())", "builtins.input is not permitted"),
    "shell": (OS + "def f(x): return os.system('true')", "os.system is not permitted"),
    "kill": (OS + "def f(x): os.kill(os.getppid(), 9)", "raised"),
    "fork": (OS + "def f(x): os.fork()", "os.fork is not permitted"),
    "frames": ("import sys\ndef f(x): return str(sys._getframe(2).f_locals)", "test 1 of 2"),
    "gc": ("import sys\ndef f(x): sys.modules['gc'].get_objects()", "gc.get_objects is not perm"),
    "thread": ("import sys\ndef f(x): sys.modules['_thread'].start_new_thread(f, (x,))", "raised"),
    "ctypes": (
        "import sys\ndef f(x): sys.modules['ctypes'].string_at(0)",
        "ctypes.string_at is",
    ),
    "closed pipe": (OS + "def f(x):\n    os.closerange(0, 99)\n    return 6", "test "),
    "garbage in pipe": (
        OS + "def f(x):\n    for d in range(99):\n        try: os.write(d, b'\\xff[}\\n' * 9)\n"
        "        except OSError: pass\n    return 6",
        "no readable result",
    ),
    "deep json in pipe": (
        OS + "def f(x):\n    for d in range(99):\n"
        "        try: os.write(d, b'{\"value\": ' + b'[' * 9**5 + b'\\n')\n"
        "        except OSError: pass\n    return 6",
        "no readable result",
    ),
    "digits in pipe": (
        OS + "def f(x):\n    for d in range(99):\n"
        "        try: os.write(d, b'{\"value\": ' + b'9' * 9**5 + b'}\\n')\n"
        "        except OSError: pass\n    return 6",
        "no readable result",
    ),
    "strange error in pipe": (
        OS + "def f(x):\n    for d in range(99):\n"
        "        try: os.write(d, b'{\"error\": [[' + b']]}\\n')\n"
        "        except OSError: pass\n    return 6",
        "no readable result",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_harm_gets_a_verdict_with_its_reason_in_bounded_time(name):
    attack, reason = ATTACKS[name]
    started = time.monotonic()
    # Processor time is the limit that a busy machine does not move.
    verdict = judge(attack, SUM, "code(wall_s=20.0)")
    assert verdict.score == 0.0
    assert reason in verdict.reason
    assert time.monotonic() - started < 60.0
    assert judge("def f(x): return sum(x)", SUM).score == 1.0


def test_digits_are_bounded_where_the_interpreter_has_no_bound():
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        verdict = judge(ATTACKS["digits in pipe"][0], SUM)
    finally:
        sys.set_int_max_str_digits(before)
    assert verdict.reason == "test 1 of 2: no readable result"


def test_a_sleeper_ends_at_the_wall_clock_limit():
    started = time.monotonic()
    (verdict,) = code(["import time\ndef f(x): time.sleep(100)"], [record("code", SUM)], wall_s=0.3)
    assert verdict.reason == "test 1 of 2: no result within 0.3 s"
    assert 0.3 <= time.monotonic() - started < 20.0


def test_a_growing_list_ends_at_the_memory_limit():
    completion = "def f(x):\n    while True: x.append(x)"
    (verdict,) = code([completion], [record("code", SUM)], cpu_s=9, wall_s=9.0, memory_mb=64)
    assert verdict.reason == "test 1 of 2: raised MemoryError"


def test_files_are_neither_read_nor_written(tmp_path):
    secret, target = tmp_path / "secret", tmp_path / "target"
    secret.write_text("6")
    os.chmod(tmp_path, 0o777)
    for way in (f"open({str(secret)!r}).read()", f"os.read(os.open({str(secret)!r}, 0), 9)"):
        verdict = judge(OS + f"def f(): return {way}", returns("6"))
        assert "open is not permitted" in verdict.reason
    for way in (f"open({str(target)!r}, 'w')", f"os.mkdir({str(target)!r})"):
        verdict = judge(OS + f"def f(): return {way}", returns(None))
        assert "is not permitted" in verdict.reason
    verdict = judge(OS + f"def f(): return os.remove({str(secret)!r})", returns(None))
    assert "os.remove is not permitted" in verdict.reason
    assert os.listdir(tmp_path) == ["secret"]

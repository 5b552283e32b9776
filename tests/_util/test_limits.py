"""Questions with a time limit: answers, errors, and what happens when the child process is slow or dies."""

import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import sympy

from controlat._util import limits
from controlat._util.limits import NotFound, TimeLimit, limited
from controlat.symbolic.questions import tidy
from controlat.symbolic.symbols import THETA, X

ENDLESS = (2**607 - 1) * (2**521 - 1)  # two primes: nobody finds them by trial
AT_EASE = 60.0  # a limit that plays no part


@pytest.fixture(autouse=True, scope="module")
def _closed() -> Iterator[None]:
    yield
    limits.close()


def _pid() -> int:
    assert limits._child is not None
    return limits._child.process.pid


def _works() -> None:
    assert limited(sympy.integrate, 2 * X, X, seconds=AT_EASE) == X**2


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_answers_come_back_from_one_process() -> None:
    assert limited(sympy.solve, X**2 - THETA**2, X, seconds=AT_EASE) == [-THETA, THETA]
    first = _pid()
    assert first != os.getpid()
    assert limited(tidy, X * X, seconds=AT_EASE) == X**2
    assert limited(sympy.factorint, 12, seconds=AT_EASE) == {2: 2, 3: 1}
    assert _pid() == first


def test_the_child_imports_the_module_that_is_asked_for_and_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lightweight.py").write_text("import sys\n\ndef knows(name): return name in sys.modules\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from lightweight import knows  # type: ignore[import-not-found]

    limits.close()
    assert not limited(knows, "sympy", seconds=AT_EASE)
    assert not limited(knows, "numpy", seconds=AT_EASE)
    _works()
    assert limited(knows, "sympy", seconds=AT_EASE)
    limits.close()


@pytest.mark.slow  # the import must take longer than any answer on a busy machine
def test_the_time_of_a_question_begins_after_its_module_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "import os, time", "time.sleep(8 * (os.getpid() != {}))", "def answer(): return 42"
    (tmp_path / "heavyweight.py").write_text("\n".join(lines).format(os.getpid()))
    monkeypatch.syspath_prepend(str(tmp_path))
    from heavyweight import answer  # type: ignore[import-not-found]

    limits.close()
    assert limited(math.gcd, 12, 18, seconds=AT_EASE) == 6  # not for the first question alone
    assert limited(answer, seconds=7) == 42
    limits.close()


def test_a_module_that_the_child_cannot_import_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shortlived.py").write_text("def answer(): return 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from shortlived import answer  # type: ignore[import-not-found]

    (tmp_path / "shortlived.py").unlink()
    limits.close()
    with pytest.raises(NotFound, match="ModuleNotFoundError: No module named 'shortlived'"):
        limited(answer, seconds=AT_EASE)
    _works()
    limits.close()


def test_symbols_come_back_as_the_same_symbols() -> None:
    dummy = sympy.Dummy("z", positive=True)
    assert limited(sympy.diff, dummy**2 * X, dummy, seconds=AT_EASE) == 2 * dummy * X


def test_large_questions_and_answers_pass_through_the_pipes() -> None:
    many = [X**k for k in range(20_000)]
    answer = limited(sympy.flatten, [many], seconds=AT_EASE)
    assert answer == many


def test_an_endless_computation_ends_with_the_time_and_the_next_question_is_answered() -> None:
    _works()
    pid = _pid()
    with pytest.raises(
        TimeLimit, match=r"^sympy\.ntheory\.factor_\.factorint took longer than 0\.5 seconds$"
    ):
        limited(sympy.factorint, ENDLESS, seconds=0.5)
    assert _gone(pid)
    _works()


def test_a_killed_child_is_an_error_and_the_next_question_is_answered() -> None:
    _works()
    timer = threading.Timer(0.3, os.kill, (_pid(), signal.SIGKILL))
    timer.start()
    with pytest.raises(NotFound, match="ended without an answer"):
        limited(sympy.factorint, ENDLESS, seconds=AT_EASE)
    timer.join()
    _works()


def test_a_child_that_was_killed_between_questions_is_replaced() -> None:
    _works()
    assert limits._child is not None
    os.kill(_pid(), signal.SIGKILL)
    limits._child.process.wait()
    _works()


def test_an_interrupt_ends_the_work_and_answers_stay_in_step() -> None:
    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    _works()
    pid, before = _pid(), signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            limited(sympy.factorint, ENDLESS, seconds=AT_EASE)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert _gone(pid)
    _works()


def test_the_child_leaves_interrupts_to_its_parent() -> None:
    _works()
    pid = _pid()
    os.kill(pid, signal.SIGINT)
    _works()
    assert _pid() == pid


def test_errors_come_back_as_text() -> None:
    _works()
    pid = _pid()
    with pytest.raises(NotFound, match=r"^\w+Error: "):
        limited(tidy, "y", seconds=AT_EASE)
    with pytest.raises(NotFound, match=r"^PicklingError: |^AttributeError: "):
        limited(sympy.lambdify, X, X, seconds=AT_EASE)
    assert _pid() == pid


def test_exhausted_memory_and_recursion_are_errors_and_the_next_question_is_answered() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(NotFound, match=r"^RecursionError"):
        limited(sympy.flatten, loop, seconds=AT_EASE)
    _works()
    if sys.platform == "linux":
        with pytest.raises(NotFound, match=r"^MemoryError"):
            limited(sympy.IndexedBase, "y", _Huge(), seconds=AT_EASE)
    _works()


class _Huge:
    """Unpickled, it asks for more memory than the child may have."""

    def __reduce__(self) -> tuple[Callable[[int], bytes], tuple[int]]:
        return bytes, (8 << 30,)


def test_what_is_printed_does_not_get_among_the_answers() -> None:
    for _ in range(3):
        assert limited(sympy.pprint, X, seconds=AT_EASE) is None
    _works()


def test_what_has_no_name_is_not_sent() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        limited(lambda: 1)
    _works()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_the_limit_is_a_positive_number(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds must be a positive number, got"):
        limited(sympy.factorint, 12, seconds=seconds)


def test_several_threads_get_each_their_own_answer() -> None:
    answer: dict[int, object] = {}

    def ask(k: int) -> None:
        answer[k] = limited(sympy.factorint, 2**k, seconds=AT_EASE)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(1, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answer == {k: {2: k} for k in range(1, 21)}


# ------------------------------------------------------------------------------- in a process of their own


def _run(code: str, folder: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *options, "-c", code],
        capture_output=True, text=True, timeout=300, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_nothing_is_left_over_at_exit_and_torch_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the folder of the user was imported from')")
    code = """
import sys
from controlat._util.limits import limited
from controlat._util import limits
assert "sympy" not in sys.modules and "torch" not in sys.modules
import sympy
print(limited(sympy.factorint, 12, seconds=60), limits._child.process.pid)
assert "torch" not in sys.modules
"""
    answer, _, pid = _run(code, tmp_path, "-P").strip().rpartition(" ")
    assert answer == "{2: 2, 3: 1}"
    assert _gone(int(pid))


def test_a_fork_has_a_child_of_its_own(tmp_path: Path) -> None:
    code = """
import os, sys, sympy
from controlat._util import limits
from controlat._util.limits import limited
assert limited(sympy.factorint, 12, seconds=60) == {2: 2, 3: 1}
first = limits._child.process.pid
with limits._lock:
    forked = os.fork()
if not forked:
    same = limited(sympy.factorint, 18, seconds=60) == {2: 1, 3: 2}
    sys.exit(0 if same and limits._child.process.pid != first else 1)
assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
assert limited(sympy.factorint, 20, seconds=60) == {2: 2, 5: 1}
assert limits._child.process.pid == first
"""
    _run(code, tmp_path)


@pytest.mark.slow
def test_the_child_ends_when_its_parent_is_killed_while_it_computes(tmp_path: Path) -> None:
    code = f"""
import os, signal, threading, sympy
from controlat._util import limits
from controlat._util.limits import limited
limited(sympy.factorint, 12, seconds=60)
print(limits._child.process.pid, flush=True)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
limited(sympy.factorint, {ENDLESS}, seconds=3)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == -signal.SIGKILL
    pid, deadline = int(done.stdout), time.monotonic() + 120
    while not _gone(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _gone(pid)

"""Run directories: continued or reprinted by the same settings, refused by others, never overwritten."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GUARD

import controlat
from controlat.app.runs import claimed, environment, slug

SETTINGS = {"command": "train", "lr": 0.1, "schedules": [{"text": "none", "epochs": 2.0}]}

_HOLDER = """
import sys
from controlat.app.runs import claimed
with claimed(sys.argv[1], {"a": 1}):
    print("held", flush=True)
    sys.stdin.read()
"""


def _state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Contents and times of every file, but the lock."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


# ----------------------------------------------------------------------------------------------- the rules


def test_a_new_directory_is_claimed_and_known_the_next_time(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    with claimed(out, SETTINGS) as known:
        assert not known
        assert json.loads((out / "settings.json").read_text()) == SETTINGS
    before = _state(out)
    with claimed(out, dict(SETTINGS)) as known:
        assert known
    assert _state(out) == before


def test_an_empty_directory_is_claimed(tmp_path: Path) -> None:
    with claimed(tmp_path, SETTINGS) as known:
        assert not known


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 0.2}, "lr: 0.1 there, 0.2 here"),
        ({"new": 1}, "new: None there, 1 here"),
        ({"schedules": [{"text": "pgd:steps=1,alpha=0.1", "epochs": 2.0}]}, "['none'] there"),
        ({"lr": 0.2, "a": 1, "b": 2, "c": 3}, "; ..."),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with claimed(tmp_path, SETTINGS):
        (tmp_path / "result").write_text("precious")
    before = _state(tmp_path)
    with (
        pytest.raises(ValueError, match="made with other settings.*" + re.escape(named)),
        claimed(tmp_path, SETTINGS | changes),
    ):
        pass
    assert _state(tmp_path) == before


def test_settings_that_are_missing_here_are_named(tmp_path: Path) -> None:
    with claimed(tmp_path, SETTINGS):
        pass
    with (
        pytest.raises(ValueError, match=r"lr: 0\.1 there, None here"),
        claimed(tmp_path, {"command": "train"}),
    ):
        pass


def test_a_directory_with_other_files_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    before = _state(tmp_path)
    with (
        pytest.raises(ValueError, match=r"holds other files and no settings\.json"),
        claimed(tmp_path, SETTINGS),
    ):
        pass
    assert _state(tmp_path) == before
    assert {p.name for p in tmp_path.iterdir()} == {"thesis.tex"}


def test_a_file_instead_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ValueError, match="is a file; give the name of a directory"),
        claimed(tmp_path / "file", SETTINGS),
    ):
        pass


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json: not valid JSON"), claimed(tmp_path, SETTINGS):
        pass


def test_a_run_that_failed_before_it_made_anything_leaves_the_directory_free(tmp_path: Path) -> None:
    def fail(made: str | None) -> None:
        with claimed(tmp_path, SETTINGS):
            if made:
                (tmp_path / made).write_text("x")
            raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        fail(None)
    with claimed(tmp_path, {"command": "other"}) as known:
        assert not known
    with pytest.raises(ValueError, match="made with other settings"):
        fail("log.jsonl")
    (tmp_path / "settings.json").unlink()
    with pytest.raises(RuntimeError, match="no data"):
        fail("log.jsonl")
    with claimed(tmp_path, SETTINGS) as known:
        assert known, "a run that has begun stays"


# ------------------------------------------------------------------------------------------- two processes


def test_two_processes_at_once_are_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        for settings in ({"a": 1}, {"a": 2}):
            with (
                pytest.raises(ValueError, match="another process is working in"),
                claimed(tmp_path, settings),
            ):
                pass
        child.kill()
        child.wait(GUARD)
    with claimed(tmp_path, {"a": 1}) as known:
        assert known, "a killed process holds no lock"


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Starts that were killed, and starts at the same time; forks of a process of its own take seconds."""
    script = Path(__file__).parent.parent / "claims.py"
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("starts"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GUARD)
    return dict(json.loads(done.stdout))


def test_a_start_that_is_killed_at_any_line_refuses_no_later_start(starts: dict[str, Any]) -> None:
    found = starts["killed"]
    assert found["kills"] > 60
    assert found["refused"] == []
    assert found["left"] == [], "nothing half-written stays"


def test_of_starts_at_the_same_time_one_holds_the_directory_and_the_others_are_told(
    starts: dict[str, Any],
) -> None:
    assert len(starts["races"]) == 10
    for told in starts["races"]:
        held = [text for text in told if text == "held, known: False"]
        busy = [text for text in told if text.startswith("another process is working in")]
        assert (len(held), len(busy)) == (1, 2), told


def test_only_files_of_our_own_are_cleared(tmp_path: Path) -> None:
    other = [".notes.tmp", ".thesis.tex.abc.tmp", "a.tmp", "runs/01/deep/.a.12345678.tmp"]
    ours = [".settings.json.0abcd_12.tmp", ".last.pt.12345678.tmp", "runs/01/.log.jsonl.12345678.tmp"]
    with claimed(tmp_path, SETTINGS):
        pass
    for name in other + ours:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with claimed(tmp_path, SETTINGS) as known:
        assert known
    assert [name for name in other if not (tmp_path / name).exists()] == []
    assert [name for name in ours if (tmp_path / name).exists()] == []


def test_what_a_killed_start_left_beside_other_files_stays(tmp_path: Path) -> None:
    (tmp_path / ".settings.json.12345678.tmp").write_text("{")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"), claimed(tmp_path, SETTINGS):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {".settings.json.12345678.tmp", "thesis.tex"}


# ------------------------------------------------------------------------------------------- real commands

_TINY: dict[str, Any] = {"epochs": 1, "train_points": 100, "threads": 1, "progress": False}


def test_training_again_with_the_same_settings_returns_the_same_and_touches_nothing(tmp_path: Path) -> None:
    first = controlat.train(tmp_path / "run", **_TINY)
    before = _state(tmp_path)
    again = controlat.train(tmp_path / "run", **_TINY)
    assert _state(tmp_path) == before
    assert (first.pop("finished_before"), again.pop("finished_before")) == (False, True)
    assert first == again


def test_a_number_and_its_text_are_the_same_setting(tmp_path: Path) -> None:
    controlat.train(tmp_path / "run", **_TINY, lr=0.05, eps="0.15")
    assert controlat.train(tmp_path / "run", **_TINY, lr="0.05", eps=0.15)["finished_before"]
    assert controlat.train(tmp_path / "run", **_TINY, lr="5e-2")["finished_before"]
    with pytest.raises(ValueError, match=r"lr: 0\.05 there, 0\.06 here"):
        controlat.train(tmp_path / "run", **_TINY, lr="0.06")


def test_what_decides_only_where_and_how_fast_does_not_count_as_other_settings(tmp_path: Path) -> None:
    controlat.train(tmp_path / "run", **_TINY)
    again = controlat.train(tmp_path / "run", **_TINY | {"device": "cpu", "checkpoint_minutes": 1.0})
    assert again["finished_before"]


def test_an_evaluation_again_with_the_same_settings_touches_nothing(tmp_path: Path) -> None:
    settings = _TINY | {"schedules": ["none"], "seeds": [0], "attacks": ["fgsm"], "test_points": 40}
    settings |= {"schedules": ["none", "fgsm:alpha=0.15"]}
    first = controlat.evaluate(tmp_path / "run", **settings)
    before = _state(tmp_path)
    assert len(before) > 10
    assert controlat.evaluate(tmp_path / "run", **settings) == first
    assert _state(tmp_path) == before
    with pytest.raises(ValueError, match=r"made with other settings.*seeds"):
        controlat.evaluate(tmp_path / "run", **settings | {"seeds": [1]})
    with pytest.raises(ValueError, match=r"made with other settings.*command"):
        controlat.train(tmp_path / "run", **_TINY)
    assert _state(tmp_path) == before


def test_a_deleted_summary_is_written_again_from_the_result(tmp_path: Path) -> None:
    settings = _TINY | {"schedules": ["none", "fgsm:alpha=0.15"], "seeds": [0], "attacks": ["fgsm"]}
    controlat.evaluate(tmp_path, **settings)
    wanted = (tmp_path / "summary.md").read_bytes()
    (tmp_path / "summary.md").unlink()
    controlat.evaluate(tmp_path, **settings)
    assert (tmp_path / "summary.md").read_bytes() == wanted


# ---------------------------------------------------------------------------------------- names and records


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("none", "none"),
        ("amata:min=2,max=10,tau=20/255", "amata-min=2-max=10-tau=20_255"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("folder/mine.json", "folder_mine.json"),
        ("a b\n<>|*?\"'$;&", "ab"),
        (":,:,", "----"),
        ("///", "___"),
        ("..", "schedule"),
        ("", "schedule"),
        ("x" * 200, "x" * 80),
    ],
)
def test_slugs_are_short_names_of_one_folder(text: str, name: str) -> None:
    assert slug(text) == name


def test_the_environment_is_plain_data_and_names_what_ran() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    parts = {name: found[name] for name in ("cudnn", "tf32")}
    values = [v for v in found.values() if v not in parts.values()]
    values += [v for part in parts.values() for v in part.values()]
    assert {type(v) for v in values} <= {str, int, bool, type(None)}, "which a checkpoint takes"
    assert parts["cudnn"] == {"enabled": torch.backends.cudnn.enabled, "deterministic": False}
    assert list(parts["tf32"]) == ["convolutions", "matmul"]
    assert found["controlat"] == controlat.__version__
    assert found["torch"] == str(torch.__version__)
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] == "cpu"
    assert found["hardware"]


def test_the_git_state_is_that_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert environment()["git"] is None

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *arguments], check=True, capture_output=True)

    (tmp_path / "a").write_text("1")
    git("init")
    git("add", "a")
    git("commit", "-m", "one")
    clean = environment()["git"]
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "a").write_text("2")
    assert environment()["git"] == clean + "+"

"""What a run leaves in log.jsonl, shows on standard error, and takes back on a resume."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pexpect
import pytest

from lory.runtime import LoryError, UsageError
from lory.training import monitor as module
from lory.training.monitor import STEP_VALUES, Monitor, read_log, rewind


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def make_values(**changes: float) -> dict[str, float]:
    values: dict[str, float] = dict.fromkeys(STEP_VALUES, 1.0)
    return values | {"learning_rate": 1.8e-4, "tokens_per_second": 512.0, "supervised_tokens": 100} | changes


def run_steps(monitor: Monitor, first: int, last: int, clock: Clock | None = None) -> None:
    for step in range(first, last + 1):
        if clock:
            clock.now += 2.0
        monitor.log_step(step, make_values(loss=float(step)))


def log_steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_log(folder)]


def test_a_line_is_written_for_the_first_the_last_and_every_nth_step(tmp_path: Path) -> None:
    with Monitor(tmp_path, 23, log_every_steps=10, tensorboard=False) as monitor:
        run_steps(monitor, 1, 23)
    assert log_steps(tmp_path) == [1, 10, 20, 23]


def test_a_line_has_every_value_and_the_times(tmp_path: Path, clock: Clock) -> None:
    with Monitor(tmp_path, 10, log_every_steps=5, tensorboard=False) as monitor:
        run_steps(monitor, 1, 5, clock)
        assert monitor.elapsed_seconds == 10.0
    line = read_log(tmp_path)[-1]
    assert list(line) == ["step", *STEP_VALUES, "elapsed_seconds", "remaining_seconds"]
    assert (line["elapsed_seconds"], line["remaining_seconds"]) == (10.0, 10.0)


def test_a_line_tells_of_all_steps_since_the_last_line(tmp_path: Path) -> None:
    first = make_values(
        loss=1.0, token_accuracy=0.2, grad_norm=1.0, supervised_tokens=100, memory_bytes=70, tokens_per_second=400
    )
    second = make_values(
        loss=4.0, token_accuracy=0.8, grad_norm=2.0, supervised_tokens=300, memory_bytes=50, learning_rate=9e-5
    )
    with Monitor(tmp_path, 100, log_every_steps=3, tensorboard=False) as monitor:
        monitor.log_step(1, make_values(loss=100.0))
        monitor.log_step(2, first)
        monitor.log_step(3, second)
    line = read_log(tmp_path)[-1]
    assert line["loss"] == pytest.approx((1.0 * 100 + 4.0 * 300) / 400)
    assert line["token_accuracy"] == pytest.approx((0.2 * 100 + 0.8 * 300) / 400)
    assert line["grad_norm"] == pytest.approx(1.5)
    assert line["tokens_per_second"] == pytest.approx(456)
    assert (line["learning_rate"], line["supervised_tokens"], line["memory_bytes"]) == (9e-5, 400, 70)


def test_a_step_without_supervised_tokens_has_no_say_in_the_loss(tmp_path: Path) -> None:
    with Monitor(tmp_path, 3, log_every_steps=10, tensorboard=False) as monitor:
        monitor.log_step(1, make_values(loss=float("nan"), supervised_tokens=0))
        monitor.log_step(2, make_values(loss=float("nan"), supervised_tokens=0))
        monitor.log_step(3, make_values(loss=2.0))
    assert [line["loss"] for line in read_log(tmp_path)] == [None, 2.0]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    with Monitor(tmp_path, 2, log_every_steps=1, tensorboard=False) as monitor:
        monitor.log_step(1, make_values(loss=float("nan"), grad_norm=float("inf")))
        monitor.log_eval(1, {"perplexity": float("inf"), "sources": {"identity": {"loss": float("nan")}}})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    step, evaluation = (
        json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").read_text().splitlines()
    )
    assert (step["loss"], step["grad_norm"]) == (None, None)
    assert evaluation == {"step": 1, "eval": {"perplexity": None, "sources": {"identity": {"loss": None}}}}


def test_values_that_were_not_given_are_null_and_further_ones_are_kept(tmp_path: Path) -> None:
    with Monitor(tmp_path, 1, tensorboard=False) as monitor:
        monitor.log_step(1, {"loss": 1.0, "unlikelihood": 0.25})
    line = read_log(tmp_path)[0]
    assert (line["memory_bytes"], line["unlikelihood"]) == (None, 0.25)


def test_lines_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    with Monitor(tmp_path, 9, log_every_steps=1, tensorboard=False) as monitor:
        run_steps(monitor, 1, 2)
        assert log_steps(tmp_path) == [1, 2]


def test_steps_since_the_last_line_are_written_when_a_run_is_stopped(tmp_path: Path) -> None:
    def stop_after_13() -> None:
        with Monitor(tmp_path, 100, log_every_steps=10, tensorboard=False) as monitor:
            run_steps(monitor, 1, 13)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_after_13()
    assert log_steps(tmp_path) == [1, 10, 13]
    assert read_log(tmp_path)[-1]["loss"] == pytest.approx(12.0)


def test_a_resumed_run_logs_the_steps_of_an_uninterrupted_one_and_its_clock_goes_on(
    tmp_path: Path, clock: Clock
) -> None:
    with Monitor(tmp_path, 30, log_every_steps=5, tensorboard=False) as monitor:
        run_steps(monitor, 1, 13, clock)
    clock.now += 5000
    with Monitor(tmp_path, 30, start_step=10, log_every_steps=5, tensorboard=False) as monitor:
        run_steps(monitor, 11, 30, clock)
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [1, 5, 10, 15, 20, 25, 30]
    assert [line["elapsed_seconds"] for line in lines] == [2.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    assert [line["loss"] for line in lines] == [1.0, 3.5, 8.0, 13.0, 18.0, 23.0, 28.0]


def test_the_time_left_is_measured_by_this_sessions_speed(tmp_path: Path, clock: Clock) -> None:
    with Monitor(tmp_path, 20, start_step=10, log_every_steps=5, tensorboard=False) as monitor:
        run_steps(monitor, 11, 15, clock)
    assert read_log(tmp_path)[0]["remaining_seconds"] == 10.0


def test_what_comes_before_the_first_step_does_not_count_for_the_time_left(tmp_path: Path, clock: Clock) -> None:
    with Monitor(tmp_path, 10, log_every_steps=5, tensorboard=False) as monitor:
        clock.now += 300
        monitor.begin()
        run_steps(monitor, 1, 5, clock)
    assert read_log(tmp_path)[-1]["remaining_seconds"] == 10.0


def test_rewind_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "eval": {"loss": 3.0}},
        {"step": 10, "loss": 1.0, "elapsed_seconds": 7.5},
        {"step": 10, "eval": {"loss": 1.5}},
        {"step": 20, "loss": 0.5, "elapsed_seconds": 15.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 2')
    # a cut through the two bytes of an é
    (tmp_path / "samples.jsonl").write_bytes(b'{"step": 10, "answer": "oui"}\n{"step": 10, "answer": "caf\xc3')
    assert rewind(tmp_path, 10) == 7.5
    assert read_log(tmp_path) == lines[:3]
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 10, "answer": "oui"}\n'


def test_rewind_keeps_a_whole_last_line_that_lacks_its_newline(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "elapsed_seconds": 2.5}')
    assert rewind(tmp_path, 1) == 2.5
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "elapsed_seconds": 2.5}\n'


def test_rewind_leaves_a_right_file_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"step": 1}\n')
    before = path.stat().st_ino
    assert rewind(tmp_path, 5) == 0.0
    assert path.stat().st_ino == before


def test_a_folder_without_logs_rewinds_to_zero_seconds(tmp_path: Path) -> None:
    assert rewind(tmp_path, 10) == 0.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ['{"step": 1', "[1]", '{"loss": 1.0}'])
def test_a_broken_line_amid_the_log_is_named(tmp_path: Path, broken: str) -> None:
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
    with pytest.raises(UsageError, match=r"log\.jsonl, line 2 is no"):
        rewind(tmp_path, 3)


def test_a_log_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with Monitor(folder, 5, log_every_steps=1, tensorboard=False) as monitor:
        shutil.rmtree(folder)
        with pytest.raises(LoryError, match="Could not write"):
            monitor.log_step(1, make_values())


def test_without_a_terminal_plain_lines_go_to_standard_error(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Monitor(tmp_path, 96, log_every_steps=20, tensorboard=False) as monitor:
        for step in range(1, 21):
            clock.now += 1.25
            monitor.log_step(step, make_values(loss=1.234))
        monitor.log_eval(
            20, {"loss": 1.5, "token_accuracy": 0.61, "sources": {"identity": {"loss": 0.25, "tokens": 9000}}}
        )
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 1/96  loss 1.234  lr 1.8e-04  512 tokens/s  01:59 left",
        "step 20/96  loss 1.234  lr 1.8e-04  512 tokens/s  01:35 left",
        "step 20/96  evaluation  loss 1.5  token accuracy 0.61",
        "  identity  loss 0.25  tokens 9000",
    ]
    assert "\r" not in err
    assert "\x1b" not in err


def test_long_times_show_hours_and_missing_values_a_dash(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Monitor(tmp_path, 11, tensorboard=False) as monitor:
        clock.now += 400
        monitor.log_step(1, {"loss": float("nan")})
    assert capsys.readouterr().err == "step 1/11  loss nan  lr -  - tokens/s  1:06:40 left\n"


def test_what_is_said_is_neither_markup_nor_control_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Monitor(tmp_path, 1, tensorboard=False) as monitor:
        monitor.say("[bold]你好[/bold] :smile:\tx\r\ny\x1b[2J\r")
    assert (
        capsys.readouterr().err
        == "[bold]你好[/bold] :smile:\tx\ny\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}\n"
    )


SESSION = """
import sys
from pathlib import Path
from lory.training.monitor import Monitor
with Monitor(Path(sys.argv[1]), 96, start_step=19, tensorboard=False) as monitor:
    monitor.log_step(20, {"loss": 1.234, "tokens_per_second": 512.0, "supervised_tokens": 9})
    monitor.say("[bold]a sample[/bold]")
print("the end")
"""


def test_a_terminal_shows_a_bar_with_lines_above_it(tmp_path: Path) -> None:
    arguments = ["-c", SESSION, str(tmp_path)]
    child = pexpect.spawn(sys.executable, arguments, dimensions=(24, 100), encoding="utf-8", timeout=30)
    shown: str = child.read()
    child.close()
    assert child.exitstatus == 0
    assert "step 20/96  loss 1.234  lr -  512 tokens/s" in shown
    assert "[bold]a sample[/bold]" in shown
    assert shown.rstrip().endswith("the end")
    assert log_steps(tmp_path) == [20]


class Writer:
    """Keeps what TensorBoard's writer is given."""

    made: list[Writer]

    def __init__(self, log_dir: str, purge_step: int | None) -> None:
        self.log_dir, self.purge_step, self.closed = log_dir, purge_step, False
        self.scalars: dict[tuple[str, int], float] = {}
        self.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_each_line_and_each_source_of_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Writer.made = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    with Monitor(tmp_path, 12, start_step=10, log_every_steps=1) as monitor:
        monitor.log_step(11, {"loss": 2.0})
        monitor.log_eval(11, {"loss": 3.0, "sources": {"identity": {"loss": 4.0}}})
    (writer,) = Writer.made
    assert (writer.log_dir, writer.purge_step, writer.closed) == (str(tmp_path / "tensorboard"), 11, True)
    assert writer.scalars == {("train/loss", 11): 2.0, ("eval/loss", 11): 3.0, ("eval/sources/identity/loss", 11): 4.0}


def test_tensorboard_files_are_written_where_the_package_is(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Monitor(tmp_path, 1) as monitor:
        monitor.log_step(1, make_values())
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_without_the_package_one_line_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing: Any = None
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", missing)
    with Monitor(tmp_path, 2, log_every_steps=1) as monitor:
        run_steps(monitor, 1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "TensorBoard" in line]
    assert len(lines) == 1
    assert 'pip install "lory-llm[tensorboard]"' in lines[0]
    assert not (tmp_path / "tensorboard").exists()

"""The benchmarks' own arithmetic, the page and the pictures they write, and the GPU script end to end on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from benchmarks import cuda, curves, memory, report, workers
from benchmarks.peers.random_models import IGNORE, draw_steps
from benchmarks.workers import cut_rows, join_samples


def make_rows(*lengths: int) -> list[dict[str, list[int]]]:
    start, rows = 0, []
    for length in lengths:
        ids = list(range(start, start + length))
        rows.append({"input_ids": ids, "labels": [-i for i in ids]})
        start += length
    return rows


def test_samples_are_joined_while_they_fit() -> None:
    joined = join_samples(make_rows(3, 4, 5, 10, 2), longest=8)
    assert [row["input_ids"] for row in joined] == [list(range(7)), list(range(7, 12)), list(range(12, 22))]
    assert all(row["labels"] == [-i for i in row["input_ids"]] for row in joined)


def test_rows_are_cut_from_samples_over_and_over() -> None:
    rows = cut_rows(make_rows(3, 4), length=5, count=3)
    assert [row["input_ids"] for row in rows] == [[0, 1, 2, 3, 4], [5, 6, 0, 1, 2], [3, 4, 5, 6, 0]]


def test_a_line_through_peaks_tells_the_bytes_of_a_token() -> None:
    line = memory.fit_line([1, 2, 4], [1003.0, 1006.0, 1012.0])
    assert line["bytes_a_token"] == pytest.approx(3)
    assert line["bytes_at_zero"] == pytest.approx(1000)
    assert line["off_the_line"] == pytest.approx(0, abs=1e-9)


def test_a_trainer_stands_still_between_its_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a peer that says how often it was asked, and would like to spin
    (tmp_path / "spinner.py").write_text(
        "import sys\nprint('@{\"peak_bytes\": 7}', flush=True)\n"
        "for turn, _ in enumerate(sys.stdin):\n    print(f'@{{\"turn\": {turn}}}', flush=True)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setitem(workers.COMMANDS, "spinner", ["spinner"])
    with workers.Worker("spinner", sys.executable, tmp_path, threads=2) as worker:
        assert worker.start() == 7
        process = psutil.Process(worker.process.pid)
        for turn in range(2):
            assert process.status() == psutil.STATUS_STOPPED
            assert worker.step() == {"turn": turn}
        environment = process.environ()
    assert environment["OMP_NUM_THREADS"] == "2"
    assert "OMP_WAIT_POLICY" not in environment
    assert worker.process.poll() is not None


def make_run(threads: int, *peers: str) -> dict[str, Any]:
    figures = {"seconds": 2.0, "tokens_per_second": 100.0, "supervised_per_second": 60.0, "peak_bytes": 2e9}
    ratio = {"median": 3.0, "min": 2.0, "max": 4.0}
    others = peers[:-1]
    return {
        "threads": threads,
        "rounds": 2,
        "peers": dict.fromkeys(peers, figures),
        "speed_ratio": dict.fromkeys(others, ratio),
        "cpu_ratio": dict.fromkeys(others, ratio),
        "memory_ratio": dict.fromkeys(others, 0.4),
        "first_loss_difference": 2e-7,
    }


def make_results(folder: Path) -> None:
    """What the three benchmarks leave, with made-up figures, and an empty file of a run that failed."""
    told = {"versions": {"torch": "2.11.0", "python": "3.12.1"}, "records": "short"}
    first = told | {
        "targets": "qv",
        "onednn": True,
        "runs": [make_run(1, "hf", "trl", "lory"), make_run(2, "hf", "lory")],
    }
    second = told | {"targets": "all", "onednn": False, "runs": [make_run(1, "hf", "lory-default")]}
    line = {
        "tokens": [512, 1024],
        "peak_bytes": [1e9, 2e9],
        "bytes_a_token": 2e6,
        "bytes_at_zero": 0,
        "off_the_line": 0.01,
    }
    steps = {"hf": None, "lory": {"seconds": 30.0, "peak_bytes": 8e9}}
    remembered = {
        "row": 512,
        "slopes": {"hf": line, "lory": line},
        "slope_ratio": 0.25,
        "context": {"tokens": 8192, "limit_bytes": 10_000_000_000, "steps": steps},
    }
    losses = {"hf": [2.0, 1.5], "lory": [2.0, 1.5]}
    drawn = {"losses": losses, "first_difference": 1e-7, "largest_difference": 3e-5}
    files = {"step-1": first, "step-2": second, "memory": remembered, "curves": drawn}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "step-3.json").write_text("")


def test_the_page_gets_the_tables_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_results(tmp_path)
    page, picture = tmp_path / "page.md", tmp_path / "images" / "bars.png"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), "--page", str(page), "--picture", str(picture)])
    report.main()
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert (
        "| q, v, short, 1 thread | Trainer + PEFT | 2.00 | 100 | 60 | 2000 | 3.00 (2.00-4.00) | 3.00 | 0.40 |" in text
    )
    assert "| all linear, short, 1 thread, no oneDNN |" in text
    assert "lory's slope is 0.25 of the Trainer's" in text
    assert "One row of 8,192 tokens within 10 GB: Trainer + PEFT fails (its line says 16.4 GB), lory" in text
    assert "at most 3.0e-05 at any" in text
    assert "](images/bars.png)" in text
    assert picture.stat().st_size > 1000
    again = page.read_text()
    report.main()
    assert page.read_text() == again


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="has no marks"):
        report.fill_page(page, ["line"])


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    curves.draw({"hf": [2.0, 1.5, 1.4], "lory": [2.0, 1.5, 1.4001]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_random_documents_fill_each_step() -> None:
    steps = draw_steps("tiny", tokens=300, steps=4)
    assert [sum(len(ids) for ids, _ in documents) for documents in steps] == [300] * 4
    ids, labels = steps[0][0]
    assert labels == [IGNORE] * (len(ids) // 3) + ids[len(ids) // 3 :]
    assert all(len(ids) >= 4 for documents in steps for ids, _ in documents)


def test_the_gpu_script_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    told = tmp_path / "cuda.json"
    variants = "hf,lory,lory-layers,lory-fp8,lory-liger,unsloth"
    settings = ["--shape", "tiny", "--tokens", "64", "--steps", "3", "--device", "cpu", "--in-process"]
    monkeypatch.setattr(sys, "argv", ["cuda", *settings, "--variants", variants, "--json", str(told)])
    cuda.main()
    found = json.loads(told.read_text())["variants"]
    assert set(found) == set(variants.split(","))
    for name in ("lory", "lory-layers"):
        assert found[name]["losses"] == pytest.approx(found["hf"]["losses"], abs=2e-5)
    # rounding to FP8 shows, and is small
    first = abs(found["lory-fp8"]["losses"][0] - found["hf"]["losses"][0])
    assert 1e-7 < first < 1e-2
    assert found["lory"]["tokens_per_second"] > 0
    assert "left_out" in found["unsloth"]
    assert "left_out" in found["lory-liger"]
    assert "unsloth not installed" in capsys.readouterr().out


def test_a_failed_variant_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"seconds": [1.0] * 6, "losses": [2.0] * 6, "tokens": [10] * 6, "peak_bytes": 10**9}
    answers = {"hf": {"error": "torch.OutOfMemoryError: out of memory"}, "lory": good}
    monkeypatch.setattr(cuda, "run_apart", lambda job, variant: answers[variant])
    found = cuda.measure({"device": "cpu"}, ["hf", "lory"], apart=True)
    assert found["hf"] == answers["hf"]
    assert found["lory"]["tokens_per_second"] == 10
    assert "out of memory" in capsys.readouterr().out

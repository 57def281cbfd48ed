"""labs/bench.py: its commands run, on a toy model; its loops agree, or `compare` would stop."""

import pytest
import torch

from labs import bench


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """Few and short random rows, and all that the flags change is put back."""
    for name in ("DTYPE", "SMALL", "EXAM"):
        monkeypatch.setattr(bench, name, getattr(bench, name))
    monkeypatch.setattr(bench.Ours, "compiled", False)
    monkeypatch.setattr(bench, "SHARED", tmp_path)
    monkeypatch.setattr(bench, "BATCH", 3)
    monkeypatch.setattr(bench, "PAIRS", 2)


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_ours_and_the_bare_loops_take_the_same_steps_and_are_compared(monkeypatch, capsys, task):
    done = type("Done", (), {"stdout": "0.5"})
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: done)
    bench.main(["--tiny", "--only", task, "--steps", "2"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("ours", "bare", "padded", "2 steps", "peak GiB"))


@pytest.mark.parametrize("which", ["sft ours", "dpo bare"])
def test_memory_of_a_loop_is_a_number_of_gib(capsys, which):
    bench.main(["--tiny", "--memory", which])
    assert 0.01 < float(capsys.readouterr().out) < 50


def test_profile_names_the_kernels_of_both_steps(capsys):
    bench.main(["--tiny", "--profile"])
    out = capsys.readouterr().out
    assert "sft:" in out and "dpo:" in out and "aten::mm" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("flag", ["--gpu", "--large"])
def test_without_a_gpu_its_commands_end_with_one_line(flag):
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench.main([flag])

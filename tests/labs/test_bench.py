"""labs/bench.py and bench_gpu.py: their commands run, on a toy model."""

import numpy as np
import pytest
import torch
from conftest import command

from labs import bench, bench_gpu


@pytest.mark.parametrize("task", ["sft", "dpo", "exam"])
def test_ours_and_the_bare_loop_compute_the_same_and_are_compared(task):
    """A difference of their losses or scores would end it with status 2."""
    status, out, _ = command("labs/bench.py", "--tiny", "--only", task, "--steps", 2)
    assert status == 0 and "times as fast" in out
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["ours", "bare"]


def test_a_branch_sees_its_trunk_and_itself():
    trunk, short, long, alone = (np.array(ids) for ids in ([1, 2], [3], [4, 5], [6]))
    asked_twice, nothing = ((1, 3, 1.0),), ()
    ids, positions, spans, asked = bench.lay_out(
        [[(trunk, nothing), (short, nothing), (long, asked_twice)], [(alone, nothing)]])
    assert ids == [1, 2, 3, 4, 5, 6] and positions == [0, 1, 2, 2, 3, 0]
    assert spans == [(None, slice(0, 3)), (slice(0, 2), slice(3, 5)), (None, slice(5, 6))]
    assert asked == [3, 4]  # what follows 4, and what would come after the branch


def test_flops_of_a_token_are_six_per_weight_and_those_of_causal_attention():
    """PaLM's 6 N + 12 n_layers D L, whose second part causality halves."""
    settings = {"num_hidden_layers": 2, "hidden_size": 8}
    assert bench_gpu.flops_per_token(settings, 100, 10) == 6 * 100 + 12 * 2 * 8 * 10 // 2


def test_both_loops_of_a_gpu_compute_the_same_loss():
    rows = bench_gpu.random_rows([40] * 5, bench_gpu.TINY["vocab_size"])
    c = bench_gpu.Config(only="large", micro_tokens=80)  # two rows per pass
    losses = [kind(bench_gpu.TINY, c).step(rows) for kind in (bench_gpu.Ours, bench_gpu.Bare)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_loop_that_needs_more_memory_than_there_is_stops_no_other(capsys):
    class Greedy:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

        def step(self, examples):
            raise torch.OutOfMemoryError

    bench_gpu.measure(Greedy(), [], bench_gpu.Config(), bench_gpu.TINY, "greedy")
    assert capsys.readouterr().out.split() == ["greedy", "out", "of", "memory"]


def test_profile_names_what_takes_the_time_of_a_step():
    status, out, _ = command("labs/bench_gpu.py", "--only", "profile", "--tiny")
    assert status == 0 and "Self CPU" in out
    assert out.count("aten::") > 5  # which operations lead depends on the machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("only", [[], ["--only", "large"]])
def test_without_a_gpu_it_ends_with_one_line(only):
    status, _, err = command("labs/bench_gpu.py", *only)
    assert status == 2 and err.count("\n") == 1 and "no CUDA device" in err

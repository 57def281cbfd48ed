"""Every solution of the lectures applies to the core as it stands, and does what it says."""

import importlib.util
import math
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import model as modeling
import train_dpo
import train_sft

ROOT = Path(__file__).parents[2]
DIFFS = sorted((ROOT / "labs/solutions").glob("*.diff"))


class Stub:
    """A function that takes the attribute which the step sets on a model under DDP."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


@pytest.fixture
def solved(tmp_path):
    """solved(number) is the file that solution changes, changed, as a module of another name."""
    if not shutil.which("git"):
        pytest.skip("git applies the solutions")

    def solve(number: int):
        diff = DIFFS[number - 1]
        name = next(line[6:] for line in diff.read_text().splitlines() if line.startswith("+++ b/"))
        shutil.copy(ROOT / name, tmp_path)
        subprocess.run(["git", "apply", diff], cwd=tmp_path, check=True)
        spec = importlib.util.spec_from_file_location(f"solution_{number}", tmp_path / name)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield solve
    for name in [name for name in sys.modules if name.startswith("solution_")]:
        del sys.modules[name]


def test_every_lecture_has_a_solution_that_names_its_exercise():
    assert [path.read_text().split(".")[0] for path in DIFFS] == [
        f"Exercise {n}" for n in range(1, 10)]


def test_1_a_key_in_the_table_is_a_format(solved):
    row = {"problem": "1 + 1?", "solution": "2"}
    with pytest.raises(data.InputError, match="expected"):
        data.parse_row("a", row)
    roles = [m["role"] for m in solved(1).parse_row("a", row).messages]
    assert roles == ["user", "assistant"]


def test_2_turning_the_other_way_keeps_distances_and_breaks_checkpoints(solved):
    other = solved(2).rotate
    q, k, angle = torch.randn(1, 1, 8), torch.randn(1, 1, 8), torch.rand(1, 1, 4)

    def score(rotate, m, n):
        q_m, k_n = (rotate(x, (p * angle).cos(), (p * angle).sin()) for x, p in ((q, m), (k, n)))
        return (q_m * k_n).sum()

    torch.testing.assert_close(score(other, 7, 4), score(other, 3, 0))
    torch.testing.assert_close(score(other, 0, 3), score(modeling.rotate, 3, 0))
    assert not torch.isclose(score(other, 3, 0), score(modeling.rotate, 3, 0))


def test_3_a_mean_of_means_depends_on_the_cut(solved):
    nlls = [[1, 2], [3, 3, 3, 5], [4], [2, 2, 2, 2, 2]]
    tokens = [100, 101, 102, 103]  # an example's first token says which it is
    examples = []
    for i, values in enumerate(nlls):
        length = 12 if i == 0 else 6
        ids = np.array([tokens[i], *[0] * (length - 1)], dtype=np.int32)
        examples.append(data.Example(ids, ((1, 1 + len(values), 1.0),)))
    known = torch.zeros((), requires_grad=True)

    def model(ids, lengths, targets, **noise):
        firsts = [part[0].item() for part in ids.split(lengths)]
        return known - torch.tensor([float(x) for t in firsts for x in nlls[tokens.index(t)]])

    run = SimpleNamespace(train=examples, step=lambda step, size: [(i, 0) for i in range(4)])
    c = train_sft.Config(micro_tokens=18, batch_size=4)
    hardware = SimpleNamespace(rank=0, world=1, device="cpu", autocast=nullcontext)
    scaler = SimpleNamespace(scale=lambda loss: loss)
    losses = [module.backward_step(Stub(model), run, 1, c, hardware, scaler)[0]
              for module in (train_sft, solved(3))]
    assert losses == pytest.approx([31 / 12, 2.15])


def test_4_the_square_root_schedule_is_at_half_after_a_quarter(solved):
    c = solved(4).Config(schedule="sqrt", warmup=0, learning_rate=8.0)
    assert [solved(4).learning_rate_at(step, 100, c) for step in (1, 26)] == [8.0, 4.0]


def test_5_the_square_root_of_the_sizes_is_temperature_2(solved):
    rates = solved(5).mixing_rates([16, 4, 1], "sqrt")
    assert rates.tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert rates.tolist() == pytest.approx(data.mixing_rates([16, 4, 1], "temperature", 2.0))


def test_6_normal_noise_has_the_variance_of_uniform_noise_and_no_bound(solved):
    keys = modeling.noise_keys(0, [0], [0], [400])
    noise, plain = (module.neftune_noise(keys, [400], 64, 5.0) for module in (solved(6), modeling))
    bound = 5 / math.sqrt(400 * 64)
    assert noise.std().item() == pytest.approx(plain.std().item(), rel=0.02)
    assert plain.abs().max() <= bound
    assert (noise.abs() > bound).float().mean().item() == pytest.approx(0.0833, abs=0.005)


def test_7_robust_dpo_is_dpo_in_the_mean_over_flipped_labels(solved):
    margin, e = torch.tensor([-3.0, 0.0, 2.0]), 0.1
    robust = [solved(7).sigmoid_loss(sign * margin, 0.5, e) for sign in (1, -1)]
    mean = (1 - e) * robust[0] + e * robust[1]
    torch.testing.assert_close(mean, train_dpo.sigmoid_loss(margin, 0.5))
    assert solved(7).sigmoid_loss(torch.tensor([50.0]), 1.0, e) < -5


def test_8_the_squared_hinge_has_no_corner(solved):
    module = solved(8)
    slopes = []
    for start in (0.0, 9.99, 11.0):
        policy = torch.tensor([[start, 0.0]], requires_grad=True)
        c = module.Config(loss="squared_hinge", beta=0.1)
        module.objective(c, policy, torch.zeros(1, 2), torch.ones(1, 2))[0].sum().backward()
        slopes.append(policy.grad[0, 0].item())
    assert slopes == pytest.approx([-0.2, 0.0, 0.0], abs=1e-3)


def test_9_agresti_and_coull_have_wilsons_middle_and_are_never_narrower(solved):
    for right, count in ((3, 10), (50, 100), (97, 100)):
        (low, high), (a, b) = evaluation.wilson(right, count), solved(9).wilson(right, count)
        assert a <= low and b >= high
        if 0 < a and b < 1:
            assert (a + b) / 2 == pytest.approx((low + high) / 2)
    assert solved(9).wilson(0, 20)[0] == 0.0

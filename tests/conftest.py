"""One thread for all tests: many small products, and the same sums in every process."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

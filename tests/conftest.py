"""One thread for every test: the machines that run them are shared, and two contended OpenMP threads crawl."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

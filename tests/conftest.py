"""Shared by all tests: one thread, so that results do not depend on the machine and processes do not crowd each other."""

import torch

torch.set_num_threads(1)

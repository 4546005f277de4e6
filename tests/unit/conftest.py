"""One thread for torch: its tensors are tiny here, and two threads on a busy machine cost fifty times as much as one."""

import torch

torch.set_num_threads(1)

"""One thread a test process: several of them with several threads each would wait for one another."""

import torch

torch.set_num_threads(1)

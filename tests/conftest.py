"""One thread a test process: several of them with several threads each would wait for one another.

Each test starts from the same seed, whatever ran before it in its process: a network that a test builds without
naming a seed is the same in every order.
"""

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before the fixtures of modules, which build networks too
def pytest_runtest_setup(item):
    torch.manual_seed(0)

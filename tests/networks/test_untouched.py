"""A model that was used within the context has left no traces."""

import random

import numpy as np
import torch
from torch import nn

from hgkd.networks.untouched import unchanged


def test_buffers_and_random_numbers_are_what_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    draws = (lambda: torch.rand(3).tolist(), random.random, lambda: np.random.rand())
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(1)
    expected = [draw() for draw in draws]
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(1)
    with unchanged(model):
        model(torch.rand(2, 3, 4, 4))
        for draw in draws:
            draw()
    assert [draw() for draw in draws] == expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

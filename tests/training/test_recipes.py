"""The config files of docs/recipes.md."""

import pytest
from conftest import ROOT

import train
from kqv.settings import parse
from kqv.training.schedule import learning_rate_at


def test_the_paper_s_learning_rate():
    config = parse(train.TrainSettings, [str(ROOT / "config/train_translation_paper.py")])
    for step in (0, 1, 200, 400, 401, 1000, 1517):
        published = config.n_embd**-0.5 * min((step + 1) ** -0.5, (step + 1) * config.warmup_iters**-1.5)
        assert learning_rate_at(step, config) == pytest.approx(published, rel=0.005)

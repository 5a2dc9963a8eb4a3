"""The demo shortens its trainings where they would take too long."""

import pytest
import yaml
from examples import demo

from odconv.app.commands.listing import find_recipes


@pytest.mark.parametrize(("seconds", "epochs"), [(0.1, 6), (0.7, 6), (1.0, 4), (3.0, 1), (60.0, 1)])
def test_epochs_fit_the_machine(seconds: float, epochs: int, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo, "seconds_per_step", lambda recipe: seconds)
    assert demo.choose_epochs() == epochs
    said = capsys.readouterr().out
    assert ("instead of 6" in said) == (epochs < 6)
    assert ("for 1 epoch instead" in said) == (epochs == 1)


def test_a_step_is_measured() -> None:
    recipe = yaml.safe_load(find_recipes("train")["digits_od_resnet18_4x"].read_text())
    small = {"arch": "od_mobilenetv2_050", "batch_size": 2}
    assert 0 < demo.seconds_per_step(recipe | small) < demo.seconds_per_step(recipe)

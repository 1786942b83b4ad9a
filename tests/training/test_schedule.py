import numpy as np
import pytest

from clove_hub.training import recipe
from clove_hub.training.schedule import half_cosine, learning_rate, make_schedule


def test_schedules_equal_the_released_ones_at_every_step(golden):
    g = golden["schedule"]
    steps = int(g["epochs"] * g["steps_per_epoch"])
    peak = float(g["base_lr"]) * int(g["batch"]) / 256
    warmup = int(g["warmup_epochs"] * g["steps_per_epoch"])
    rates = np.array([learning_rate(step, steps, warmup, peak) for step in range(steps)])
    momenta = np.array([half_cosine(step, steps, 0.99, 1.0) for step in range(steps)])
    assert np.abs(rates - g["lr"]).max() <= 1e-5 * np.abs(g["lr"]).max()
    assert np.abs(momenta - g["momentum"]).max() <= 1e-5


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_short_warm_ups_stay_between_start_and_peak(warmup):
    rates = [learning_rate(step, 10, warmup, 2.0) for step in range(10)]
    assert all(0.02 <= rate <= 2.0 for rate in rates)
    assert rates[warmup] == 2.0


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_a_warm_up_that_stops_short_of_the_peak_is_followed_by_it(warmup):
    rates = [learning_rate(step, 10, warmup, 2.0, warmup_to_peak=False) for step in range(10)]
    assert rates[: warmup + 1] == pytest.approx(np.linspace(0.02, 2.0, warmup + 1) if warmup else [2.0])
    assert rates[warmup + 1] < 2.0


def test_a_rate_that_falls_by_epoch_stays_within_each():
    by_step = [learning_rate(step, 12, 0, 2.0) for step in range(12)]
    by_epoch = [learning_rate(step, 12, 0, 2.0, decay_every=3) for step in range(12)]
    assert by_epoch == [by_step[step // 3 * 3] for step in range(12)]


def test_the_teachers_momentum_stays_where_start_and_end_are_the_same():
    assert {half_cosine(step, 10, 0.995, 0.995) for step in range(10)} == {0.995}
    assert half_cosine(0, 10, 0.9, 0.95) == pytest.approx(0.9)
    assert half_cosine(5, 10, 0.9, 0.95) == pytest.approx(0.925)


@pytest.mark.parametrize(("photos", "warmup"), [(16, 10), (240, 15), (100_000, 15)])
def test_an_automatic_warm_up_fits_any_number_of_photos(photos, warmup):
    """The recipe of the demo has 150 steps of 8 photos; five passes over many photos would not fit in."""
    schedule = make_schedule(recipe.load("demo", ["data.path=x"]), photos // 8)
    assert (schedule.steps, schedule.warmup) == (150, warmup)


def test_a_warm_up_that_does_not_fit_names_the_way_out():
    with pytest.raises(ValueError, match=r"is 150 steps.*give schedule\.warmup_epochs=auto"):
        make_schedule(recipe.load("demo", ["data.path=x", "schedule.warmup_epochs=5"]), 30)

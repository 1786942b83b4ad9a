"""The report of a run after its first steps."""

from datetime import datetime, timedelta

import pytest

from clove_hub.training.outlook import in_words, outlook


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3, "a minute"), (89, "a minute"), (91, "2 minutes"), (3000, "50 minutes"), (5400, "1.5 hours")],
)
def test_a_time_in_words(seconds, words):
    assert in_words(timedelta(seconds=seconds)) == words


def test_the_speed_and_the_end_of_a_run():
    now = datetime(2026, 1, 31, 23, 0)
    assert outlook(20, 80, 60.0, 16, 0.25, now) == (
        "5.33 images/s, 4 minutes to go, until Sat 31 Jan 23:04; 25% of the time waiting for data"
    )
    assert outlook(20, 0, 60.0, 16, 0.25, now) == "5.33 images/s, done; 25% of the time waiting for data"

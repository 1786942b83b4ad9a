"""Curves of runs: what is drawn where, in which color and on what ground."""

import numpy as np
import pytest
from rendering import CLOVE, EVALUATIONS, arguments, assert_readable, close, color_at, rendered

from clove_hub.figures import curves
from clove_hub.figures.style import LINES


def panels(figure) -> dict[str, object]:
    return {axes.get_title("left"): axes for axes in figure.axes}


def test_what_a_run_has_logged_is_drawn_where_it_belongs():
    drawn = panels(figure := curves.curves({"run": curves.Run(CLOVE, EVALUATIONS)}))
    assert list(drawn) == [
        *("loss", "cosine to the teacher", "spread of the teacher", "cells with a match"),
        *("gradient", "learning rate", "correspond on photos"),
    ]
    cosines = drawn["cosine to the teacher"].lines
    assert [list(line.get_ydata()) for line in cosines] == [
        [0.1, 0.2, pytest.approx(0.3)],
        [0.05, 0.1, pytest.approx(0.15)],
    ]
    assert {line.get_linestyle() for line in cosines} == {"-", "--"}  # not by color alone
    evaluated = drawn["correspond on photos"].lines
    # The line between them is the height at which the run began.
    assert [list(line.get_ydata()) for line in evaluated] == [[20, 23], [20, 20], [8, 8]]
    assert list(evaluated[0].get_xdata()) == [0, 3]
    assert_readable(figure)


def test_a_quantity_that_is_not_known_has_a_panel_of_its_own():
    rows = [{"step": step, "loss": 1.0, "loss_mask": 0.1 * step} for step in (1, 2)]
    assert list(panels(curves.curves({"run": curves.Run(rows)}))) == ["loss", "loss mask"]


@pytest.mark.parametrize("keys", [("group_loss", "slot_loss", "active_slots", "contrasted_slots", "used_prototypes")])
def test_the_quantities_of_slotcon_share_panels_and_are_readable(keys):
    rows = [{"step": step, "loss": 1.0, **dict.fromkeys(keys, 0.5)} for step in (1, 2)]
    figure = curves.curves({"run": curves.Run(rows)})
    assert list(panels(figure)) == ["loss", "prototypes in use", "slots"]
    assert len(panels(figure)["loss"].lines) == 3
    assert_readable(figure)


def test_each_of_several_runs_has_its_color_and_what_one_lacks_is_left_out():
    other = [{"step": 2, "loss": 50.0}, {"step": 4, "loss": 40.0}]
    figure = curves.curves({"long name of the first run": curves.Run(CLOVE), "other": curves.Run(other)})
    first, second = panels(figure)["loss"].lines
    assert (first.get_color(), second.get_color()) == LINES[:2]
    assert list(second.get_xdata()) == [2, 4]
    assert {line.get_color() for line in panels(figure)["cosine to the teacher"].lines} == {LINES[0]}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["long name of the first run", "other"]
    assert_readable(figure)


def test_a_collapse_is_told_by_the_ground_it_lies_on():
    pixels = rendered(figure := curves.curves({"run": curves.Run(CLOVE)}))
    spread = panels(figure)["spread of the teacher"]
    assert close(color_at(pixels, spread, 1.1, 0.07), (217, 217, 217))
    assert close(color_at(pixels, spread, 1.1, 0.2), (255, 255, 255))


def test_long_runs_have_a_running_mean():
    rows = [{"step": step, "loss": 5.0 + (-1) ** step} for step in range(200)]
    pale, bold = panels(curves.curves({"run": curves.Run(rows)}))["loss"].lines
    assert list(pale.get_ydata()) == [row["loss"] for row in rows]
    assert np.allclose(bold.get_ydata(), 5)  # of two neighbors
    assert len(bold.get_xdata()) == len(bold.get_ydata()) == 199
    rows = [{"step": step, "loss": float(step)} for step in range(300)]
    _, bold = panels(curves.curves({"run": curves.Run(rows)}))["loss"].lines
    assert np.allclose(bold.get_xdata(), bold.get_ydata())  # of three, in the middle of them


def test_runs_are_named_by_their_folders_or_as_asked_for(tmp_path):
    for folder in ("a/run", "b/run", "c"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')

    def names(*given: object) -> list[str]:
        return [text.get_text() for text in curves.draw(arguments(curves, *given)).legends[0].get_texts()]

    a, b, c = tmp_path / "a/run", tmp_path / "b/run", tmp_path / "c"
    assert names(a, c) == ["run", "c"]
    assert names(a, b) == [str(a), str(b)]
    assert names(a, b, "--labels", "x", "y") == ["x", "y"]
    with pytest.raises(ValueError, match="expected 2 different labels, one for each run"):
        names(a, b, "--labels", "x")
    (c / "metrics.jsonl").write_text('{"step": 1, "lo')  # a row that is just being written
    with pytest.raises(ValueError, match="no rows yet"):
        names(a, c)

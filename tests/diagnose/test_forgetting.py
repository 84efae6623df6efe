"""Average, transfer and forgetting of a matrix: values worked by hand, identities, refusals."""

import numpy as np
import pytest

from jtl.diagnose import forgetting

# Rows: after task 0, 1, 2. Task 0 goes 0.9, 0.95, 0.5; task 1 goes 0.3, 0.8, 0.7; task 2 ends 0.6.
MATRIX = [[0.9, 0.3, 0.1], [0.95, 0.8, 0.2], [0.5, 0.7, 0.6]]


def test_figures_by_hand():
    found = forgetting.figures(MATRIX, fresh=[0.1, 0.25, 0.15])
    assert found.average == pytest.approx((0.5 + 0.7 + 0.6) / 3)
    assert found.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2)
    # The best before the last task, which for task 0 came after task 1.
    assert found.forgetting == pytest.approx(((0.95 - 0.5) + (0.8 - 0.7)) / 2)
    assert found.forward_transfer == pytest.approx(((0.3 - 0.25) + (0.2 - 0.15)) / 2)
    assert found.learning == pytest.approx((0.9 + 0.8 + 0.6) / 3)
    assert forgetting.averages(MATRIX).tolist() == pytest.approx([0.9, 0.875, 0.6])
    assert forgetting.forgotten(MATRIX).tolist() == pytest.approx([0.45, 0.1])


def test_nothing_forgotten_is_zero_and_scores_before_a_task_do_not_count():
    found = forgetting.figures([[0.9, 1.0, 0.0], [0.9, 0.5, 0.0], [0.9, 0.5, 0.8]])
    assert found.backward_transfer == found.forgetting == 0.0  # not 1.0 - 0.5
    assert np.isnan(found.forward_transfer)  # nobody gave the fresh model's figures
    better = forgetting.figures([[0.5, 0.0], [0.75, 0.5]])
    assert (better.backward_transfer, better.forgetting) == (0.25, -0.25)


def test_what_nobody_scored_may_be_missing_above_the_diagonal():
    table = np.array(MATRIX)
    table[0, 2] = np.nan
    assert forgetting.figures(table) == pytest.approx(forgetting.figures(MATRIX), nan_ok=True)
    table[0, 1] = np.nan
    assert np.isnan(forgetting.figures(table, fresh=[0, 0, 0]).forward_transfer)
    assert np.isnan(forgetting.figures([[0.5]]).forgetting)
    assert forgetting.figures([[0.5]]).average == 0.5


def test_the_argument_stays_as_it_is():
    # A peer appends zeros to the list that it is given, so that a second call says another thing.
    rows, fresh = [list(row) for row in MATRIX], [0.1, 0.25, 0.15]
    first = forgetting.figures(rows, fresh)
    forgetting.averages(rows), forgetting.forgotten(rows)
    assert rows == MATRIX and fresh == [0.1, 0.25, 0.15]
    assert forgetting.figures(rows, fresh) == first
    table = np.array(MATRIX)
    forgetting.checked(table)[0, 0] = 7.0
    assert table[0, 0] == 0.9


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\); wanted is one row and one column"):
        forgetting.figures([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
    with pytest.raises(ValueError, match=r"lacks the figures at .* \[\(1, 0\)\]; it has 2 tasks"):
        forgetting.figures([[0.5, 0.5], [np.nan, 0.5]])
    with pytest.raises(ValueError, match="2 tasks and figures of a fresh model of shape"):
        forgetting.figures([[0.5, 0.5], [0.5, 0.5]], fresh=[0.1])

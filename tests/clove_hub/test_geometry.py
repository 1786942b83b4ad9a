import math

import numpy as np
import torch

from clove_hub.geometry import cell_centers, match_cells


def random_boxes(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    side = rng.uniform(0.3, 0.9, (*shape, 2))
    low = rng.uniform(0, 1, (*shape, 2)) * (1 - side)
    boxes = np.concatenate([low, low + side], -1)
    flipped = rng.uniform(size=shape) < 0.5
    boxes[flipped] = boxes[flipped][:, [2, 1, 0, 3]]
    return torch.from_numpy(boxes)


def naive_match(query_box, query_grid, key_box, key_grid, distance):
    """CLoVE Eq. 1 as two loops over cells."""

    def cells(box, grid):
        height, width = grid
        step = ((box[2] - box[0]) / width, (box[3] - box[1]) / height)
        for row in range(height):
            for column in range(width):
                yield box[0] + (column + 0.5) * step[0], box[1] + (row + 0.5) * step[1]

    def diagonal(box, grid):
        return math.sqrt(((box[2] - box[0]) / grid[1]) ** 2 + ((box[3] - box[1]) / grid[0]) ** 2)

    larger = max(diagonal(query_box, query_grid), diagonal(key_box, key_grid))
    return [
        [math.sqrt((qx - kx) ** 2 + (qy - ky) ** 2) / larger < distance for kx, ky in cells(key_box, key_grid)]
        for qx, qy in cells(query_box, query_grid)
    ]


def test_matching_equals_a_double_loop_over_cells():
    rng = np.random.default_rng(0)
    query, key = random_boxes(rng, 20), random_boxes(rng, 20)
    found = 0
    for query_grid, key_grid in [((7, 7), (7, 7)), ((3, 3), (7, 7)), ((2, 5), (6, 4))]:
        for distance in (0.5, 0.7, 0.9):
            match = match_cells(query, query_grid, key, key_grid, distance)
            for i in range(len(query)):
                expected = naive_match(query[i].tolist(), query_grid, key[i].tolist(), key_grid, distance)
                assert match[i].tolist() == expected
            found += int(match.sum())
    assert found > 500  # the random boxes do overlap


def test_matching_broadcasts_views_against_views():
    rng = np.random.default_rng(1)
    query, key = random_boxes(rng, 6, 3), random_boxes(rng, 2, 3)
    together = match_cells(query[:, None], (3, 3), key[None], (7, 7), 0.7)
    assert together.shape == (6, 2, 3, 9, 49)
    for v in range(6):
        for t in range(2):
            assert torch.equal(together[v, t], match_cells(query[v], (3, 3), key[t], (7, 7), 0.7))


def test_a_flipped_view_matches_its_mirror_image():
    box = torch.tensor([0.1, 0.2, 0.7, 0.9])
    mirrored = box[[2, 1, 0, 3]]
    match = match_cells(box, (4, 5), mirrored, (4, 5), 0.1).view(4, 5, 4, 5)
    for row in range(4):
        for column in range(5):
            assert match[row, column].nonzero().tolist() == [[row, 4 - column]]


def test_cell_centers_keep_the_type_of_the_boxes():
    columns, rows = cell_centers(torch.zeros(2, 4, dtype=torch.float64), (2, 3))
    assert columns.dtype == rows.dtype == torch.float64
    assert (columns.shape, rows.shape) == ((2, 3), (2, 2))

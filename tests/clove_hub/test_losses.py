import pytest
import torch

from clove_hub import losses


def naive_ranking(similarity, match, count, weight, margin):
    """The released form for one image, in loops, with every unmatched cell at hand."""
    d = -2 * similarity
    matched = [float(d[q, k]) for q in range(d.shape[0]) for k in range(d.shape[1]) if match[q, k]]
    positive = sum(matched) / (len(matched) + 1e-6)
    rows = []
    for q in range(d.shape[0]):
        hardest = sorted(float(d[q, k]) for k in range(d.shape[1]) if not match[q, k])[:count]
        rows.append(sum(hardest[1:]) / len(hardest[1:]))
    return max(0.0, margin + weight * positive - sum(rows) / len(rows))


def matched_mean(similarity, match):
    return losses.matched_mean(losses.matched_sum(similarity, match), match.sum(-1, dtype=torch.float32))


def hard_negatives(similarity, match, count):
    count = min(count, similarity.shape[-1])
    top = losses.matched_and_hardest(similarity, match, count)[1]
    return losses.without_hardest(top, (similarity.shape[-1] - match.sum(-1, dtype=torch.float32)).clamp(max=count))


def random_case(seed, queries=9, keys=25, rate=0.1):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(queries, keys, generator=generator, dtype=torch.float64) * 2 - 1
    return similarity, torch.rand(queries, keys, generator=generator) < rate


@pytest.mark.parametrize("margin", [100.0, 0.3])
def test_ranking_loss_equals_loops_over_cells(margin):
    for seed in range(5):
        similarity, match = random_case(seed)
        negative, has = hard_negatives(similarity, match, 10)
        loss = losses.ranking_loss(matched_mean(similarity, match), negative, has, positive_weight=2.0, margin=margin)
        assert float(loss) == pytest.approx(
            naive_ranking(similarity, match, 10, 2.0, margin), rel=1e-6
        )  # the divisor is float32


def test_per_pair_loss_equals_eq_2_in_loops():
    for seed in range(5):
        similarity, match = random_case(seed)
        negative, _ = hard_negatives(similarity, match, 10)
        pairs = []
        for q, k in match.nonzero().tolist():
            hardest = sorted((float(similarity[q, j]) for j in range(25) if not match[q, j]), reverse=True)[1:10]
            pairs.append(max(0.0, -3.0 * float(similarity[q, k]) + sum(hardest) / 9 + 0.5))
        loss = losses.ranking_loss_per_pair(similarity, match, negative, positive_weight=3.0, margin=0.5)
        assert float(loss) == pytest.approx(sum(pairs) / (len(pairs) + 1e-6), rel=1e-6)  # the divisor is float32


def test_l2_loss_is_the_squared_distance_of_matched_unit_vectors():
    generator = torch.Generator().manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(4, 8, generator=generator, dtype=torch.float64), dim=1)
    key = torch.nn.functional.normalize(torch.randn(6, 8, generator=generator, dtype=torch.float64), dim=1)
    match = torch.rand(4, 6, generator=generator) < 0.4
    distances = [float((query[q] - key[k]).square().sum()) for q, k in match.nonzero().tolist()]
    loss = losses.l2_loss(matched_mean(query @ key.T, match), match.sum(-1, dtype=torch.float32))
    assert float(loss) == pytest.approx(sum(distances) / (len(distances) + 1e-6), rel=1e-6)  # the divisor is float32


def test_a_query_with_few_negatives_uses_those_it_has():
    similarity = torch.tensor([[0.9, 0.5, 0.3, 0.1]] * 4, dtype=torch.float64)
    match = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    mean, has = hard_negatives(similarity, match, 10)
    assert mean.tolist() == pytest.approx([(0.5 + 0.3 + 0.1) / 3, 0.2, 0.1, 0.0])
    assert has.tolist() == [True, True, True, False]


def test_the_gradient_is_that_of_the_plain_operations():
    similarity, match = random_case(3, rate=0.4)
    match[0], match[1], match[2, 1:] = True, False, True  # no negatives, no match, a single negative
    similarity = similarity.expand(2, 3, -1, -1).clone().requires_grad_()
    match = match.expand(2, 3, -1, -1)
    assert torch.autograd.gradcheck(lambda s: losses.matched_and_hardest(s, match, 10), similarity)

    def loss(s):
        return losses.ranking_loss(matched_mean(s, match), *hard_negatives(s, match, 10)).sum()

    assert torch.autograd.gradcheck(loss, similarity, atol=1e-4)  # the divisor is float32
    assert similarity.grad is None
    loss(similarity).backward()
    assert similarity.grad.isfinite().all()


def test_views_that_do_not_overlap_have_no_positive_part():
    similarity, _ = random_case(0)
    match = torch.zeros_like(similarity, dtype=torch.bool)
    assert float(matched_mean(similarity, match)) == 0
    assert float(losses.l2_loss(matched_mean(similarity, match), match.sum(-1, dtype=torch.float32))) == 0


@pytest.mark.parametrize("shared", [True, False])
def test_cosines_are_those_of_each_view_with_each_of_its_keys(shared):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 2, 4, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(1 if shared else 3, 5, 2, 6, 8, generator=generator, dtype=torch.float64)
    similarity = losses.cosine(query, key)
    assert similarity.shape == (3, 5, 2, 4, 6)
    for v in range(3):
        for r in range(5):
            for b in range(2):
                expected = query[v, b] @ key[0 if shared else v, r, b].T
                assert torch.allclose(similarity[v, r, b], expected, atol=1e-12)

import torch

from clove_hub.heads import ContextualAttention, dense_projector


def test_normalized_attention_equals_the_papers_equations_in_float64():
    torch.manual_seed(0)
    attention = ContextualAttention(32, heads=4, temperature=0.2).double()
    x = torch.randn(3, 10, 32, dtype=torch.float64)
    wq, wk, wv = attention.qkv.weight.chunk(3)
    for image in range(3):
        heads = []
        for h in range(4):
            rows = slice(8 * h, 8 * h + 8)
            q, k, v = x[image] @ wq[rows].T, x[image] @ wk[rows].T, x[image] @ wv[rows].T
            out = torch.zeros(10, 8, dtype=torch.float64)
            for i in range(10):
                cosines = torch.stack([q[i] @ k[j] / (q[i].norm() * k[j].norm()) for j in range(10)])
                weights = (cosines / 0.2).exp() / (cosines / 0.2).exp().sum()
                assert torch.allclose(attention.weights(x)[image, h, i], weights, atol=1e-12)
                for j in range(10):
                    out[i] += weights[j] * v[j]
            heads.append(out)
        expected = torch.cat(heads, 1) @ attention.out.weight.T + attention.out.bias
        assert torch.allclose(attention(x)[image], expected, rtol=0, atol=1e-12)


def test_standard_attention_equals_torchs_multi_head_attention():
    torch.manual_seed(0)
    ours = ContextualAttention(32, heads=4, temperature=None).double()
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True).double()
    torch.nn.init.normal_(theirs.in_proj_bias)
    torch.nn.init.normal_(theirs.out_proj.bias)
    ours.load_state_dict(
        {
            "qkv.weight": theirs.in_proj_weight,
            "qkv.bias": theirs.in_proj_bias,
            "out.weight": theirs.out_proj.weight,
            "out.bias": theirs.out_proj.bias,
        }
    )
    x = torch.randn(3, 10, 32, dtype=torch.float64)
    expected, weights = theirs(x, x, x, average_attn_weights=False)
    assert torch.allclose(ours(x), expected, atol=1e-12)
    assert torch.allclose(ours.weights(x), weights, atol=1e-12)


def test_the_paper_has_no_bias_in_its_projections():
    assert ContextualAttention(32, 4, temperature=0.2).qkv.bias is None


def test_projector_ends_in_a_batch_norm_without_scale():
    projector = dense_projector(8, hidden=16, out=4)
    assert [name for name, _ in projector.named_parameters()] == [
        "linear1.weight",
        "bn1.weight",
        "bn1.bias",
        "linear2.weight",
    ]
    out = projector(torch.randn(5, 8, 3, 3))
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(4), atol=1e-5)

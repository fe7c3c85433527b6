"The published operators and the gated layers, for any input hypothesis can think of"
import numpy as np
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from atft.fan_san import FAN, SAN, RevIN, main_frequency, slice_borders, slice_normalize

@settings(max_examples=40, deadline=None)
@given(st.integers(2, 70), st.integers(1, 40), st.integers(0, 2**31))
def test_main_frequency_is_the_published_split(L, k, seed):
    k, x = min(k, L//2+1), np.random.default_rng(seed).normal(size=(2, L, 3))
    X = np.fft.rfft(x, axis=1)
    kept = np.zeros_like(X)
    for n in range(2):
        for c in range(3):
            top = np.argsort(-np.abs(X[n, :, c]))[:k]
            kept[n, top, c] = X[n, top, c]
    main = np.fft.irfft(kept, n=L, axis=1)
    split = main_frequency(torch.from_numpy(x), k)
    np.testing.assert_allclose(split.x_main, main, atol=1e-10)
    np.testing.assert_allclose(split.residual, x-main, atol=1e-10)

@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 8), st.integers(0, 2**31))
def test_slice_normalize_is_the_published_one(length, slices, seed):
    x = np.random.default_rng(seed).normal(3, 2, (2, slices*length, 3))
    split, parts = slice_normalize(torch.from_numpy(x), length), x.reshape(2, slices, length, 3)
    np.testing.assert_allclose(split.mean, parts.mean(2), atol=1e-10)
    np.testing.assert_allclose(split.std, parts.std(2, ddof=1), atol=1e-10)
    np.testing.assert_allclose(split.x_norm, ((parts-parts.mean(2, keepdims=True))/(parts.std(2, ddof=1, keepdims=True)+1e-5)).reshape(x.shape), atol=1e-10)

wild = st.floats(width=32, min_value=-2.**60, max_value=2.**60) | st.sampled_from([np.nan, np.inf, -np.inf, 0., 1., 1e-20, -1e20, 1e20])

@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 25))
def test_gated_layers_are_finite_and_the_identity_at_birth(data, L):
    x = torch.from_numpy(data.draw(arrays(np.float32, (3, L, 2), elements=wild)))
    known = torch.where(x.isfinite(), x, 0)
    for layer in (FAN(2), SAN(2), FAN(2, windows=(2, 40), frequencies=3), SAN(2, slices=7, overlap=.5)):
        assert torch.equal(layer(x), known) and torch.equal(layer.plain(x), known) and torch.equal(layer(x.bfloat16()), known.bfloat16())
        layer.gate.g.data.fill_(.7)
        assert layer(x.bfloat16()).isfinite().all()
        for way in (layer, layer.plain):
            layer.zero_grad()
            asked = x.clone().requires_grad_()
            y = way(asked)
            assert y.isfinite().all()
            (y/known.abs().max().clamp(min=1)).sum().backward()
            assert asked.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())

@settings(max_examples=30, deadline=None)
@given(st.integers(3, 30), st.integers(0, 2**31))
def test_a_sample_never_sees_another_and_the_rolling_part_never_sees_later_steps(L, seed):
    torch.manual_seed(seed)
    x = torch.randn(4, L, 2)
    x[torch.rand(4, L, 2) < .2] = torch.nan
    for layer in (FAN(2), SAN(2)):
        layer.gate.g.data.fill_(1.)
        other = x.clone()
        other[1:] = 50*torch.randn(3, L, 2)
        other[2, :, 0] = torch.nan
        assert torch.equal(layer(x)[0], layer(other)[0])
        assert torch.equal(layer(x)[0], layer(x[:1])[0])
    causal, later, t = FAN(2, frequencies=0), x.clone(), L//2
    causal.gate.g.data.fill_(1.)
    later[:, t:] = 7.
    for way in (causal, causal.plain): assert torch.equal(way(x)[:, :t], way(later)[:, :t])

@settings(max_examples=30, deadline=None)
@given(st.integers(10, 40), st.integers(0, 2**31), st.floats(.1, 1000), st.floats(-100, 100))
def test_an_affine_change_of_a_channel_changes_nothing_as_eps_goes_to_zero(L, seed, scale, level):
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, L, 2)))
    for layer in (FAN(2, frequencies=0, eps=1e-12), SAN(2, eps=1e-12)):
        layer.double().gate.g.data.fill_(50.)  # fully open
        torch.testing.assert_close(layer(x*scale+level), layer(x), atol=1e-6, rtol=1e-6)

@settings(max_examples=30, deadline=None)
@given(st.integers(2, 61), st.integers(1, 70), st.floats(0, .95))
def test_every_step_of_every_window_is_covered_by_a_slice(L, K, overlap):
    lo, hi = slice_borders(L, K, overlap)
    covered = np.zeros(L, int)
    for a, b in zip(lo, hi): covered[a:b] += 1
    assert covered.min() >= 1 and (lo >= 0).all() and (hi <= L).all()

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**31))
def test_a_gap_in_front_is_a_shorter_history(L, gap, seed):
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, L, 2))).float()
    longer = torch.cat([torch.full((2, gap, 2), torch.nan), x], 1)
    layer = FAN(2, frequencies=0)
    layer.gate.g.data.fill_(1.)
    torch.testing.assert_close(layer(longer)[:, gap:], layer(x), atol=1e-5, rtol=1e-5)

def test_published_operators_give_the_published_numbers(golden):
    "Every array of the papers' own code, float64, gradients included"
    files = sorted(golden.glob('*.npz'))
    assert files, f'{golden} holds no .npz files'
    for path in files:
        with np.load(path) as f: a = {k: f[k] for k in f.files}
        x = torch.from_numpy(a['x']).requires_grad_()
        close = lambda ours, name: np.testing.assert_allclose(ours.detach().numpy(), a[name].reshape(ours.shape), atol=1e-10, rtol=1e-10, err_msg=f'{path.name} {name}')
        if path.name.startswith('fan'):
            split = main_frequency(x, int(a['freq_topk']))
            close(split.x_main, 'x_main'); close(split.residual, 'residual')
            (split.residual*torch.from_numpy(a['cot_residual'])).sum().backward()
            close(x.grad, 'grad_x_residual_only')
        elif path.name.startswith('san'):
            split = slice_normalize(x, int(a['period_len']))
            close(split.mean, 'slice_mean'); close(split.std, 'slice_std'); close(split.x_norm, 'x_norm')
            (split.x_norm*torch.from_numpy(a['cot_norm'])).sum().backward()
            close(x.grad, 'grad_x_norm_only')
        elif path.name.startswith('revin'):
            revin = RevIN(x.shape[2], affine=bool(a['affine'])).double()
            if a['affine']: revin.weight.data, revin.bias.data = (torch.from_numpy(a[k]) for k in ('w_gamma', 'w_beta'))
            z, (mean, deviation) = revin.normalize(x)
            close(z, 'x_norm'); close(mean, 'avg'); close(deviation.square()-revin.eps, 'var_unbiased')
            torch.testing.assert_close(revin.denormalize(z, (mean, deviation)), x, atol=1e-10, rtol=1e-10)

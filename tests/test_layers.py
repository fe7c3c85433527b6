"The published operators and the gated layers, for any input hypothesis can think of"
import numpy as np
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from atft.fan_san import FAN, SAN, main_frequency, slice_normalize

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

wild = st.floats(width=32, min_value=-2.**60, max_value=2.**60) | st.sampled_from([np.nan, np.inf, -np.inf, 0., 1., 1e-20, 1e18])

@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 25))
def test_gated_layers_are_finite_and_the_identity_at_birth(data, L):
    x = torch.from_numpy(data.draw(arrays(np.float32, (3, L, 2), elements=wild)))
    known = torch.where(x.isfinite(), x, 0)
    for layer in (FAN(2), SAN(2), FAN(2, windows=(2, 40), frequencies=3), SAN(2, slices=7, overlap=.5)):
        assert torch.equal(layer(x), known)
        layer.gate.g.data.fill_(.7)
        asked = x.clone().requires_grad_()
        y = layer(asked)
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
        torch.testing.assert_close(layer(x)[0], layer(other)[0], atol=1e-5, rtol=1e-5)
    causal, later, t = FAN(2, frequencies=0), x.clone(), L//2
    causal.gate.g.data.fill_(1.)
    later[:, t:] = 7.
    assert torch.equal(causal(x)[:, :t], causal(later)[:, :t])

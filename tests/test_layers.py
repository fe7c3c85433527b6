"The published operators and the gated layers, for any input hypothesis can think of"
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from atft.core import AtftError
from atft.fan_san import FAN, SAN, RevIN, main_frequency, slice_borders, slice_normalize

SEEDS = st.integers(0, 2**31)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 70), st.integers(1, 40), SEEDS)
def test_main_frequency_is_the_published_split(L, k, seed):
    k = min(k, L//2+1)
    x = normal(seed, 2, L, 3)
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
@given(st.integers(2, 12), st.integers(1, 8), SEEDS)
def test_slice_normalize_is_the_published_one(length, slices, seed):
    x = np.random.default_rng(seed).normal(3, 2, (2, slices*length, 3))
    split = slice_normalize(torch.from_numpy(x), length)
    parts = x.reshape(2, slices, length, 3)
    mean = parts.mean(2, keepdims=True)
    std = parts.std(2, ddof=1, keepdims=True)
    x_norm = ((parts-mean)/(std+1e-5)).reshape(x.shape)
    np.testing.assert_allclose(split.mean, mean[:, :, 0], atol=1e-10)
    np.testing.assert_allclose(split.std, std[:, :, 0], atol=1e-10)
    np.testing.assert_allclose(split.x_norm, x_norm, atol=1e-10)


AWKWARD = [np.nan, np.inf, -np.inf, 0., 1., 1e-20, -1e20, 1e20]
WILD = st.floats(width=32, min_value=-2.**60, max_value=2.**60) | st.sampled_from(AWKWARD)


def check_identity_at_birth(layer, x):
    known = torch.where(x.isfinite(), x, 0)
    assert torch.equal(layer(x), known)
    assert torch.equal(layer.plain(x), known)
    assert torch.equal(layer(x.bfloat16()), known.bfloat16())


def check_finite(layer, x):
    size = torch.where(x.isfinite(), x, 0).abs().max().clamp(min=1)
    assert layer(x.bfloat16()).isfinite().all()
    for way in (layer, layer.plain):
        layer.zero_grad()
        asked = x.clone().requires_grad_()
        y = way(asked)
        assert y.isfinite().all()
        (y/size).sum().backward()
        assert asked.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 25))
def test_gated_layers_are_finite_and_the_identity_at_birth(data, L):
    x = torch.from_numpy(data.draw(arrays(np.float32, (3, L, 2), elements=WILD)))
    odd = [FAN(2, windows=(2, 40), frequencies=3), SAN(2, slices=7, overlap=.5)]
    for layer in [FAN(2), SAN(2), *odd]:
        check_identity_at_birth(layer, x)
        layer.gate.g.data.fill_(.7)
        check_finite(layer, x)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 30), SEEDS)
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
    causal = FAN(2, frequencies=0)
    causal.gate.g.data.fill_(1.)
    t = L//2
    later = x.clone()
    later[:, t:] = 7.
    for way in (causal, causal.plain):
        assert torch.equal(way(x)[:, :t], way(later)[:, :t])


@settings(max_examples=30, deadline=None)
@given(st.integers(10, 40), SEEDS, st.floats(.1, 1000), st.floats(-100, 100))
def test_an_affine_change_of_a_channel_changes_nothing_as_eps_goes_to_zero(L, seed, scale, level):
    x = torch.from_numpy(normal(seed, 2, L, 2))
    for layer in (FAN(2, frequencies=0, eps=1e-12), SAN(2, eps=1e-12)):
        layer.double().gate.g.data.fill_(50.)  # fully open
        torch.testing.assert_close(layer(x*scale+level), layer(x), atol=1e-6, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 61), st.integers(1, 70), st.floats(0, .95))
def test_every_step_of_every_window_is_covered_by_a_slice(L, K, overlap):
    lo, hi = slice_borders(L, K, overlap)
    covered = np.zeros(L, int)
    for first, after in zip(lo, hi):
        covered[first:after] += 1
    assert covered.min() >= 1
    assert (lo >= 0).all()
    assert (hi <= L).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), SEEDS)
def test_a_gap_in_front_is_a_shorter_history(L, gap, seed):
    x = torch.from_numpy(normal(seed, 2, L, 2)).float()
    longer = torch.cat([torch.full((2, gap, 2), torch.nan), x], 1)
    layer = FAN(2, frequencies=0)
    layer.gate.g.data.fill_(1.)
    torch.testing.assert_close(layer(longer)[:, gap:], layer(x), atol=1e-5, rtol=1e-5)


def test_a_batch_of_no_samples_stays_one_with_both_ways_back():
    for layer in (FAN(2), SAN(2)):
        x = torch.empty(0, 20, 2, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.shape
        assert layer.gate.g.grad.tolist() == [0., 0.]


REFUSED = [
    (FAN, dict(channels=0), 'FAN: channels=0 must be a whole number and at least 1'),
    (FAN, dict(channels=2.), 'FAN: channels=2.0 must be a whole number'),
    (FAN, dict(windows=(5, 1)), 'FAN: window 1 is too short'),
    (FAN, dict(windows=(5, 2.5)), 'must be whole numbers of steps'),
    (FAN, dict(windows=5), 'FAN: windows=5 must be whole numbers of steps'),
    (FAN, dict(windows='5'), "FAN: windows='5' must be whole numbers of steps"),
    (FAN, dict(windows=(5, 5)), 'FAN: windows=(5, 5) names one twice'),
    (FAN, dict(windows=(), frequencies=0), 'leave nothing to blend'),
    (FAN, dict(frequencies=-1), 'FAN: frequencies=-1 must be a whole number and at least 0'),
    (FAN, dict(min_obs=0), 'FAN: min_obs=0 must be a whole number and at least 1'),
    (FAN, dict(aggregation='best'), "FAN: aggregation 'best' is not known"),
    (FAN, dict(eps=0.), 'FAN: eps=0.0 must be a number above 0'),
    (FAN, dict(eps=math.nan), 'FAN: eps=nan must be a number above 0'),
    (SAN, dict(channels=True), 'SAN: channels=True must be a whole number'),
    (SAN, dict(slices=0), 'SAN: slices=0 must be a whole number and at least 1'),
    (SAN, dict(slices=2.), 'SAN: slices=2.0 must be a whole number'),
    (SAN, dict(overlap=1.), 'SAN: overlap=1.0 must lie in [0, 1)'),
    (SAN, dict(overlap=-.1), 'SAN: overlap=-0.1 must lie in [0, 1)'),
    (SAN, dict(overlap='half'), "SAN: overlap='half' must lie in [0, 1)"),
    (SAN, dict(min_obs=-3), 'SAN: min_obs=-3 must be a whole number and at least 1'),
    (SAN, dict(aggregation=None), 'SAN: aggregation None is not known'),
    (SAN, dict(eps=math.inf), 'SAN: eps=inf must be a number above 0'),
]


@pytest.mark.parametrize('layer, options, words', REFUSED)
def test_a_layer_refuses_at_birth_what_cannot_be_meant_in_one_line(layer, options, words):
    with pytest.raises(AtftError) as error:
        layer(**dict(channels=3) | options)
    assert words in str(error.value)
    assert '\n' not in str(error.value)


def check_golden(ours, golden, name):
    ours = ours.detach().numpy()
    published = golden[name].reshape(ours.shape)
    np.testing.assert_allclose(ours, published, atol=1e-10, rtol=1e-10, err_msg=name)


def check_fan(golden, x):
    split = main_frequency(x, int(golden['freq_topk']))
    check_golden(split.x_main, golden, 'x_main')
    check_golden(split.residual, golden, 'residual')
    (split.residual*torch.from_numpy(golden['cot_residual'])).sum().backward()
    check_golden(x.grad, golden, 'grad_x_residual_only')


def check_san(golden, x):
    split = slice_normalize(x, int(golden['period_len']))
    check_golden(split.mean, golden, 'slice_mean')
    check_golden(split.std, golden, 'slice_std')
    check_golden(split.x_norm, golden, 'x_norm')
    (split.x_norm*torch.from_numpy(golden['cot_norm'])).sum().backward()
    check_golden(x.grad, golden, 'grad_x_norm_only')


def check_revin(golden, x):
    revin = RevIN(x.shape[2], affine=bool(golden['affine'])).double()
    if golden['affine']:
        revin.weight.data = torch.from_numpy(golden['w_gamma'])
        revin.bias.data = torch.from_numpy(golden['w_beta'])
    z, statistics = revin.normalize(x)
    mean, deviation = statistics
    check_golden(z, golden, 'x_norm')
    check_golden(mean, golden, 'avg')
    check_golden(deviation.square()-revin.eps, golden, 'var_unbiased')
    torch.testing.assert_close(revin.denormalize(z, statistics), x, atol=1e-10, rtol=1e-10)


def test_published_operators_give_the_published_numbers(golden):
    "Every array of the papers' own code, float64, gradients included"
    checks = dict(fan=check_fan, san=check_san, revin=check_revin)
    files = sorted(golden.glob('*.npz'))
    assert files, f'{golden} holds no .npz files'
    for path in files:
        print(path.name)  # pytest shows it if a number is another
        with np.load(path) as file:
            arrays_of_file = dict(file)
        for name, check in checks.items():
            if path.name.startswith(name):
                check(arrays_of_file, torch.from_numpy(arrays_of_file['x']).requires_grad_())

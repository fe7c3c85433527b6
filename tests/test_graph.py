"The graph of a day against a brute-force reference in float64"
import numpy as np
import torch
from hypothesis import given, settings, strategies as st
from atft.data import ParquetStockIterableDataset
from atft.graph import GraphCache, GraphSpec, correlation_knn

def reference(returns, spec):
    N = len(returns)
    c = np.full((N, N), np.nan)
    for i in range(N):
        for j in range(N):
            both = np.isfinite(returns[i]) & np.isfinite(returns[j])
            if i != j and both.sum() >= spec.min_obs and np.ptp(returns[i, both]) > 0 and np.ptp(returns[j, both]) > 0:
                c[i, j] = np.corrcoef(returns[i, both], returns[j, both])[0, 1]
    return c

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(40, 70), st.floats(0, .3), st.integers(1, 30), st.floats(.1, .9), st.integers(0, 2**31))
def test_edges_are_the_k_strongest_above_the_threshold(N, T, missing, k, threshold, seed):
    rng = np.random.default_rng(seed)
    returns = .02*(rng.normal(size=(N, T)) + rng.normal(size=(1, T))*rng.normal(size=(N, 1)))
    returns[rng.random((N, T)) < missing] = np.nan
    if N > 3: returns[0] = .01; returns[1] = np.nan; returns[2] = -returns[3]
    spec = GraphSpec(lookback=T, k=k, threshold=threshold, min_obs=40)
    c = reference(returns, spec)
    edge_index, edge_attr = correlation_knn(returns, spec, block=5)
    edges = set(map(tuple, edge_index.T.tolist()))
    assert len(edges) == edge_index.shape[1] and edges == {(j, i) for i, j in edges} and all(i != j for i, j in edges)
    for (i, j), (a,) in zip(edge_index.T.tolist(), edge_attr.tolist()): assert abs(c[i, j]-a) < 2e-5
    strength = np.nan_to_num(np.abs(c), nan=-1)
    for i in range(N):
        best = np.sort(strength[i])[::-1]
        bar = max(threshold, best[min(k, N)-1]) if N else threshold
        for j in range(N):  # a margin, since float32 decides near the bar
            if i != j and strength[i, j] > bar+1e-4: assert (i, j) in edges
            if i != j and strength[i, j] < threshold-1e-4: assert (i, j) not in edges

def test_a_day_is_the_same_graph_when_the_data_ends_there(small_market, tmp_path):
    day = 150
    whole = list(ParquetStockIterableDataset(small_market, small_market.dates[[day, day+40]], lookback=1))
    alone = next(iter(ParquetStockIterableDataset(small_market, small_market.dates[[day]], lookback=1)))
    cache = GraphCache(tmp_path)
    for a, b in zip(cache(whole[0]), cache(alone)): assert torch.equal(a, b)
    assert (cache.hits, cache.misses) == (1, 1)

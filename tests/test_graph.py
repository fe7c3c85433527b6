"The graph of a day against a brute-force reference in float64"
import numpy as np
import polars as pl
import torch
from hypothesis import given, settings, strategies as st
from atft.data import ParquetStockIterableDataset
from atft.graph import GraphCache, GraphSpec, correlation_knn
from atft.panel import write_panel

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
    if N > 7: returns[4] = np.where(np.isnan(returns[5]), returns[4], .01)  # moves only on days when the other is missing
    if N > 9: returns[8] *= 1e-9; returns[9] *= 1e6
    spec = GraphSpec(lookback=T, k=k, threshold=threshold, min_obs=40)
    c = reference(returns, spec)
    edge_index, edge_attr = correlation_knn(returns, spec, block=5)
    assert edge_attr.isfinite().all()
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

def test_labels_never_reach_the_graph(small_market, tmp_path):
    nonsense = small_market.scan().with_columns(pl.col('^target.*$')*0+7).collect()
    other = write_panel(nonsense, tmp_path/'panel', small_market.spec)
    days = [next(iter(ParquetStockIterableDataset(p, small_market.dates[[200]], lookback=1))) for p in (small_market, other)]
    for a, b in zip(*(correlation_knn(d.returns) for d in days)): assert torch.equal(a, b)

def test_sixty_sessions_whatever_the_calendar(small_market):
    "The window counts sessions: the graph of a day is that of the last 60 columns and no others"
    day = next(iter(ParquetStockIterableDataset(small_market, small_market.dates[[200]], lookback=1, return_lookback=90)))
    assert day.returns.shape[1] == 90
    for a, b in zip(correlation_knn(day.returns), correlation_knn(day.returns[:, -60:])): assert torch.equal(a, b)

def test_what_changes_never_hits_and_what_is_damaged_is_built_again(small_market, tmp_path):
    day = next(iter(ParquetStockIterableDataset(small_market, small_market.dates[[200]], lookback=1)))
    cache = GraphCache(tmp_path)
    right = cache(day)
    bumped = day.returns.clone()
    bumped[3, -60] += 1e-7
    cache(day._replace(returns=bumped))
    cache(day._replace(codes=[c.lower() for c in day.codes]))
    GraphCache(tmp_path, GraphSpec(k=19))(day)
    assert cache.hits == 0 and len(list(tmp_path.glob('*.npz'))) == 4
    file = tmp_path/f'{cache.key(day.returns[:, -60:], day.codes)}.npz'
    good = file.read_bytes()
    for bit in np.random.default_rng(0).integers(0, len(good)*8, 200):
        bad = bytearray(good); bad[bit//8] ^= 1 << bit % 8
        file.write_bytes(bad)
        for a, b in zip(cache(day), right): assert torch.equal(a, b)
    file.write_bytes(good[:100])
    for a, b in zip(cache(day), right): assert torch.equal(a, b)

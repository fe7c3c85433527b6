"A day's graph against brute force in float64; the cache against all that could make it stale"
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings, strategies as st

import atft.graph
import atft.neighbours
from atft.core import AtftError
from atft.data import ParquetStockIterableDataset
from atft.graph import (
    CorrelationGraph, GraphCache, GraphSpec, NoGraph, SectorHistory, correlation_knn)
from atft.neighbours import _keep_strongest
from atft.panel import write_panel


def days_of(panel, numbers, **options):
    return list(ParquetStockIterableDataset(panel, panel.dates[numbers], lookback=1, **options))


def day_of(panel, number, **options):
    return days_of(panel, [number], **options)[0]


def assert_same(a, b):
    for mine, theirs in zip(a, b, strict=True):
        assert torch.equal(mine, theirs)


def reference(returns, spec):
    N = len(returns)
    c = np.full((N, N), np.nan)
    for i in range(N):
        for j in range(N):
            both = np.isfinite(returns[i]) & np.isfinite(returns[j])
            a = returns[i, both]
            b = returns[j, both]
            if i != j and both.sum() >= spec.min_obs and np.ptp(a) > 0 and np.ptp(b) > 0:
                c[i, j] = np.corrcoef(a, b)[0, 1]
    return c


def awkward_returns(N, T, missing, seed):
    "A market with gaps, a constant, a code never traded, a mirror image, and returns of all sizes"
    rng = np.random.default_rng(seed)
    market = rng.normal(size=(1, T))*rng.normal(size=(N, 1))
    returns = .02*(rng.normal(size=(N, T)) + market)
    returns[rng.random((N, T)) < missing] = np.nan
    if N > 3:
        returns[0] = .01
        returns[1] = np.nan
        returns[2] = -returns[3]
    if N > 7:  # moves only on days when the other is missing
        returns[4] = np.where(np.isnan(returns[5]), returns[4], .01)
    if N > 9:
        returns[8] *= 1e-9
        returns[9] *= 1e6
    return returns


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(40, 70), st.floats(0, .3), st.integers(1, 30),
       st.floats(.1, .9), st.integers(0, 2**31))
def test_edges_are_the_k_strongest_above_the_threshold(N, T, missing, k, threshold, seed):
    returns = awkward_returns(N, T, missing, seed)
    spec = GraphSpec(lookback=T, k=k, threshold=threshold, min_obs=40)
    c = reference(returns, spec)
    edge_index, edge_attr = correlation_knn(returns, spec, block=5)
    assert edge_attr.isfinite().all()
    pairs = edge_index.T.tolist()
    edges = set(map(tuple, pairs))
    assert len(edges) == edge_index.shape[1]
    assert edges == {(j, i) for i, j in edges}
    assert all(i != j for i, j in edges)
    for (i, j), (strength,) in zip(pairs, edge_attr.tolist()):
        assert abs(c[i, j]-strength) < 2e-5
    strength = np.nan_to_num(np.abs(c), nan=-1)
    for i in range(N):
        best = np.sort(strength[i])[::-1]
        bar = max(threshold, best[min(k, N)-1])
        for j in range(N):  # a margin, since float32 decides near the bar
            if i != j and strength[i, j] > bar+1e-4: assert (i, j) in edges
            if i != j and strength[i, j] < threshold-1e-4: assert (i, j) not in edges


def test_a_day_is_the_same_graph_when_the_data_ends_there(small_market, tmp_path):
    whole = days_of(small_market, [150, 190])
    alone = day_of(small_market, 150)
    cache = GraphCache(tmp_path)
    assert_same(cache(whole[0]), cache(alone))
    assert (cache.hits, cache.misses) == (1, 1)


def test_labels_never_reach_the_graph(small_market, tmp_path):
    nonsense = small_market.scan().with_columns(pl.col('^target.*$')*0+7).collect()
    other = write_panel(nonsense, tmp_path/'panel', small_market.spec)
    mine = day_of(small_market, 200)
    theirs = day_of(other, 200)
    assert_same(correlation_knn(mine.returns), correlation_knn(theirs.returns))


def test_sixty_sessions_whatever_the_calendar(small_market):
    "The window counts sessions: the graph of a day is that of the last 60 columns and no others"
    day = day_of(small_market, 200, return_lookback=90)
    assert day.returns.shape[1] == 90
    assert_same(correlation_knn(day.returns), correlation_knn(day.returns[:, -60:]))


def test_what_changes_never_hits(small_market, tmp_path):
    day = day_of(small_market, 200)
    cache = GraphCache(tmp_path)
    cache(day)
    bumped = day.returns.clone()
    bumped[3, -60] += 1e-7
    cache(day._replace(returns=bumped))
    cache(day._replace(codes=[c.lower() for c in day.codes]))
    cache(day._replace(date=small_market.dates[201].item()))
    GraphCache(tmp_path, GraphSpec(k=19))(day)
    GraphCache(tmp_path, NoGraph())(day)
    assert cache.hits == 0
    assert len(list(tmp_path.glob('*.npz'))) == 6


def test_what_is_damaged_is_built_again(small_market, tmp_path):
    day = day_of(small_market, 200)
    cache = GraphCache(tmp_path)
    right = cache(day)
    file = tmp_path/f'{cache.key(day)}.npz'
    good = file.read_bytes()
    for bit in np.random.default_rng(0).integers(0, len(good)*8, 200):
        bad = bytearray(good)
        bad[bit//8] ^= 1 << bit % 8
        file.write_bytes(bad)
        assert_same(cache(day), right)
    file.write_bytes(good[:100])
    assert_same(cache(day), right)


def halved(returns, spec=None, block=128, sectors=None):
    edge_index, edge_attr = correlation_knn(returns, spec, block, sectors)
    return edge_index, edge_attr/2


def test_a_replaced_rule_makes_a_new_graph_and_deletes_nothing(
        small_market, tmp_path, monkeypatch):
    day = day_of(small_market, 200)
    cache = GraphCache(tmp_path)
    right = cache(day)
    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(atft.graph, 'correlation_knn', halved)
        for asked in (cache, GraphCache(tmp_path)):  # one that was there, and a new one
            assert_same(asked(day), (right[0], right[1]/2))
    assert (cache.hits, cache.misses) == (0, 2)
    assert set(tmp_path.iterdir()) > before
    assert_same(cache(day), right)
    assert (cache.hits, cache.misses) == (1, 2)


def test_an_edit_deep_in_the_rule_is_another_key(small_market, tmp_path, monkeypatch):
    "The function that the rule's function calls, and a constant that it reads"
    day = day_of(small_market, 200)
    cache = GraphCache(tmp_path)
    keys = {cache.key(day)}
    exported = atft.neighbours.standardise

    def noisy(returns, spec): return exported(returns+1e-3*torch.rand_like(returns), spec)
    def twice(r, *others): return _keep_strongest(2*r, *others)
    edits = [(atft.graph, 'standardise', noisy), (atft.neighbours, 'FLAT', 1e-4),
             (atft.neighbours, '_keep_strongest', twice)]
    for room, name, edited in edits:
        with monkeypatch.context() as patch:
            patch.setattr(room, name, edited)
            keys.add(cache.key(day))
    assert len(keys) == 4
    assert cache.key(day) in keys
    assert GraphCache(tmp_path).key(day) in keys


def test_unchanged_code_finds_its_graph_also_from_a_thread_that_builds(small_market, tmp_path):
    days = days_of(small_market, np.arange(200, 206))
    GraphCache(tmp_path).build(days, threads=2)
    again = GraphCache(tmp_path)
    for day in days: again(day)
    assert (again.hits, again.misses) == (6, 0)


@dataclass(frozen=True)
class ChainSpec:
    strength:float = 1.
    columns:int = 1


class Chain:
    "Somebody's graph: each code and the one listed after it"
    version = 'mine 1'

    def __init__(self, spec=ChainSpec(), attributes=1):
        self.spec = spec
        self.attributes = attributes

    def __call__(self, day):
        here = torch.arange(len(day)-1)
        edge_index = torch.stack([here, here+1])
        return edge_index, torch.full((len(here), self.spec.columns), self.spec.strength)


class Beyond(Chain):
    def __call__(self, day):
        edge_index, edge_attr = super().__call__(day)
        return edge_index+1, edge_attr


class Flat(Chain):
    def __call__(self, day): return super().__call__(day)[0].flatten(), torch.ones(3, 1)


class Int(Chain):
    def __call__(self, day): return super().__call__(day)[0].int(), super().__call__(day)[1]


class Alone(Chain):
    def __call__(self, day): return super().__call__(day)[0]


def test_a_graph_of_somebody_is_kept_with_as_many_attributes_as_it_says(small_market, tmp_path):
    day = day_of(small_market, 200)
    cache = GraphCache(tmp_path, Chain(ChainSpec(columns=3), 3))
    first = cache(day)
    assert first[1].shape == (len(day)-1, 3)
    assert_same(cache(day), first)
    GraphCache(tmp_path, Chain(ChainSpec(strength=.5, columns=3), 3))(day)
    assert len(list(tmp_path.iterdir())) == 2
    assert (cache.hits, cache.misses, cache.attributes) == (1, 1, 3)


@pytest.mark.parametrize('graph, says', [
    (Chain(attributes=2), r'Chain on .*: edge_attr is torch.float32 \(36, 1\); give floats \(36, 2\)'),
    (Chain(ChainSpec(float('nan'))), 'edge_attr has NaN or inf'),
    (Beyond(), 'Beyond on .*: edge_index goes from 1 to 37; give positions in 0 .. 36'),
    (Flat(), r'edge_index is torch.int64 \(72,\); give torch.int64 \[2, E\]'),
    (Int(), r'edge_index is torch.int32 \(2, 36\); give torch.int64'),
    (Alone(), 'it gave Tensor; give a pair')])
def test_edges_that_do_not_fit_the_day_are_one_line(small_market, tmp_path, graph, says):
    day = day_of(small_market, 200)
    assert len(day) == 37
    with pytest.raises(AtftError, match=says) as error:
        GraphCache(tmp_path, graph)(day)
    assert '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_is_no_graph_is_refused_at_birth(tmp_path):
    class NoCall:
        spec = ChainSpec()
        version = '1'
        attributes = 1
    no_json = ChainSpec(strength=np.float32(1))
    for graph, says in [
            (correlation_knn, 'has no spec'), ('knn', 'has no spec'),
            (NoCall(), 'cannot be called'),
            (Chain(attributes=0), 'must be at least 1'),
            (Chain(attributes='1'), 'not a whole number'),
            (Chain(spec={}), 'not a dataclass'),
            (Chain(spec=no_json), 'cannot be written as JSON')]:
        with pytest.raises(AtftError, match=says):
            GraphCache(tmp_path, graph)


@pytest.mark.parametrize('options', [
    dict(k=0), dict(k=2.5), dict(k='20'), dict(k=True), dict(lookback=1), dict(lookback=20),
    dict(lookback=60.), dict(min_obs=1), dict(min_obs=61), dict(min_obs=None), dict(threshold=0),
    dict(threshold=1.1), dict(threshold=-.3), dict(threshold='.3'), dict(threshold=float('nan')),
    dict(halflife=0), dict(halflife=-5), dict(halflife='20'), dict(halflife=float('inf')),
    dict(shrinkage=1), dict(shrinkage=-.1), dict(shrinkage=None), dict(demean=1),
    dict(sectors='yes')])
def test_a_graph_spec_refuses_what_cannot_be_meant(options):
    name = next(iter(options))
    with pytest.raises(AtftError, match=f'GraphSpec: ({name}|min_obs)=') as error:
        GraphSpec(**options)
    assert '\n' not in str(error.value)


def with_sectors(panel, folder, rule):
    "The panel with its column `sector` made by a rule"
    return write_panel(panel.scan().with_columns(sector=rule), folder, panel.spec)


def test_a_change_of_sector_in_the_future_moves_nothing(small_market, tmp_path):
    day = day_of(small_market, 150)
    moves = pl.col('date') > day.date
    plain = SectorHistory(small_market)
    changed = pl.when(moves).then(pl.lit('A new one')).otherwise('sector')
    later = SectorHistory(with_sectors(small_market, tmp_path/'later', changed))
    assert torch.equal(plain.on(day.date, day.codes), later.on(day.date, day.codes))
    tomorrow = small_market.dates[151].item()
    assert not torch.equal(plain.on(tomorrow, day.codes), later.on(tomorrow, day.codes))
    spec = GraphSpec(sectors=True)
    assert_same(CorrelationGraph(spec, plain)(day), CorrelationGraph(spec, later)(day))


def test_sectors_are_those_of_the_rows_up_to_the_day(small_market, tmp_path):
    "Against looking it up: the last row at or before the day that has a sector"
    number = pl.col('code').cum_count().over('code')
    wild = (pl.col('code').hash(3) % 5 + number // 37) % 4
    rule = pl.when(number % 3 == 0).then(None).otherwise(pl.format('s{}', wild))
    panel = with_sectors(small_market, tmp_path, rule)
    history = SectorHistory(panel)
    rows = panel.scan().select('date', 'code', 'sector').drop_nulls().collect()
    for number in (0, 1, 40, 200, 299):
        date = panel.dates[number].item()
        last = rows.filter(pl.col('date') <= date).sort('date').group_by('code').last()
        known = dict(zip(last['code'], last['sector']))
        got = history.on(date, panel.codes).tolist()
        names = [*history.names, None]  # -1 is the last: unknown
        assert [names[n] for n in got] == [known.get(c) for c in panel.codes]
    assert len(history.at) < len(rows)/5


def test_the_second_attribute_says_who_shares_a_sector(small_market, tmp_path):
    day = day_of(small_market, 200)
    history = SectorHistory(small_market)
    graph = CorrelationGraph(GraphSpec(sectors=True), history)
    cache = GraphCache(tmp_path, graph)
    for edge_index, edge_attr in (cache(day), cache(day)):
        number = history.on(day.date, day.codes)
        same = number[edge_index[0]] == number[edge_index[1]]
        assert edge_attr.shape[1] == graph.attributes == 2
        assert torch.equal(edge_attr[:, 1], same.float())
        assert 0 < same.sum() < len(same)
    other = pl.when(pl.col('code') == day.codes[0]).then(pl.lit('x')).otherwise('sector')
    moved = SectorHistory(with_sectors(small_market, tmp_path/'moved', other))
    GraphCache(tmp_path, CorrelationGraph(GraphSpec(sectors=True), moved))(day)
    assert len(list(tmp_path.glob('*.npz'))) == 2, 'other sectors, the same key'


def test_sectors_are_asked_for_with_their_history_or_not_at_all(small_market, tmp_path):
    spec = GraphSpec(sectors=True)
    with pytest.raises(AtftError, match='needs the history of sectors'):
        GraphCache(tmp_path, spec)
    with pytest.raises(AtftError, match='the spec does not use them'):
        CorrelationGraph(GraphSpec(), SectorHistory(small_market))
    with pytest.raises(AtftError, match='needs the sector of each code'):
        correlation_knn(torch.randn(5, 60), spec)
    empty = with_sectors(small_market, tmp_path/'empty', pl.lit(None, pl.String))
    with pytest.raises(AtftError, match='no row of .* has a sector'):
        SectorHistory(empty)

"The stream: the same days from any number of workers, with polars alive in the parent"
import numpy as np
import polars as pl
import pytest
import torch
from torch.utils.data import DataLoader
from atft.data import ParquetStockIterableDataset, make_loader

def same(a, b):
    return a.date == b.date and a.codes == b.codes and all(torch.equal(getattr(a, n).nan_to_num(9), getattr(b, n).nan_to_num(9)) for n in ('x', 'y', 'returns'))

@pytest.mark.timeout(120)
@pytest.mark.parametrize('num_workers', [1, 2, 4])
def test_workers_change_nothing_while_polars_is_in_use(small_market, num_workers):
    assert len(small_market.scan().collect()) > 0  # polars' threads are running now: a forked worker would hang
    ds = ParquetStockIterableDataset(small_market, lookback=15, shuffle=True, seed=3, span=32)
    here, apart = list(make_loader(ds)), list(make_loader(ds, num_workers))
    assert len(here) == len(apart) == 300 and all(map(same, here, apart))

@pytest.mark.timeout(120)
def test_a_plain_torch_loader_gives_the_same_order(small_market):
    ds = ParquetStockIterableDataset(small_market, small_market.dates[:90], lookback=5, shuffle=True)
    plain = DataLoader(ds, batch_size=None, num_workers=2, multiprocessing_context='forkserver')
    assert all(map(same, list(ds), list(plain)))

def test_ranks_share_the_days(small_market):
    days = [[b.date for b in ParquetStockIterableDataset(small_market, shuffle=True, rank=r, world_size=3)] for r in range(3)]
    assert sorted(sum(days, [])) == [d.item() for d in small_market.dates]

@pytest.mark.parametrize('span', [7, 64, 400])
def test_windows_are_the_rows_of_the_calendar_whatever_the_span(small_market, span):
    t = small_market.scan().collect()
    wide = t.pivot(on='code', index='date', values='own').sort('date')
    for b in ParquetStockIterableDataset(small_market, small_market.dates[100:140], lookback=30, span=span):
        at = int(np.searchsorted(small_market.dates, np.datetime64(b.date)))
        expected = wide.select(b.codes)[at-29:at+1].to_numpy().T
        np.testing.assert_array_equal(b.x[:, :, small_market.spec.features.index('own')], expected.astype(np.float32))
        assert sorted(t.filter(pl.col('date') == b.date)['code']) == b.codes

def test_a_state_continues_with_the_next_day(small_market):
    make = lambda workers=0: make_loader(ParquetStockIterableDataset(small_market, lookback=3, shuffle=True, seed=1, span=50), workers)
    whole = list(make())
    for stop in (0, 1, 49, 50, 51, 299, 300):
        loader = make()
        stream = iter(loader)
        for _ in range(stop): next(stream)
        again = make()
        again.load_state_dict(loader.state_dict())
        rest = list(again)
        assert len(rest) == 300-stop and all(map(same, whole[stop:], rest))

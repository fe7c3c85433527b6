"The stream: the same days from any number of workers, ranks and restarts, with polars alive"
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
from itertools import product

import numpy as np
import polars as pl
import pytest
import torch
import warm
from torch.utils.data import DataLoader, get_worker_info

from atft.core import AtftError
from atft.data import (
    OnlineRobustScaler, ParquetStockIterableDataset, Split, make_loader, split_days, walk_forward)
from atft.panel import PanelSpec, write_panel

WORKERS = (0, 1, 2, 4)


def same(a, b):
    if a.date != b.date or a.codes != b.codes: return False
    pairs = zip((a.x, a.y, a.returns), (b.x, b.y, b.returns))
    return all(torch.equal(mine.nan_to_num(9), theirs.nan_to_num(9)) for mine, theirs in pairs)


def workers_since(before): return set(multiprocessing.active_children())-before


@pytest.mark.timeout(240)
def test_any_workers_before_and_after_a_restart_give_the_same_days(small_market):
    # polars' threads are running now: a forked worker would hang
    assert len(small_market.scan().collect()) > 0
    options = dict(lookback=15, shuffle=True, seed=3, span=32)
    def make(): return ParquetStockIterableDataset(small_market, small_market.dates[:130], **options)
    whole = list(make_loader(make()))
    assert len(whole) == 130
    states = {}
    for workers, stop in zip(WORKERS, (31, 32, 75, 101)):
        loader = make_loader(make(), workers)
        stream = iter(loader)
        head = [next(stream) for _ in range(stop)]
        states[workers] = (stop, loader.state_dict())
        stream.close()
        assert all(map(same, whole, head))
    for before, after in product(WORKERS, WORKERS):
        stop, state = states[before]
        again = make_loader(make(), after)
        again.load_state_dict(state)
        rest = list(again)
        assert len(rest) == 130-stop, (before, after)
        assert all(map(same, whole[stop:], rest)), (before, after)


class UsesPolars(ParquetStockIterableDataset):
    "A dataset whose workers use polars as well, as somebody's subclass may"
    def read_span(self, days):
        assert len(self.panel.scan().select(pl.len()).collect()) == 1
        return super().read_span(days)


@pytest.mark.timeout(120)
def test_polars_in_parent_and_workers_does_not_hang(small_market):
    "In forked workers this waits for ever: polars' threads do not survive a fork"
    assert small_market.scan().select(pl.col('own').sum()).collect().height == 1
    dataset = UsesPolars(small_market, small_market.dates[:60], lookback=5, span=20)
    assert sum(1 for _ in make_loader(dataset, 2)) == 60


def test_reading_a_span_uses_pyarrow_and_numpy_only(small_market, monkeypatch):
    def forbidden(*args, **options): raise AssertionError('polars was used in a worker\'s code')
    names = ('scan_parquet', 'read_parquet', 'from_arrow', 'DataFrame', 'LazyFrame', 'Series')
    for name in names: monkeypatch.setattr(pl, name, forbidden)
    dataset = ParquetStockIterableDataset(small_market, small_market.dates[:60], lookback=5)
    assert len(dataset.read_span(dataset.spans()[0]).days) == 60


CONTINUE = r'''
import json, sys
from atft.data import *
dataset = ParquetStockIterableDataset(Panel(sys.argv[1]), lookback=3, shuffle=True, seed=1, span=50)
loader = make_loader(dataset)
loader.load_state_dict(json.loads(sys.argv[2]))
for day in loader: print(day.date, day.x.nan_to_num(9).double().sum().item().hex())
'''


@pytest.mark.timeout(120)
def test_a_state_continues_in_a_new_process(small_market):
    loader = make_loader(ParquetStockIterableDataset(
        small_market, lookback=3, shuffle=True, seed=1, span=50))
    whole = list(loader)
    stream = iter(loader)
    for _ in range(77): next(stream)
    state = str(loader.state_dict()).replace("'", '"')
    command = [sys.executable, '-c', CONTINUE, small_market.folder, state]
    out = warm.run(command, check=True).stdout
    sums = [day.x.nan_to_num(9).double().sum().item().hex() for day in whole[77:]]
    assert out.splitlines() == [f'{day.date} {total}' for day, total in zip(whole[77:], sums)]


@pytest.mark.timeout(120)
def test_a_plain_torch_loader_gives_the_same_order(small_market):
    dataset = ParquetStockIterableDataset(
        small_market, small_market.dates[:90], lookback=5, shuffle=True, span=20)
    plain = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context='forkserver')
    assert all(map(same, list(dataset), list(plain)))


@pytest.mark.parametrize('world', [2, 4])
def test_ranks_share_the_days_and_see_whole_windows(small_market, world):
    options = dict(lookback=20, shuffle=True, span=16)
    def days_of(**more): return list(ParquetStockIterableDataset(small_market, **options, **more))
    alone = {day.date: day for day in days_of()}
    shared = []
    for rank in range(world): shared += days_of(rank=rank, world_size=world)
    assert sorted(day.date for day in shared) == [d.item() for d in small_market.dates]
    assert all(same(day, alone[day.date]) for day in shared)


@pytest.mark.parametrize('span', [7, 64, 400])
def test_windows_are_the_rows_of_the_calendar_whatever_the_span(small_market, tmp_path, span):
    table = small_market.scan().collect()
    # days and windows cross row groups and shards
    cut = write_panel(table, tmp_path, small_market.spec, row_group=1_111)
    wide = table.pivot(on='code', index='date', values='own').sort('date')
    own = cut.spec.features.index('own')
    for day in ParquetStockIterableDataset(cut, cut.dates[100:290], lookback=30, span=span):
        at = int(np.searchsorted(cut.dates, np.datetime64(day.date)))
        expected = wide.select(day.codes)[at-29:at+1].to_numpy().T
        np.testing.assert_array_equal(day.x[:, :, own], expected.astype(np.float32))
        assert sorted(table.filter(pl.col('date') == day.date)['code']) == day.codes


def test_a_batch_that_is_kept_is_not_overwritten(small_market):
    "Blocks are used again: only when nothing refers to them"
    dataset = ParquetStockIterableDataset(small_market, lookback=10, span=20)
    kept = list(dataset)
    for _ in range(3): list(day.x for day in dataset)
    assert all(map(same, kept, ParquetStockIterableDataset(small_market, lookback=10, span=20)))


@pytest.mark.timeout(120)
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_stalls_is_an_error_that_names_the_shard(small_market, how):
    loader = make_loader(ParquetStockIterableDataset(small_market, lookback=5, span=10), 2)
    before = set(multiprocessing.active_children())
    stream = iter(loader)
    next(stream)
    for p in workers_since(before): os.kill(p.pid, how)
    start = time.monotonic()
    says = r'worker process died or gave nothing.*year=\d+.*\.parquet'
    with pytest.raises(AtftError, match=says):
        for _ in stream: pass
    assert time.monotonic()-start < 30


class StopsAtHandOver(ParquetStockIterableDataset):
    "Its workers stop when the parent asks for the memory of a block that they have announced"
    def read_span(self, days):
        def stop(*_): os.kill(os.getpid(), signal.SIGSTOP)
        if get_worker_info(): multiprocessing.connection.deliver_challenge = stop
        return super().read_span(days)


@pytest.mark.timeout(120)
def test_a_worker_that_stalls_while_it_hands_a_block_over_is_an_error_too(small_market):
    "The `DataLoader`'s own time limit does not cover this moment"
    before = set(multiprocessing.active_children())
    start = time.monotonic()
    says = r'worker process died or gave nothing for 10 s.*year=\d+.*\.parquet'
    with pytest.raises(AtftError, match=says):
        list(make_loader(StopsAtHandOver(small_market, lookback=5, span=10), 2, timeout=10))
    assert time.monotonic()-start < 20
    for p in workers_since(before): p.join(5)
    assert not workers_since(before), 'stopped workers were left behind'


@pytest.mark.timeout(120)
def test_whoever_leaves_early_does_not_wait_for_a_stopped_worker(small_market):
    before = set(multiprocessing.active_children())
    dataset = ParquetStockIterableDataset(small_market, lookback=5, span=10)
    stream = iter(make_loader(dataset, 2))
    next(stream)
    workers = workers_since(before)
    for p in workers: os.kill(p.pid, signal.SIGSTOP)
    stream.close()
    for p in workers: p.join(5)
    assert len(workers) == 2
    assert not any(p.is_alive() for p in workers), 'the interpreter would wait for them'


@pytest.mark.timeout(120)
def test_an_error_in_a_worker_arrives_as_one_line(small_market, tmp_path):
    panel = write_panel(small_market.scan().collect(), tmp_path, small_market.spec)
    loader = make_loader(ParquetStockIterableDataset(panel, lookback=5, span=10), 1)
    shard = panel.root/panel.shards[-1]['file']
    raw = bytearray(shard.read_bytes())
    raw[len(raw)//2] ^= 4
    shard.write_bytes(raw)
    with pytest.raises(AtftError) as e: list(loader)
    assert shard.name in str(e.value)
    assert '\n' not in str(e.value)
    assert str(e.value).startswith('shard ')


@pytest.mark.parametrize('options, says', [
    (dict(embargo=-30), 'embargo=-30 must be at least 0'),
    (dict(purge=-1), 'purge=-1 must be at least 0'),
    (dict(purge=2.5), 'purge=2.5 is not a whole number'),
    (dict(train_days=-5), 'train_days=-5 must be at least 1'),
    (dict(train_days='9'), "train_days='9' is not a whole number"),
    (dict(valid='2023-13-01'), 'valid=2023-13-01 is not a day'),
    (dict(valid='2015/05/01'), 'valid=2015/05/01 is not a day'),
    (dict(test='2015-09'), 'test=2015-09 is not a day'),
    (dict(end='never'), 'end=never is not a day')])
def test_a_split_refuses_what_cannot_be_meant(small_market, options, says):
    asked = dict(valid='2015-05-01', test='2015-09-01', purge=5, embargo=2) | options
    with pytest.raises(AtftError, match=says) as e: split_days(small_market.dates, **asked)
    assert '\n' not in str(e.value)
    gaps = {name: value for name, value in options.items() if name not in ('valid', 'test', 'end')}
    if gaps:
        with pytest.raises(AtftError, match=says): walk_forward(small_market.dates, **gaps)


def test_parts_of_a_split_never_share_a_day(small_market):
    dates = small_market.dates
    for parts in [(dates[:50], dates[49:90], dates[95:]), (dates[:50], dates[60:97], dates[95:]),
                  (dates[60:90], dates[:50], dates[95:]), (dates[50::-1], dates[60:90], dates[95:])]:
        with pytest.raises(AtftError, match='train before valid before test'): Split(*parts)
    assert len(Split(dates[:50], dates[60:90], dates[:0]).test) == 0


@pytest.mark.parametrize('options', [
    dict(lookback=0), dict(lookback=2.5), dict(return_lookback='60'), dict(span=-1), dict(seed=-1),
    dict(seed=None), dict(shuffle=1), dict(threads=0), dict(world_size=0), dict(rank=1),
    dict(rank=-1), dict(rank=True)])
def test_a_dataset_refuses_what_cannot_be_meant(small_market, options):
    with pytest.raises(AtftError, match=f'dataset: {next(iter(options))}=') as e:
        ParquetStockIterableDataset(small_market, **options)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('options', [
    dict(max_samples=0), dict(max_samples=1e4), dict(max_files=0), dict(clip=0), dict(clip='5'),
    dict(clip=float('nan')), dict(seed=-1), dict(seed=True)])
def test_a_scaler_refuses_what_cannot_be_meant(options):
    with pytest.raises(AtftError, match=f'scaler: {next(iter(options))}='):
        OnlineRobustScaler(**options)


@pytest.mark.parametrize('options', [
    dict(num_workers=-1), dict(num_workers=1.5), dict(num_workers='2'), dict(num_workers=True),
    dict(timeout=0), dict(timeout=None)])
def test_a_loader_refuses_what_cannot_be_meant(small_market, options):
    with pytest.raises(AtftError, match=f'{next(iter(options))}='):
        make_loader(ParquetStockIterableDataset(small_market), **options)


MEASURE = r'''
import re, sys
from atft.data import ParquetStockIterableDataset, make_loader
from atft.panel import Panel
for b in make_loader(ParquetStockIterableDataset(Panel(sys.argv[1]), lookback=60, span=64)): b.x
print(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])  # ru_maxrss would be the parent's
'''
CODES = 300
YEAR = 200


def write_years(years, spec, folder, rng):
    "A panel of many codes whose history is some years long"
    D = YEAR*years
    calendar = np.busday_offset('1990-01-01', np.arange(D), roll='forward')
    columns = dict(
        date=np.repeat(calendar.astype('datetime64[D]'), CODES),
        code=np.tile([f'C{i:03d}' for i in range(CODES)], D))
    for name in (*spec.features, 'ret_1d', 'target_1d'):
        columns[name] = rng.standard_normal(CODES*D, dtype=np.float32)
    write_panel(pl.DataFrame(columns).filter(pl.int_range(pl.len()) % 50 > 0), folder, spec)


def peak_of_streaming(folder):
    "Kilobytes that a process needs to stream a panel, at best"
    command = [sys.executable, '-c', MEASURE, str(folder)]
    def once(): return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return min(int(once()) for _ in range(2))


@pytest.mark.timeout(300)
@pytest.mark.skipif(not os.path.exists('/proc/self/status'),
                    reason='peak memory is read from /proc, which only Linux has')
def test_peak_memory_does_not_grow_with_the_history(tmp_path):
    rng = np.random.default_rng(0)
    spec = PanelSpec(features=tuple(f'f{i}' for i in range(24)), horizons=(1,))
    peak = {}
    for years in (1, 4, 16):
        write_years(years, spec, tmp_path/str(years), rng)
        peak[years] = peak_of_streaming(tmp_path/str(years))
    assert max(peak.values()) < 1.1*min(peak.values()), peak

"The stream: the same days from any number of workers, ranks and restarts, with polars alive in the parent"
import multiprocessing, multiprocessing.connection, os, signal, subprocess, sys, time
from itertools import product
import numpy as np
import polars as pl
import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info
from atft.core import AtftError
from atft.data import ParquetStockIterableDataset, make_loader
from atft.panel import Panel, PanelSpec, write_panel

WORKERS = (0, 1, 2, 4)

def same(a, b):
    return a.date == b.date and a.codes == b.codes and all(torch.equal(getattr(a, n).nan_to_num(9), getattr(b, n).nan_to_num(9)) for n in ('x', 'y', 'returns'))

@pytest.mark.timeout(240)
def test_any_workers_before_and_after_a_restart_give_the_same_days(small_market):
    assert len(small_market.scan().collect()) > 0  # polars' threads are running now: a forked worker would hang
    make = lambda: ParquetStockIterableDataset(small_market, small_market.dates[:130], lookback=15, shuffle=True, seed=3, span=32)
    whole, states = list(make_loader(make())), {}
    assert len(whole) == 130
    for workers, stop in zip(WORKERS, (31, 32, 75, 101)):
        loader = make_loader(make(), workers)
        stream = iter(loader)
        head = [next(stream) for _ in range(stop)]
        states[workers] = stop, loader.state_dict()
        stream.close()
        assert all(map(same, whole, head))
    for before, after in product(WORKERS, WORKERS):
        stop, state = states[before]
        again = make_loader(make(), after)
        again.load_state_dict(state)
        rest = list(again)
        assert len(rest) == 130-stop and all(map(same, whole[stop:], rest)), (before, after)

class UsesPolars(ParquetStockIterableDataset):
    "A dataset whose workers use polars as well, as somebody's subclass may"
    def read_span(self, days):
        assert len(self.panel.scan().select(pl.len()).collect()) == 1
        return super().read_span(days)

@pytest.mark.timeout(120)
def test_polars_in_parent_and_workers_does_not_hang(small_market):
    "In forked workers this waits for ever: polars' threads do not survive a fork"
    assert small_market.scan().select(pl.col('own').sum()).collect().height == 1
    assert sum(1 for _ in make_loader(UsesPolars(small_market, small_market.dates[:60], lookback=5, span=20), 2)) == 60

def test_reading_a_span_uses_pyarrow_and_numpy_only(small_market, monkeypatch):
    def forbidden(*args, **options): raise AssertionError('polars was used in a worker\'s code')
    for name in ('scan_parquet', 'read_parquet', 'from_arrow', 'DataFrame', 'LazyFrame', 'Series'): monkeypatch.setattr(pl, name, forbidden)
    ds = ParquetStockIterableDataset(small_market, small_market.dates[:60], lookback=5)
    assert len(ds.read_span(ds.spans()[0]).days) == 60

@pytest.mark.timeout(120)
def test_a_state_continues_in_a_new_process(small_market):
    make = 'make_loader(ParquetStockIterableDataset(Panel({folder!r}), lookback=3, shuffle=True, seed=1, span=50))'
    loader = eval(make.format(folder=str(small_market.folder)))
    whole = list(loader)
    stream = iter(loader)
    for _ in range(77): next(stream)
    code = (f'from atft.data import *; l = {make.format(folder=str(small_market.folder))}; l.load_state_dict({loader.state_dict()!r}); '
            'print(*(f"{b.date} {b.x.nan_to_num(9).double().sum().item().hex()}" for b in l), sep="\\n")')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split('\n')[:-1]
    assert out == [f'{b.date} {b.x.nan_to_num(9).double().sum().item().hex()}' for b in whole[77:]]

@pytest.mark.timeout(120)
def test_a_plain_torch_loader_gives_the_same_order(small_market):
    ds = ParquetStockIterableDataset(small_market, small_market.dates[:90], lookback=5, shuffle=True, span=20)
    plain = DataLoader(ds, batch_size=None, num_workers=2, multiprocessing_context='forkserver')
    assert all(map(same, list(ds), list(plain)))

@pytest.mark.parametrize('world', [2, 4])
def test_ranks_share_the_days_and_see_whole_windows(small_market, world):
    alone = {b.date: b for b in ParquetStockIterableDataset(small_market, lookback=20, shuffle=True, span=16)}
    parts = [list(ParquetStockIterableDataset(small_market, lookback=20, shuffle=True, span=16, rank=r, world_size=world)) for r in range(world)]
    assert sorted(b.date for p in parts for b in p) == [d.item() for d in small_market.dates]
    assert all(same(b, alone[b.date]) for p in parts for b in p)

@pytest.mark.parametrize('span', [7, 64, 400])
def test_windows_are_the_rows_of_the_calendar_whatever_the_span(small_market, tmp_path, span):
    t = small_market.scan().collect()
    cut = write_panel(t, tmp_path, small_market.spec, row_group=1_111)  # days and windows cross row groups and shards
    wide = t.pivot(on='code', index='date', values='own').sort('date')
    for b in ParquetStockIterableDataset(cut, cut.dates[100:290], lookback=30, span=span):
        at = int(np.searchsorted(cut.dates, np.datetime64(b.date)))
        expected = wide.select(b.codes)[at-29:at+1].to_numpy().T
        np.testing.assert_array_equal(b.x[:, :, cut.spec.features.index('own')], expected.astype(np.float32))
        assert sorted(t.filter(pl.col('date') == b.date)['code']) == b.codes

def test_a_batch_that_is_kept_is_not_overwritten(small_market):
    "Blocks are used again: only when nothing refers to them"
    make = lambda: ParquetStockIterableDataset(small_market, lookback=10, span=20)
    ds = make()
    kept = list(ds)
    for _ in range(3): list(b.x for b in ds)
    assert all(map(same, kept, make()))

@pytest.mark.timeout(120)
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_stalls_is_an_error_that_names_the_shard(small_market, how):
    loader = make_loader(ParquetStockIterableDataset(small_market, lookback=5, span=10), 2)
    before, stream = set(multiprocessing.active_children()), iter(loader)
    next(stream)
    for p in set(multiprocessing.active_children())-before: os.kill(p.pid, how)
    start = time.monotonic()
    with pytest.raises(AtftError, match=r'worker process died or gave nothing.*year=\d+.*\.parquet'):
        for _ in stream: pass
    assert time.monotonic()-start < 30

class StopsAtHandOver(ParquetStockIterableDataset):
    "Its workers stop in the moment the parent asks for the memory of a block that they have announced"
    def read_span(self, days):
        if get_worker_info(): multiprocessing.connection.deliver_challenge = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
        return super().read_span(days)

@pytest.mark.timeout(120)
def test_a_worker_that_stalls_while_it_hands_a_block_over_is_an_error_too(small_market):
    "The `DataLoader`'s own time limit does not cover this moment"
    start, before = time.monotonic(), set(multiprocessing.active_children())
    with pytest.raises(AtftError, match=r'worker process died or gave nothing for 10 s.*year=\d+.*\.parquet'):
        list(make_loader(StopsAtHandOver(small_market, lookback=5, span=10), 2, timeout=10))
    assert time.monotonic()-start < 20
    for p in set(multiprocessing.active_children())-before: p.join(5)
    assert set(multiprocessing.active_children()) == before, 'stopped workers were left behind'

@pytest.mark.timeout(120)
def test_whoever_leaves_early_does_not_wait_for_a_stopped_worker(small_market):
    before, stream = set(multiprocessing.active_children()), iter(make_loader(ParquetStockIterableDataset(small_market, lookback=5, span=10), 2))
    next(stream)
    workers = set(multiprocessing.active_children())-before
    for p in workers: os.kill(p.pid, signal.SIGSTOP)
    stream.close()
    for p in workers: p.join(5)
    assert len(workers) == 2 and not any(p.is_alive() for p in workers), 'the interpreter would wait for them when it ends'

@pytest.mark.timeout(120)
def test_an_error_in_a_worker_arrives_as_one_line(small_market, tmp_path):
    panel = write_panel(small_market.scan().collect(), tmp_path, small_market.spec)
    loader = make_loader(ParquetStockIterableDataset(panel, lookback=5, span=10), 1)
    shard = panel.root/panel.shards[-1]['file']
    raw = bytearray(shard.read_bytes()); raw[len(raw)//2] ^= 4; shard.write_bytes(raw)
    with pytest.raises(AtftError) as e: list(loader)
    assert shard.name in str(e.value) and '\n' not in str(e.value) and str(e.value).startswith('shard ')

MEASURE = r'''
import re, sys
from atft.data import ParquetStockIterableDataset, make_loader
from atft.panel import Panel
for b in make_loader(ParquetStockIterableDataset(Panel(sys.argv[1]), lookback=60, span=64)): b.x
print(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])  # ru_maxrss would be the parent's
'''

@pytest.mark.timeout(300)
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='peak memory is read from /proc, which only Linux has')
def test_peak_memory_does_not_grow_with_the_history(tmp_path):
    C, F, year = 300, 24, 200
    rng, spec, peak = np.random.default_rng(0), PanelSpec(features=tuple(f'f{i}' for i in range(F)), horizons=(1,)), {}
    for times in (1, 4, 16):
        D = year*times
        days = np.repeat(np.busday_offset('1990-01-01', np.arange(D), roll='forward').astype('datetime64[D]'), C)
        table = pl.DataFrame(dict(date=days, code=np.tile([f'C{i:03d}' for i in range(C)], D)) | {c: rng.standard_normal(C*D, dtype=np.float32) for c in (*spec.features, 'ret_1d', 'target_1d')})
        write_panel(table.filter(pl.int_range(pl.len()) % 50 > 0), tmp_path/str(times), spec)
        peak[times] = min(int(subprocess.run([sys.executable, '-c', MEASURE, str(tmp_path/str(times))], capture_output=True, text=True, check=True).stdout) for _ in range(2))
    assert max(peak.values()) < 1.1*min(peak.values()), peak

"Bad input and bad luck: one clear line each, and nothing is lost"
import hashlib, multiprocessing, subprocess, sys, time
from datetime import date, timedelta
from pathlib import Path
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from atft.bars import open_panel
from atft.core import AtftError
from atft.data import OnlineRobustScaler, ParquetStockIterableDataset
from atft.panel import Panel, PanelSpec, adopt_panel, append_shard, tiny_table, write_panel
from atft.phases import RunSpec, check_run, setup

SPEC = PanelSpec(features=('volume_z', 'constant'), horizons=(1, 5))
TABLE = tiny_table()

def everything(panel): return pl.from_arrow(panel.read(list(panel.spec.columns), panel.dates[0], panel.dates[-1]))
def batches(panel): return [(b.date, b.codes, b.x.nan_to_num(9).tolist()) for b in ParquetStockIterableDataset(panel, lookback=5, return_lookback=5)]

def test_no_flipped_bit_is_silent(tmp_path):
    panel = write_panel(TABLE, tmp_path, SPEC)
    right, shard = everything(panel), panel.root/panel.shards[0]['file']
    good, rng, noticed, harmless = shard.read_bytes(), np.random.default_rng(0), 0, 0
    for bit in rng.choice(len(good)*8, 1000, replace=False):
        bad = bytearray(good)
        bad[bit//8] ^= 1 << bit % 8
        shard.write_bytes(bad)
        try:
            assert everything(Panel(tmp_path)).equals(right), bit
            harmless += 1  # a byte that nothing reads: every number is right
        except AtftError as e:
            assert shard.name in str(e) and '\n' not in str(e)
            noticed += 1
    assert noticed > 900 and noticed+harmless == 1000, (noticed, harmless)

def test_every_cut_is_named_within_a_second(tmp_path):
    panel = write_panel(TABLE, tmp_path, SPEC)
    shard = panel.root/panel.shards[0]['file']
    good = shard.read_bytes()
    for size in np.linspace(0, len(good)-1, 100).astype(int):
        shard.write_bytes(good[:size])
        start = time.perf_counter()
        with pytest.raises(AtftError, match=shard.name): Panel(tmp_path)
        assert time.perf_counter()-start < 1

def test_damaged_shards_can_be_skipped_and_are_listed(tmp_path):
    two = pl.concat([TABLE, TABLE.with_columns(pl.col('date')+timedelta(days=366))])
    panel = write_panel(two, tmp_path, SPEC)
    bad = panel.root/panel.shards[1]['file']
    raw = bytearray(bad.read_bytes()); raw[200] ^= 1; bad.write_bytes(raw)
    with pytest.raises(AtftError, match='damaged.*--skip-damaged'): everything(Panel(tmp_path))
    rest = Panel(tmp_path, skip_damaged=True)
    assert len(rest.dates) == 60 and len(rest.skipped) == 1 and bad.name in rest.skipped[0] and f'{len(TABLE)} rows' in rest.skipped[0]
    assert '1 damaged shards skipped' in repr(rest) and len(batches(rest)) == 60
    kept = setup(check_run(RunSpec(data=str(tmp_path), skip_damaged=True, lookback=5, graph_lookback=5, min_obs=4, purge=2, embargo=1)))
    assert len(kept.panel.dates) == 60 and kept.split.test[-1] == rest.dates[-1]

def adopt(folder, *tables):
    folder.mkdir()
    for i, t in enumerate(tables): (pq.write_table if isinstance(t, pa.Table) else pl.DataFrame.write_parquet)(t, folder/f'{i}.parquet')
    return adopt_panel(folder, SPEC, cache=folder.parent/'cache')

FIRST, SECOND = TABLE.filter(pl.col('date') < date(2024, 2, 1)), TABLE.filter(pl.col('date') >= date(2024, 2, 1))
DRIFTS = dict(
    extra=(lambda t: t.with_columns(more=1.), "column 'more' is not in the first shard"),
    missing=(lambda t: t.drop('volume_z'), "column 'volume_z' is missing"),
    renamed=(lambda t: t.rename({'volume_z': 'volumez'}), "column 'volume_z' is missing"),
    float_width=(lambda t: t.with_columns(pl.col('volume_z').cast(pl.Float32)), "column 'volume_z' is float, in the first shard 0.parquet it is double"),
    text=(lambda t: t.with_columns(pl.col('volume_z').cast(pl.String)), "column 'volume_z' is string"),
    stamp=(lambda t: t.with_columns(pl.col('date').cast(pl.Datetime('us'))), 'date is timestamp'),
    zone=(lambda t: t.with_columns(pl.col('date').cast(pl.Datetime('us')).dt.replace_time_zone('Asia/Tokyo')), 'time zone Asia/Tokyo'))

@pytest.mark.parametrize('name', DRIFTS)
def test_a_drifting_schema_is_refused_by_name(tmp_path, name):
    drift, message = DRIFTS[name]
    with pytest.raises(AtftError, match=message) as e: adopt(tmp_path/'in', FIRST, drift(SECOND))
    assert '1.parquet' in str(e.value) and '\n' not in str(e.value)

def test_another_order_of_columns_is_accepted(tmp_path):
    assert batches(adopt(tmp_path/'in', FIRST, SECOND.select(reversed(SECOND.columns)))) == batches(write_panel(TABLE, tmp_path/'own', SPEC))

@pytest.mark.parametrize('order', [['date', 'code'], ['date'], ['code', 'date'], ['volume_z']])
def test_any_order_of_rows_gives_the_same_batches(tmp_path, order):
    (tmp_path/'in').mkdir()
    TABLE.sort(order).write_parquet(tmp_path/'in'/'0.parquet', row_group_size=40)
    panel = adopt_panel(tmp_path/'in', SPEC, cache=tmp_path/'cache')
    assert batches(panel) == batches(write_panel(TABLE, tmp_path/'own', SPEC))
    assert panel.note.startswith('read in place' if order[0] == 'date' else 're-partitioned once: it is not sorted by date')

def test_a_shard_without_statistics_is_read_all_the_same(tmp_path):
    (tmp_path/'in').mkdir()
    pq.write_table(TABLE.to_arrow(), tmp_path/'in'/'0.parquet', write_statistics=False, row_group_size=64)
    assert batches(adopt_panel(tmp_path/'in', SPEC, tmp_path/'cache')) == batches(write_panel(TABLE, tmp_path/'own', SPEC))

def test_huge_row_groups_are_repartitioned(tmp_path):
    (tmp_path/'in').mkdir()
    TABLE.write_parquet(tmp_path/'in'/'0.parquet')
    panel = adopt_panel(tmp_path/'in', SPEC, tmp_path/'cache', most_rows=100)
    assert 'row groups of' in panel.note and len(batches(panel)) == 60

def test_a_new_shard_in_an_adopted_folder_needs_no_copy(tmp_path):
    one = adopt(tmp_path/'in', FIRST)
    SECOND.write_parquet(tmp_path/'in'/'1.parquet')
    two = adopt_panel(tmp_path/'in', SPEC, tmp_path/'cache')
    assert len(one.dates) < len(two.dates) == 60 and two.note == 'read in place' and not list(two.folder.glob('*.parquet'))

def test_duplicate_rows_are_named(tmp_path):
    with pytest.raises(AtftError, match='C has more than one row on 2024-01-02'): write_panel(pl.concat([TABLE, TABLE.filter(pl.col('code') == 'C')[1:2]]), tmp_path/'own', SPEC)
    panel = adopt(tmp_path/'in', pl.concat([TABLE[:50], TABLE[49:]]))
    with pytest.raises(AtftError, match='has 2 rows on 2024'): batches(panel)

def test_a_folder_without_shards_an_empty_shard_and_an_empty_table(tmp_path):
    with pytest.raises(AtftError, match='no .parquet shards'): adopt(tmp_path/'none')
    with pytest.raises(AtftError, match='all 1 shards are empty'): adopt(tmp_path/'void', TABLE[:0])
    assert len(adopt(tmp_path/'some', FIRST, TABLE[:0], SECOND).dates) == 60
    with pytest.raises(AtftError, match='no rows'): write_panel(TABLE[:0], tmp_path/'own', SPEC)
    (tmp_path/'some'/'3.parquet').write_bytes(b'PAR1 not really')
    with pytest.raises(AtftError, match='3.parquet is cut off or not Parquet'): adopt_panel(tmp_path/'some', SPEC, tmp_path/'cache')

def test_floods_of_nan_and_inf_and_a_null_feature_and_a_code_seen_once(tmp_path):
    odd = TABLE.with_columns(constant=pl.lit(None, pl.Float64), volume_z=pl.when(pl.int_range(pl.len()) % 3 == 0).then(float('inf')).when(pl.int_range(pl.len()) % 3 == 1).then(float('nan')).otherwise('volume_z'))
    odd = pl.concat([odd, odd[100:101].with_columns(code=pl.lit('ONCE'))])
    panel = write_panel(odd, tmp_path, SPEC)
    scaler = OnlineRobustScaler().fit(panel, panel.dates)
    assert np.isfinite(scaler.center_).all() and (scaler.scale_ > 0).all()
    seen = list(ParquetStockIterableDataset(panel, lookback=9, scaler=scaler))
    assert sum('ONCE' in b.codes for b in seen) == 1
    assert all((b.x.isfinite() | b.x.isnan()).all() and b.x[:, :, 1].isnan().all() for b in seen) and any(b.x[:, -1, 0].isfinite().any() for b in seen)

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 59), st.integers(0, 10))
def test_appended_days_give_the_panel_that_was_written_at_once(tmp_path_factory, cut, overlap):
    folder, days = tmp_path_factory.mktemp('append'), TABLE['date'].unique().sort()
    first = days[max(0, cut-overlap)]
    stale = TABLE.filter(pl.col('date') < days[cut]).with_columns(pl.when(pl.col('date') >= first).then(0.).otherwise('volume_z').alias('volume_z'))
    short = write_panel(stale, folder/'a', SPEC)
    kept = [(short.root/s['file']).stat().st_mtime_ns for s in short.shards]
    grown = append_shard(short, TABLE.filter(pl.col('date') >= first))
    assert [(short.root/s['file']).stat().st_mtime_ns for s in short.shards] == kept
    whole = write_panel(TABLE, folder/'b', SPEC)
    assert batches(grown) == batches(whole) and grown.num_rows == whole.num_rows
    assert everything(grown).sort('date', 'code').equals(everything(whole)) and grown.scan().sort('date', 'code').collect().equals(whole.scan().collect())

LIMITED = '''
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
from atft.bars import open_panel
from atft.core import AtftError
try: print(len(open_panel(sys.argv[1], cache=sys.argv[2]).dates))
except AtftError as e: print('AtftError', e)
'''

def bars(folder, days=300):
    "A folder of OHLCV bars"
    rng, folder = np.random.default_rng(0), Path(folder)
    close = 100*np.exp(np.cumsum(rng.normal(0, .02, (days, 5)), 0)).ravel()
    day = np.repeat(np.busday_offset('2020-01-01', np.arange(days), roll='forward').astype('datetime64[D]'), 5)
    folder.mkdir(exist_ok=True)
    pl.DataFrame(dict(date=day, code=np.tile(list('ABCDE'), days), open=close, high=close*1.01, low=close*.99, close=close, volume=np.full(len(close), 1e5))).write_parquet(folder/'all.parquet')

def test_a_full_disk_leaves_no_half_written_cache(tmp_path):
    bars(tmp_path/'bars')
    run = lambda limit: subprocess.run([sys.executable, '-c', LIMITED, tmp_path/'bars', tmp_path/'cache', str(limit)], capture_output=True, text=True)
    full = run(20_000)
    assert full.stdout.startswith('AtftError cannot write') and full.stdout.count('\n') == 1, full
    assert not [p for p in (tmp_path/'cache').rglob('*') if p.is_file()]
    assert run(10**9).stdout.strip() == '300'

def test_a_read_only_cache_is_one_line(tmp_path):
    bars(tmp_path/'bars')
    (tmp_path/'cache').write_text('a file where a folder should be made')
    with pytest.raises(AtftError, match='cannot write the cache'): open_panel(tmp_path/'bars', cache=tmp_path/'cache'/'below')

def build_and_read(folder, cache, seconds, results):
    "Open the panel again and again, building it where it is not there yet"
    end, seen = time.monotonic()+seconds, set()
    while time.monotonic() < end:
        panel = open_panel(folder, cache=Path(cache)/str(int(time.monotonic()*2)))  # every half second a new cache, for all at once
        seen.add(hashlib.sha256(everything(panel).write_csv().encode()).hexdigest())
    results.put(seen)

@pytest.mark.timeout(200)
def test_many_processes_build_one_cache_at_once(tmp_path, request, record_property):
    bars(tmp_path/'bars')
    context, seconds = multiprocessing.get_context('forkserver'), float(request.config.getoption('--race-seconds'))
    results = context.Queue()
    crowd = [context.Process(target=build_and_read, args=(tmp_path/'bars', tmp_path/'cache', seconds, results)) for _ in range(8)]
    for p in crowd: p.start()
    seen = [results.get(timeout=seconds+90) for _ in crowd]
    for p in crowd: p.join()
    assert all(p.exitcode == 0 for p in crowd) and len(set.union(*seen)) == 1, (seen, [p.exitcode for p in crowd])
    assert not list((tmp_path/'cache').rglob('.*/panel.json'))  # nothing temporary is left
    record_property('caches built by 8 processes at once, each read equal', len(list((tmp_path/'cache').iterdir())))

def rewrite(folder, shift, seconds):
    "Write the panel of one content again and again into a folder that others write and read"
    end = time.monotonic()+seconds
    while time.monotonic() < end: write_panel(TABLE.with_columns(pl.col('volume_z')+shift), folder, SPEC)

def read_again(folder, seconds, results):
    "Read the panel again and again: its content, or one line that says a shard is gone"
    end, seen = time.monotonic()+seconds, []
    while time.monotonic() < end:
        try: seen.append(round(float((everything(Panel(folder))['volume_z'].cast(pl.Float64)-TABLE['volume_z']).mean())*1e3))
        except AtftError as e: seen.append('named' if 'year=2024' in str(e) else str(e))
    results.put((len(seen), set(seen)))

@pytest.mark.timeout(200)
def test_readers_never_see_a_mixture_of_two_writers(tmp_path, request, record_property):
    write_panel(TABLE, tmp_path, SPEC)
    context, seconds = multiprocessing.get_context('forkserver'), float(request.config.getoption('--race-seconds'))
    results = context.Queue()
    crowd = [context.Process(target=rewrite, args=(tmp_path, float(i), seconds)) for i in range(4)] + [context.Process(target=read_again, args=(tmp_path, seconds, results)) for _ in range(4)]
    for p in crowd: p.start()
    seen = [results.get(timeout=seconds+90) for _ in range(4)]
    for p in crowd: p.join()
    assert all(p.exitcode == 0 for p in crowd)
    assert set.union(*(s for _, s in seen)) <= {0, 1000, 2000, 3000, 'named'} and min(n for n, _ in seen) > 10, seen
    record_property('reads beside 4 writers, none torn or wrong', sum(n for n, _ in seen))

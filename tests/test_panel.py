"Bad input and bad luck: one clear line each, and nothing is lost; what is made is never stale"
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

import atft.bars
import atft.market
import atft.panel
from atft.adopted import adopt_panel
from atft.bars import open_panel
from atft.core import AtftError
from atft.data import OnlineRobustScaler, ParquetStockIterableDataset
from atft.market import MarketSpec, embedded_panel
from atft.panel import (
    Panel, PanelSpec, Target, append_shard, as_target, tiny_table, write_panel)
from atft.phases import RunSpec, check_run, setup

SPEC = PanelSpec(features=('volume_z', 'constant'), horizons=(1, 5))
TABLE = tiny_table()


def everything(panel):
    return pl.from_arrow(panel.read(list(panel.spec.columns), panel.dates[0], panel.dates[-1]))


def batches(panel):
    days = ParquetStockIterableDataset(panel, lookback=5, return_lookback=5)
    return [(day.date, day.codes, day.x.nan_to_num(9).tolist()) for day in days]


# --- shards that were damaged

def test_no_flipped_bit_is_silent(tmp_path):
    panel = write_panel(TABLE, tmp_path, SPEC)
    right = everything(panel)
    shard = panel.root/panel.shards[0]['file']
    good = shard.read_bytes()
    noticed = 0
    harmless = 0
    for bit in np.random.default_rng(0).choice(len(good)*8, 1000, replace=False):
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
        with pytest.raises(AtftError, match=shard.name):
            Panel(tmp_path)
        assert time.perf_counter()-start < 1


def test_damaged_shards_can_be_skipped_and_are_listed(tmp_path):
    next_year = TABLE.with_columns(pl.col('date')+timedelta(days=366))
    panel = write_panel(pl.concat([TABLE, next_year]), tmp_path, SPEC)
    bad = panel.root/panel.shards[1]['file']
    raw = bytearray(bad.read_bytes())
    raw[200] ^= 1
    bad.write_bytes(raw)
    with pytest.raises(AtftError, match='damaged.*--skip-damaged'):
        everything(Panel(tmp_path))
    rest = Panel(tmp_path, skip_damaged=True)
    assert len(rest.dates) == 60 and len(rest.skipped) == 1
    assert bad.name in rest.skipped[0] and f'{len(TABLE)} rows' in rest.skipped[0]
    assert '1 damaged shards skipped' in repr(rest) and len(batches(rest)) == 60
    run = RunSpec(data=str(tmp_path), skip_damaged=True, lookback=5, graph_lookback=5, min_obs=4,
                  purge=2, embargo=1)
    kept = setup(check_run(run))
    assert len(kept.panel.dates) == 60 and kept.split.test[-1] == rest.dates[-1]


# --- shards of others

def adopt(folder, *tables):
    folder.mkdir()
    for i, table in enumerate(tables):
        table.write_parquet(folder/f'{i}.parquet')
    return adopt_panel(folder, SPEC, cache=folder.parent/'cache')


FIRST = TABLE.filter(pl.col('date') < date(2024, 2, 1))
SECOND = TABLE.filter(pl.col('date') >= date(2024, 2, 1))
STAMP = pl.col('date').cast(pl.Datetime('us'))
VOLUME = pl.col('volume_z')
DRIFTS = dict(
    extra=(SECOND.with_columns(more=1.), "column 'more' is not in the first shard"),
    missing=(SECOND.drop('volume_z'), "column 'volume_z' is missing"),
    renamed=(SECOND.rename({'volume_z': 'volumez'}), "column 'volume_z' is missing"),
    float_width=(SECOND.with_columns(VOLUME.cast(pl.Float32)),
                 "column 'volume_z' is float, in the first shard 0.parquet it is double"),
    text=(SECOND.with_columns(VOLUME.cast(pl.String)), "column 'volume_z' is string"),
    stamp=(SECOND.with_columns(STAMP), 'date is timestamp'),
    zone=(SECOND.with_columns(STAMP.dt.replace_time_zone('Asia/Tokyo')), 'time zone Asia/Tokyo'))


@pytest.mark.parametrize('name', DRIFTS)
def test_a_drifting_schema_is_refused_by_name(tmp_path, name):
    drifted = DRIFTS[name][0]
    with pytest.raises(AtftError, match=DRIFTS[name][1]) as e:
        adopt(tmp_path/'in', FIRST, drifted)
    assert '1.parquet' in str(e.value) and '\n' not in str(e.value)


def test_another_order_of_columns_is_accepted(tmp_path):
    adopted = adopt(tmp_path/'in', FIRST, SECOND.select(reversed(SECOND.columns)))
    assert batches(adopted) == batches(write_panel(TABLE, tmp_path/'own', SPEC))


@pytest.mark.parametrize('order', [['date', 'code'], ['date'], ['code', 'date'], ['volume_z']])
def test_any_order_of_rows_gives_the_same_batches(tmp_path, order):
    (tmp_path/'in').mkdir()
    TABLE.sort(order).write_parquet(tmp_path/'in'/'0.parquet', row_group_size=40)
    panel = adopt_panel(tmp_path/'in', SPEC, cache=tmp_path/'cache')
    assert batches(panel) == batches(write_panel(TABLE, tmp_path/'own', SPEC))
    copied = 're-partitioned once: it is not sorted by date'
    assert panel.note.startswith('read in place' if order[0] == 'date' else copied)


def test_a_shard_without_statistics_is_read_all_the_same(tmp_path):
    (tmp_path/'in').mkdir()
    shard = tmp_path/'in'/'0.parquet'
    pq.write_table(TABLE.to_arrow(), shard, write_statistics=False, row_group_size=64)
    adopted = adopt_panel(tmp_path/'in', SPEC, tmp_path/'cache')
    assert batches(adopted) == batches(write_panel(TABLE, tmp_path/'own', SPEC))


def test_huge_row_groups_are_repartitioned(tmp_path):
    (tmp_path/'in').mkdir()
    TABLE.write_parquet(tmp_path/'in'/'0.parquet')
    panel = adopt_panel(tmp_path/'in', SPEC, tmp_path/'cache', most_rows=100)
    assert 'row groups of' in panel.note and len(batches(panel)) == 60


def test_a_new_shard_in_an_adopted_folder_needs_no_copy(tmp_path):
    one = adopt(tmp_path/'in', FIRST)
    SECOND.write_parquet(tmp_path/'in'/'1.parquet')
    two = adopt_panel(tmp_path/'in', SPEC, tmp_path/'cache')
    assert len(one.dates) < len(two.dates) == 60
    assert two.note == 'read in place' and not list(two.folder.glob('*.parquet'))


def test_duplicate_rows_are_named(tmp_path):
    twice = pl.concat([TABLE, TABLE.filter(pl.col('code') == 'C')[1:2]])
    with pytest.raises(AtftError, match='C has more than one row on 2024-01-02'):
        write_panel(twice, tmp_path/'own', SPEC)
    panel = adopt(tmp_path/'in', pl.concat([TABLE[:50], TABLE[49:]]))
    with pytest.raises(AtftError, match='has 2 rows on 2024'):
        batches(panel)


def test_a_folder_without_shards_an_empty_shard_and_an_empty_table(tmp_path):
    with pytest.raises(AtftError, match='no .parquet shards'):
        adopt(tmp_path/'none')
    with pytest.raises(AtftError, match='all 1 shards are empty'):
        adopt(tmp_path/'void', TABLE[:0])
    assert len(adopt(tmp_path/'some', FIRST, TABLE[:0], SECOND).dates) == 60
    with pytest.raises(AtftError, match='no rows'):
        write_panel(TABLE[:0], tmp_path/'own', SPEC)
    (tmp_path/'some'/'3.parquet').write_bytes(b'PAR1 not really')
    with pytest.raises(AtftError, match='3.parquet is cut off or not Parquet'):
        adopt_panel(tmp_path/'some', SPEC, tmp_path/'cache')


def test_floods_of_nan_and_inf_and_a_null_feature_and_a_code_seen_once(tmp_path):
    third = pl.int_range(pl.len()) % 3
    flood = pl.when(third == 0).then(float('inf')).when(third == 1).then(float('nan'))
    unknown = pl.lit(None, pl.Float64)
    odd = TABLE.with_columns(constant=unknown, volume_z=flood.otherwise('volume_z'))
    odd = pl.concat([odd, odd[100:101].with_columns(code=pl.lit('ONCE'))])
    panel = write_panel(odd, tmp_path, SPEC)
    scaler = OnlineRobustScaler().fit(panel, panel.dates)
    assert np.isfinite(scaler.center_).all() and (scaler.scale_ > 0).all()
    seen = list(ParquetStockIterableDataset(panel, lookback=9, scaler=scaler))
    assert sum('ONCE' in day.codes for day in seen) == 1
    for day in seen:
        assert (day.x.isfinite() | day.x.isnan()).all() and day.x[:, :, 1].isnan().all()
    assert any(day.x[:, -1, 0].isfinite().any() for day in seen)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 59), st.integers(0, 10))
def test_appended_days_give_the_panel_that_was_written_at_once(tmp_path_factory, cut, overlap):
    folder = tmp_path_factory.mktemp('append')
    days = TABLE['date'].unique().sort()
    first = days[max(0, cut-overlap)]
    replaced = pl.when(pl.col('date') >= first).then(0.).otherwise('volume_z')
    stale = TABLE.filter(pl.col('date') < days[cut]).with_columns(volume_z=replaced)
    short = write_panel(stale, folder/'a', SPEC)
    kept = [(short.root/s['file']).stat().st_mtime_ns for s in short.shards]
    grown = append_shard(short, TABLE.filter(pl.col('date') >= first))
    assert [(short.root/s['file']).stat().st_mtime_ns for s in short.shards] == kept
    whole = write_panel(TABLE, folder/'b', SPEC)
    assert batches(grown) == batches(whole) and grown.num_rows == whole.num_rows
    assert everything(grown).sort('date', 'code').equals(everything(whole))
    assert grown.scan().sort('date', 'code').collect().equals(whole.scan().collect())


# --- targets and specs

prices = st.sampled_from(atft.panel.PRICES)
targets = st.builds(Target, st.integers(1, 250), st.integers(0, 20), prices)


@given(targets)
def test_a_target_is_the_same_however_it_is_written(target):
    for written in (target, target.name, target.column, asdict(target)):
        assert as_target(written) == target
    assert target.reach == target.horizon + target.delay
    spec = PanelSpec(('gap',), (target,))
    assert spec.labels == (target,) and spec.reach == target.reach
    assert PanelSpec(**json.loads(json.dumps(asdict(spec)))) == spec
    plain = target == Target(target.horizon)
    assert spec.horizons == (target.horizon if plain else target.name,)


def test_a_target_with_a_name_of_its_own_survives_the_panel(tmp_path):
    spec = PanelSpec(('volume_z',), horizons=(1, Target(5, delay=2, name='mine')))
    panel = write_panel(TABLE.rename({'target_5d': 'target_mine'}), tmp_path, spec)
    assert panel.spec == spec
    assert panel.spec.target_names == ('1d', 'mine') and panel.spec.reach == 7
    assert len(batches(panel)) == 60


def test_a_panel_of_plain_horizons_is_written_as_ever(tmp_path):
    panel = write_panel(TABLE, tmp_path, SPEC)
    manifest = json.loads((tmp_path/'panel.json').read_text())
    columns = dict(date='date', code='code', ret='ret_1d')
    assert manifest['spec'] == dict(features=['volume_z', 'constant'], horizons=[1, 5], **columns)
    keys = ['version', 'spec', 'source', 'fingerprint', 'shards', 'dates', 'codes']
    assert list(manifest) == keys
    assert panel.fingerprint == manifest['fingerprint'] and panel.recipe == {}


@pytest.mark.parametrize('features, horizons, message', [
    ((), (1,), 'no features'),
    (('gap', 'gap'), (1,), "feature 'gap' is named twice"),
    (('gap', 'target_20d'), (1,), "'target_20d' is a target"),
    (('gap', 'target_mine'), (Target(5, name='mine'),), "'target_mine' is a target"),
    (('gap', 'date'), (1,), "'date' says which row"),
    (('gap',), (), 'no targets'),
    (('gap',), (1, '1d'), "target 'target_1d' is named twice"),
    (('gap',), (-1,), 'horizon=-1'),
    (('gap',), (dict(horizon=1, delay=-1),), 'delay=-1'),
    (('gap',), (dict(horizon=1, price='vwap'),), "price='vwap' is not known"),
    (('gap',), ('1 day',), "target '1 day' is not known")])
def test_a_spec_that_cannot_be_meant_is_one_line(features, horizons, message):
    with pytest.raises(AtftError, match=message) as e:
        PanelSpec(features, horizons)
    assert '\n' not in str(e.value)


# --- nothing is stale

def bars(folder, days=300):
    "A folder of OHLCV bars"
    rng = np.random.default_rng(0)
    close = 100*np.exp(np.cumsum(rng.normal(0, .02, (days, 5)), 0)).ravel()
    calendar = np.busday_offset('2020-01-01', np.arange(days), roll='forward')
    table = pl.DataFrame(dict(
        date=np.repeat(calendar.astype('datetime64[D]'), 5), code=np.tile(list('ABCDE'), days),
        open=close, high=close*1.01, low=close*.99, close=close, volume=np.full(len(close), 1e5)))
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    table.write_parquet(folder/'all.parquet')
    return folder


def made_long_ago(folder):
    "Digests are remembered only of files that were not written just now"
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))
    return folder


def test_a_feature_more_is_a_new_panel_and_unchanged_code_finds_the_old_one(tmp_path, monkeypatch):
    folder = bars(tmp_path/'bars')
    before = open_panel(folder, tmp_path/'cache')
    assert len(before.spec.features) == 25+5
    usual = atft.bars.ohlcv_features

    def one_more():
        return usual() | dict(doubled=2*pl.col('ret_1d'))

    monkeypatch.setattr(atft.bars, 'ohlcv_features', one_more)
    after = open_panel(folder, tmp_path/'cache')
    assert len(after.spec.features) == 26+5 and 'doubled' in after.scan().collect().columns
    assert after.recipe['data'] == before.recipe['data']
    assert after.recipe['code'] != before.recipe['code']
    assert open_panel(folder, tmp_path/'cache').folder == after.folder
    monkeypatch.undo()
    again = open_panel(folder, tmp_path/'cache')
    assert again.folder == before.folder and again.recipe == before.recipe


def test_a_changed_step_of_the_conversion_is_a_new_panel(tmp_path, monkeypatch):
    folder = bars(tmp_path/'bars')
    before = open_panel(folder, tmp_path/'cache')

    def repair_nothing(ohlcv):
        return ohlcv.select('date', 'code', *atft.bars.BARS).sort('code', 'date')

    monkeypatch.setattr(atft.bars, 'repair_bars', repair_nothing)
    assert open_panel(folder, tmp_path/'cache').folder != before.folder


def test_options_features_and_targets_are_part_of_the_recipe(tmp_path):
    folder = bars(tmp_path/'bars')
    calm = dict(calm=pl.col('ret_1d').rolling_std(5))
    calmer = dict(calm=pl.col('ret_1d').rolling_std(9))
    choices = [dict(), dict(scale='robust'), dict(horizons=(5, '5d_delay1', 'next_oc')),
               dict(features=calm), dict(features=calmer)]
    panels = [open_panel(folder, tmp_path/'cache', **choice) for choice in choices]
    assert len({panel.folder for panel in panels}) == 5
    assert len({panel.recipe['code'] for panel in panels}) == 5
    assert len({panel.recipe['data'] for panel in panels}) == 1
    assert panels[2].spec.targets == ('target_5d', 'target_5d_delay1', 'target_next_oc')
    assert panels[2].spec.reach == 6
    assert panels[3].spec.features[:-5] == ('calm',)


def test_targets_that_are_asked_for_add_columns_and_leave_the_usual_ones_alone(tmp_path):
    ohlcv = pl.read_parquet(bars(tmp_path/'bars')/'all.parquet')
    usual = atft.bars.panel_from_ohlcv(ohlcv).collect()
    names = [f'target_{h}d' for h in (1, 5, 10, 20)]
    delayed = [f'{name}_delay1' for name in names]
    assert usual.columns[-9:] == [*names, *delayed, 'target_next_oc']
    more = (1, 5, 10, 20, '5d_open', '2d_delay3')
    asked = atft.bars.panel_from_ohlcv(ohlcv, horizons=more).collect()
    assert asked.select(usual.columns).equals(usual)
    assert asked.columns[len(usual.columns):] == ['target_5d_open', 'target_2d_delay3']
    one = asked.filter(pl.col('code') == 'A')
    close = ohlcv.filter(pl.col('code') == 'A')['close']
    assert one['target_2d_delay3'][7] == close[12]/close[10]-1
    assert one['target_5d_open'][7] == close[12]/close[8]-1  # these bars open at their close


def test_bars_cannot_make_a_target_with_a_name_of_its_own(tmp_path):
    folder = bars(tmp_path/'bars')
    with pytest.raises(AtftError, match="target 'mine' has a name of its own"):
        open_panel(folder, tmp_path/'cache', horizons=(Target(5, name='mine'),))


@pytest.fixture
def opened():
    "Every file that Python opens, as long as the test runs"
    seen = []
    watching = [True]

    def note(event, args):
        if event == 'open' and watching:
            seen.append(str(args[0]))

    sys.addaudithook(note)
    yield seen
    watching.clear()  # a hook cannot be taken out


def test_bars_that_did_not_change_are_not_read_again(tmp_path, opened):
    folder = made_long_ago(bars(tmp_path/'bars'))
    raw = folder/'all.parquet'
    before = open_panel(folder, tmp_path/'cache')
    assert opened.count(str(raw)) == 1  # for its digest
    raw.write_bytes(b'x'*raw.stat().st_size)  # whoever reads it now, fails
    made_long_ago(folder)
    opened.clear()
    assert open_panel(folder, tmp_path/'cache').folder == before.folder
    assert str(raw) not in opened and str(before.folder/'panel.json') in opened


def test_bars_of_another_time_are_read_again(tmp_path):
    folder = made_long_ago(bars(tmp_path/'bars'))
    before = open_panel(folder, tmp_path/'cache')
    bars(folder, days=301)
    after = open_panel(folder, tmp_path/'cache')
    assert len(after.dates) == len(before.dates)+1
    assert after.recipe['data'] != before.recipe['data']
    assert after.recipe['code'] == before.recipe['code']


def test_adopted_shards_that_did_not_change_are_not_read_for_their_digest(tmp_path, monkeypatch):
    adopt(tmp_path/'in', FIRST, SECOND)
    made_long_ago(tmp_path/'in')
    before = adopt_panel(tmp_path/'in', SPEC, tmp_path/'cache')
    digests = []
    monkeypatch.setattr(hashlib, 'file_digest', lambda *read: digests.append(read))
    assert adopt_panel(tmp_path/'in', SPEC, tmp_path/'cache').folder == before.folder
    assert not digests


def test_a_changed_market_is_a_new_panel_unchanged_code_finds_the_old_one(tmp_path, monkeypatch):
    small = MarketSpec(codes=12, days=60, clusters=3)
    before = embedded_panel(small, tmp_path)
    assert embedded_panel(small, tmp_path).folder == before.folder
    monkeypatch.setitem(atft.market.DECAY, 'own', .9)
    slower = embedded_panel(small, tmp_path)
    monkeypatch.undo()
    usual = atft.market.synthetic_market
    monkeypatch.setattr(atft.market, 'synthetic_market', lambda spec: usual(spec, seed=7))
    replaced = embedded_panel(small, tmp_path)
    monkeypatch.undo()
    assert len({before.folder, slower.folder, replaced.folder}) == 3
    assert slower.fingerprint != before.fingerprint
    assert slower.recipe['data'] == before.recipe['data']
    assert slower.recipe['code'] != before.recipe['code']
    assert embedded_panel(small, tmp_path).folder == before.folder


# --- full disks, and many processes at once

LIMITED = '''
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
from atft.bars import open_panel
from atft.core import AtftError
try: print(len(open_panel(sys.argv[1], cache=sys.argv[2]).dates))
except AtftError as e: print('AtftError', e)
'''


def test_a_full_disk_leaves_no_half_written_cache(tmp_path):
    bars(tmp_path/'bars')

    def run(limit):
        command = [sys.executable, '-c', LIMITED, tmp_path/'bars', tmp_path/'cache', str(limit)]
        return subprocess.run(command, capture_output=True, text=True)

    full = run(20_000)
    assert full.stdout.startswith('AtftError cannot write') and full.stdout.count('\n') == 1, full
    for left in [path for path in (tmp_path/'cache').rglob('*') if path.is_file()]:
        note = json.loads(left.read_text())  # a digest of the bars, whole; and nothing else
        assert left.parent.name == 'digests' and len(note['sha256']) == 64
    assert run(10**9).stdout.strip() == '300'


def test_a_read_only_cache_is_one_line(tmp_path):
    bars(tmp_path/'bars')
    (tmp_path/'cache').write_text('a file where a folder should be made')
    with pytest.raises(AtftError, match='cannot write the cache'):
        open_panel(tmp_path/'bars', cache=tmp_path/'cache'/'below')


def build_and_read(folder, cache, seconds, results):
    "Open the panel again and again, building it where it is not there yet"
    end = time.monotonic()+seconds
    seen = set()
    while time.monotonic() < end:
        place = Path(cache)/str(int(time.monotonic()*2))  # every half second a new one, for all
        content = everything(open_panel(folder, cache=place)).write_csv()
        seen.add(hashlib.sha256(content.encode()).hexdigest())
    results.put(seen)


def finish(crowd, results, reports, patience):
    "What the processes of a crowd report; every one must end well"
    for process in crowd:
        process.start()
    seen = [results.get(timeout=patience) for _ in range(reports)]
    for process in crowd:
        process.join()
    assert all(p.exitcode == 0 for p in crowd), (seen, [p.exitcode for p in crowd])
    return seen


@pytest.mark.timeout(200)
def test_many_processes_build_one_cache_at_once(tmp_path, request, record_property):
    bars(tmp_path/'bars')
    context = multiprocessing.get_context('forkserver')
    seconds = float(request.config.getoption('--race-seconds'))
    results = context.Queue()
    job = (tmp_path/'bars', tmp_path/'cache', seconds, results)
    crowd = [context.Process(target=build_and_read, args=job) for _ in range(8)]
    seen = finish(crowd, results, 8, seconds+90)
    assert len(set.union(*seen)) == 1, seen
    assert not list((tmp_path/'cache').rglob('.*/panel.json'))  # nothing temporary is left
    built = len(list((tmp_path/'cache').iterdir()))
    record_property('caches built by 8 processes at once, each read equal', built)


def rewrite(folder, shift, seconds):
    "Write a panel of one content again and again into a folder that others write and read"
    end = time.monotonic()+seconds
    while time.monotonic() < end:
        write_panel(TABLE.with_columns(pl.col('volume_z')+shift), folder, SPEC)


def read_again(folder, seconds, results):
    "Read the panel again and again: its content, or one line that says a shard is gone"
    end = time.monotonic()+seconds
    seen = []
    while time.monotonic() < end:
        try:
            shift = everything(Panel(folder))['volume_z'].cast(pl.Float64)-TABLE['volume_z']
            seen.append(round(float(shift.mean())*1e3))
        except AtftError as e:
            seen.append('named' if 'year=2024' in str(e) else str(e))
    results.put((len(seen), set(seen)))


@pytest.mark.timeout(200)
def test_readers_never_see_a_mixture_of_two_writers(tmp_path, request, record_property):
    write_panel(TABLE, tmp_path, SPEC)
    context = multiprocessing.get_context('forkserver')
    seconds = float(request.config.getoption('--race-seconds'))
    results = context.Queue()
    jobs = [(tmp_path, float(shift), seconds) for shift in range(4)]
    writers = [context.Process(target=rewrite, args=job) for job in jobs]
    job = (tmp_path, seconds, results)
    readers = [context.Process(target=read_again, args=job) for _ in range(4)]
    seen = finish(writers+readers, results, 4, seconds+90)
    assert set.union(*(contents for _, contents in seen)) <= {0, 1000, 2000, 3000, 'named'}, seen
    assert min(reads for reads, _ in seen) > 10, seen
    reads = sum(reads for reads, _ in seen)
    record_property('reads beside 4 writers, none torn or wrong', reads)

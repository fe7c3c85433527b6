"A URL where a folder goes, against an S3 server on this machine; and paths that look like patterns"
import gzip
import json
import subprocess
import sys
import urllib.request
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from atft.adopted import adopt_panel
from atft.backtest import backtest
from atft.bars import bars_panel, open_panel
from atft.core import AtftError
from atft.door import make_panel
from atft.data import OnlineRobustScaler, ParquetStockIterableDataset, make_loader
from atft.intake import take
from atft.judge import evaluate
from atft.longer import append_bars
from atft.panel import Panel, PanelSpec, append_shard, write_panel
from atft.places import exists, name_of, place
from atft.predictions import load_predictions
from atft.shards import UNREAD
from atft.specs import RunSpec
from atft.targets import tiny_table

SPEC = PanelSpec(features=('ret_1d', 'volume_z', 'constant'), horizons=(1, 5))
WIDE = PanelSpec(features=tuple(f'f{i:02d}' for i in range(30)), horizons=(1, 5))
KEY = 'AKIAEXAMPLE'
SECRET = 'a%2Fverysecret'


class Store:
    "Buckets by URL, and the bytes they sent"
    def __init__(self, port):
        self.port = port
        self.options = f'?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1'
        for bucket in ('market', 'theirs'): self.ask(f'/{bucket}', 'PUT')

    def ask(self, path, method='GET'):
        request = urllib.request.Request(f'http://127.0.0.1:{self.port}{path}', method=method)
        with urllib.request.urlopen(request, timeout=10) as answer: return answer.read()

    @property
    def passed(self): return int(self.ask('/passed'))

    def url(self, path): return f's3://{KEY}:{SECRET}@{path}{self.options}'


@pytest.fixture(scope='session')
def store():
    "One server for all tests of a process"
    server = [sys.executable, Path(__file__).with_name('store.py')]
    with subprocess.Popen(server, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        try:
            yield Store(int(run.stdout.readline()))
        finally:
            run.kill()


def wide_table(days=250, codes=40):
    rng = np.random.default_rng(0)
    calendar = np.busday_offset('2020-01-01', np.arange(days), roll='forward').astype('datetime64[D]')
    columns = [*WIDE.floats]
    names = pl.DataFrame(dict(code=[f'{1000+i}' for i in range(codes)]))
    table = pl.DataFrame(dict(date=calendar)).join(names, how='cross')
    values = rng.normal(size=(len(table), len(columns))).astype(np.float32)
    return table.hstack(pl.DataFrame(values, schema=columns))


def same(a, b):
    if a.date != b.date or a.codes != b.codes: return False
    pairs = zip((a.x, a.y, a.returns), (b.x, b.y, b.returns))
    return all(torch.equal(mine.nan_to_num(9), theirs.nan_to_num(9)) for mine, theirs in pairs)


@pytest.fixture(scope='session')
def both(store, tmp_path_factory):
    "The same panel here and there"
    table = wide_table()
    here = write_panel(table, tmp_path_factory.mktemp('here')/'panel', WIDE, row_group=1_000)
    there = write_panel(table, store.url('market/wide'), WIDE, row_group=1_000)
    return here, there


def test_a_panel_is_written_to_a_url_as_to_a_folder(both):
    here, there = both
    assert there.fingerprint == here.fingerprint
    assert there.shards == here.shards
    assert (there.folder/'panel.json').read_text() == (here.folder/'panel.json').read_text()
    assert there.scan().collect().equals(here.scan().collect())


@pytest.mark.parametrize('workers', [0, 2])
def test_the_stream_of_a_url_is_that_of_a_folder(both, workers):
    def batches(panel, workers):
        scaler = OnlineRobustScaler().fit(panel, panel.dates[:150])
        stream = ParquetStockIterableDataset(
            panel, panel.dates[150:190], lookback=20, return_lookback=15, scaler=scaler,
            shuffle=True, span=16)
        return list(make_loader(stream, workers))

    here, there = both
    found = batches(there, workers)
    assert len(found) == 40
    assert all(map(same, batches(here, 0), found))


def test_ranges_pass_and_no_whole_file(store, both):
    here, there = both
    whole = sum(shard['bytes'] for shard in there.shards)
    before = store.passed
    panel = open_panel(str(store.url('market/wide')))
    opened = store.passed-before
    rows = panel.read(['code', 'f03'], panel.dates[100], panel.dates[100])
    one_column = store.passed-before-opened
    panel.read(list(WIDE.columns), panel.dates[100], panel.dates[100])
    one_day = store.passed-before-opened-one_column
    assert rows.equals(here.read(['code', 'f03'], panel.dates[100], panel.dates[100]))
    assert opened < .2*whole  # the manifest and the footers
    assert one_column < .1*whole
    assert one_day < .2*whole
    before = store.passed
    first = panel.scan().filter(pl.col('date') == panel.dates[3].item()).select('f00').collect()
    assert len(first) == 40
    assert store.passed-before < .25*whole


def test_shards_in_a_store_are_adopted_in_place(store, tmp_path):
    table = wide_table()
    half = len(table)//2
    folder = place(store.url('theirs/by day [1]'))
    near = tmp_path/'near {1}'
    near.mkdir()
    for number, part in enumerate((table[:half], table[half:])):
        name = f'part[{number}]?.parquet'
        part.write_parquet(near/name, row_group_size=400)
        (folder/name).upload(near/name)
    (near/'._part.parquet').write_bytes(b'a Mac was here')
    (folder/'._part.parquet').upload(near/'._part.parquet')
    before = store.passed
    panel = adopt_panel(folder, WIDE, cache=tmp_path/'cache')
    whole = sum(shard['bytes'] for shard in panel.shards)
    assert store.passed-before < .5*whole  # dates, codes and footers
    left_out = 'read in place; 1 other files left out: ._part.parquet'
    assert panel.note == left_out+'; leaks are not looked for in a store'
    here = adopt_panel(near, WIDE, cache=tmp_path/'cache')
    assert panel.scan().collect().equals(here.scan().collect())
    assert all(shard['sha256'].startswith(UNREAD) for shard in panel.shards)
    options = dict(lookback=10, return_lookback=10)
    streams = [ParquetStockIterableDataset(p, p.dates[40:80], **options) for p in (here, panel)]
    assert all(map(same, make_loader(streams[0]), make_loader(streams[1])))
    assert not list(adopt_panel(folder, WIDE, cache=tmp_path/'cache').skipped)
    kept = [p.read_text() for p in (tmp_path/'cache').rglob('*.json')]
    assert not any(KEY in text or 'verysecret' in text for text in kept)


def put_by_code(folder, table, tmp_path):
    "Shards that are not sorted by day, into a store"
    for code, part in table.group_by('code'):
        part.write_parquet(tmp_path/'part.parquet')
        (folder/f'{code[0]}.parquet').upload(tmp_path/'part.parquet')


def test_unsorted_shards_in_a_store_become_a_sorted_copy(store, tmp_path):
    table = tiny_table()
    folder = place(store.url('theirs/by code'))
    put_by_code(folder, table, tmp_path)
    panel = adopt_panel(folder, SPEC, cache=tmp_path/'cache')
    assert 're-partitioned once' in panel.note
    whole = write_panel(table, tmp_path/'whole', SPEC)
    assert panel.scan().collect().equals(whole.scan().collect())


def test_a_panel_in_a_store_grows(store, tmp_path):
    longer = tiny_table(days=66)
    day = pl.col('date')
    last = sorted(longer['date'].unique())[49]
    start = write_panel(longer.filter(day <= last), store.url('market/grows'), SPEC)
    grown = append_shard(start, longer.filter(day > last))
    whole = write_panel(longer, tmp_path/'whole', SPEC)
    assert grown.scan().sort('date', 'code').collect().equals(whole.scan().collect())
    write_panel(longer, store.url('market/grows'), SPEC)  # replaced: the old shards go
    names = sorted(p.name for p in place(store.url('market/grows')).iterdir())
    assert names == sorted([s['file'] for s in whole.shards]+['panel.json'])


def test_a_changed_or_damaged_shard_in_a_store_is_noticed(store, tmp_path):
    panel = write_panel(tiny_table(), store.url('market/damaged'), SPEC)
    shard = panel.root/panel.shards[0]['file']
    content = shard.read_bytes()
    (tmp_path/'bad').write_bytes(content[:-100])
    shard.upload(tmp_path/'bad')
    with pytest.raises(AtftError, match='instead of'): Panel(panel.folder)
    (tmp_path/'bad').write_bytes(content[:500]+bytes(200)+content[700:])
    shard.upload(tmp_path/'bad')
    opened = Panel(panel.folder)
    with pytest.raises(AtftError, match='is damaged in row group 0'):
        opened.read(list(SPEC.columns), opened.dates[0], opened.dates[-1])
    with pytest.raises(AtftError, match='every shard is damaged'):
        Panel(panel.folder, skip_damaged=True)


def refusal(action):
    with pytest.raises(AtftError) as caught: action()
    text = str(caught.value)
    assert '\n' not in text
    assert KEY not in text and 'verysecret' not in text
    return text


def test_what_a_store_refuses_is_one_line_without_credentials(store, tmp_path):
    table = tiny_table()
    assert 'no bucket nowhere' in refusal(lambda: Panel(store.url('nowhere/panel')))
    assert 'no bucket nowhere' in refusal(lambda: open_panel(store.url('nowhere/panel')))
    assert 'bucket does not exist' in refusal(lambda: write_panel(table, store.url('nowhere/a'), SPEC))
    assert 'does not exist; check' in refusal(lambda: Panel(store.url('market/none')))
    assert 'no permission' in refusal(lambda: Panel(store.url('forbidden/panel')))
    put_by_code(place(store.url('theirs/refused')), table, tmp_path)
    write_panel(table, store.url('market/refused'), SPEC)
    closed = store.url('market/refused').replace(str(store.port), '1')
    assert 'no answer from the store' in refusal(lambda: Panel(closed))
    assert 'option of the URL' in refusal(lambda: Panel(store.url('market/refused')+'&wrong=1'))
    assert 'no store that pyarrow' in refusal(lambda: Panel('ftp://there/panel'))
    assert 'no panel.json' in refusal(lambda: Panel(store.url('market')))
    assert 'kept on this machine' in refusal(
        lambda: adopt_panel(store.url('theirs/refused'), SPEC, cache=store.url('market/cache')))


def test_a_url_is_named_without_its_credentials(store, both):
    url = store.url('market/wide')
    assert exists(url) and not exists(store.url('market/none'))
    assert name_of(url) == f's3://market/wide{store.options}'
    assert name_of(Path('runs/a')) == 'runs/a'
    there = both[1]
    for text in (str(there.folder), repr(there.folder), repr(there), json.dumps(str(there.root))):
        assert KEY not in text and 'verysecret' not in text
    assert place(Path(url)) == place(url)
    assert place(str(there.folder)) == there.folder  # what was given is remembered


@pytest.mark.parametrize('name', ['a[1]', '*', 'what?', '{a,b}', 'a b#%20', '[!x]*', '~', 'ü'])
def test_every_path_is_a_path(tmp_path, name):
    for other in ('a1', 'a', 'x'): (tmp_path/other).mkdir()
    table = tiny_table()
    whole = write_panel(table, tmp_path/name/name, SPEC)
    assert whole.scan().collect().equals(write_panel(table, tmp_path/'plain', SPEC).scan().collect())
    shards = tmp_path/f'{name} shards'
    shards.mkdir()
    for code, part in table.group_by('code'): part.write_parquet(shards/f'{name}{code[0]}.parquet')
    copied = adopt_panel(shards, SPEC, cache=tmp_path/f'cache {name}')
    assert copied.scan().collect().equals(whole.scan().collect())
    last = table['date'].unique().sort()[40]
    cut = write_panel(table.filter(pl.col('date') <= last), tmp_path/name/'cut', SPEC)
    grown = append_shard(cut, table.filter(pl.col('date') > last))
    assert grown.scan().collect().equals(whole.scan().collect())


# Tables of others -------------------------------------------------------------------------------

def plain_bars(codes=3, days=30, more=()):
    rng = np.random.default_rng(1)
    calendar = np.busday_offset('2020-01-01', np.arange(days), roll='forward').astype('datetime64[D]')
    names = pl.DataFrame(dict(code=[f'{i:04d}' for i in range(codes)]))
    table = names.join(pl.DataFrame(dict(date=calendar)), how='cross')
    close = 100*np.exp(rng.normal(0, .01, (codes, days)).cumsum(1)).reshape(-1)
    rows = dict(open=close, high=close*1.01, low=close*.99, close=close, volume=close.round()+1)
    return table.with_columns(**rows, **{c: rng.normal(size=len(table)) for c in more})


def upload(folder, place_there):
    "Every file of a folder into a store"
    for file in folder.rglob('*'):
        if file.is_file(): (place_there/str(file.relative_to(folder))).upload(file)


def hive(folder, table):
    for (month,), part in table.group_by(pl.col('date').dt.month()):
        home = folder/f'month={month}'/'deep er'
        home.mkdir(parents=True)
        part.write_parquet(home/'bars[1].parquet')
    (folder/'notes.txt').write_text('no table')
    (folder/'month=1'/'._bars.parquet').write_bytes(b'a Mac was here')


def csv_by_code(folder, table):
    for (code,), part in table.group_by('code'):
        part.drop('code').write_csv(folder/f'{code}.csv')


def csv_gz(folder, table):
    with gzip.open(folder/'bars.csv.gz', 'wb') as file: table.write_csv(file)


def feather(folder, table): table.write_ipc(folder/'bars.feather')
def stream(folder, table): table.write_ipc_stream(folder/'bars.arrow')
def large(folder, table):
    kinds = dict(code=pl.Categorical, close=pl.Decimal(18, 4), volume=pl.Int64)
    kinds['date'] = pl.Datetime('ns', 'Asia/Tokyo')
    table = table.with_columns(pl.col('date').cast(pl.Datetime('ns')).dt.replace_time_zone('Asia/Tokyo'))
    table.with_columns(close=pl.col('close').round(2)).cast(kinds).write_parquet(folder/'a.pq')


@pytest.mark.parametrize('write', [hive, csv_by_code, csv_gz, feather, stream, large])
def test_a_folder_of_tables_in_a_store_is_read_as_on_a_disk(store, tmp_path, write):
    write(tmp_path, plain_bars())
    there = place(store.url(f'theirs/tables {write.__name__}'))
    upload(tmp_path, there)
    here = take(tmp_path)
    found = take(str(there))  # the URL as it is shown, its credentials are known
    assert found.table.collect().equals(here.table.collect())
    assert (found.counts, len(found.files)) == (here.counts, len(here.files))
    assert [file.relative_to(there) for file in found.files] == [
        file.relative_to(tmp_path) for file in here.files]
    if len(here.files) == 1: assert take(found.files[0]).table.collect().equals(here.table.collect())


def test_of_a_wide_table_in_a_store_the_wanted_columns_pass_once(store, tmp_path):
    table = plain_bars(20, 200, [f'more{i}' for i in range(40)])
    table.write_parquet(tmp_path/'wide.parquet')
    file = place(store.url('theirs/wide.parquet'))
    file.upload(tmp_path/'wide.parquet')
    before = store.passed
    taken = take(file)
    assert taken.table.collect().equals(table.select(taken.table.collect_schema().names()))
    assert store.passed-before < .35*file.stat().st_size


def test_a_panel_of_bars_in_a_store_may_lie_in_a_store(store, tmp_path, capsys):
    bars = plain_bars(4, 80)
    day = pl.col('date')
    cut = bars['date'].unique().sort()[69]
    kept = dict(universe=pl.DataFrame(dict(code=['0000', '0001', '0002'], first=[date(2019, 1, 1)]*3,
                                           last=[None]*3), schema_overrides=dict(last=pl.Date)),
                sectors=pl.DataFrame(dict(code=['0000', '0001'], sector=['banks', 'steel'])),
                join=pl.DataFrame(dict(code=['0000']*2, said=[date(2020, 1, 9), date(2020, 3, 9)],
                                       profit=[1., 2.])))
    (tmp_path/'bars').mkdir()
    hive(tmp_path/'bars', bars.filter(day <= cut))
    for name, table in kept.items(): table.write_csv(tmp_path/f'{name}.csv')
    upload(tmp_path, place(store.url('theirs/own')))

    def made(where, out):
        tables = {name: f'{where[0]}/{name}.csv{where[1]}' for name in kept}
        return bars_panel(f'{where[0]}/bars{where[1]}', tmp_path/'cache', out=out, as_of='said', **tables)

    here = made((tmp_path, ''), tmp_path/'panel')
    url = store.url('theirs/own').partition('?')
    there = made((url[0], '?'+url[2]), store.url('market/of bars'))
    assert there.scan().collect().equals(here.scan().collect())
    assert there.findings == here.findings
    before = store.passed
    again = made((url[0], '?'+url[2]), store.url('market/of bars'))
    assert again.fingerprint == there.fingerprint
    assert store.passed-before < 150_000  # footers and ends: nothing is made again
    new = bars.filter(day > cut)
    new.write_csv(tmp_path/'new.csv')
    file = place(store.url('theirs/new.csv'))
    file.upload(tmp_path/'new.csv')
    longer = append_bars(there, file)
    assert longer.scan().collect().equals(append_bars(here, new).scan().collect())
    texts = [p.read_text() for p in (tmp_path/'cache').rglob('*.json')]
    texts += [(longer.folder/'panel.json').read_text(), capsys.readouterr().err]
    assert not any(KEY in text or 'verysecret' in text for text in texts)


def test_changed_bars_in_a_store_are_other_bars(store, tmp_path):
    file = place(store.url('theirs/changing.csv'))
    bars = plain_bars()
    bars.write_csv(tmp_path/'changing.csv')
    file.upload(tmp_path/'changing.csv')
    first = bars_panel(file, tmp_path)
    assert open_panel(store.url('theirs/changing.csv'), tmp_path).folder == first.folder
    bars.with_columns(close=pl.col('close')*1.001).write_csv(tmp_path/'changing.csv')
    file.upload(tmp_path/'changing.csv')
    assert bars_panel(file, tmp_path).folder != first.folder


def test_predictions_and_prices_in_a_store_are_judged(store, tmp_path):
    rows = plain_bars(8, 40).select('date', 'code', 'close', horizon=1)
    ahead = pl.col('close').shift(-1).over('code')/pl.col('close')-1
    rows = rows.with_columns(target=ahead, prediction=pl.col('close').sin())
    rows.drop('close').write_parquet(tmp_path/'p.parquet')
    rows.select('date', 'code', 'close').write_csv(tmp_path/'prices.csv')
    for name in ('p.parquet', 'prices.csv'): place(store.url(f'theirs/{name}')).upload(tmp_path/name)
    url = store.url('theirs/p.parquet')
    here = load_predictions(tmp_path/'p.parquet')
    assert load_predictions(url).equals(here)
    assert evaluate(url, draws=0).equals(evaluate(here, draws=0))
    how = dict(top=2, entry='close', impact=0)
    found = backtest(url, prices=store.url('theirs/prices.csv'), **how)
    assert found.equals(backtest(here, prices=tmp_path/'prices.csv', **how))


def test_what_is_wrong_with_tables_in_a_store_is_one_line(store, tmp_path):
    table = plain_bars()
    folder = place(store.url('theirs/wrong'))
    table.write_parquet(tmp_path/'whole.parquet', row_group_size=20)
    content = (tmp_path/'whole.parquet').read_bytes()
    files = {'cut.parquet': content[:-9], 'empty.csv': b'', 'text.xyz': b'what is this?',
             'short.csv': b'date,code,close\n2020-01-01,A,1\n2020-01-02,00',
             'page.parquet': content[:40]+bytes(900)+content[940:], 'not.feather': b'ARROW1 no'}
    for name, content in files.items():
        (tmp_path/'one').write_bytes(content)
        (folder/name).upload(tmp_path/'one')
    def refused(path): return refusal(lambda: take(store.url(path), ('close',)))
    assert 'cut.parquet' in refused('theirs/wrong/cut.parquet')
    assert 'is cut off or not Parquet' in refused('theirs/wrong/cut.parquet')
    assert 'is an empty file' in refused('theirs/wrong/empty.csv')
    assert 'is no table that is known' in refused('theirs/wrong/text.xyz')
    assert 'its last row is short' in refused('theirs/wrong/short.csv')
    assert 'page.parquet' in refused('theirs/wrong/page.parquet')
    assert 'is cut off or not Arrow' in refused('theirs/wrong/not.feather')
    assert 'two kinds of tables' in refused('theirs/wrong')
    assert 'does not exist; check the path' in refused('theirs/nothing')
    assert 'no bucket nowhere' in refused('nowhere/bars.parquet')
    assert 'no permission' in refused('forbidden/bars.parquet')
    assert 'no bucket nowhere' in refusal(lambda: bars_panel(store.url('nowhere/bars'), tmp_path))
    table.rename(dict(close='Close')).write_parquet(tmp_path/'one')
    (folder/'named.parquet').upload(tmp_path/'one')
    assert '--columns Close=close' in refused('theirs/wrong/named.parquet')


def test_the_command_line_takes_urls_and_writes_to_one(store, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain_bars(3, 60).write_parquet('bars.parquet')
    pl.DataFrame(dict(code=['0000', '0001'], sector=['banks', 'steel'])).write_csv('sectors.csv')
    for name in ('bars.parquet', 'sectors.csv'): place(store.url(f'theirs/typed/{name}')).upload(name)
    urls = [store.url(f'theirs/typed/{name}') for name in ('bars.parquet', 'sectors.csv')]
    typed = make_panel([urls[0], '--out', store.url('market/typed'), '--sectors', urls[1]])
    here = make_panel(['bars.parquet', '--out', 'panel', '--sectors', 'sectors.csv'])
    assert typed.scan().collect().equals(here.scan().collect())
    said = json.dumps([RunSpec(data=urls[0], sectors=urls[1]).door.sectors, capsys.readouterr().out])
    assert KEY not in said and 'verysecret' not in said

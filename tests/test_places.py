"A URL where a folder goes, against an S3 server on this machine; and paths that look like patterns"
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from atft.adopted import adopt_panel
from atft.bars import open_panel
from atft.core import AtftError
from atft.data import OnlineRobustScaler, ParquetStockIterableDataset, make_loader
from atft.panel import Panel, PanelSpec, append_shard, write_panel
from atft.places import exists, name_of, place
from atft.shards import UNREAD
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


@pytest.fixture(scope='module')
def store():
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


@pytest.fixture(scope='module')
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
            panel, lookback=20, return_lookback=15, scaler=scaler, shuffle=True, span=64)
        return list(make_loader(stream, workers))

    here, there = both
    found = batches(there, workers)
    assert len(found) == len(here.dates)
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
    assert panel.note == 'read in place; 1 other files left out: ._part.parquet'
    here = adopt_panel(near, WIDE, cache=tmp_path/'cache')
    assert panel.scan().collect().equals(here.scan().collect())
    assert all(shard['sha256'].startswith(UNREAD) for shard in panel.shards)
    options = dict(lookback=10, return_lookback=10)
    streams = [ParquetStockIterableDataset(p, p.dates[40:80], **options) for p in (here, panel)]
    assert all(map(same, make_loader(streams[0]), make_loader(streams[1])))
    assert not list(adopt_panel(folder, WIDE, cache=tmp_path/'cache').skipped)
    kept = [p.read_text() for p in (tmp_path/'cache').rglob('*.json')]
    assert not any(KEY in text or 'verysecret' in text for text in kept)


def test_unsorted_shards_in_a_store_become_a_sorted_copy(store, tmp_path):
    table = tiny_table()
    folder = place(store.url('theirs/by code'))
    for code, part in table.group_by('code'):
        part.write_parquet(tmp_path/'part.parquet')
        (folder/f'{code[0]}.parquet').upload(tmp_path/'part.parquet')
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
    closed = store.url('market/wide').replace(str(store.port), '1')
    assert 'no answer from the store' in refusal(lambda: Panel(closed))
    assert 'option of the URL' in refusal(lambda: Panel(store.url('market/wide')+'&wrong=1'))
    assert 'no store that pyarrow' in refusal(lambda: Panel('ftp://there/panel'))
    assert 'no panel.json' in refusal(lambda: Panel(store.url('market')))
    assert 'kept on this machine' in refusal(
        lambda: adopt_panel(store.url('theirs/by code'), SPEC, cache=store.url('market/cache')))


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

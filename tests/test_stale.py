"Nothing is stale: what code made is made again when the code changed, and found again when not"
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from conftest import ROOT
from polars.testing import assert_frame_equal

import atft.bars
import atft.graph
import atft.market
from atft.bars import ohlcv_features, panel_from_ohlcv
from atft.graph import correlation_knn
from atft.market import MarketSpec, embedded_panel, synthetic_market
from atft.panel import Panel
from atft.phases import Callback, RunFolder, RunSpec, run_phases

BIN = Path(sys.executable).parent
TINY = dict(max_epochs=1, hidden=8, lookback=10, embargo=5, pictures=False)


@pytest.fixture
def bars(tmp_path, monkeypatch):
    "A folder of bars in a place of its own, with its own cache"
    monkeypatch.chdir(tmp_path)
    folder = tmp_path/'bars'
    folder.mkdir()
    table = synthetic_market(codes=12, days=220, clusters=2).ohlcv
    half = table['date'].unique().sort()[110]
    table.filter(pl.col('date') < half).write_parquet(folder/'a.parquet')
    table.filter(pl.col('date') >= half).write_parquet(folder/'b.parquet')
    for shard in folder.iterdir(): os.utime(shard, (1e9, 1e9))  # long ago: nobody writes it now
    return folder


class Opened(Exception):
    "All is open and `config.json` is written: what this page asks is answered"


class Stop(Callback):
    "Remembers the run's setup and trains nothing"
    def run_begins(self, setup):
        self.setup = setup
        raise Opened


def begin(bars, name):
    "Begin a run on some bars in a folder of this name; its setup and what config.json says"
    run = RunSpec(data=str(bars), run_dir=f'runs/{name}', phase='0-1', **TINY)
    stop = Stop()
    with pytest.raises(Opened): run_phases(run, show=False, callbacks=[stop])
    return stop.setup, RunFolder(run.run_dir).read_config()


def made_panels(bars):
    "The panels that were made of the bars"
    return sorted(Path('runs/cache').resolve().glob(f'{bars.name}-*'))


def make_unreadable(bars):
    "Zeros of the same size and time: whoever reads a byte of a shard can do nothing with it"
    for shard in bars.iterdir():
        stat = shard.stat()
        shard.write_bytes(bytes(stat.st_size))
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_feature_more_is_in_the_panel_of_the_next_run(bars, monkeypatch):
    def with_another():
        last = pl.col('last')
        return ohlcv_features() | dict(to_low_60d=last/last.rolling_min(60, min_samples=45))

    before, old = begin(bars, 'before')
    with monkeypatch.context() as patch:
        patch.setattr(atft.bars, 'ohlcv_features', with_another)
        after, new = begin(bars, 'after')
    assert len(before.panel.spec.features) == 25+5
    before_steps = before.panel.spec.features[:25]
    assert after.panel.spec.features[:26] == (*before_steps, 'to_low_60d')
    assert after.network_spec.features == 26+5
    assert old['keys']['panel']['data'] == new['keys']['panel']['data']
    assert old['keys']['panel']['code'] != new['keys']['panel']['code']
    assert len(made_panels(bars)) == 2  # and nobody deleted anything


def test_unchanged_code_finds_its_panel_and_reads_no_bar(bars):
    first, old = begin(bars, 'first')
    make_unreadable(bars)
    second, new = begin(bars, 'second')
    assert second.panel.folder == first.panel.folder
    assert made_panels(bars) == [first.panel.folder]
    assert new['keys'] == old['keys']


def test_changed_bars_make_another_panel_by_the_same_code(bars):
    first, old = begin(bars, 'first')
    shard = bars/'b.parquet'
    prices = pl.col('open', 'high', 'low', 'close')
    pl.read_parquet(shard).with_columns(prices*1.5).write_parquet(shard)
    second, new = begin(bars, 'second')
    assert second.panel.fingerprint != first.panel.fingerprint
    assert old['keys']['panel']['data'] != new['keys']['panel']['data']
    assert old['keys']['panel']['code'] == new['keys']['panel']['code']


def thinned_to(nth, ours):
    "A rule that keeps one pair of each `nth` that ours has"
    def thinned(*args, **options):
        edge_index, edge_attr = ours(*args, **options)
        low = edge_index.amin(0)
        high = edge_index.amax(0)
        kept = (low+high) % nth == 0
        return edge_index[:, kept], edge_attr[kept]

    return thinned


def edges(setup):
    "The edges of the validation days"
    return [setup.graphs(day)[0] for day in setup.days('valid')]


def test_another_graph_rule_gives_other_graphs_in_the_next_run(bars, monkeypatch):
    first, old = begin(bars, 'first')
    ours = edges(first)
    assert first.graphs.misses == len(ours) and not first.graphs.hits
    with monkeypatch.context() as patch:
        patch.setattr(atft.graph, 'correlation_knn', thinned_to(2, correlation_knn))
        second, new = begin(bars, 'second')
        halves = edges(second)
    assert second.graphs.misses == len(ours) and not second.graphs.hits
    counts = [sum(days.shape[1] for days in found) for found in (ours, halves)]
    assert counts[0] > counts[1] > 0
    assert old['keys']['graph']['code'] != new['keys']['graph']['code']
    again, same = begin(bars, 'again')
    assert all(map(torch.equal, ours, edges(again)))
    assert again.graphs.hits == len(ours) and not again.graphs.misses
    assert same['keys'] == old['keys']


def test_two_rules_of_ones_own_are_told_apart(bars, monkeypatch):
    "Both were written outside of the package, by functions of the same name"
    keys = []
    for nth in (2, 3):
        monkeypatch.setattr(atft.graph, 'correlation_knn', thinned_to(nth, correlation_knn))
        setup, config = begin(bars, f'every-{nth}')
        assert len(edges(setup)) == setup.graphs.misses
        keys.append(config['keys']['graph'])
    assert keys[0]['code'] != keys[1]['code']


SMALL = MarketSpec(codes=12, days=90, clusters=3)


def test_another_generator_gives_another_embedded_panel(tmp_path, monkeypatch):
    def louder(spec=None, **changes):
        market = synthetic_market(spec, **changes)
        panel = market.panel.with_columns(pl.col('turnover')*2)
        return replace(market, panel=panel)

    before = embedded_panel(SMALL, tmp_path)
    monkeypatch.setattr(atft.market, 'synthetic_market', louder)
    after = embedded_panel(SMALL, tmp_path)
    monkeypatch.undo()
    again = embedded_panel(SMALL, tmp_path)
    assert after.folder != before.folder == again.folder
    assert after.recipe['data'] == before.recipe['data']
    assert after.recipe['code'] != before.recipe['code']
    told = [panel.scan().collect()['turnover'] for panel in (before, after)]
    assert (2*told[0] == told[1]).all()


def test_another_step_deep_in_the_generator_does_too(tmp_path, monkeypatch):
    def all_listed(rng, spec): return np.ones((spec.days, spec.codes), bool)

    before = embedded_panel(SMALL, tmp_path)
    monkeypatch.setattr(atft.market, 'listed', all_listed)
    after = embedded_panel(SMALL, tmp_path)
    assert after.folder != before.folder
    rows = [len(panel.scan().collect()) for panel in (before, after)]
    assert rows[0] < rows[1] == SMALL.days*SMALL.codes


def test_config_names_both_halves_of_the_keys(bars):
    setup, config = begin(bars, 'run')
    keys = config['keys']
    for made in ('panel', 'graph'):
        for half in ('data', 'code'):
            assert re.fullmatch(r'[0-9a-f]{12,}', keys[made][half]), (made, half, keys[made])
    assert keys['panel'] == setup.panel.recipe
    assert keys['graph']['data'] == setup.panel.fingerprint
    assert keys['graph']['code'] == setup.graphs.code
    assert keys['graph']['name'] == 'CorrelationGraph'
    assert keys['graph']['spec']['k'] == 20


OLD_FORMULA = 'spread = (high-low)/close'
NEW_FORMULA = 'spread = (low-high)/close'


@pytest.fixture
def project(tmp_path):
    "A copy of the notebooks and of the package, as somebody has it who works on it"
    root = tmp_path/'project'
    shutil.copytree(ROOT/'atft', root/'atft')
    (root/'nbs').mkdir()
    for path in (ROOT/'nbs').glob('*.ipynb'): shutil.copy(path, root/'nbs')
    for name in ('settings.ini', 'setup.py', 'README.md'): shutil.copy(ROOT/name, root)
    return root


def change_the_formula(root):
    "In the notebook, as in JupyterLab"
    path = root/'nbs/00p_features.ipynb'
    notebook = json.loads(path.read_text())
    changed = 0
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        is_formula = source.startswith('#| export') and OLD_FORMULA in source
        if is_formula: cell['source'] = source.replace(OLD_FORMULA, NEW_FORMULA)
        changed += is_formula
    assert changed == 1
    path.write_text(json.dumps(notebook, indent=1))


def as_old_as_ours(root):
    "Give modules that the export left as they were their time again: numba compiles by it"
    for path in (root/'atft').glob('*.py'):
        ours = ROOT/'atft'/path.name
        if path.read_bytes() == ours.read_bytes(): shutil.copystat(ours, path)


def typed_in(root, *words):
    "A command typed in a project, whose package is the one that is loaded there"
    environment = os.environ | dict(PYTHONPATH=str(root))
    return subprocess.run(list(map(str, words)), cwd=root, env=environment, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL)


def test_a_formula_changed_in_a_notebook_is_exported_or_nothing_trains(bars, project, tmp_path):
    run = tmp_path/'run'
    given = dict(phase=0, data=bars, run_dir=run, report_dir=tmp_path) | TINY
    words = [word for name, value in given.items() for word in ('-p', name, value)]
    command = [BIN/'papermill', 'nbs/03_phases.ipynb', tmp_path/'out.ipynb', *words]
    change_the_formula(project)
    refused = typed_in(project, *command)
    last = refused.stderr.strip().splitlines()[-1]
    assert refused.returncode == 1 and 'Traceback' not in refused.stderr
    assert last.startswith('AtftError: nbs/00p_features.ipynb differs from the exported package')
    assert last.endswith('run nbdev_export first')
    assert not run.exists() and not (project/'runs/cache').exists()

    exported = typed_in(project, BIN/'nbdev_export')
    assert exported.returncode == 0, exported.stderr
    as_old_as_ours(project)
    trained = typed_in(project, *command)
    assert trained.returncode == 0, trained.stderr[-2000:]
    panel = Panel(RunFolder(run).read_config()['data']['folder'])
    assert panel.folder.is_relative_to(project)
    high = pl.col('high')
    low = pl.col('low')
    formula = ohlcv_features() | dict(range=(low-high)/pl.col('close'))
    table = pl.scan_parquet(bars/'*.parquet')
    wanted = panel_from_ohlcv(table, features=formula).select('date', 'code', 'range').collect()
    found = panel.scan().select('date', 'code', 'range').sort('date', 'code').collect()
    assert_frame_equal(found, wanted.with_columns(pl.col('range').cast(pl.Float32)))
    ours = panel_from_ohlcv(table).select('range').collect().to_series()
    assert (found['range']-ours).abs().max() > 1  # ranks turned round

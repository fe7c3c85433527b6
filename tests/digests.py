"""What the code computes, as digests: `python tests/digests.py write FILE` before a change, and
`python tests/digests.py compare FILE` after it.

Two small runs of all phases, one on an embedded market and one on a folder of bars with flaws in
it. The digests are of bits, so they belong to one machine and one set of packages: make them with
the old tree and the new one side by side. Names are looked up in every module, so that a thing may
move from one to another; the names of targets, which old tables lack, are not compared."""
import hashlib
import importlib
import json
import pkgutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import polars as pl
import torch

import atft


def modules():
    "Every module of the package"
    names = [m.name for m in pkgutil.iter_modules(atft.__path__)]
    return [importlib.import_module(f'atft.{n}') for n in names if not n.startswith('_')]


MODULES = modules()


def product(name):
    "The package's object of this name, whichever module holds it"
    found = [getattr(m, name) for m in MODULES if hasattr(m, name)]
    if not found: raise SystemExit(f'the package has no {name}')
    return found[0]


def digest_of_table(total, table):
    for column in sorted(table.columns):
        total.update(column.encode() + str(table.schema[column]).encode())
        total.update(repr(table[column].to_list()).encode())


def digest_of_array(total, value):
    if isinstance(value, torch.Tensor): value = value.detach().cpu().numpy()
    array = np.asarray(value)
    total.update(str(array.dtype).encode() + str(array.shape).encode())
    total.update(np.ascontiguousarray(array).tobytes())


def digest(*values):
    "SHA-256 over arrays, tensors and tables, by value"
    total = hashlib.sha256()
    for value in values:
        is_table = isinstance(value, pl.DataFrame)
        add = digest_of_table if is_table else digest_of_array
        add(total, value)
    return total.hexdigest()[:16]


def digest_of_text(text): return hashlib.sha256(text.encode()).hexdigest()[:16]


def every(n, first):
    "One row of each n"
    return pl.col('row') % n == first


def flawed_bars(folder):
    "Bars of a small market, in two shards, with gaps, zeros, swaps and repeats"
    bars = product('synthetic_market')(codes=24, days=420, clusters=3).ohlcv.with_row_index('row')
    flawed = bars.with_columns(
        high=pl.when(every(97, 3)).then(pl.col('low')).otherwise('high'),
        low=pl.when(every(97, 3)).then(pl.col('high')).otherwise('low'),
        open=pl.when(every(131, 5)).then(0.).otherwise('open'),
        close=pl.when(every(151, 7)).then(None).otherwise('close'),
        volume=pl.when(every(61, 9)).then(0.).otherwise('volume')).drop('row')
    folder.mkdir()
    half = flawed['date'].unique().sort()[210]
    flawed.filter(pl.col('date') < half).write_parquet(folder/'a.parquet')
    flawed.filter(pl.col('date') >= half).write_parquet(folder/'b.parquet')
    return folder


TABLE = ['date', 'code', 'horizon', 'prediction', 'target']
NAMES = dict(baseline='0', gat='1', graph='1', fan='2', san='3', finetune='4')


def of_panel(panel):
    table = panel.scan().collect().sort('date', 'code')
    return dict(panel=digest(table), rows=len(table), columns=len(table.columns))


def by_content(array): return array.shape, array.tobytes()


def of_weights(path):
    "The weights of a checkpoint, whatever they are called"
    state = torch.load(path, weights_only=True)['model']
    arrays = [v.numpy() for v in state.values() if isinstance(v, torch.Tensor)]
    return digest(*sorted(arrays, key=by_content))


def of_intervals(metrics):
    found = metrics['valid_rank_ic'].items()
    return digest_of_text(repr({k: [v['mean'], v['low'], v['high']] for k, v in found}))


def of_predictions(path):
    table = pl.read_parquet(path).select(*TABLE, 'q10', 'q50', 'q90', 'split')
    return digest(table.with_columns(pl.col('horizon').cast(pl.Int32)))


def of_days(s):
    "Graphs and windows of every twentieth test day"
    out = {}
    for number, day in enumerate(s.days('test')):
        if number % 20: continue
        edge_index, edge_attr = s.graphs(day)
        out[f'graph {number}'] = digest(edge_index, edge_attr)
        out[f'windows {number}'] = digest(day.x, day.y, day.returns)
    return out


def of_run(run, panel):
    "Scalers, graphs, weights, scores and predictions of a run's phases"
    folder = Path(run.run_dir)
    s = product('setup')(product('check_run')(run), panel)
    scalers = s.scaler.center_, s.scaler.scale_, s.target.center_, s.target.scale_
    out = dict(scaler=digest(*scalers)) | of_days(s)
    for n in range(5):
        metrics = json.loads((folder/f'phase{n}_metrics.json').read_text())
        out[f'weights {n}'] = of_weights(folder/f'phase{n}_best.pt')
        out[f'score {n}'] = repr(metrics['score'])
        out[f'intervals {n}'] = of_intervals(metrics)
        out[f'predictions {n}'] = of_predictions(folder/f'phase{n}_predictions.parquet')
    return out


def without_names(table):
    "What a frame of the old tree has, too"
    return table.drop('target_name', strict=False)


def tables_of(run):
    "Predictions on the test days: phases by their number, baselines by their name"
    result = product('load_run')(run.run_dir)
    phases = {NAMES[name.split()[1]]: table for name, table in result.phases.items()}
    return phases | {n: t for n, t in result.baselines.items() if n != 'random'}


def of_frames(run):
    "What a report is made of"
    tables = tables_of(run)
    out = {}
    for name, table in tables.items():
        daily = product('backtest')(table, spread_bps=20)
        out[f'table {name}'] = digest(table.select(TABLE))
        out[f'evaluate {name}'] = digest(without_names(product('evaluate')(table, draws=50)))
        out[f'backtest {name}'] = digest(daily)
        out[f'performance {name}'] = digest(product('performance')(daily, draws=50))
    phases = [tables[n] for n in '01234']
    last = phases[-1]
    compared = product('compare')(*phases, names=tuple('01234'))
    out['decay'] = digest(without_names(product('decay')(last)))
    out['deciles'] = digest(product('decile_returns')(last, 1))
    out['years'] = digest(without_names(product('evaluate_by')(last, 'year')))
    out['compare'] = digest(without_names(compared))
    return out


def of_market(spec):
    made = product('synthetic_market')(spec)
    oracle = without_names(made.oracle)
    return dict(panel=digest(made.panel), bars=digest(made.ohlcv), oracle=digest(oracle))


def everything(root):
    "Every digest, by the run it is of; `root` is an empty folder"
    small = dict(phase='0-4', max_epochs=2, hidden=8, lookback=12, embargo=5)
    market = product('MarketSpec')(codes=40, days=300, clusters=4)
    embedded = product('embedded_panel')(market, cache=root/'cache')
    bars = product('open_panel')(flawed_bars(root/'bars'), root/'cache')
    out = dict(market=of_market(market))
    for name, panel in dict(embedded=embedded, bars=bars).items():
        run = product('RunSpec')(**small, run_dir=str(root/name))
        out[f'{name} panel'] = of_panel(panel)
        product('run_phases')(run, panel, show=False)
        out[name] = of_run(run, panel)
        out[f'{name} frames'] = of_frames(run)
    return out


def flat(digests):
    "One line a digest"
    lines = {}
    for part, found in digests.items():
        for name, value in found.items(): lines[f'{part}: {name}'] = value
    return lines


def compare(before, now):
    "Print what differs; True if nothing does"
    differ = [name for name in before if now.get(name) != before[name]]
    for name in differ: print(f'{name}: {before[name]} became {now.get(name)}')
    print(f'{len(before)-len(differ)} of {len(before)} digests are the same')
    return not differ


def main(what, path):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root: now = everything(Path(root))
    if what == 'write': Path(path).write_text(json.dumps(now, indent=1) + '\n')
    elif not compare(flat(json.loads(Path(path).read_text())), flat(now)): sys.exit(1)


if __name__ == '__main__': main(*sys.argv[1:])

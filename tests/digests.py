"""What the code computes, as digests.

`python tests/digests.py write FILE` before a change, `python tests/digests.py compare FILE` after it.
Two small runs of all phases, one on an embedded market and one on a folder of bars with flaws in it.
The digests are of bits, so they belong to one machine and one set of packages: make them with the
old tree and the new one side by side. Names are looked up in every module, so that a thing may move
from one to another."""
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

NAMES_OF_MODULES = [m.name for m in pkgutil.iter_modules(atft.__path__) if m.name[0] != '_']
MODULES = [importlib.import_module(f'atft.{name}') for name in NAMES_OF_MODULES]


def product(name):
    "The package's object of this name, whichever module holds it"
    found = [getattr(m, name) for m in MODULES if hasattr(m, name)]
    if not found:
        raise SystemExit(f'the package has no {name}')
    return found[0]


def digest(*values):
    "SHA-256 over arrays, tensors and tables, by value"
    total = hashlib.sha256()
    for value in values:
        if isinstance(value, pl.DataFrame):
            for column in sorted(value.columns):
                total.update(column.encode() + str(value.schema[column]).encode())
                total.update(repr(value[column].to_list()).encode())
        else:
            array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            total.update(str(array.dtype).encode() + str(array.shape).encode())
            total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]


def flawed_bars(folder):
    "Bars of a small market, in two shards, with gaps, zeros, swaps and repeats"
    bars = product('synthetic_market')(codes=24, days=420, clusters=3).ohlcv.with_row_index('row')
    every = lambda n, k: pl.col('row') % n == k
    bars = bars.with_columns(
        high=pl.when(every(97, 3)).then(pl.col('low')).otherwise('high'),
        low=pl.when(every(97, 3)).then(pl.col('high')).otherwise('low'),
        open=pl.when(every(131, 5)).then(0.).otherwise('open'),
        close=pl.when(every(151, 7)).then(None).otherwise('close'),
        volume=pl.when(every(61, 9)).then(0.).otherwise('volume')).drop('row')
    folder.mkdir()
    half = bars['date'].unique().sort()[210]
    bars.filter(pl.col('date') < half).write_parquet(folder/'a.parquet')
    bars.filter(pl.col('date') >= half).write_parquet(folder/'b.parquet')
    return folder


TABLE = ['date', 'code', 'horizon', 'prediction', 'target']
NAMES = dict(baseline='0', gat='1', graph='1', fan='2', san='3', finetune='4')


def of_panel(panel):
    table = panel.scan().collect().sort('date', 'code')
    return dict(panel=digest(table), rows=len(table), columns=len(table.columns))


def of_run(name, run, panel):
    "Scalers, graphs, weights, scores and predictions of a run's phases"
    out, folder = {}, Path(run.run_dir)
    s = product('setup')(product('check_run')(run), panel)
    out['scaler'] = digest(s.scaler.center_, s.scaler.scale_, s.target.center_, s.target.scale_)
    for number, day in enumerate(s.days('test')):
        if number % 20:
            continue
        edge_index, edge_attr = s.graphs(day)
        out[f'graph {number}'] = digest(edge_index, edge_attr)
        out[f'windows {number}'] = digest(day.x, day.y, day.returns)
    for n in range(5):
        state = torch.load(folder/f'phase{n}_best.pt', weights_only=True)['model']
        kept = [v for v in state.values() if isinstance(v, torch.Tensor)]
        out[f'weights {n}'] = digest(*sorted((v.numpy() for v in kept), key=lambda a: (a.shape, a.tobytes())))
        metrics = json.loads((folder/f'phase{n}_metrics.json').read_text())
        out[f'score {n}'] = repr(metrics['score'])
        intervals = {k: [v['mean'], v['low'], v['high']] for k, v in metrics['valid_rank_ic'].items()}
        out[f'intervals {n}'] = hashlib.sha256(repr(intervals).encode()).hexdigest()[:16]
        table = pl.read_parquet(folder/f'phase{n}_predictions.parquet')
        table = table.select(*TABLE, 'q10', 'q50', 'q90', 'split')
        out[f'predictions {n}'] = digest(table.with_columns(pl.col('horizon').cast(pl.Int32)))
    return out


def of_frames(run):
    "What a report is made of"
    result, out = product('load_run')(run.run_dir), {}
    evaluate, compare, backtest = (product(n) for n in ('evaluate', 'compare', 'backtest'))
    known = lambda t: t.select([c for c in t.columns if c != 'target_name'])
    tables = {**{NAMES[k.split()[1]]: v for k, v in result.phases.items()}, **result.baselines}
    for name, table in tables.items():
        if name == 'random':
            continue
        out[f'table {name}'] = digest(table.select(TABLE))
        out[f'evaluate {name}'] = digest(known(evaluate(table, draws=50)))
        daily = backtest(table, spread_bps=20)
        out[f'backtest {name}'] = digest(daily)
        out[f'performance {name}'] = digest(product('performance')(daily, draws=50))
    last = tables['4']
    out['decay'] = digest(known(product('decay')(last)))
    out['deciles'] = digest(product('decile_returns')(last, 1))
    out['years'] = digest(known(product('evaluate_by')(last, 'year')))
    in_order = [tables[name] for name in '01234']
    out['compare'] = digest(known(compare(*in_order, names=tuple('01234'))))
    return out


def everything():
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    RunSpec, run_phases = product('RunSpec'), product('run_phases')
    small = dict(phase='0-4', max_epochs=2, hidden=8, lookback=12, embargo=5)
    out = {}
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        market = product('MarketSpec')(codes=40, days=300, clusters=4)
        panel = product('embedded_panel')(market, cache=root/'cache')
        bars = product('open_panel')(flawed_bars(root/'bars'), root/'cache')
        made = product('synthetic_market')(market)
        oracle = made.oracle.drop('target_name', strict=False)
        out['market'] = dict(panel=digest(made.panel), bars=digest(made.ohlcv), oracle=digest(oracle))
        for name, data in dict(embedded=panel, bars=bars).items():
            out[f'{name} panel'] = of_panel(data)
            run = RunSpec(**small, run_dir=str(root/name))
            run_phases(run, data, show=False)
            out[name] = of_run(name, run, data)
            out[f'{name} frames'] = of_frames(run)
    return out


if __name__ == '__main__':
    what, path = sys.argv[1:]
    now = everything()
    if what == 'write':
        Path(path).write_text(json.dumps(now, indent=1) + '\n')
    else:
        flat = lambda d: {f'{a}: {b}': v for a, part in d.items() for b, v in part.items()}
        before, now = flat(json.loads(Path(path).read_text())), flat(now)
        differ = [k for k in before if now.get(k) != before[k]]
        print('\n'.join(f'{k}: {before[k]} became {now.get(k)}' for k in differ))
        print(f'{len(before)-len(differ)} of {len(before)} digests are the same')
        sys.exit(bool(differ))

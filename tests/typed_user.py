"""A user's script, read by mypy and not run (`make types`): what the README hands in has these types

A line with `type: ignore` hands in something wrong on purpose. mypy has to complain there: where it
does not, it calls the comment unused, and `make types` fails."""
from pathlib import Path

import numpy as np
import polars as pl
from torch import Tensor, nn

from atft.backtest import backtest, performance
from atft.bars import assert_causal, ohlcv_features, open_panel, panel_from_ohlcv
from atft.baselines import register_baseline
from atft.core import AtftError
from atft.correlation import rank_ic
from atft.eval import write_report
from atft.judge import compare, decay, evaluate
from atft.losses import Scored, register_term
from atft.network import NetworkSpec, Part, register_part
from atft.panel import Panel, PanelSpec, Target, write_panel
from atft.phases import Callback, Phase, RunSpec, run_phases
from atft.predictions import load_predictions
from atft.project import from_root, project_root
from atft.trading import Trading

BARS = pl.DataFrame(dict(date=[], code=[], close=[]))


def make_panel(folder:Path)->Panel:
    features:dict[str, pl.Expr] = ohlcv_features()
    features['calm'] = -pl.col('ret_1d').rolling_std(20)
    targets = (1, '5d', Target(5, delay=1))
    table:pl.LazyFrame = panel_from_ohlcv(BARS, features=features, horizons=targets)
    assert_causal(panel_from_ohlcv, BARS)
    spec = PanelSpec(tuple(features), targets)
    write_panel(table, folder, spec, source='made up', row_group=1000)
    opened:Panel = open_panel(folder, cache=folder/'cache')
    count:int = opened.num_rows
    lazy:pl.LazyFrame = opened.scan()
    print(lazy.collect_schema())
    try: return Panel(str(folder), skip_damaged=count > 0)
    except AtftError as trouble: raise SystemExit(str(trouble)) from trouble


class Narrow(nn.Module):
    def __init__(self, spec:NetworkSpec):
        super().__init__()
        self.narrow = nn.Linear(spec.hidden, 4)


def huber(day:Scored)->Tensor: return (day.score-day.target).abs().mean()


def calm(panel:Panel, split, dates:np.ndarray, seed:int): return panel.spec.features


class Dear(Trading):
    def cost(self, trade, market)->float: return 1+super().cost(trade, market)


class Seen(Callback):
    def epoch_ends(self, trainer): print(trainer.history[-1])


def train(panel:Panel, folder:Path)->dict[int, dict]:
    part:Part = register_part('narrow', 'state', Narrow, group=None)
    register_term('huber')(huber)
    register_baseline('calm')(calm)
    loss = dict(rank=.5, huber=.5)
    phases = (
        Phase('plain', (), 2e-3, loss, (1, .5, .25, .25), epochs=2),
        Phase(part.name, ('narrow',), 1e-3, loss, {'1d': 1.}, epochs=2, rates=dict(narrow=2)))
    run:RunSpec = RunSpec.of(run_dir=str(folder), phase='0-1', hidden='8')
    print(run.hidden, run.flat())
    return run_phases(run, panel, show=False, phases=phases, callbacks=(Seen(),))


def judge(run:Path, mine:Path)->Path:
    table:pl.DataFrame = load_predictions(mine)
    found:pl.DataFrame = evaluate(table, draws=100, level=.9)
    later:pl.DataFrame = decay(table)
    paired:pl.DataFrame = compare(table, mine, names=('a', 'b'))
    trading = Trading(top=50, keep=80, rebalance=5)
    daily:pl.DataFrame = backtest(table, '5d', trading, spread_bps=5.)
    earned:pl.DataFrame = performance(daily, column='gross')
    print(found, later, paired, earned, project_root()/'runs', from_root('runs'))
    report:Path = write_report(run, None, trading=Dear(), prices=BARS, baselines=('calm',), tried=3)
    return report


def wrong(panel:Panel, run:RunSpec, table:pl.DataFrame):
    "Each line is a mistake that a type checker has to find"
    Panel(3)                                     # type: ignore[arg-type]
    PanelSpec(features=3)                        # type: ignore[arg-type]
    panel.spec.features = ('a',)                 # type: ignore[misc]
    Target(5, late=1)                            # type: ignore[call-arg]
    write_panel(table, 'folder', ('value',))     # type: ignore[arg-type]
    run_phases('runs/mine')                      # type: ignore[arg-type]
    run_phases(run, show='no')                   # type: ignore[arg-type]
    RunSpec(graph=20)                            # type: ignore[arg-type]
    panel.scann()                                # type: ignore[attr-defined]
    panel.read('value', 0, 1)                    # type: ignore[arg-type]
    Phase('plain')                               # type: ignore[call-arg]
    Phase('plain', (), 'fast', {}, {}, epochs=1) # type: ignore[arg-type]
    evaluate(table, draw=100)                    # type: ignore[call-arg]
    evaluate(table).of_target('5d')              # type: ignore[attr-defined]
    compare(table, table, names='ab')            # type: ignore[arg-type]
    backtest(table, trading='long')              # type: ignore[arg-type]
    performance(str(project_root()))             # type: ignore[arg-type]
    Trading(top='fifty')                         # type: ignore[arg-type]
    write_report(run, 'reports')                 # type: ignore[arg-type]
    write_report('run', tried='many')            # type: ignore[arg-type]
    rank_ic(table)                               # type: ignore[call-arg, arg-type]
    missing:Path = from_root(None)               # type: ignore[assignment]
    return missing

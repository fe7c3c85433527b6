"Nothing may know tomorrow: change the future, and everything up to today stays the same bit for bit"
from dataclasses import replace
import numpy as np
import polars as pl
import pytest
import torch
from atft.data import PanelSpec, write_panel
from atft.eval import evaluate
from atft.market import MarketSpec, embedded_panel, ohlcv_features, panel_from_ohlcv, synthetic_market
from atft.network import PARTS
from atft.phases import RunSpec, load_checkpoint, predict, run_phases, setup

SMALL = RunSpec(phase='0', max_epochs=1, hidden=8, lookback=10, embargo=5)

def test_future_bars_move_no_feature_scaler_graph_or_prediction(tmp_path):
    bars = synthetic_market(codes=24, days=420, clusters=3).ohlcv
    spec = PanelSpec(features=tuple(ohlcv_features()))
    as_panel = lambda table, name: write_panel(panel_from_ohlcv(table), tmp_path/name, spec)
    panel = as_panel(bars, 'whole')
    run = replace(SMALL, run_dir=str(tmp_path/'run'), phase='0-1')
    run_phases(run, panel, show=False)
    whole = setup(run, panel)
    day = whole.split.test[len(whole.split.test)//2]
    rng = np.random.default_rng(0)
    noise = pl.Series(rng.lognormal(0, .3, len(bars)))
    later = pl.col('date') > day
    changed = as_panel(bars.with_columns([pl.when(later).then(pl.col(c)*noise).otherwise(pl.col(c)).alias(c) for c in ('open', 'high', 'low', 'close', 'volume')]), 'changed')
    other = setup(run, changed)
    assert np.array_equal(whole.scaler.center_, other.scaler.center_) and np.array_equal(whole.scaler.scale_, other.scaler.scale_)
    nets = [s.network().switch(PARTS) for s in (whole, other)]
    weights = load_checkpoint(tmp_path/'run/phase1_best.pt', whole)['model']
    for n in nets:
        n.load_state_dict(weights)
        for name, p in n.named_parameters():
            if name.endswith('.g'): p.data.fill_(.5)
    compared = 0
    flat = lambda lists: (p for days in lists for p in days)
    for a, b in zip(flat(predict(nets[0], whole, whole.days('test'))), flat(predict(nets[1], other, other.days('test')))):
        if a.date > day.item(): break
        assert a.codes == b.codes and torch.equal(a.forecast.score, b.forecast.score) and torch.equal(a.forecast.quantiles, b.forecast.quantiles)
        compared += 1
    assert compared == len(whole.split.test)//2+1

@pytest.mark.parametrize('seed', [0, 1])
def test_a_market_of_noise_yields_nothing(seed, tmp_path):
    noise = embedded_panel(MarketSpec(codes=60, days=1000, clusters=6, effects=(), seed=seed), cache=tmp_path)
    run = replace(SMALL, run_dir=str(tmp_path/'run'), phase='0-3', seed=seed)
    run_phases(run, noise, show=False)
    for phase in range(4):
        test = pl.read_parquet(tmp_path/f'run/phase{phase}_predictions.parquet').filter(pl.col('split') == 'test')
        judged = evaluate(test, draws=0).drop_nulls('low')
        assert len(judged) >= 2
        for row in judged.iter_rows(named=True): assert row['low'] < 0 < row['high'], row

def test_the_purge_and_the_embargo_stand_between_training_and_judging(small_market):
    s = setup(replace(SMALL, run_dir='unused', embargo=7), small_market)
    at = lambda d: int(np.searchsorted(small_market.dates, d))
    longest = max(small_market.spec.horizons)
    for before, after in ((s.split.train, s.split.valid), (s.split.valid, s.split.test)):
        assert at(after[0])-at(before[-1])-1 == longest+7
        assert at(before[-1])+longest < at(after[0])

"What the tests share: a small market on disk, and the folder of real market data if one is given"
import os
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # tests run side by side: threads that wait leave the processor to others; results do not depend on it
import time
from pathlib import Path
import pytest
from atft.market import MarketSpec, embedded_panel
from atft.reports import dated, provenance, provenance_table, table, write_text

ROOT = Path(__file__).parents[1]

def pytest_addoption(parser):
    parser.addoption('--data', default=None, help='folder of daily OHLCV shards, for the tests on real market data')
    parser.addoption('--golden', default=None, help='folder of outputs of the published FAN, SAN and RevIN (.npz)')
    parser.addoption('--kills', default='3', help='how often a run is killed; 25 times as often while it saves, half as often while it searches')
    parser.addoption('--race-seconds', default='8', help='how long eight processes race for one cache')
    parser.addoption('--kills-report', default=None, help='folder for kills_YYYYMMDD.md: each test, its outcome, and the counts that it recorded')

def pytest_terminal_summary(terminalreporter, exitstatus, config):
    "Every test that ran, with what it counted, as a dated report"
    if not config.getoption('--kills-report'): return
    ran = [r for key in ('passed', 'failed', 'skipped', 'error') for r in terminalreporter.stats.get(key, ()) if r.when == 'call' or not r.passed]
    rows = [[r.nodeid.split('::')[-1].removeprefix('test_').replace('_', ' '), r.outcome, '; '.join(f'{k}: {v}' for k, v in r.user_properties), f'{r.duration:.0f}'] for r in ran]
    facts = provenance('make kills', 'small generated markets', 0, (time.time()-config.invocation_time)/60)
    print(write_text(dated(config.getoption('--kills-report'), 'kills'), ['# Killed, short of disk, and raced for', provenance_table(facts),
        f'{sum(r.passed for r in ran)} of {len(ran)} tests passed. A test passes only if nothing was lost: what it counted is beside it.', table(['test', 'outcome', 'counted', 'seconds'], rows)]))

def pytest_configure(config): config.invocation_time = time.time()

@pytest.fixture
def market_data(request):
    "The folder given as --data; the test says so when it skips"
    folder = request.config.getoption('--data')
    if not folder: pytest.skip('no market data given: make test DATA=FOLDER')
    return Path(folder)

@pytest.fixture
def golden(request):
    "The folder given as --golden; the test says so when it skips"
    folder = request.config.getoption('--golden')
    if not folder: pytest.skip('no outputs of the published layers given: make test GOLDEN=FOLDER')
    return Path(folder)

@pytest.fixture(scope='session')
def small_market(tmp_path_factory):
    "A panel of 40 codes by 300 days with every effect planted"
    return embedded_panel(MarketSpec(codes=40, days=300, clusters=4), cache=tmp_path_factory.mktemp('market'))

"What the tests share: a small market on disk, and the folder of real market data if one is given"
import os

# Tests run side by side: threads that wait leave the processor to others; results do not change.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import time
from pathlib import Path

import pytest
import warm

from atft.market import MarketSpec, embedded_panel
from atft.reports import dated, provenance, provenance_table, table, write_text

ROOT = Path(__file__).parents[1]

OPTIONS = {
    '--data': (None, 'folder of daily OHLCV shards, for the tests on real market data'),
    '--golden': (None, 'folder of outputs of the published FAN, SAN and RevIN (.npz)'),
    '--kills': ('3', 'how often a run is killed; 25 times as often while it saves, half as often '
                     'while it searches'),
    '--race-seconds': ('8', 'how long eight processes race for one cache'),
    '--kills-report': (None, 'folder for kills_YYYYMMDD.md: each test, its outcome, and the counts '
                             'that it recorded'),
}


def pytest_addoption(parser):
    for name, (default, meaning) in OPTIONS.items():
        parser.addoption(name, default=default, help=meaning)


def pytest_configure(config):
    config.invocation_time = time.time()
    is_worker = hasattr(config, 'workerinput')
    config.warm = None if is_worker else warm.start()  # one for all that run side by side


def pytest_unconfigure(config):
    if getattr(config, 'warm', None): warm.stop(config.warm)


def reported(terminalreporter):
    "The reports of tests that ran, and of those that failed before or after"
    kinds = ('passed', 'failed', 'skipped', 'error')
    reports = [r for kind in kinds for r in terminalreporter.stats.get(kind, ())]
    return [r for r in reports if r.when == 'call' or not r.passed]


def report_row(report):
    "A test in words: its name, its outcome, what it counted, its seconds"
    name = report.nodeid.split('::')[-1].removeprefix('test_').replace('_', ' ')
    counted = '; '.join(f'{name}: {value}' for name, value in report.user_properties)
    return [name, report.outcome, counted, f'{report.duration:.0f}']


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    "Every test that ran, with what it counted, as a dated report"
    folder = config.getoption('--kills-report')
    if not folder: return
    ran = reported(terminalreporter)
    minutes = (time.time()-config.invocation_time)/60
    facts = provenance('make kills', 'small generated markets', 0, minutes)
    passed = sum(r.passed for r in ran)
    rows = [report_row(r) for r in ran]
    print(write_text(dated(folder, 'kills'), [
        '# Killed, short of disk, and raced for', provenance_table(facts),
        f'{passed} of {len(ran)} tests passed. A test passes only if nothing was lost: what it '
        'counted is beside it.', table(['test', 'outcome', 'counted', 'seconds'], rows)]))


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
    spec = MarketSpec(codes=40, days=300, clusters=4)
    return embedded_panel(spec, cache=tmp_path_factory.mktemp('market'))

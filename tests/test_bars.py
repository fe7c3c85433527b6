"Bars as people have them: sessions, repairs, vendors, and what stands beside them; counted, or refused"
import gzip
import shlex
from datetime import date, timedelta

import numpy as np
import polars as pl
import pytest
from conftest import ROOT
from polars.testing import assert_frame_equal

from atft import door
from atft.bars import (
    Reading, SessionRule, assert_causal, bars_panel, count_repairs, open_panel, panel_from_ohlcv,
    read_bars, sessions_of_bars)
from atft.causal import find_leaks
from atft.core import AtftError
from atft.longer import append_bars
from atft.panel import Panel, PanelSpec, tiny_table, write_panel
from atft.inference import open_data, split_of
from atft.repairs import findings_lines
from atft.sessions import sessions_per_year
from atft.specs import read_command_line
from atft.vendors import adjusted

NUMBERS = ('open', 'high', 'low', 'close', 'volume')


def calendar(days, start='2020-01-01', all_week=False):
    "So many days; all of them, or those of the week"
    if all_week: return np.datetime64(start)+np.arange(days)
    return np.busday_offset(start, np.arange(days), roll='forward').astype('datetime64[D]')


def bars(codes=30, days=100, seed=0, prefix='C', dates=None):
    "Random walks; open, high and low around the close"
    rng = np.random.default_rng(seed)
    dates = calendar(days) if dates is None else dates
    close = 50*np.exp(np.cumsum(rng.normal(0, .02, (len(dates), codes)), 0))
    open_ = close*np.exp(rng.normal(0, .005, close.shape))
    day, code = np.divmod(np.arange(close.size), codes)
    return pl.DataFrame(dict(
        date=dates[day], code=[f'{prefix}{c:02d}' for c in code], open=open_.ravel(),
        high=np.maximum(close, open_).ravel()*1.01, low=np.minimum(close, open_).ravel()*.99,
        close=close.ravel(), volume=rng.integers(1000, 9000, close.size).astype(float)))


BARS = bars()
PLAIN = panel_from_ohlcv(BARS).collect()


def moved(code, day, to):
    "A bar of a code once more, on another day"
    one = BARS.filter((pl.col('code') == code) & (pl.col('date') == day))
    return one.with_columns(date=to, volume=pl.col('volume')+1)


# --- sessions

STRAYS = dict(
    saturday=[('C03', date(2020, 3, 6), date(2020, 3, 7))],
    whole_weekend=[('C03', date(2020, 3, 6), date(2020, 3, 7)), ('C03', date(2020, 3, 6), date(2020, 3, 8))],
    two_codes=[('C03', date(2020, 3, 6), date(2020, 3, 7)), ('C11', date(2020, 3, 6), date(2020, 3, 7))],
    three_weekends=[('C05', date(2020, 2, d), date(2020, 2, d+1)) for d in (7, 14, 21)],
    before_the_first_week=[('C29', date(2020, 1, 3), date(2020, 1, 4))])


@pytest.mark.parametrize('name', STRAYS)
def test_a_stray_day_of_few_codes_changes_nothing_of_the_others(name, tmp_path):
    strays = [moved(*stray) for stray in STRAYS[name]]
    table = pl.concat([BARS, *strays])
    assert panel_from_ohlcv(table).collect().equals(PLAIN)
    found = bars_panel(table, tmp_path/'cache').findings['no_sessions']
    assert found['days'] == len({s[2] for s in STRAYS[name]}) and found['rows'] == len(strays)
    day, traded, of, code = found['listed'][0]
    assert day == str(STRAYS[name][0][2]) and code == STRAYS[name][0][0] and of == 30


def test_a_holiday_on_which_one_code_has_a_bar_is_no_session():
    "A weekday on which all others pause"
    holiday = date(2020, 2, 12)
    closed = BARS.filter(pl.col('date') != holiday)
    one = BARS.filter((pl.col('date') == holiday) & (pl.col('code') == 'C07'))
    assert panel_from_ohlcv(pl.concat([closed, one])).collect().equals(panel_from_ohlcv(closed).collect())


@pytest.mark.parametrize('filled', ['nulls', 'repeats', 'no volume'])
def test_a_day_on_which_nobody_traded_is_no_session(filled, tmp_path):
    "The exchange was down: a row of nulls, of yesterday's bars, or of its closes without volume"
    down = date(2020, 3, 10)
    before = BARS.filter(pl.col('date') == date(2020, 3, 9)).with_columns(date=down)
    if filled == 'nulls': before = before.with_columns(pl.lit(None, pl.Float64).alias(c) for c in NUMBERS)
    if filled == 'no volume':
        before = before.with_columns(open='close', high='close', low='close', volume=pl.lit(0.))
    closed = BARS.filter(pl.col('date') != down)
    table = pl.concat([closed, before])
    made = panel_from_ohlcv(table).collect()
    assert made.equals(panel_from_ohlcv(closed).collect())
    found = bars_panel(table, tmp_path/'cache').findings
    assert found['no_sessions']['listed'][0][:2] == [str(down), 0] and found['sessions'] == 99


def test_two_calendars_are_refused_with_one_code_of_each():
    coins = bars(3, 140, prefix='X', dates=calendar(140, all_week=True))
    with pytest.raises(AtftError, match='X00 trades on .*Saturday, Sunday, C00 on Monday.*two panels'):
        panel_from_ohlcv(pl.concat([bars(10), coins]))
    fridays = bars(4, prefix='W', dates=calendar(100)[2::5])
    with pytest.raises(AtftError, match='W00 has weekly bars, C00 has not.*make two panels'):
        panel_from_ohlcv(pl.concat([BARS, fridays]))
    few = bars(2, 140, prefix='S', dates=calendar(140))
    with pytest.raises(AtftError, match='two calendars'):
        panel_from_ohlcv(pl.concat([few, bars(30, 140, prefix='X', dates=calendar(140, all_week=True))]))


@pytest.mark.parametrize('dates, year', [
    (calendar(400, all_week=True), 365), (calendar(400), 261),
    (calendar(400, all_week=True)[2::7], 52),
    (np.arange('2015-01', '2023-01', dtype='datetime64[M]').astype('datetime64[D]'), 12)])
def test_one_calendar_of_any_kind_is_a_panel(dates, year):
    table = bars(5, dates=dates)
    assert panel_from_ohlcv(table, horizons=(1,)).collect()['date'].n_unique() == len(dates)
    assert sessions_per_year(dates) == year == sessions_per_year([str(d) for d in dates])


@pytest.mark.parametrize('codes', [1, 2, 3])
def test_few_codes_keep_the_days_on_which_half_of_them_trade(codes):
    table = bars(codes)
    paused = table.filter((pl.col('code') != 'C00') | (pl.col('date') != date(2020, 3, 10)))
    days = 99 if codes == 1 else 100
    assert panel_from_ohlcv(paused).collect()['date'].n_unique() == days


def test_half_of_the_universe_may_be_listed_or_delisted():
    early = pl.col('date') < date(2020, 3, 1)
    few = pl.col('code').is_in(['C00', 'C01', 'C02'])
    for table in (BARS.filter(few | early), BARS.filter(few | ~early)):
        assert panel_from_ohlcv(table).collect()['date'].n_unique() == 100


def test_the_share_is_a_choice_and_part_of_the_key(tmp_path):
    half = BARS.filter((pl.col('date') != date(2020, 3, 10)) | (pl.col('code') < 'C10'))
    assert panel_from_ohlcv(half).collect()['date'].n_unique() == 99
    rule = SessionRule(share=.3)
    assert panel_from_ohlcv(half, sessions=rule).collect()['date'].n_unique() == 100
    made = [bars_panel(half, tmp_path, sessions=r) for r in (SessionRule(), rule)]
    assert made[0].folder != made[1].folder
    with pytest.raises(AtftError, match='share=50'): SessionRule(share=50)


def test_hourly_bars_are_told_what_a_day_is():
    hours = [BARS.with_columns(pl.col('date').cast(pl.Datetime).dt.offset_by(f'{h}h')) for h in (9, 10)]
    with pytest.raises(AtftError, match='C00 has 2 bars on 2020-01-01; a day is one bar'):
        panel_from_ohlcv(pl.concat(hours))
    with pytest.raises(AtftError, match='one row a code|a day is one bar'):
        panel_from_ohlcv(pl.concat(hours), reading=Reading(zone='Asia/Tokyo'))


def test_sessions_are_causal():
    strays = [moved(*stray) for stray in STRAYS['three_weekends']]
    assert_causal(panel_from_ohlcv, pl.concat([BARS, *strays]), cuts=9)


# --- repairs

def flawed():
    row = pl.int_range(pl.len())
    return BARS.with_columns(
        close=pl.when(row % 211 == 5).then(None).otherwise('close'),
        volume=pl.when(row % 97 == 7).then(0.).otherwise('volume'))


def test_every_repair_is_counted_with_examples_and_kept(tmp_path, capsys):
    panel = bars_panel(flawed(), tmp_path)
    counts = dict(count_repairs(flawed().lazy()).select('rule', 'bars').iter_rows())
    found = Panel(panel.folder).findings
    assert {rule: f['bars'] for rule, f in found['repairs'].items()} == {
        rule: count for rule, count in counts.items() if count}
    assert found['repairs']['no_close']['examples'][0] == ['C05', '2020-01-01']
    assert len(found['repairs']['zero_volume']['examples']) == 3
    said = capsys.readouterr().err
    assert 'bars: 3,000 rows, 30 codes, 100 sessions' in said and 'C05 2020-01-01' in said
    bars_panel(flawed(), tmp_path)
    assert not capsys.readouterr().err  # it is told once, when it is made


def test_an_adjusted_close_beside_raw_prices_is_refused_with_the_way_out():
    early = pl.col('date') < date(2020, 4, 1)
    for factor in (.5, .93, 3.):
        mixed = BARS.with_columns(close=pl.when(early).then(pl.col('close')*factor).otherwise('close'))
        with pytest.raises(AtftError, match='close of C00 lies outside .* in .* of 100 bars .*adjust all four'):
            panel_from_ohlcv(mixed)
    raw = BARS.with_columns(adjusted=pl.when(early).then(pl.col('close')*.5).otherwise('close'))
    jump = pl.when(early).then(.5).otherwise(1.)
    wanted = BARS.with_columns([(pl.col(c)*jump).alias(c) for c in NUMBERS[:4]])
    made = panel_from_ohlcv(raw, adjust='adjusted:close').collect()
    ours = panel_from_ohlcv(wanted).collect()
    assert np.allclose(made['ret_1d'].fill_null(9), ours['ret_1d'].fill_null(9), atol=1e-12)


def test_a_move_that_looks_like_a_split_is_listed_and_changes_nothing(tmp_path):
    late = pl.col('date') >= date(2020, 3, 10)
    for ratio in (2, .2, 10, 1/3):
        one = late & (pl.col('code') == 'C04')
        split = BARS.with_columns([pl.when(one).then(pl.col(c)*ratio).otherwise(c).alias(c) for c in NUMBERS[:4]])
        jumps = bars_panel(split, tmp_path).findings['jumps']
        assert jumps['found'] == 1 and jumps['listed'][0][:2] == ['C04', '2020-03-10']
        assert jumps['listed'][0][3] == pytest.approx(ratio)
    crash = BARS.with_columns([pl.when(late).then(pl.col(c)/2).otherwise(c).alias(c) for c in NUMBERS[:4]])
    assert bars_panel(crash, tmp_path).findings['jumps']['found'] == 0


def test_gaps_are_counted_and_the_longest_named(tmp_path):
    days = BARS['date'].unique().sort()
    paused = BARS.filter((pl.col('code') != 'C02') | ~pl.col('date').is_between(days[20], days[40]))
    gaps = bars_panel(paused, tmp_path).findings['gaps']
    assert gaps == dict(found=1, longest=[['C02', str(days[19]), str(days[41]), 21]])


def test_duplicates_are_counted_if_identical_and_refused_if_they_differ(tmp_path):
    twice = pl.concat([BARS, BARS[:7]])
    panel = bars_panel(twice, tmp_path)
    assert panel.findings['intake'] == {'identical duplicate rows': 7} and panel.num_rows == 3000
    assert panel_from_ohlcv(twice).collect().equals(PLAIN)
    differing = pl.concat([BARS, BARS[:12].with_columns(pl.col('close')+1)])
    with pytest.raises(AtftError, match='C00 has more than one row on 2020-01-01.*C09.* and 2 more'):
        panel_from_ohlcv(differing)


@pytest.mark.parametrize('column', ['date', 'code'])
def test_bars_without_a_code_or_a_day_do_not_vanish(column):
    nameless = BARS.with_columns(pl.when(pl.int_range(pl.len()) > 5).then(column).alias(column))
    with pytest.raises(AtftError, match='6 rows have no date or no code'): panel_from_ohlcv(nameless)


# --- leaks

SPEC = PanelSpec(features=('volume_z', 'constant'), horizons=(1, 5))
TABLE = tiny_table(300)
LEAKS = dict(
    target=pl.col('target_5d'), tomorrow=pl.col('ret_1d').shift(-1).over('code'),
    in_three_days=pl.col('ret_1d').shift(-3).over('code'), turned=-pl.col('target_1d'),
    ranked=pl.col('target_1d').rank().over('date'))


@pytest.mark.parametrize('name', LEAKS)
def test_a_feature_that_is_a_coming_return_is_refused(name, tmp_path):
    with pytest.raises(AtftError, match='volume_z .*it looks ahead'):
        write_panel(TABLE.with_columns(volume_z=LEAKS[name]), tmp_path/'p', SPEC)
    assert not (tmp_path/'p').exists()


def test_a_target_that_is_todays_return_is_refused(tmp_path):
    with pytest.raises(AtftError, match='ret_1d equals target_1d'):
        write_panel(TABLE.with_columns(target_1d='ret_1d'), tmp_path, SPEC)


def test_a_feature_that_is_nearly_a_coming_return_is_told_and_kept(tmp_path):
    nearly = LEAKS['tomorrow']+.005*pl.col('volume_z')
    with pytest.warns(UserWarning, match='volume_z is correlated .* look ahead'):
        panel = write_panel(TABLE.with_columns(volume_z=nearly), tmp_path, SPEC)
    assert 'volume_z is correlated +0.9' in panel.findings['leaks'][0]


def test_an_honest_panel_is_not_accused(small_market, tmp_path):
    nothing = dict(refused=[], warned=[])
    assert find_leaks(small_market.scan().collect(), small_market.spec) == nothing
    spec = PanelSpec(tuple(PLAIN.columns[4:29]))
    assert find_leaks(PLAIN, spec) == nothing
    assert write_panel(PLAIN, tmp_path, spec).findings == {}


# --- vendors

def quotes(version, days=60):
    "Made-up quotes of a vendor, five characters a code, raw, with a split and a day without a trade"
    table = bars(6, days, seed=3).with_columns(code=pl.col('code').str.replace('C0', '130A'))
    dates = table['date'].unique().sort()
    split = (pl.col('code') == '130A2') & (pl.col('date') >= dates[30])
    is_ex = (pl.col('code') == '130A2') & (pl.col('date') == dates[30])
    raw = table.with_columns([pl.when(split).then(pl.col(c)/2).otherwise(c).alias(c) for c in NUMBERS[:4]])
    raw = raw.with_columns(
        volume=pl.when(split).then(pl.col('volume')*2).otherwise('volume'),
        factor=pl.when(is_ex).then(.5).otherwise(1.))
    quiet = (pl.col('code') == '130A4') & (pl.col('date') == dates[10])
    quiet = quiet | (pl.col('date') == dates[20])  # the exchange was down
    raw = raw.with_columns(pl.when(~quiet).then(pl.col(c)).alias(c) for c in NUMBERS)
    ours = table.with_columns(pl.when(~quiet).then(pl.col(c)).alias(c) for c in NUMBERS)
    names = dict(v1=dict(date='Date', code='Code', open='Open', high='High', low='Low', close='Close',
                         volume='Volume', factor='AdjustmentFactor'),
                 v2=dict(date='Date', code='Code', open='O', high='H', low='L', close='C', volume='Vo',
                         factor='AdjFactor'))
    return raw.with_columns(UL=pl.lit('0')).rename(names[version]), ours, dates


@pytest.mark.parametrize('version', ['v1', 'v2'])
@pytest.mark.parametrize('form', ['csv.gz', 'parquet'])
def test_a_vendors_quotes_give_the_returns_of_adjusted_prices(version, form, tmp_path):
    theirs, ours, dates = quotes(version)
    folder = tmp_path/'bulk'
    folder.mkdir()
    if form == 'parquet': theirs.write_parquet(folder/'a.parquet')
    else:
        with gzip.open(folder/'a.csv.gz', 'wb') as f: theirs.write_csv(f)
    panel = open_panel(folder, tmp_path/'cache', vendor='jquants')
    made = panel.scan().collect().sort('date', 'code')
    wanted = panel_from_ohlcv(ours).collect()
    assert made.select('date', 'code').equals(wanted.select('date', 'code'))
    for c in ('ret_1d', 'target_5d', 'vol_20d'):
        assert np.allclose(made[c].fill_null(9), wanted[c].fill_null(9), atol=1e-6), c
    assert panel.codes[0] == '130A0' and dates[20] not in made['date'].unique().to_list()
    assert panel.findings['no_sessions']['listed'][0][:2] == [str(dates[20]), 0]


def test_a_folder_of_both_versions_is_read(tmp_path):
    old, ours, dates = quotes('v1')
    new = quotes('v2')[0]
    folder = tmp_path/'bulk'
    folder.mkdir()
    old.filter(pl.col('Date') < dates[25]).write_csv(folder/'2020-01.csv')
    new.filter(pl.col('Date') >= dates[25]).write_csv(folder/'2020-02.csv')
    both = open_panel(folder, tmp_path/'cache', vendor='jquants').scan().collect().sort('date', 'code')
    (tmp_path/'one').mkdir()
    new.write_csv(tmp_path/'one/all.csv')
    one = open_panel(tmp_path/'one', tmp_path/'cache', vendor='jquants').scan().collect()
    assert both.equals(one.sort('date', 'code'))


def test_a_split_that_comes_later_moves_no_earlier_price():
    raw = quotes('v2')[0].rename(dict(Date='date', Code='code', O='open', H='high', L='low', C='close',
                                      Vo='volume', AdjFactor='factor'))
    whole = adjusted(raw.lazy(), 'factor').collect()
    early = pl.col('date') < date(2020, 2, 1)
    cut = adjusted(raw.filter(early).lazy(), 'factor').collect()
    assert whole.filter(early).equals(cut)


def test_codes_given_as_numbers_need_a_width():
    numbers = BARS.with_columns(code=pl.col('code').str.slice(1).cast(pl.Int64)+40)
    with pytest.raises(AtftError, match='code'): panel_from_ohlcv(numbers)
    made = panel_from_ohlcv(numbers, reading=Reading(codes=5)).collect()
    assert made['code'].min() == '00040'


def test_sectors_and_market_of_a_vendor_are_kept_as_known_at_the_day(tmp_path):
    theirs, _, dates = quotes('v2')
    codes = theirs['Code'].unique().sort()
    def master(day, sector):
        return pl.DataFrame(dict(Date=[day]*6, Code=codes, CoName=['x']*6, S17=['01']*6, S33=[sector]*6,
                                 Mkt=['0111']*6))
    both = pl.concat([master(dates[0], '0050'), master(dates[40], '3050')])
    panel = bars_panel(theirs, tmp_path, vendor='jquants', sectors=both)
    made = panel.scan().collect()
    assert made.filter(pl.col('date') < dates[40])['sector'].unique().to_list() == ['0050']
    assert made.filter(pl.col('date') >= dates[40])['sector'].unique().to_list() == ['3050']
    assert made['market'].unique().to_list() == ['0111'] and 'sector' not in panel.spec.features


# --- beside the bars

def test_a_universe_leaves_rows_out_and_features_as_they_are(tmp_path):
    calm = dict(calm=pl.col('ret_1d').rolling_std(20))
    first = date(2020, 3, 2)
    ranges = pl.DataFrame(dict(code=[f'C{i:02d}' for i in range(10)], first=[first]*10, last=[None]*10))
    panel = bars_panel(BARS, tmp_path, universe=ranges, features=calm)
    made = panel.scan().collect()
    assert made['date'].min() == first and made['code'].n_unique() == 10
    assert made['calm'].null_count() == 0  # the days before are known, though they have no rows
    assert panel.findings['universe']['rows_left_out'] == 3000-len(made)
    daily = made.select('date', 'code')
    again = bars_panel(BARS, tmp_path, universe=daily, features=calm).scan().collect()
    assert again.equals(made)


def test_fundamentals_count_from_the_day_after_they_were_published(tmp_path):
    facts = pl.DataFrame(dict(code=['C00', 'C01', 'C00'], book=[1., 2., 3.],
                              published=[date(2020, 2, 3), date(2020, 2, 3), date(2020, 3, 10)]))
    raw = panel_from_ohlcv(BARS, join=facts, as_of='published').collect()
    known = raw.filter(pl.col('book').is_not_null())
    assert known['date'].min() == date(2020, 2, 4) and set(known['code']) == {'C00', 'C01'}
    one = known.filter(pl.col('code') == 'C00')
    assert one.filter(pl.col('date') == date(2020, 3, 10))['book'].item() == -.5  # below C01 still
    assert one.filter(pl.col('date') == date(2020, 3, 11))['book'].item() == .5
    with pytest.raises(AtftError, match='say which column tells when'): panel_from_ohlcv(BARS, join=facts)


def test_fundamentals_dated_forty_days_early_are_caught():
    ends = pl.DataFrame(dict(end=[date(2019, 9, 1)+timedelta(days=9*i) for i in range(28)]))
    codes = BARS.select('code').unique().sort('code')
    facts = ends.join(codes, how='cross').with_columns(book=pl.int_range(pl.len())*7. % 11)
    facts = facts.with_columns(published=pl.col('end').dt.offset_by('40d'))

    def joined(by):
        return lambda bars, facts: panel_from_ohlcv(bars, join=facts.drop({'end', 'published'}-{by}), as_of=by)

    when = dict(dates=dict(facts='published'))
    assert_causal(joined('published'), BARS, facts, **when)
    with pytest.raises(AssertionError, match="look-ahead: column 'book'"):
        assert_causal(joined('end'), BARS, facts, **when)


def test_own_numbers_are_kept_as_further_features(tmp_path):
    own = BARS.with_columns(mood=pl.Series(np.random.default_rng(1).normal(size=3000)))
    panel = bars_panel(own, tmp_path, keep='mood')
    assert panel.spec.features[25] == 'mood' and len(panel.spec.features) == 31
    made = panel.scan().collect().sort('date', 'code')
    ranks = own.sort('date', 'code').with_columns(pl.col('mood').rank().over('date'))
    assert np.allclose(made['mood'], (ranks['mood']-.5)/30*2-1, atol=1e-6)
    with pytest.raises(AtftError, match="'gap' is the name of two features"):
        panel_from_ohlcv(own.rename(dict(mood='gap')), keep=('gap',))


def test_every_option_is_part_of_the_key(tmp_path):
    sectors = pl.DataFrame(dict(code=['C00'], sector=['x']))
    choices = [dict(), dict(sectors=sectors), dict(sectors=sectors.with_columns(sector=pl.lit('y'))),
               dict(sessions=SessionRule(.3)), dict(universe=BARS.select('date', 'code')), dict(scale='robust')]
    assert len({bars_panel(BARS, tmp_path, **choice).folder for choice in choices}) == len(choices)
    assert read_bars(BARS).counts == {}


# --- a month longer

def with_flaws(codes, days):
    "A market with a late listing, a delisting, a long pause, a stray Saturday, and repairs"
    table = bars(codes, days, seed=5)
    dates = table['date'].unique().sort()
    day = pl.col('date')
    listed = (pl.col('code') != 'C01') | (day >= dates[days-25])
    lives = listed & ((pl.col('code') != 'C02') | (day <= dates[days-30]))
    pause = (pl.col('code') == 'C03') & day.is_between(dates[days-90], dates[days-12])
    row = pl.int_range(pl.len())
    table = table.filter(lives & ~pause).with_columns(
        close=pl.when(row % 211 == 5).then(None).otherwise('close'),
        volume=pl.when(row % 97 == 7).then(0.).otherwise('volume'))
    friday = table.filter((pl.col('code') == 'C06') & (day.dt.weekday() == 5)).tail(3).head(1)
    return pl.concat([table, friday.with_columns(day.dt.offset_by('1d'), pl.col('volume')+1)])


@pytest.mark.parametrize('scale', ['rank', 'robust'])
@pytest.mark.parametrize('cuts', [(470,), (440, 441, 470), (485, 490, 495, 499)])
def test_appended_bars_give_the_panel_of_all_bars(scale, cuts, tmp_path):
    table = with_flaws(12, 500)
    dates = table['date'].unique().sort()
    edges = [0, *cuts, len(dates)]
    day = pl.col('date')
    parts = [table.filter(day.is_between(dates[a], dates[b-1])) for a, b in zip(edges, edges[1:])]
    grown = bars_panel(parts[0], tmp_path/'cache', out=tmp_path/'grows', scale=scale)
    for part in parts[1:]: grown = append_bars(grown, part)
    whole = bars_panel(table, tmp_path/'cache', scale=scale)
    ours = grown.scan().collect().sort('date', 'code')
    assert ours.equals(whole.scan().collect().sort('date', 'code'))
    assert (grown.dates == whole.dates).all() and grown.codes == whole.codes
    assert grown.findings == whole.findings and len(grown.shards) > len(whole.shards)


def test_only_what_can_be_made_longer_is(tmp_path):
    first = BARS.filter(pl.col('date') < date(2020, 4, 1))
    rest = BARS.filter(pl.col('date') >= date(2020, 4, 1))
    with pytest.raises(AtftError, match='was not made from bars'):
        append_bars(write_panel(TABLE, tmp_path/'plain', SPEC), rest)
    with pytest.raises(AtftError, match='in a folder of its own'):
        append_bars(bars_panel(first, tmp_path/'cache'), rest)
    own = bars_panel(first, tmp_path/'cache', out=tmp_path/'own')
    with pytest.raises(AtftError, match='give the days after that'): append_bars(own, BARS)
    days = (tmp_path/'own/history/days.parquet').read_bytes()
    assert append_bars(own, rest).num_rows == 3000
    (tmp_path/'own/history/days.parquet').write_bytes(days)
    later = BARS.filter(pl.col('date') == BARS['date'].max()).with_columns(date=date(2020, 6, 1))
    with pytest.raises(AtftError, match='the bars beside it on 2020-03-31: somebody else'):
        append_bars(Panel(tmp_path/'own'), later)


def raw_with_splits(codes=12, days=440, ex=(300, 430, 432, 436)):
    "Raw bars of a vendor under our names, with splits on some days, and their factors"
    table = with_flaws(codes, days).with_columns(factor=pl.lit(1.))
    dates = table['date'].unique().sort()
    for i, at in enumerate(ex):
        one = pl.col('code') == f'C{4+2*i:02d}'
        ratio = (.5, 1/3, .2, 10.)[i]
        split = one & (pl.col('date') >= dates[at])
        table = table.with_columns(
            [pl.when(split).then(pl.col(c)*ratio).otherwise(c).alias(c) for c in NUMBERS[:4]]
            + [pl.when(one & (pl.col('date') == dates[at])).then(ratio).otherwise('factor').alias('factor')])
    return table, dates


V1 = dict(date='Date', code='Code', open='Open', high='High', low='Low', close='Close',
          volume='Volume', factor='AdjustmentFactor')
V2 = dict(date='Date', code='Code', open='O', high='H', low='L', close='C', volume='Vo', factor='AdjFactor')


def grown_and_whole(parts, whole, tmp_path, **options):
    "The panel that parts made one after the other, and that of all at once"
    grown = bars_panel(parts[0], tmp_path/'cache', out=tmp_path/'grows', **options)
    for part in parts[1:]: grown = append_bars(grown, part)
    once = bars_panel(whole, tmp_path/'cache', **options)
    rows = [p.scan().collect().sort('date', 'code') for p in (grown, once)]
    assert rows[0].equals(rows[1]) and grown.findings == once.findings
    assert (grown.dates == once.dates).all() and grown.codes == once.codes
    return grown


@pytest.mark.parametrize('cuts', [(430,), (420, 429, 430, 433)])
def test_raw_prices_of_a_vendor_are_carried_on_over_splits(cuts, tmp_path):
    "First under the old names, then under the new ones; a split is on the first of the new days"
    table, dates = raw_with_splits()
    day = pl.col('date')
    edges = [0, *cuts, len(dates)]
    parts = [table.filter(day.is_between(dates[a], dates[b-1])).rename(V2 if a else V1)
             for a, b in zip(edges, edges[1:])]
    grown_and_whole(parts, table.rename(V1), tmp_path, vendor='jquants')


@pytest.mark.parametrize('kind', ['levels', 'close'])
def test_other_factors_are_carried_on_too(kind, tmp_path):
    table, dates = raw_with_splits()
    level = 1/pl.col('factor').cum_prod().over('code', order_by='date')
    table = table.with_columns(factor=level if kind == 'levels' else pl.col('close')*level)
    day = pl.col('date')
    parts = [table.filter(day < dates[430]), table.filter(day >= dates[430])]
    grown_and_whole(parts, table, tmp_path, adjust=f'factor:{kind}')


def beside_files(folder, dates, until):
    "Sectors, members and fundamentals as they were known on a day"
    codes = [f'C{c:02d}' for c in range(11)]
    folder.mkdir(exist_ok=True)
    quarters = [d for d in dates[::45] if d <= until]
    facts = [dict(code=c, published=q, book=float((3*i+7*j) % 11)) for i, c in enumerate(codes[:9])
             for j, q in enumerate(quarters)]
    pl.DataFrame(facts).write_parquet(folder/'facts.parquet')
    said = [dict(date=d, code=c, sector=f's{(i+j)%3}') for j, d in enumerate(dates[::60]) if d <= until
            for i, c in enumerate(codes[:10])]
    pl.DataFrame(said).write_parquet(folder/'sectors.parquet')
    members = [dict(date=d, code=c) for j, d in enumerate(dates) if d <= until and j != 7
               for i, c in enumerate(codes) if (i+j//100) % 5]
    pl.DataFrame(members).write_parquet(folder/'members.parquet')
    return dict(join=folder/'facts.parquet', as_of='published', sectors=folder/'sectors.parquet',
                universe=folder/'members.parquet')


def test_tables_beside_the_bars_may_have_grown(tmp_path):
    table = with_flaws(12, 440)
    dates = table['date'].unique().sort()
    day = pl.col('date')
    grown = None
    for begin, end in ((0, 400), (400, 409), (409, len(dates))):
        options = beside_files(tmp_path/'beside', dates, dates[end-1])
        part = table.filter(day.is_between(dates[begin], dates[end-1]))
        if grown is None: grown = bars_panel(part, tmp_path/'cache', out=tmp_path/'grows', **options)
        else: grown = append_bars(grown, part)
    once = bars_panel(table, tmp_path/'cache', **options)
    rows = [p.scan().collect().sort('date', 'code') for p in (grown, once)]
    assert rows[0].equals(rows[1]) and grown.findings == once.findings
    assert once.findings['universe']['days_without_list'] == 1 and once.findings['unknown']['sector'] > 0


def test_a_table_beside_the_bars_that_was_rewritten_is_refused(tmp_path):
    table = with_flaws(12, 440)
    dates = table['date'].unique().sort()
    day = pl.col('date')
    options = beside_files(tmp_path/'beside', dates, dates[399])
    bars_panel(table.filter(day <= dates[399]), tmp_path/'cache', out=tmp_path/'grows', **options)
    rest = table.filter(day > dates[399])
    early = (pl.col('code') == 'C03') & (pl.col('date') == dates[60])
    changes = dict(
        facts=('join', lambda t: t.with_columns(pl.col('book')+(pl.col('published') == dates[45]))),
        sectors=('sectors', lambda t: t.with_columns(sector=pl.when(early).then(pl.lit('x')).otherwise('sector'))),
        members=('universe', lambda t: t.filter(~early)))
    for name, (told, change) in changes.items():
        beside_files(tmp_path/'beside', dates, dates[-1])
        path = tmp_path/f'beside/{name}.parquet'
        change(pl.read_parquet(path)).write_parquet(path)
        with pytest.raises(AtftError, match=f'append_bars: {told} says other things of days before .*C0'):
            append_bars(Panel(tmp_path/'grows'), rest)
    beside_files(tmp_path/'beside', dates, dates[-1])
    path = tmp_path/'beside/facts.parquet'
    pl.read_parquet(path).with_columns(sales=1.).write_parquet(path)
    with pytest.raises(AtftError, match='append_bars: join has columns .*sales'):
        append_bars(Panel(tmp_path/'grows'), rest)


def test_a_daily_list_that_is_there_once_a_month_is_refused(tmp_path):
    monthly = BARS.select('date', 'code').filter(pl.col('date').is_in(BARS['date'].unique().sort()[::20].implode()))
    with pytest.raises(AtftError, match='sessions between them have none'):
        bars_panel(BARS, tmp_path, universe=monthly)


def test_a_code_that_comes_back_after_years_is_a_gap_in_the_longer_panel(tmp_path):
    table = bars(4, 460, seed=2)
    dates = table['date'].unique().sort()
    day = pl.col('date')
    away = table.filter((pl.col('code') != 'C01') | (day < dates[20]) | (day > dates[440]))
    parts = [away.filter(day <= dates[430]), away.filter(day > dates[430])]
    grown = grown_and_whole(parts, away, tmp_path)
    assert grown.findings['gaps'] == dict(found=1, longest=[['C01', str(dates[19]), str(dates[441]), 421]])


# --- thin markets

@pytest.mark.parametrize('share', [.2, .3, .5, .8])
@pytest.mark.parametrize('codes', [10, 30])
def test_a_thin_market_keeps_its_days(codes, share):
    table = bars(codes, 300, seed=4).sample(fraction=share, seed=1)
    assert len(sessions_of_bars(table.lazy()).dates) == table['date'].n_unique()


@pytest.mark.parametrize('left', [7, 10, 14, 20])
@pytest.mark.parametrize('days', [1, 4, 9, 20])
def test_most_of_the_universe_may_be_delisted_at_the_end(left, days):
    end = BARS['date'].unique().sort()[-1-days]
    table = BARS.filter((pl.col('date') <= end) | (pl.col('code') < f'C{left:02d}'))
    assert len(sessions_of_bars(table.lazy()).dates) == 100


@pytest.mark.parametrize('codes, day', [(3, date(2020, 3, 7)), (30, date(2020, 3, 7)), (30, date(2020, 3, 9))])
def test_a_stray_day_at_the_end_is_no_session(codes, day):
    "A Saturday, or a holiday"
    friday = date(2020, 3, 6)
    early = BARS.filter((pl.col('date') <= friday) & (pl.col('code') < f'C{codes:02d}'))
    stray = pl.concat([early, moved('C01', friday, day)])
    assert sessions_of_bars(stray.lazy()).dates['date'].max() == friday


# --- two publications of a day

FINS = pl.DataFrame(dict(
    DiscDate=['2020-02-03', '2020-02-03', '2020-02-03', '2020-03-10'],
    DiscTime=['15:30:00', '11:00:00', '15:00:00', '16:00:00'],
    Code=['C00', 'C00', 'C01', 'C00'], EPS=['3', '1', '2', '4']))


def known_on(panel, code, day):
    return panel.scan().filter((pl.col('code') == code) & (pl.col('date') == day)).collect()['EPS'].item()


@pytest.mark.parametrize('form', ['two columns', 'stamps', 'stamps as text'])
def test_the_later_of_two_publications_of_a_day_counts(form, tmp_path):
    stamp = pl.col('DiscDate')+' '+pl.col('DiscTime')
    as_text = FINS.select('Code', 'EPS', at=stamp)
    facts = {'two columns': FINS, 'stamps': as_text.with_columns(pl.col('at').str.to_datetime()),
             'stamps as text': as_text}[form]
    facts.write_parquet(tmp_path/'fins.parquet')
    as_of = 'DiscDate,DiscTime' if form == 'two columns' else 'at'
    theirs = BARS.with_columns(factor=1.).rename(V2)
    panel = bars_panel(theirs, tmp_path/'cache', vendor='jquants', join=tmp_path/'fins.parquet', as_of=as_of)
    assert known_on(panel, 'C00', date(2020, 2, 3)) is None
    assert known_on(panel, 'C00', date(2020, 2, 4)) == .5  # 3, of C01 2
    assert panel.findings['beside'] == {'join: rows that another of the same day replaced': 1}


def test_two_publications_of_which_none_is_the_last_are_refused(tmp_path):
    facts = FINS.rename(dict(Code='code'))
    with pytest.raises(AtftError, match='C00 on 2020-02-03; name the time too .--as-of DiscDate,TIME'):
        bars_panel(BARS, tmp_path, join=facts.drop('DiscTime'), as_of='DiscDate')
    tied = facts.with_columns(DiscTime=pl.lit('15:00'))
    with pytest.raises(AtftError, match='none is told to be the last: C00 on 2020-02-03'):
        bars_panel(BARS, tmp_path, join=tied, as_of='DiscDate,DiscTime')
    twice = pl.concat([facts[1:], facts[1:]])
    panel = bars_panel(BARS, tmp_path, join=twice, as_of='DiscDate,DiscTime')
    assert panel.findings['beside'] == {'join: identical rows': 3}


def test_tables_beside_the_bars_have_codes_as_the_bars_have(tmp_path):
    numbers = BARS.with_columns(ticker=pl.col('code').str.slice(1).cast(pl.Int64)+40).drop('code')
    reading = Reading('ticker=code', codes=4)
    sectors = numbers.select('ticker', sector=pl.lit('x')).unique()
    panel = bars_panel(numbers, tmp_path, reading=reading, sectors=sectors)
    assert panel.codes[0] == '0040' and panel.scan().collect()['sector'].null_count() == 0


# --- hours in files

@pytest.mark.parametrize('form', ['one csv', 'a file a ticker', 'parquet', 'told', 'epoch', 'pandas', 'vendor'])
def test_hourly_bars_in_files_are_told_what_a_day_is(form, tmp_path):
    few = BARS.filter(pl.col('code') < 'C03')
    hours = pl.concat([few.with_columns(pl.col('date').cast(pl.Datetime).dt.offset_by(f'{h}h'),
                                        pl.col('close')+h/99) for h in (9, 10)])
    options = {}
    source = tmp_path/'hours'
    source.mkdir()
    if form == 'one csv': hours.write_csv(source/'all.csv')
    if form == 'a file a ticker':
        for (code,), rows in hours.partition_by('code', as_dict=True).items():
            rows.drop('code').write_csv(source/f'{code}.csv')
    if form == 'parquet': hours.write_parquet(source/'all.parquet')
    if form == 'told':
        hours.with_columns(pl.col('date').dt.strftime('%d/%m/%Y %H:%M')).write_csv(source/'all.csv')
        options = dict(reading=Reading(dates='%d/%m/%Y %H:%M'))
    if form == 'epoch':
        hours.with_columns(pl.col('date').dt.epoch('ms')).write_csv(source/'all.csv')
        options = dict(reading=Reading(dates='ms'))
    if form == 'pandas': source = hours.to_pandas().set_index(['date', 'code'])
    if form == 'vendor':
        hours.with_columns(factor=1.).rename(V2).write_csv(source/'all.csv')
        options = dict(vendor='jquants')
    with pytest.raises(AtftError, match='C00 has 2 bars on 2020-01-01; a day is one bar.*aggregate to daily'):
        bars_panel(source, tmp_path/'cache', **options)


# --- what the README says to type

def readme_lines():
    "The commands of the section on one's own table"
    section = (ROOT/'README.md').read_text().split('## Your own table')[1].split('\n## ')[0]
    block = section.split('```bash\n')[1].split('```')[0]
    return [line.partition('  #')[0].strip() for line in block.splitlines()]


def test_the_commands_of_the_readme_work_as_they_stand(tmp_path, monkeypatch, capsys):
    "On made-up bars of the days that it speaks of; the data of the training are opened and split"
    monkeypatch.chdir(tmp_path)
    table = bars(8, dates=calendar(620, '2014-03-03'))
    month = pl.col('date') >= table['date'].unique().sort()[-20]
    table.filter(~month).write_csv('bars.csv')
    table.filter(month).write_csv('next_month.csv')
    made, trained, longer = [shlex.split(line) for line in readme_lines()]
    assert made[:3] == longer[:3] == ['python', '-m', 'atft.bars'] and trained[2] == 'atft.phases'
    door.main(made[3:])
    assert capsys.readouterr().out.startswith('bars: 4,800 rows, 8 codes, 600 sessions')
    run = read_command_line(trained[3:])
    split = split_of(run, open_data(run, tmp_path/'cache'))
    assert all(len(days) > 20 for days in (split.train, split.valid, split.test))
    door.main(longer[3:])
    assert '620 days' in capsys.readouterr().out


# --- what the first users stumbled over

def test_what_is_null_is_no_price_of_zero(tmp_path):
    "A matrix of closes has no open, high, low, volume: nothing of it was repaired"
    BARS.pivot('code', index='date', values='close').write_csv(tmp_path/'prices.csv')
    found = bars_panel(tmp_path/'prices.csv', tmp_path/'cache', reading=Reading(wide='close')).findings
    assert found['repairs'] == {}
    assert found['intake'] == {'columns that the matrix has not: open, high, low, volume': 4}
    with pytest.raises(AtftError, match=r'a column for each code: wide=close \(--wide close\)'):
        bars_panel(tmp_path/'prices.csv', tmp_path/'cache')


def test_members_and_unknown_facts_are_told(tmp_path):
    members = pl.DataFrame(dict(code=['C00', 'C01'], first=['2020-01-01']*2, last=['', '2020-03-02']))
    facts = pl.DataFrame(dict(code=['C00'], published=['2020-02-03'], eps=[1.]))
    panel = bars_panel(BARS, tmp_path, universe=members, join=facts, as_of='published')
    told = '\n'.join(findings_lines(panel.findings))
    of_members = panel.scan().select('code', 'date', 'eps').collect()
    unknown = of_members['eps'].null_count()
    assert f'universe: {len(BARS)-len(of_members):,} rows of no members left out' in told
    assert f'eps: not known in {unknown:,} rows' in told and unknown
    assert of_members.filter(code='C01')['date'].max() == date(2020, 3, 2)


def test_another_unit_of_a_price_changes_no_feature_and_no_step():
    first = BARS['code'][0]
    of_one = pl.col('code') == first
    prices = [pl.when(of_one).then(pl.col(c)/8).otherwise(pl.col(c)).alias(c)
              for c in ('open', 'high', 'low', 'close')]
    volume = pl.when(of_one).then(pl.col('volume')*8).otherwise(pl.col('volume')).alias('volume')
    before = panel_from_ohlcv(BARS).collect()
    after = panel_from_ohlcv(BARS.with_columns(*prices, volume)).collect()
    assert {'step_open', 'step_close', 'step_value'} < set(before.columns)
    assert_frame_equal(before, after, rel_tol=1e-6, abs_tol=1e-9)


def test_steps_are_made_of_the_session_before_and_can_be_left_out():
    made = panel_from_ohlcv(BARS).collect()
    one = made.filter(pl.col('code') == BARS['code'][0]).sort('date')
    moves = one['step_close'].to_numpy()
    np.testing.assert_allclose(np.expm1(moves), one['ret_1d'].to_numpy(), rtol=1e-5, atol=1e-9)
    bare = panel_from_ohlcv(BARS, paths=False).collect()
    assert bare.columns == [c for c in made.columns if not c.startswith('step_')]

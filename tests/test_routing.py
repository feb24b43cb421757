"""The routing decision: a profile serves only when it is whole, fresh and of the bundle's mixture."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.contracts import Route
from coterie.routing import MAX_AGE, Profile, confirm, route

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
KNOWN = Profile(
    worker_id="w-1",
    embedding=(0.5, -1.0),
    reliability=1.2,
    comparisons=40,
    coterie=1,
    posterior=(0.1, 0.7, 0.2),
    mixture_version="m1",
    event_timestamp=NOW - timedelta(days=1),
)


def test_a_whole_fresh_profile_serves_its_worker():
    answer = route(KNOWN, "m1", NOW)
    assert (answer.source, answer.reason) == ("profile", None)
    assert answer.coterie == 1
    assert answer.posterior == list(KNOWN.posterior)
    assert answer.embedding == list(KNOWN.embedding)
    assert answer.mixture_version == "m1"


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        (None, "unknown-worker"),
        (replace(KNOWN, mixture_version="m0"), "other-mixture"),
        (replace(KNOWN, event_timestamp=NOW - MAX_AGE - timedelta(seconds=1)), "stale-profile"),
        (replace(KNOWN, posterior=()), "damaged-profile"),
        (replace(KNOWN, posterior=(0.5, float("nan"), 0.5)), "damaged-profile"),
        (replace(KNOWN, posterior=(0.5, -0.5, 1.0)), "damaged-profile"),
        (replace(KNOWN, posterior=(0.9, 0.9, 0.9)), "damaged-profile"),
        (replace(KNOWN, coterie=3), "damaged-profile"),
        (replace(KNOWN, coterie=-1), "damaged-profile"),
    ],
)
def test_anything_else_is_the_global_reward_with_its_reason(profile, reason):
    answer = route(profile, "m1", NOW)
    assert (answer.source, answer.reason) == ("global", reason)
    assert answer.coterie is None
    assert answer.posterior is None
    assert answer.embedding is None


def test_the_staleness_limit_is_a_setting_and_inclusive():
    limit = timedelta(hours=24)
    assert route(KNOWN, "m1", NOW, limit).source == "profile"
    assert route(KNOWN, "m1", NOW + timedelta(microseconds=1), limit).reason == "stale-profile"


@given(
    posterior=st.lists(st.floats(), max_size=4).map(tuple),
    coterie=st.integers(-2, 5),
    version=st.sampled_from(["m0", "m1", ""]),
    age=st.timedeltas(min_value=timedelta(days=-1), max_value=timedelta(days=400)),
)
def test_no_profile_raises_or_reaches_a_coterie_that_is_not_there(posterior, coterie, version, age):
    profile = replace(KNOWN, posterior=posterior, coterie=coterie, mixture_version=version, event_timestamp=NOW - age)
    answer = route(profile, "m1", NOW)
    if answer.source == "profile":
        assert version == "m1"
        assert age <= MAX_AGE
        assert 0 <= answer.coterie < len(answer.posterior)
        assert sum(answer.posterior) == pytest.approx(1, abs=1e-3)
    else:
        assert answer.reason is not None
        assert answer.posterior is None


def test_the_predictor_confirms_a_route_by_its_own_mixture_and_number_of_coteries():
    good = route(KNOWN, "m1", NOW)
    assert confirm(good, "m1", 3) == good
    assert confirm(good, "m2", 3).reason == "other-mixture"
    assert confirm(good, "m1", 4).reason == "damaged-profile"
    assert confirm(good.model_copy(update={"coterie": 3}), "m1", 3).reason == "damaged-profile"
    assert confirm(Route(source="profile", mixture_version="m1"), "m1", 3).reason == "damaged-profile"
    stale = Route(source="global", reason="stale-profile")
    assert confirm(stale, "m1", 3) == stale

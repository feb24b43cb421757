"""From votes to profiles: what they become, that they get there, and that none is lost when something is down."""

import signal
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from scipy.special import softmax
from starlette.testclient import TestClient

from coterie.bundle import Bundle
from coterie.config import PublishSettings
from coterie.contracts import MIXTURE_FILE, PROFILE, Example
from coterie.discovery.mixture import MixtureReward
from coterie.errors import BackendUnavailable, BadData
from coterie.feedback.database import Database
from coterie.feedback.evidence import Evidence, Place, Prior, Said, weights
from coterie.feedback.intake import read_comparisons
from coterie.feedback.journal import Journal
from coterie.feedback.posteriors import Posteriors
from coterie.feedback.relay import UNPUBLISHED, Published, Relay
from coterie.feedback.tables import FEEDBACK, FOLDED, FOLDING, OUTBOX, STAMP
from coterie.scoring import Scorer
from tests.databases import postgres
from tests.staged import TextEncoder, everything
from tests.test_feast import redis  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def posteriors(staged):
    return Posteriors(Scorer(Bundle.load(staged.bundle), TextEncoder()))


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'feedback.db'}"
    else:
        url = request.getfixturevalue("server").database()
    opened = Database(url)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def server():
    with postgres() as running:
        yield running


@pytest.fixture
def lite(tmp_path):
    opened = Database(f"sqlite:///{tmp_path / 'feedback.db'}")
    yield opened
    opened.close()


def vote(database, worker, *numbers, long=True):
    """Votes for the longer of two responses, or the shorter."""
    texts = ["tea " * 30 + str(numbers), "tea"]
    records = [
        {"worker_id": worker, "prompt": f"q {n}", "chosen": texts[not long], "rejected": texts[long]} for n in numbers
    ]
    journal = Journal(database, daily_cap=10**6)
    journal.submit(read_comparisons(records, None)).result(30)
    journal.close()


def published(folder, version="m1", workers=("ann", "bob"), when=0, **metadata):
    folder.mkdir(exist_ok=True)
    n = len(workers)
    columns = {
        "worker_id": list(workers), "embedding": [[0.5]] * n, "reliability": [1.0] * n, "comparisons": [10] * n,
        "coterie": [0] * n, "posterior": [[0.9, 0.1]] * n, "mixture_version": [version] * n,
        "event_timestamp": [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=when)] * n,
    }  # fmt: skip
    PROFILE.write(folder / "profiles.parquet", columns, metadata, embedding=1, posterior=2)
    return Published(folder / "profiles.parquet")


class Someone:
    """Infers nothing, keeps what was pushed, fails when told to."""

    def __init__(self):
        self.pushed, self.asked, self.down = [], [], None

    def infer(self, people):
        if self.down == "infer":
            raise BackendUnavailable("no predictor")
        self.asked += people
        return [Place(posterior=[0.2, 0.8], embedding=[1.0], reliability=1.5) for _ in people]

    def push(self, profiles):
        if self.down == "push":
            raise BackendUnavailable("no Feast")
        self.pushed += profiles


def waiting(database):
    with database.reading() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(OUTBOX))


# --------------------------------------------------------------------------------------------------------- posteriors
def test_a_strangers_place_is_the_one_that_a_request_with_comparisons_gets(posteriors, staged):
    examples = [Example(prompt=f"p{i}", chosen="tea " * 40, rejected="tea") for i in range(6)]
    told = Scorer(Bundle.load(staged.bundle), TextEncoder()).place(examples)
    [place] = posteriors([Evidence(said=[Said(**e.model_dump()) for e in examples])])
    np.testing.assert_allclose(place.posterior, told.posterior, rtol=1e-5)
    np.testing.assert_allclose(place.embedding, told.embedding, rtol=1e-5)
    assert max(place.posterior) > 0.8


def test_what_was_published_is_the_prior_of_what_is_said(posteriors, staged):
    said = [Said(prompt=f"p{i}", chosen="tea " * 40, rejected="tea") for i in range(4)]
    rank = Bundle.load(staged.bundle).manifest.rank
    priors = [
        Prior(posterior=posterior, embedding=[0.3] * rank, reliability=1.2, comparisons=n)
        for posterior, n in (([0.5, 0.5], 10), ([1.0, 0.0], 10), ([0.5, 0.5], 10**9))
    ]
    alone, even, sure, much = posteriors([Evidence(said=said), *(Evidence(said=said, prior=p) for p in priors)])
    weight = MixtureReward.load(staged.cluster / MIXTURE_FILE).weights_
    evidence = np.log(alone.posterior) - np.log(weight)
    np.testing.assert_allclose(even.posterior, softmax(np.log([0.5, 0.5]) + evidence), rtol=1e-5)
    np.testing.assert_allclose(sure.posterior, softmax(np.log([1, 1e-7]) + evidence), rtol=1e-4)
    assert (even.reliability, sure.reliability) == (1.2, 1.2)
    # The embedding lies between what was published and what the votes say, the nearer to the former the more is behind it.
    moved = [np.linalg.norm(np.subtract(place.embedding, 0.3)) for place in (much, even, alone)]
    assert moved[0] < 1e-3 < moved[1] < moved[2]
    with pytest.raises(BadData, match="3 coteries beside a bundle of 2"):
        posteriors([Evidence(said=said, prior=priors[0].model_copy(update={"posterior": [0.3, 0.3, 0.4]}))])


def test_texts_are_encoded_once(staged):
    encoder = TextEncoder()
    infer = Posteriors(Scorer(Bundle.load(staged.bundle), encoder))
    said = [Said(prompt=f"p{i}", chosen="tea " * 9, rejected="tea") for i in range(3)]
    first, again = infer([Evidence(said=said[:2])]), infer([Evidence(said=said[:2])])
    assert (first, encoder.calls) == (again, 1)
    assert infer([Evidence(said=said)]) != first
    assert encoder.calls == 2


def test_the_pairs_of_a_ranking_count_as_its_choices():
    assert weights([None, "r", "r", "r", "s"]) == pytest.approx([1, 2 / 3, 2 / 3, 2 / 3, 1])


# -------------------------------------------------------------------------------------------------------------- relay
def test_who_has_said_something_gets_a_later_profile_of_all_they_said(database, tmp_path):
    someone, known = Someone(), published(tmp_path / "one")
    relay = Relay(database, known, someone.infer, someone.push)
    assert relay.round() == 0
    vote(database, "ann", 1, 2)
    vote(database, "new", 1)
    assert (relay.round(), relay.round(), waiting(database)) == (2, 0, 0)
    ann, new = sorted(someone.pushed, key=lambda profile: profile.worker_id)
    assert (ann.comparisons, new.comparisons, ann.coterie, ann.mixture_version) == (12, 1, 1, "m1")
    assert [person.prior and person.prior.posterior for person in someone.asked] == [pytest.approx([0.9, 0.1]), None]
    with database.writing() as connection:  # a clock that was ahead
        connection.execute(STAMP.update().values(stamped_at=datetime.now(UTC) + timedelta(days=1)))
    vote(database, "ann", 3)
    relay.round()
    assert someone.pushed[-1].event_timestamp > ann.event_timestamp + timedelta(hours=23)
    assert someone.pushed[-1].comparisons == 13


@pytest.mark.parametrize("down", ["infer", "push"])
def test_what_is_down_makes_the_outbox_wait_and_nothing_else(database, tmp_path, down):
    someone = Someone()
    relay = Relay(database, published(tmp_path / "one"), someone.infer, someone.push)
    someone.down = down
    relay.start()
    vote(database, "ann", 1)
    relay.wake()
    time.sleep(1.2)
    assert (waiting(database), someone.pushed) == (1, [])
    someone.down = None
    deadline = time.monotonic() + 20
    while waiting(database):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    relay.close()
    assert [profile.worker_id for profile in someone.pushed] == ["ann"]


def test_the_slower_of_two_routers_does_not_undo_the_quicker(database, tmp_path):
    known, quick = published(tmp_path / "one"), Someone()
    vote(database, "ann", 1)

    def meanwhile(people):
        vote(database, "ann", 2)
        Relay(database, known, quick.infer, quick.push).round()
        return Someone().infer(people)

    slow = Someone()
    Relay(database, known, meanwhile, slow.push).round()
    assert [profile.comparisons for profile in quick.pushed] == [12]
    assert (slow.pushed, waiting(database)) == ([], 0)


def test_who_cannot_be_done_holds_nobody_up(lite, tmp_path, caplog):
    someone = Someone()

    def infer(people):
        if any(person.prior for person in people):
            raise ValueError("a damaged profile")
        return someone.infer(people)

    relay = Relay(lite, published(tmp_path / "one"), infer, someone.push)
    for worker in ("ann", "new", "newer"):
        vote(lite, worker, 1)
    assert (relay.round(), relay.round()) == (3, 0)
    assert sorted(profile.worker_id for profile in someone.pushed) == ["new", "newer"]
    assert waiting(lite) == 1
    assert "left aside" in caplog.text


def test_a_new_publication_has_everybodys_feedback_added_but_for_what_it_was_made_of(lite, tmp_path):
    first, second = Someone(), Someone()
    vote(lite, "ann", 1, 2)
    vote(lite, "bob", 3)
    relay = Relay(lite, published(tmp_path / "one"), first.infer, first.push)
    relay.round()
    assert relay.replay() == 0
    with lite.writing() as connection:
        ids = connection.execute(sa.select(FEEDBACK.c.comparison_id, FEEDBACK.c.prompt)).all()
        folded = [{"folding": "f", "comparison_id": name} for name, prompt in ids if prompt in ("q 1", "q 3")]
        connection.execute(FOLDED.insert(), folded)
    again = Relay(lite, published(tmp_path / "two", "m2", when=9, **{FOLDING: "f"}), second.infer, second.push)
    assert again.replay() == 1
    again.round()
    assert [(profile.worker_id, profile.comparisons, profile.mixture_version) for profile in second.pushed] == [
        ("ann", 11, "m2")
    ]


def test_a_relay_follows_to_another_publication_and_waits_where_there_is_none(lite, tmp_path):
    first, second = Someone(), Someone()
    relay = Relay(lite, published(tmp_path / "one"), first.infer, first.push)
    relay.start()

    def settled(until):
        relay.wake()
        deadline = time.monotonic() + 20
        while not until():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    vote(lite, "ann", 1)
    settled(lambda: first.pushed and not waiting(lite))
    relay.follow(None, first.infer, first.push)
    settled(lambda: UNPUBLISHED._value.get() == 1)
    vote(lite, "ann", 2)
    relay.wake()
    time.sleep(1)
    assert (waiting(lite), len(first.pushed)) == (1, 1)
    relay.follow(published(tmp_path / "two", "m2", when=9), second.infer, second.push)
    settled(lambda: second.pushed and not waiting(lite))
    relay.close()
    assert [(p.worker_id, p.mixture_version, p.comparisons) for p in second.pushed] == [("ann", "m2", 12)]
    assert (len(first.pushed), UNPUBLISHED._value.get()) == (1, 0)
    assert second.pushed[0].event_timestamp > first.pushed[0].event_timestamp


def test_what_the_router_of_the_mixture_before_took_is_taken_up_again(lite, tmp_path, monkeypatch):
    monkeypatch.setattr("coterie.feedback.relay._AGAIN", 0.5)
    before, after = Someone(), Someone()
    old = Relay(lite, published(tmp_path / "one"), before.infer, before.push)
    new = Relay(lite, published(tmp_path / "two", "m2", when=9), after.infer, after.push)
    new.start()
    time.sleep(0.2)  # it has replayed, and looks again in half a second
    vote(lite, "ann", 1)
    old.round()
    deadline = time.monotonic() + 20
    while not after.pushed:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    new.close()
    assert {profile.mixture_version for profile in after.pushed} == {"m2"}


def test_feedback_reaches_feast_and_can_be_taken_out(lite, staged, posteriors, tmp_path):
    from feature_repo.publish import publish
    from feature_repo.store import lookup, open_store, remove
    from serving.feedback import push_to

    publish(staged.cluster, tmp_path / "publish", PublishSettings())
    known, store = Published(tmp_path / "publish" / "profiles.parquet"), open_store(tmp_path / "publish")
    worker = next(iter(known._rows))
    [before] = lookup(store, [worker])
    vote(lite, worker, *range(12), long=False)
    vote(lite, "new", *range(12), long=True)
    relay = Relay(lite, known, posteriors, push_to(store))
    relay.round()
    after, new = lookup(store, [worker, "new"])
    assert after.event_timestamp >= before.event_timestamp  # Feast tells whole seconds
    assert after.comparisons == before.comparisons + 12
    assert after.mixture_version == new.mixture_version == before.mixture_version
    assert new.posterior[new.coterie] > 0.8
    assert remove(store, "new")
    assert not remove(store, "new")
    assert lookup(store, [worker, "new"]) == [after, None]


def test_redis_takes_every_profile_whose_stamp_is_later_and_gives_it_up(redis, lite, staged, posteriors, tmp_path):  # noqa: F811
    from feature_repo.publish import publish
    from feature_repo.store import lookup, open_store, push, remove
    from serving.feedback import push_to

    publish(staged.cluster, tmp_path / "publish", PublishSettings(online_store="redis"))
    known, store = Published(tmp_path / "publish" / "profiles.parquet"), open_store(tmp_path / "publish")
    worker = next(iter(known._rows))
    relay = Relay(lite, known, posteriors, push_to(store))
    for n in range(3):
        vote(lite, worker, n)
        relay.round()
        assert lookup(store, [worker])[0].comparisons == known.get(worker).comparisons + n + 1
    last = lookup(store, [worker])[0]
    push(store, [replace(last, comparisons=0)])  # no later: Redis says nothing and keeps what it has
    assert lookup(store, [worker]) == [last]
    redis.send_signal(signal.SIGSTOP)
    vote(lite, worker, 3)
    with pytest.raises(BackendUnavailable, match="Feast took no profiles"):
        relay.round()
    redis.send_signal(signal.SIGCONT)
    relay.round()
    assert lookup(store, [worker])[0].comparisons == last.comparisons + 1
    assert remove(store, worker)
    assert (remove(store, worker), lookup(store, [worker])) == (False, [None])


# --------------------------------------------------------------------------------------------- the predictor's side
def test_a_router_asks_the_predictor_where_people_stand(posteriors, monkeypatch):
    from serving.posteriors import RemotePosteriors, routes

    app = FastAPI()
    app.include_router(routes(lambda: posteriors))
    people = [Evidence(said=[Said(prompt="p", chosen="tea " * 9, rejected="tea")])]
    remote, other = RemotePosteriors("http://predictor", "m1"), RemotePosteriors("http://predictor", "m2")
    with pytest.raises(BackendUnavailable, match="infers no posteriors: ConnectError"):
        remote(people)
    with TestClient(app, base_url="http://predictor") as client:
        monkeypatch.setattr(httpx.Client, "post", lambda self, *args, **kw: client.request("POST", *args, **kw))
        assert remote(people) == posteriors(people)
        with pytest.raises(BackendUnavailable, match="serves mixture m1, not m2"):
            other(people)
    monkeypatch.setattr(httpx.Client, "post", lambda *args, **kw: httpx.Response(413))
    with pytest.raises(BadData, match="what 1 people have said"):  # no outage: the relay asks about each alone
        remote(people)

"""Bundles and profiles brought into a pod, from a real S3 protocol, a claim and a folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from stand_ins import s3

from coterie.bundle import Bundle
from coterie.errors import BackendUnavailable, BadBundle, BadConfiguration, BadData
from serving import fetch
from tests.served import make_bundle, publish_profiles

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bundle with published profiles of its mixture and of another."""
    root = tmp_path_factory.mktemp("fetched")
    make_bundle(root)
    publish_profiles(root)
    publish_profiles(root, "m2", "other")
    return root


@pytest.fixture(scope="module")
def store(made):
    """An S3 server that holds all of it in the bucket `runs`, as Kubeflow stores folders: by prefix."""
    with s3() as (system, _):
        system.mkdir("runs")
        for folder in ("bundle", "publish", "other"):
            system.put(str(made / folder), f"runs/first/{folder}", recursive=True)
        yield system


def command(*arguments, **environ):
    return CliRunner().invoke(fetch.main, [str(one) for one in arguments], env=environ)


@pytest.mark.parametrize("scheme", ["s3", "minio"])
def test_a_bundle_of_an_object_store_is_the_bundle(scheme, made, store, tmp_path):
    version = Bundle.load(made / "bundle").manifest.model_version
    uri = f"{scheme}://runs/first/bundle"
    done = command("bundle", "--to", tmp_path, COTERIE_BUNDLE=uri, COTERIE_MODEL_VERSION=version)
    assert done.exit_code == 0, done.output
    assert f"{uri}: bundle {version}" in done.output
    assert Bundle.load(tmp_path).manifest == Bundle.load(made / "bundle").manifest
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    # A pod that starts again finds what is there and what is left of an attempt that was killed.
    (tmp_path / ".arriving").mkdir()
    (tmp_path / ".arriving" / "half").write_text("half")
    (tmp_path / "foreign.txt").write_text("of before")
    fetch.fetch_bundle(uri, tmp_path, version)
    assert Bundle.load(tmp_path).manifest.model_version == version


def test_a_bundle_that_was_tampered_with_never_appears(made, store, tmp_path):
    tampered = tmp_path / "tampered"
    for name, change in {
        "changed": lambda folder: (folder / "golden.json").write_text("[]"),
        "short": lambda folder: (folder / "mixture.safetensors").unlink(),
        "foreign": lambda folder: (folder / "more.txt").write_text("more"),
        "none": lambda folder: (folder / "manifest.json").unlink(),
    }.items():
        shutil.rmtree(tampered, ignore_errors=True)
        shutil.copytree(made / "bundle", tampered)
        change(tampered)
        store.put(str(tampered), f"runs/{name}", recursive=True)
    words = {
        "changed": r"s3://runs/changed: .*golden\.json is not the file that the manifest names",
        "short": r"mixture\.safetensors is missing",
        "foreign": r"more\.txt is not in the manifest",
        "none": r"no manifest\.json, so no bundle",
    }
    for name, said in words.items():
        with pytest.raises(BadBundle, match=said):
            fetch.fetch_bundle(f"s3://runs/{name}", tmp_path / "to")
        assert not list((tmp_path / "to").iterdir()), name


def test_what_serves_stays_where_another_version_lies_at_its_address(made, tmp_path):
    version = Bundle.load(made / "bundle").manifest.model_version
    fetch.fetch_bundle(str(made / "bundle"), tmp_path, version)
    done = command("bundle", "--to", tmp_path, COTERIE_BUNDLE=str(made / "bundle"), COTERIE_MODEL_VERSION="another")
    assert done.exit_code == 2
    assert f"holds the bundle {version}, not another" in done.output
    assert "Traceback" not in done.output
    assert Bundle.load(tmp_path).manifest.model_version == version


def test_what_is_not_there_is_said_apart_from_a_store_that_does_not_answer(store, tmp_path, monkeypatch):
    import s3fs

    with pytest.raises(BadData, match="s3://runs/nothing: no such file"):
        fetch.fetch_bundle("s3://runs/nothing", tmp_path / "to")
    with pytest.raises(BadData, match="s3://nowhere/first"):
        fetch.fetch_bundle("s3://nowhere/first", tmp_path / "to")
    with pytest.raises(BadData, match="no such file"):
        fetch.fetch_bundle(str(tmp_path / "absent"), tmp_path / "to")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(BackendUnavailable, match="s3://runs/first/bundle"):
        fetch.fetch_bundle("s3://runs/first/bundle", tmp_path / "to")
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_bundle_on_a_claim_is_verified_where_it_is_mounted(made, tmp_path):
    mounted = tmp_path / "mounted"
    shutil.copytree(made / "bundle", mounted)
    assert command("bundle", "--to", mounted, COTERIE_BUNDLE="pvc://models/first/bundle").exit_code == 0
    (mounted / "golden.json").write_text("[]")
    done = command("bundle", "--to", mounted, COTERIE_BUNDLE="pvc://models/first/bundle")
    assert (done.exit_code, (mounted / "golden.json").read_text()) == (2, "[]")
    assert "pvc://models/first/bundle: " in done.output
    for wrong in ("pvc://", "pvc:///path", "pvc://models/../secrets"):
        with pytest.raises(BadConfiguration, match="pvc://claim/path"):
            fetch.claim_of(wrong)


def test_profiles_lie_by_their_mixtures_and_the_newest_of_a_mixture_counts(made, store, tmp_path, monkeypatch):
    from serving.profiles import FeastProfiles

    claims = tmp_path / "claims"
    shutil.copytree(made / "other", claims / "kept" / "runs" / "other")
    monkeypatch.setattr(fetch, "CLAIMS", claims)
    newest = tmp_path / "newest"
    shutil.copytree(made / "publish", newest)
    (newest / "mark").write_text("newest")
    to = tmp_path / "to"
    to.mkdir()
    uris = [str(newest), "pvc://kept/runs/other", "minio://runs/first/publish"]
    done = command("profiles", "--to", to, COTERIE_PROFILES=",".join(uris))
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in to.iterdir()) == ["m1", "m2"]
    assert (to / "m1" / "mark").is_file()
    profiles = FeastProfiles(to)
    profiles.open()
    assert len(profiles.opened()) == 2


def test_profiles_that_nothing_new_needs_may_be_gone(made, tmp_path, caplog):
    gone = str(tmp_path / "gone")
    assert fetch.fetch_profiles([str(made / "publish"), gone], tmp_path) == ["m1"]
    assert "not needed once all routers are new" in caplog.text
    with pytest.raises(BadData, match="gone: no such file"):
        fetch.fetch_profiles([gone, str(made / "publish")], tmp_path)
    with pytest.raises(BadData, match="not a published folder"):
        fetch.fetch_profiles([str(made / "bundle")], tmp_path)


def test_a_volume_without_room_is_said(made, tmp_path, monkeypatch):
    from errno import ENOSPC

    from fsspec.implementations.local import LocalFileSystem

    def full(*arguments, **options):
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "get", full)
    done = command("bundle", "--to", tmp_path, COTERIE_BUNDLE=str(made / "bundle"))
    assert done.exit_code == 3
    assert f"{tmp_path}: no room for {made / 'bundle'}. Give this volume more room." in done.output
    assert not list(tmp_path.iterdir())


def test_what_the_routers_image_runs_needs_nothing_that_it_lacks():
    absent = ("torch", "transformers", "kfp", "scipy", "sklearn", "sentence_transformers", "datasets")
    program = (
        "import sys; import serving.fetch, serving.deploy, serving.rollout, serving.doors; from kserve import KServeClient\n"
        f"print([name for name in {absent} if name in sys.modules])"
    )
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr

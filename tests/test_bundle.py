"""The bundle: the same bytes from the same inputs, and every kind of damage refused with its remedy."""

import json
import shutil

import pytest
import yaml
from staged import everything, make_bundle, write_stages

from coterie.bundle import Bundle
from coterie.errors import BadBundle, BadData


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("run"))


@pytest.fixture
def copied(staged, tmp_path):
    return shutil.copytree(staged.bundle, tmp_path / "bundle")


def files(folder):
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def test_a_bundle_holds_what_serves_and_nothing_pickled(staged):
    bundle = Bundle.load(staged.bundle)
    assert set(bundle.heads) == {"global", "coterie-0", "coterie-1"}
    assert (bundle.manifest.coteries, bundle.manifest.verdict, bundle.encoder.name) == (2, "coteries", "drawn")
    assert {p.suffix for p in files(staged.bundle).values()} == {".json", ".safetensors", ".md"}
    assert set(bundle.manifest.files) == set(files(staged.bundle)) - {"manifest.json"}


def test_the_same_inputs_make_the_same_bytes(staged, tmp_path):
    make_bundle(staged, tmp_path)
    made = files(tmp_path)
    assert made.keys() == files(staged.bundle).keys()
    for name, path in files(staged.bundle).items():
        assert path.read_bytes() == made[name].read_bytes(), name


def test_other_rewards_make_another_version(staged, tmp_path):
    other = everything(tmp_path, seed=1)
    assert Bundle.load(other.bundle).manifest.model_version != Bundle.load(staged.bundle).manifest.model_version


def test_rewards_are_centred_on_the_reference_that_travels_with_them(staged):
    from safetensors.numpy import load_file

    reference = load_file(staged.bundle / "reference.safetensors")["features"]
    assert reference.shape == (64, 20)
    for head in Bundle.load(staged.bundle).heads.values():
        assert head.score(reference).mean() == pytest.approx(0, abs=1e-5)


def test_a_flipped_byte_in_any_file_is_found(copied):
    for name, path in files(copied).items():
        if name == "manifest.json":
            continue
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(BadBundle, match=rf"{name} is not the file that the manifest names.*Fetch the bundle again"):
            Bundle.load(copied)
        path.write_bytes(good)
    Bundle.load(copied)


def test_a_missing_file_is_named(copied):
    for name in ("rewards/coterie-1/head.safetensors", "golden.json", "mixture.safetensors"):
        held = (copied / name).read_bytes()
        (copied / name).unlink()
        with pytest.raises(BadBundle, match=f"{name} is missing"):
            Bundle.load(copied)
        (copied / name).write_bytes(held)


def test_a_file_that_nobody_named_is_refused_but_not_what_a_hub_adds(copied):
    (copied / ".gitattributes").write_text("*.safetensors filter=lfs")
    (copied / ".cache" / "huggingface").mkdir(parents=True)
    (copied / ".cache" / "huggingface" / "README.md.lock").touch()
    Bundle.load(copied)
    (copied / "rewards" / "coterie-7").mkdir()
    (copied / "rewards" / "coterie-7" / "head.safetensors").write_bytes(b"")
    with pytest.raises(BadBundle, match=r"coterie-7/head\.safetensors is not in the manifest\. Remove it"):
        Bundle.load(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 4}, "manifest schema version 4, this program reads 3. Upgrade coterie"),
        ({"schema_version": 0}, "Make the bundle again"),
        ({"coteries": "many"}, "coteries: .*Fetch or make the bundle again"),
        ({"surprise": 1}, "surprise"),
        ({"base_models": []}, "names no encoder"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(copied, change, message):
    path = copied / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadBundle, match=message):
        Bundle.load(copied)


def test_a_folder_without_a_readable_manifest_is_no_bundle(copied, tmp_path):
    with pytest.raises(BadBundle, match=r"no manifest.json, so no bundle"):
        Bundle.load(tmp_path / "nowhere")
    (copied / "manifest.json").write_text("{")
    with pytest.raises(BadBundle, match="not readable"):
        Bundle.load(copied)


def test_the_card_has_a_header_that_the_hub_reads(staged):
    _, header, body = (staged.bundle / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "coterie"
    assert "| 0 | own |" in body
    assert "**coteries**" in body


def test_inputs_that_are_missing_are_named(tmp_path):
    staged = write_stages(tmp_path)
    (tmp_path / "rewards" / "global").mkdir(parents=True)
    with pytest.raises(BadData, match=r"metrics\.json"):
        make_bundle(staged, tmp_path / "bundle")

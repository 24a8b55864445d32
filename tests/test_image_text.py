"""Tar shards of image–text pairs: what is sound is read, and what is not is named, counted and passed over."""

import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import DIGITS, digit, info, png, uid, write_tar

from metagradient.data.captions import HashedWords, words
from metagradient.data.image_text import load_pool, pair_batches, read_pairs, read_uids, write_uids
from metagradient.data.shards import Fault, FaultKind, Faults
from metagradient.errors import DataError


def kinds(directory: Path) -> dict[FaultKind, int]:
    return dict(load_pool(directory, 8).faults.counts)


def test_the_real_pool_is_read_whole(shared_data):
    directory = shared_data("emoji-clip")
    pool = load_pool(directory / "00000007.tar", 32)
    assert len(pool) == 367
    assert pool.images.shape == (367, 32, 32, 3)
    assert pool.images.dtype == np.uint8
    assert not pool.faults.counts
    with tarfile.open(directory / "00000007.tar") as tar:
        names = sorted({name.split(".")[0] for name in tar.getnames()})
        first = {end: tar.extractfile(f"{names[0]}.{end}").read() for end in ("png", "txt", "json")}  # pyright: ignore[reportOptionalMemberAccess]
    assert pool.captions[0] == first["txt"].decode().strip()
    assert pool.uids[0] == json.loads(first["json"])["uid"]
    np.testing.assert_array_equal(pool.images[0], np.asarray(Image.open(io.BytesIO(first["png"]))))
    assert set(pool.column("source")) == {"google-emoji", "openclipart", "tuxpaint"}


def test_pairs_come_in_the_order_of_shards_and_a_directory_names_only_numbered_ones(tmp_path: Path):
    for shard, numbers in ((1, (2, 3)), (0, (0, 1))):
        write_tar(tmp_path / f"{shard:08d}.tar", [m for n in numbers for m in digit(n)])
    write_tar(tmp_path / "val.tar", digit(9))
    pool = load_pool(tmp_path, 8)
    assert pool.uids == tuple(uid(n) for n in range(4))
    assert load_pool(tmp_path / "val.tar", 8).uids == (uid(9),)
    assert load_pool([tmp_path / "val.tar", tmp_path / "00000001.tar"], 8).uids == (uid(9), uid(2), uid(3))
    np.testing.assert_allclose(pool.images[3] / 255, DIGITS.images[3].repeat(3, -1), atol=1 / 255)
    assert load_pool(tmp_path, 8, limit=3).uids == pool.uids[:3]
    assert pool.take([2, 0]).uids == (uid(2), uid(0))


def test_batches_are_the_pool_in_pieces(tmp_path: Path):
    write_tar(tmp_path / "0.tar", [m for n in range(7) for m in digit(n)])
    faults = Faults()
    batches = list(pair_batches(tmp_path, 8, 3, faults))
    assert [len(b) for b in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([b.images for b in batches]), load_pool(tmp_path, 8).images)


BAD_JSON = ("000000001.json", b'{"uid": ')
CAPTION = ("000000001.txt", b"a one")
IMAGE = ("000000001.png", png(DIGITS.images[1, ..., 0]))
JSON = ("000000001.json", json.dumps({"uid": uid(1)}).encode())


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ([CAPTION, JSON], "missing image"),
        ([IMAGE, JSON], "missing caption"),
        ([IMAGE, CAPTION], "missing json"),
        ([IMAGE, CAPTION, BAD_JSON], "unreadable json"),
        ([IMAGE, CAPTION, ("000000001.json", b"[1]")], "unreadable json"),
        ([IMAGE, CAPTION, ("000000001.json", b"[" * 100000)], "unreadable json"),
        ([IMAGE, CAPTION, ("000000001.json", b"{}")], "bad uid"),
        ([IMAGE, CAPTION, ("000000001.json", b'{"uid": "../../x"}')], "bad uid"),
        ([IMAGE, CAPTION, ("000000001.json", json.dumps({"uid": uid(0)}).encode())], "duplicate uid"),
        ([IMAGE, ("000000001.txt", b"caf\xe9"), JSON], "unreadable caption"),
        ([("000000001.png", b"no image"), CAPTION, JSON], "unreadable image"),
        ([("000000001.png", IMAGE[1][:60]), CAPTION, JSON], "unreadable image"),
        ([("000000001.png", b""), CAPTION, JSON], "unreadable image"),
        ([info("../000000001.png"), CAPTION, JSON], "unsafe name"),
        ([("/000000001.png", b"x")], "unsafe name"),
        ([("a/../../000000001.png", b"x")], "unsafe name"),
        ([("a\\..\\000000001.png", b"x")], "unsafe name"),
        ([("C:x.png", b"x")], "unsafe name"),
        ([info("000000001.png", kind=tarfile.SYMTYPE, link="/etc/passwd")], "not a file"),
        ([info("000000001.png", kind=tarfile.LNKTYPE, link="000000000.png")], "not a file"),
        ([info("000000001.png", kind=tarfile.CHRTYPE)], "not a file"),
    ],
)
def test_a_bad_pair_is_named_and_counted_and_the_others_are_read(tmp_path: Path, members, kind):
    write_tar(tmp_path / "00000000.tar", [*digit(0), *members, *digit(2)])
    write_tar(tmp_path / "00000001.tar", digit(3))
    pool = load_pool(tmp_path, 8)
    assert pool.uids == (uid(0), uid(2), uid(3))
    assert pool.faults.counts[kind] == 1
    assert "00000000.tar" in pool.faults.named[kind][0]
    assert f"1 x {kind} (00000000.tar" in str(pool.faults)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000000.tar", "00000001.tar"]


def test_a_second_image_is_counted_and_the_first_one_kept(tmp_path: Path):
    write_tar(tmp_path / "0.tar", [*digit(0), ("000000000.jpg", b"x"), *digit(1)])
    pool = load_pool(tmp_path, 8)
    assert pool.uids == (uid(0), uid(1))
    assert pool.faults.counts == {"repeated part": 1}


def test_directories_and_members_of_other_kinds_are_no_faults(tmp_path: Path):
    listed = [(f"part/{name}", content) for name, content in digit(1)]
    readme = ("readme.md", b"hello")
    write_tar(tmp_path / "0.tar", [info("part", kind=tarfile.DIRTYPE), readme, *listed, ("part/000000001.cls", b"4")])
    pool = load_pool(tmp_path, 8)
    assert pool.uids == (uid(1),)
    assert not pool.faults.counts


@pytest.mark.parametrize("cut", ["in content", "in a header", "between members", "first header"])
def test_a_tar_that_is_cut_short_gives_what_came_before(tmp_path: Path, cut):
    whole = write_tar(tmp_path / "00000000.tar", [m for n in range(4) for m in digit(n)])
    write_tar(tmp_path / "00000001.tar", digit(5))
    with tarfile.open(whole) as tar:
        third = tar.getmember("000000002.png")
    ends = {
        "in content": third.offset_data + third.size // 2,
        "in a header": third.offset + 100,
        "between members": third.offset,
        "first header": 100,
    }
    os.truncate(whole, ends[cut])
    pool = load_pool(tmp_path, 8)
    assert pool.uids == (*(() if cut == "first header" else (uid(0), uid(1))), uid(5))
    assert pool.faults.counts["damaged tar"] == 1


def test_a_bad_header_ends_its_tar_with_a_fault_and_not_in_silence(tmp_path: Path):
    whole = write_tar(tmp_path / "00000000.tar", [m for n in range(4) for m in digit(n)])
    write_tar(tmp_path / "00000001.tar", digit(5))
    with tarfile.open(whole) as tar:
        offset = tar.getmember("000000002.png").offset
    with whole.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 512)
    pool = load_pool(tmp_path, 8)
    assert pool.uids == (uid(0), uid(1), uid(5))
    assert pool.faults.counts == {"damaged tar": 1}
    assert str(offset) in pool.faults.named["damaged tar"][0]


def test_a_tar_whose_every_byte_is_noise_is_a_fault(tmp_path: Path):
    (tmp_path / "00000000.tar").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "00000001.tar").write_bytes(b"")
    write_tar(tmp_path / "00000002.tar", digit(5))
    assert kinds(tmp_path) == {"damaged tar": 2}


def test_any_flipped_bytes_leave_a_reading_that_ends(tmp_path: Path):
    whole = write_tar(tmp_path / "0.tar", [m for n in range(6) for m in digit(n)]).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        bytes_ = bytearray(whole)
        for place in rng.integers(0, len(whole), 20):
            bytes_[place] = rng.integers(256)
        (tmp_path / "0.tar").write_bytes(bytes(bytes_))
        found = list(read_pairs(tmp_path, 8))
        assert len(found) >= 1
        assert all(isinstance(f, Fault) or f.image.shape == (8, 8, 3) for f in found)


def test_where_nothing_can_be_used_it_says_why(tmp_path: Path):
    with pytest.raises(DataError, match="holds no shards"):
        load_pool(tmp_path, 8)
    with pytest.raises(DataError, match=r"nowhere\.tar is absent"):
        load_pool(tmp_path / "nowhere.tar", 8)
    write_tar(tmp_path / "0.tar", [CAPTION])
    with pytest.raises(DataError, match=r"no image–text pair can be used; 1 x missing image \(0.tar:000000001\)"):
        load_pool(tmp_path, 8)


def test_images_of_other_sizes_and_modes_come_to_one(tmp_path: Path):
    file, wide = io.BytesIO(), Image.new("RGBA", (24, 12), (255, 0, 0, 0))
    wide.paste((0, 0, 255, 255), (0, 0, 12, 12))
    wide.save(file, "PNG")
    grey = io.BytesIO()
    Image.new("L", (5, 9), 128).save(grey, "PNG")
    members = [*digit(0), ("000000001.png", file.getvalue()), CAPTION, JSON]
    members += [("000000002.png", grey.getvalue()), *digit(2)[1:]]
    write_tar(tmp_path / "0.tar", members)
    _, halves, flat = load_pool(tmp_path, 12).images
    np.testing.assert_array_equal(halves[:, 0], [[0, 0, 255]] * 12)
    np.testing.assert_array_equal(halves[:, -1], [[255, 255, 255]] * 12)
    assert np.all(flat == 128)


def test_an_image_of_more_pixels_than_memory_is_refused_undecoded(tmp_path: Path):
    file = io.BytesIO()
    Image.new("1", (30000, 30000)).save(file, "PNG")
    write_tar(tmp_path / "0.tar", [*digit(0), ("000000001.png", file.getvalue()), CAPTION, JSON])
    tracemalloc.start()
    assert kinds(tmp_path) == {"unreadable image": 1}
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_pool_is_streamed_in_the_memory_of_a_batch(tmp_path: Path):
    content = [png(DIGITS.images[0, ..., 0], 64)] + [c for _, c in digit(0)[1:2]]
    for shard in range(4):
        members = []
        for n in range(shard * 100, shard * 100 + 100):
            record = json.dumps({"uid": uid(n)}).encode()
            members += zip((f"{n}.png", f"{n}.txt", f"{n}.json"), (*content, record), strict=True)
        write_tar(tmp_path / f"{shard}.tar", members)

    def peak(files: int) -> int:
        tracemalloc.start()
        count = sum(len(b) for b in pair_batches([tmp_path / f"{i}.tar" for i in range(files)], 64, 20, Faults()))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 100 * files
        return found

    peak(1)
    # Three hundred pairs more: a tenth of their images would show.
    assert peak(4) - peak(1) < 300 * 64 * 64 * 3 / 10


def test_uid_files_are_those_of_datacomp(tmp_path: Path):
    uids = ["ffffffffffffffff0000000000000001", "00000000000000000000000000000002", "0" * 32]
    write_uids(tmp_path / "subset.npy", [*uids, uids[1]])
    found = np.load(tmp_path / "subset.npy")
    assert found.dtype == np.dtype("u8,u8")
    assert found.tolist() == [(0, 0), (0, 2), (0, 2), (2**64 - 1, 1)]
    # How the resharder looks a uid up.
    key = np.array([(int(uids[1][:16], 16), int(uids[1][16:32], 16))], np.dtype("u8,u8"))[0]
    assert np.searchsorted(found, key, "right") - np.searchsorted(found, key, "left") == 2
    assert read_uids(tmp_path / "subset.npy") == [uids[2], uids[1], uids[1], uids[0]]
    write_uids(tmp_path / "none.npy", [])
    assert read_uids(tmp_path / "none.npy") == []


def test_what_is_no_uid_is_refused(tmp_path: Path):
    for bad in ("12", "g" * 32, " " * 32):
        with pytest.raises(DataError, match="32 hexadecimal digits"):
            write_uids(tmp_path / "subset.npy", [bad])
    np.save(tmp_path / "floats.npy", np.zeros(3))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for name in ("floats.npy", "objects.npy", "absent.npy"):
        with pytest.raises(DataError, match=name):
            read_uids(tmp_path / name)


def test_captions_become_hashes_of_words_and_of_what_words_share():
    tokens = HashedWords(size=1000, words=3, pieces=4)
    ids = tokens(["Cats: a cat", "cat cats", "", "a b c d", "CATS"])
    assert ids.shape == (5, 3, 4)
    assert ids.dtype == np.int32
    assert ids.min() == 0
    assert ids.max() < 1000
    np.testing.assert_array_equal(ids[0, 0], ids[1, 1])
    np.testing.assert_array_equal(ids[0, 0], ids[4, 0])
    # <ca and cat are in both words, the words themselves are not.
    assert len(set(ids[1, 0]) & set(ids[1, 1]) - {0}) == 2
    assert not ids[2].any()
    assert ids[3].any(-1).all()
    np.testing.assert_array_equal(tokens(["a cat"])[0, 1], ids[0, 2])
    assert words("eight o’clock_2") == ["eight", "o", "clock", "2"]

"""Pictures and captions in folders."""

import pytest

from lowrank_core.errors import LowrankError, UsageError


def captions(pictures) -> dict[str, str]:
    return {picture.name: picture.caption for picture in pictures}


def test_text_files_caption_pictures_of_the_same_name_in_nested_folders(find, folder, notes):
    root = folder(
        {
            "b.png": "red",
            "b.txt": "\ufeffa red\n  picture \n",
            "inner/a.jpg": "blue",
            "inner/a.txt": "ein blaues Bild, groß",
            ".hidden/c.png": "red",
            "inner/._a.jpg": b"no picture",
        }
    )
    pictures = find(root)
    assert captions(pictures) == {"b.png": "a red picture", "inner/a.jpg": "ein blaues Bild, groß"}
    assert [picture.open().getpixel((0, 0)) for picture in pictures[:1]] == [(255, 0, 0)]
    assert notes == []


def test_names_decide_the_order(find, folder):
    root = folder({f"{name}.png": "red" for name in "cab"})
    assert list(captions(find(root, caption="x"))) == ["a.png", "b.png", "c.png"]


def test_two_pictures_share_a_text_file(find, folder):
    assert captions(find(folder({"a.png": "red", "a.jpg": "red", "a.txt": "one"}))) == {"a.jpg": "one", "a.png": "one"}


def test_a_text_file_without_a_picture_is_noted(find, folder, notes):
    root = folder({"a.png": "red", "a.txt": "one", "LICENCE.txt": "free"})
    assert captions(find(root)) == {"a.png": "one"}
    assert notes == [f"text files of {root} that no picture goes with are left alone: LICENCE.txt"]


def test_one_caption_fills_in(find, folder):
    root = folder({"a.png": "red", "a.txt": "one", "b.png": "red", "c.png": "red", "c.txt": " \n"})
    assert captions(find(root, caption="a  thing")) == {"a.png": "one", "b.png": "a thing", "c.png": "a thing"}


def test_missing_captions_are_counted_and_the_first_named(find, folder):
    root = folder({f"{number}.png": "red" for number in range(9)} | {"3.txt": "three"})
    with pytest.raises(
        LowrankError, match=r"8 of 9 pictures in .* have no caption \(0.png, 1.png, 2.png, 4.png, 5.png"
    ):
        find(root)
    with pytest.raises(LowrankError, match=r"5.png and 3 more\); write .* -o data.caption="):
        find(root)


def test_a_caption_that_is_no_text(find, folder):
    with pytest.raises(LowrankError, match=r"a.txt cannot be read .*it should be text in UTF-8"):
        find(folder({"a.png": "red", "a.txt": b"\xff\xfe\x00"}))


METADATA = '{"file_name": "a.png", "text": "one", "source": "here"}\n\n{"file_name": "in/b.png", "text": "two"}\n'


def test_metadata_captions_pictures_relative_to_itself(find, folder):
    files = {"a.png": "red", "in/b.png": "blue", "metadata.jsonl": METADATA}
    assert captions(find(folder(files))) == {"a.png": "one", "in/b.png": "two"}
    files = {"in/x.png": "red", "in/metadata.jsonl": '{"file_name": "./x.png", "label": 3, "story": "once"}'}
    assert captions(find(folder(files), caption="filled in"))["in/x.png"] == "once"


def test_csv_metadata(find, folder):
    files = {"a.png": "red", "metadata.csv": 'file_name,caption\na.png,"one, two"\n'}
    assert captions(find(folder(files))) == {"a.png": "one, two"}


def test_metadata_goes_before_text_files_which_fill_gaps(find, folder):
    files = {"a.png": "red", "a.txt": "old", "b.png": "red", "b.txt": "beside", "in/b.png": "red"}
    assert captions(find(folder(files | {"metadata.jsonl": METADATA}))) == {
        "a.png": "one",
        "b.png": "beside",
        "in/b.png": "two",
    }


def test_caption_key_chooses_among_columns(find, folder):
    row = '{"file_name": "a.png", "short": "one", "long": "one and all", "size": 3, "tags": ["x"]}'
    root = folder({"a.png": "red", "metadata.jsonl": row})
    assert captions(find(root, caption_key="long")) == {"a.png": "one and all"}
    with pytest.raises(UsageError, match=r"several columns hold text \(short, long\).*set data.caption_key"):
        find(root)
    with pytest.raises(UsageError, match=r"'size', which holds int.*columns are short \(string\)"):
        find(root, caption_key="size")
    with pytest.raises(UsageError, match="'prompt', which is no column"):
        find(root, caption_key="prompt")


def test_keys_that_a_folder_has_not(find, folder):
    root = folder({"a.png": "red"})
    with pytest.raises(UsageError, match=r"data.caption_key is 'text', but .* has no metadata.jsonl"):
        find(root, caption_key="text", caption="x")
    with pytest.raises(UsageError, match=r"data.image_key is 'image', but .* is a folder of picture files"):
        find(root, image_key="image", caption="x")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ('{"file_name": "z.png", "text": "one"}', r"names 1 files that are no pictures in that folder \(z.png\)"),
        ('{"file_name": "../a.png", "text": "one"}', r"no pictures in that folder \(\.\./a.png\)"),
        ('{"text": "one"}', r"row 1 of .* has no file_name \(found text\)"),
        ('{"file_name": "a.png"}\n{"file_name', r"line 2 of .*metadata.jsonl is no JSON"),
        ('["a.png"]', r'line 1 of .* is \["a.png"\], and each line is one object'),
        (b"\xff", r"metadata.jsonl cannot be read .*it should be text in UTF-8"),
    ],
)
def test_broken_metadata(find, folder, metadata, message):
    with pytest.raises(LowrankError, match=message):
        find(folder({"a.png": "red", "metadata.jsonl": metadata}))


def test_metadata_without_text_leaves_the_caption_to_the_configuration(find, folder):
    root = folder({"a.png": "red", "metadata.jsonl": '{"file_name": "a.png", "label": 1}'})
    assert captions(find(root, caption="x")) == {"a.png": "x"}


def test_folders_and_files_that_hold_no_pictures(find, folder, tmp_path):
    with pytest.raises(
        LowrankError, match=r"no pictures and no parquet files \(found only .heic, .mov\); pictures end"
    ):
        find(folder({"a.heic": b"", "b.mov": b""}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LowrankError, match="found nothing"):
        find(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"a.heic, a file; it takes a folder of pictures or a parquet file"):
        find(tmp_path / "pictures" / "a.heic")
    with pytest.raises(LowrankError, match="there is no such folder; give an existing folder"):
        find(tmp_path / "nowhere")


def test_max_images_is_a_seeded_choice(find, folder):
    root = folder({f"{number}.png": "red" for number in range(20)})
    chosen = {seed: [p.name for p in find(root, seed=seed, caption="x", max_images=5)] for seed in (0, 1)}
    assert chosen[0] == sorted(chosen[0])
    assert len(set(chosen[0])) == 5
    assert chosen[0] != chosen[1]
    assert chosen[0] == [p.name for p in find(root, caption="x", max_images=5)]
    assert len(find(root, caption="x", max_images=50)) == 20

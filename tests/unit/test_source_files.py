"""Which files make the input; words for types."""

import fnmatch
import os
import re
import uuid

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.core.errors import ConfigError, SourceError
from batchgen.job.files import absolute
from batchgen.job.model import is_url
from batchgen.source.columns import is_json, kind_word, parse_field, type_word
from batchgen.source.csv import CsvReader
from batchgen.source.files import find_inputs, open_input, stat_input
from batchgen.source.formats import find_files, reader_for
from batchgen.source.jsonl import JsonlReader
from batchgen.source.parquet import ParquetReader


def touch(tmp_path, *names: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()


def test_files_come_in_the_order_of_the_list_sorted_within_a_pattern(tmp_path):
    touch(tmp_path, "b/2.jsonl", "b/1.ndjson", "b/.x", "b/_y", "a/9.jsonl.gz", "a/1.JSON.zst")
    found = find_files([f"{tmp_path}/b", f"{tmp_path}/a/*", f"{tmp_path}/b/2.jsonl"])
    names = ["b/1.ndjson", "b/2.jsonl", "a/1.JSON.zst", "a/9.jsonl.gz"]
    assert (found.format, found.paths) == ("jsonl", [f"{tmp_path}/{name}" for name in names])


@pytest.mark.parametrize(
    ("name", "format_name"),
    [("a.csv", "csv"), ("a.tsv.gz", "csv"), ("a.parquet", "parquet"), ("a.pq", "parquet")],
)
def test_the_suffix_tells_the_format(tmp_path, name, format_name):
    touch(tmp_path, name)
    assert find_files([f"{tmp_path}/{name}"]).format == format_name


def test_a_given_format_needs_no_suffix(tmp_path):
    touch(tmp_path, "part-0", "part-1.x")
    assert find_files([f"{tmp_path}/part-*"], "jsonl").format == "jsonl"


@pytest.mark.parametrize(
    ("names", "pattern", "format_name", "text"),
    [
        ([], "*.jsonl", None, "names no file, expected at least one; check the path"),
        ([], "a.jsonl", None, "names no file, expected at least one; check the path"),
        (["a.txt"], "*", None, "a.txt: has a suffix that names no format, expected .jsonl"),
        (["a.XLSX"], "*", None, "is a spreadsheet, expected text or Parquet; save it as CSV, or"),
        (["a.parquet.gz"], "*", None, "has a suffix that names no format"),
        (["a.jsonl"], "*", "jsnl", r"unknown format 'jsnl'; did you mean 'jsonl'\?"),
        (["a.csv", "b.jsonl"], "*", None, "b.jsonl: is jsonl, but .*a.csv is csv, expected one"),
    ],
)
def test_what_is_no_input_is_refused(tmp_path, names, pattern, format_name, text):
    touch(tmp_path, *names)
    with pytest.raises(SourceError, match=text):
        find_files([f"{tmp_path}/{pattern}"], format_name)


def test_two_stars_in_a_name_are_one(tmp_path):
    touch(tmp_path, "in1.jsonl", "in2.jsonl", "in_d/x.jsonl")
    found = find_files([f"{tmp_path}/in**"])
    assert found.paths == [f"{tmp_path}/in1.jsonl", f"{tmp_path}/in2.jsonl"]


@pytest.mark.parametrize("path", ["~/*.jsonl", "~x*.jsonl", "~/a.jsonl"])
def test_a_tilde_that_begins_a_name_here_is_no_home(tmp_path, path):
    touch(tmp_path, "~/a.jsonl", "~x1.jsonl")
    assert absolute(tmp_path, path) == f"{tmp_path}/{path}"


def test_no_paths_are_refused():
    with pytest.raises(SourceError, match="names no file, expected at least one"):
        find_files([])


def test_every_format_has_its_reader():
    readers = [type(reader_for(name)) for name in ("jsonl", "csv", "parquet")]
    assert readers == [JsonlReader, CsvReader, ParquetReader]


@pytest.mark.parametrize("word", ["string", "bool", "int32", "int64", "float64", "json", "text"])
def test_type_words_come_back(word):
    field = parse_field("a", word)
    assert (field.name, type_word(field), is_json(field)) == ("a", word, word == "json")


def test_unknown_type_words_are_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"unknown type 'sting' for column 'a'; did you mean 'st"):
        parse_field("a", "sting")


def test_all_unknown_type_words_are_reported_at_once(tmp_path):
    touch(tmp_path, "a.jsonl")
    with pytest.raises(ConfigError) as caught:
        JsonlReader().columns([f"{tmp_path}/a.jsonl"], {"a": "sting", "b": "int", "c": "json"})
    assert caught.value.where == "input.types"
    assert caught.value.problems == (
        "unknown type 'sting' for column 'a'; did you mean 'string'?",
        "unknown type 'int' for column 'b'; did you mean 'int64'?",
    )


def test_words_for_what_was_found():
    assert type_word(pa.field("a", pa.list_(pa.int8()))) == "list<item: int8>"
    values = [None, "a", True, 1, 1.5, [], {}]
    words = ["null", "string", "bool", "integer", "float", "list", "object"]
    assert [kind_word(value) for value in values] == words


# --- one set of rules for folders and patterns ---------------------------------------------------


def names(tmp_path, *paths: str) -> list[str]:
    found = find_files([str(tmp_path / path) for path in paths])
    return [path.removeprefix(f"{tmp_path}/") for path in found.paths]


def notes(tmp_path, *paths: str) -> list[str]:
    found = find_files([str(tmp_path / path) for path in paths])
    return [note.replace(f"{tmp_path}/", "").removeprefix("input: ") for note in found.notes]


@pytest.fixture
def folder(tmp_path):
    """Files, links of every kind, hidden names, a pipe and a folder."""
    touch(tmp_path, "in/a.jsonl", "in/_b.jsonl", "in/.c.jsonl", "in/sub/d.jsonl", "out/e.jsonl")
    links = {
        "in/l1.jsonl": "../out/e.jsonl",
        "in/l2.jsonl": str(tmp_path / "out" / "e.jsonl"),
        "in/l3.jsonl": "a.jsonl",
        "in/lsub": "sub",
        "in/loop": "..",
        "in/_gone.jsonl": "nowhere",
        "lin": "in",
    }
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "in" / "pipe.jsonl")
    return tmp_path


LEFT_OUT = [
    "in/.c.jsonl and 2 more left out: the name begins with . or _ (name it to read it)",
    "in/loop and 1 more left out: it is a link to a folder (name it to read the files in it)",
    "in/pipe.jsonl left out: it is neither a file nor a folder",
    "in/sub left out: it is a folder (name it to read the files in it)",
    "in/l2.jsonl left out: it is another name of in/l1.jsonl, which is read once",
    "in/l3.jsonl left out: it is another name of in/a.jsonl, which is read once",
]


def test_the_state_of_a_jobs_output_is_left_out_without_a_word(tmp_path):
    touch(tmp_path, "out/part-00000.parquet", "out/_batchgen/x.parquet")
    assert (names(tmp_path, "out"), notes(tmp_path, "out")) == (["out/part-00000.parquet"], [])


@pytest.mark.parametrize("path", ["in", "in/*", "i[n]/*"])
def test_a_folder_and_a_pattern_name_the_same_files_and_leave_out_the_same(folder, path):
    assert names(folder, path) == ["in/a.jsonl", "in/l1.jsonl"]
    assert notes(folder, path) == LEFT_OUT


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("lin/*.jsonl", ["lin/a.jsonl", "lin/l1.jsonl"]),
        ("lin", ["lin/a.jsonl", "lin/l1.jsonl"]),
        ("in/lsub", ["in/lsub/d.jsonl"]),
        ("in/l?ub/*", ["in/lsub/d.jsonl"]),
        ("in/l1.jsonl", ["in/l1.jsonl"]),
        ("in/_b.jsonl", ["in/_b.jsonl"]),
        ("in/_[ab]*", ["in/_b.jsonl"]),
        ("in/.c*", ["in/.c.jsonl"]),
        ("in/**/d*", ["in/sub/d.jsonl"]),
        ("in/**", ["in/a.jsonl", "in/l1.jsonl", "in/sub/d.jsonl"]),
        ("**/*.jsonl", ["in/a.jsonl", "in/sub/d.jsonl", "out/e.jsonl"]),
        ("*/*/d.jsonl", ["in/sub/d.jsonl"]),  # And names by links, of the same file.
    ],
)
def test_links_and_hidden_names_can_be_named(folder, path, expected):
    assert names(folder, path) == expected


def test_a_file_that_is_reached_twice_is_read_once_under_its_own_name(folder):
    assert names(folder, "in/l1.jsonl", "out/e.jsonl") == ["out/e.jsonl"]
    assert names(folder, "in/a.jsonl", "in/a.jsonl") == ["in/a.jsonl"]
    os.link(folder / "in" / "a.jsonl", folder / "in" / "z.jsonl")
    assert names(folder, "in/[az].jsonl") == ["in/a.jsonl", "in/z.jsonl"]  # As copies are.


@pytest.mark.parametrize("path", ["in", "in/*.jsonl", "in/gone.jsonl"])
def test_a_link_that_leads_nowhere_is_refused(folder, path):
    (folder / "in" / "gone.jsonl").symlink_to("nowhere")
    text = (
        r"in/gone.jsonl: is a link to 'nowhere', which leads nowhere \(No such file or directory\)"
    )
    with pytest.raises(SourceError, match=text):
        names(folder, path)


def test_a_link_that_leads_to_itself_is_refused(folder):
    (folder / "in" / "me.jsonl").symlink_to("me.jsonl")
    with pytest.raises(
        SourceError, match=r"is a link to 'me.jsonl', which leads nowhere \(Too many"
    ):
        names(folder, "in")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("in/s*", "names no file, expected at least one; it names folders, add /[*] for the files"),
        ("in/x[1].jsonl", r"there is no such name, so \* \? \[ \] in it are a pattern"),
        ("in/pipe.jsonl", "cannot be read: it is neither a file nor a folder"),
    ],
)
def test_a_path_without_files_says_why(folder, path, text):
    with pytest.raises(SourceError, match=text):
        names(folder, path)


ODD = (
    "in[1].jsonl",
    "in*.jsonl",
    "in?.jsonl",
    "[!i]n.jsonl",
    "a::b.jsonl",
    "x#y%20.jsonl",
    "{}.jsonl",
)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("place", ["data", "data[1]", "a::b", "*", "s3:", "**", "-x"])
def test_what_exists_as_it_is_written_is_meant_so(tmp_path, name, place):
    others = ("in1.jsonl", "inx.jsonl", "in.jsonl", *ODD)
    touch(tmp_path, *(f"{place}/{other}" for other in others), "data1/in1.jsonl", "x/in1.jsonl")
    assert names(tmp_path, f"{place}/{name}") == [f"{place}/{name}"]
    assert names(tmp_path, place) == sorted(f"{place}/{other}" for other in others)
    assert names(tmp_path, f"{place}/in[x1].jsonl") == [f"{place}/in1.jsonl", f"{place}/inx.jsonl"]
    assert names(tmp_path, f"{place}/i??.jsonl") == [
        f"{place}/{other}" for other in sorted(others) if re.fullmatch(r"i..\.jsonl", other)
    ]
    found = find_files([f"{tmp_path}/{place}/{name}"]).paths[0]
    with open_input(found) as raw:
        assert raw.read() == b""
    assert stat_input(found).size_bytes == 0


@given(
    st.lists(st.text(alphabet="ab[]*?!-._", min_size=1, max_size=4), min_size=1, max_size=5),
    st.text(alphabet="ab[]*?!-._", min_size=1, max_size=4),
)
def test_every_name_that_exists_is_that_file_and_every_other_a_pattern(
    tmp_path_factory, made, asked
):
    root = tmp_path_factory.mktemp("names")
    made = [name for name in made if name not in (".", "..")]
    touch(root, *(f"{name}.jsonl" for name in made))
    pattern = f"{asked}.jsonl"
    expected = (
        [pattern]
        if asked in made
        else sorted(
            {
                f"{name}.jsonl"
                for name in made
                if fnmatch.fnmatchcase(f"{name}.jsonl", pattern)
                and (name[0] not in "._" or name[0] == asked[0])
            }
        )
    )
    if expected:
        assert names(root, pattern) == expected
    else:
        with pytest.raises(SourceError, match="names no file"):
            names(root, pattern)


def test_urls_follow_the_same_rules():
    fs = fsspec.filesystem("memory")
    root = f"/rules-{uuid.uuid4().hex}"
    for name in (
        "d[1]/a[1].jsonl",
        "d[1]/a1.jsonl",
        "d[1]/_b.jsonl",
        "d[1]/sub/c.jsonl",
        "d1/x.jsonl",
    ):
        fs.pipe(f"{root}/{name}", b"")
    here = f"memory://{root}/d[1]"
    for path in (here, f"{here}/*"):
        found = find_files([path])
        assert found.paths == [f"{here}/a1.jsonl", f"{here}/a[1].jsonl"]
        assert found.notes == [
            f"input: {here}/_b.jsonl left out: the name begins with . or _ (name it to read it)",
            f"input: {here}/sub left out: it is a folder (name it to read the files in it)",
        ]
    assert find_files([f"{here}/a[1].jsonl"]).paths == [f"{here}/a[1].jsonl"]
    assert find_files([f"{here}/**/*.jsonl"]).paths[-1] == f"{here}/sub/c.jsonl"
    assert find_files([f"{here}/_*"]).paths == [f"{here}/_b.jsonl"]


def test_a_file_url_follows_them_too(folder):
    found = find_files([f"file://{folder}/in"])
    assert found.paths == [f"file://{folder}/in/{name}.jsonl" for name in ("a", "l1", "l2", "l3")]
    assert len(found.notes) == 4


# --- opened and looked at


def test_an_input_is_opened_and_looked_at(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"12345")
    os.utime(path, ns=(7, 1_000_000_007))
    with open_input(str(path)) as file:
        assert file.read() == b"12345"
    found = stat_input(str(path))
    assert (found.size_bytes, found.version) == (5, "1000000007")


def test_a_url_is_opened_and_looked_at_by_fsspec():
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/storage-test/a.jsonl", b"1234")
    url = "memory://storage-test/a.jsonl"
    assert is_url(url)
    assert not is_url("/a/b")
    assert not is_url("/s3://b")
    with open_input(url) as file:
        assert file.read() == b"1234"
    assert stat_input(url).size_bytes == 4
    assert find_inputs(["memory://storage-test"]).files == ["memory:///storage-test/a.jsonl"]


@pytest.mark.parametrize("look", [open_input, stat_input])
@pytest.mark.parametrize("where", ["local", "memory"])
def test_an_input_that_is_absent_is_a_source_error(tmp_path, look, where):
    path = {"local": str(tmp_path / "no.jsonl"), "memory": "memory://no/such"}[where]
    with pytest.raises(SourceError, match="does not exist, expected an input file") as caught:
        look(path)
    assert caught.value.path == path


@pytest.mark.parametrize("look", [open_input, stat_input, lambda url: find_inputs([url])])
def test_an_unknown_kind_of_url_is_a_source_error(look):
    with pytest.raises(SourceError, match=r"nope://x/y: .*[Pp]rotocol"):
        look("nope://x/y")


def test_a_link_that_is_turned_to_a_file_of_equal_size_and_time_is_another_version(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, ns=(5, 5))
    link = tmp_path / "link"
    link.symlink_to("one")
    os.utime(link, ns=(7, 7), follow_symlinks=False)
    before = stat_input(str(link))
    assert stat_input(str(link)).is_still(before)
    link.unlink()
    link.symlink_to("two")
    assert not stat_input(str(link)).is_still(before)
    assert stat_input(str(tmp_path / "one")).version == "5"


@pytest.mark.parametrize(("link", "path"), [("folder", "folder/a"), ("middle", "first")])
def test_so_is_one_on_the_way_to_the_file(tmp_path, link, path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
        os.utime(tmp_path / name / "a", ns=(5, 5))
    (tmp_path / "folder").symlink_to("one")
    (tmp_path / "middle").symlink_to("one/a")
    (tmp_path / "first").symlink_to("middle")
    before = stat_input(str(tmp_path / path))
    assert stat_input(str(tmp_path / path)).is_still(before)
    target = (tmp_path / link).readlink()
    (tmp_path / link).unlink()
    (tmp_path / link).symlink_to(str(target).replace("one", "two"))
    assert not stat_input(str(tmp_path / path)).is_still(before)


def test_two_dots_behind_a_link_are_where_the_link_leads(tmp_path):
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far" / "deep")
    base = tmp_path / "near"
    assert absolute(base, "link/../in.jsonl") == str(tmp_path / "far" / "in.jsonl")
    assert absolute(base, "link/../*.jsonl") == str(tmp_path / "far" / "*.jsonl")
    assert absolute(base, "link/in.jsonl") == str(base / "link" / "in.jsonl")
    assert absolute(base, "x/../in.jsonl") == str(base / "in.jsonl")
    assert absolute(base, "../in.jsonl") == str(tmp_path / "in.jsonl")


@pytest.mark.parametrize("path", ["file:/x/in.jsonl", "s3:/bucket/in.jsonl"])
def test_a_url_with_one_slash_is_refused(tmp_path, path):
    scheme, _, rest = path.partition(":/")
    with pytest.raises(ValueError, match=f"with one slash, expected such as {scheme}://{rest}"):
        absolute(tmp_path, path)
    (tmp_path / f"{scheme}:").mkdir()
    assert absolute(tmp_path, path) == str(tmp_path / path)
